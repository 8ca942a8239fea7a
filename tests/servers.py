"""The servers that tests, benchmarks and chaos runs need: found in the environment, or started here.

    with servers.redis(private=True, appendonly=True) as server:
        ...                 # server.url answers from here on
        server.kill()       # SIGKILL
        server.restart()    # same port, same data; returns when the server answers
    # the process and its folder are gone

`TEST_MARIADB_URL`, `TEST_REDIS_URL` and `TEST_RABBITMQ_URL` name servers to use as they are. `TEST_SERVER_PATH` is a
folder of programs that come before this machine's own (tests/matrix). Other servers are started from the binaries of
this machine (on Debian, root installs missing ones), each on its own port on 127.0.0.1 with its data in a temporary
folder. A server that cannot be found or started raises `Unavailable` with the reason. This module does not depend on
pytest.
"""

import ctypes
import fcntl
import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from kombu.connection import Connection
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import NullPool, create_engine, text

HOST = "127.0.0.1"
POLL_INTERVAL_S = 0.02
PROBE_TIMEOUT_S = 3.0
STOP_TIMEOUT_S = 20.0
NAMED_SERVER_TIMEOUT_S = 10.0
INSTALL_TIMEOUT_S = 600.0
LOG_TAIL_LINES = 25

# Below the ports that kernels assign to outgoing connections (Linux from 32768, others from 49152): a
# client that reconnects to a killed server's port could otherwise get that port as its own end, connect
# to itself, and keep the server from binding the port again.
PORTS = range(15_000, 32_000)

# Debian keeps daemons out of users' PATH. Its rabbitmq-server in PATH is a wrapper that changes to the user
# rabbitmq, which may not read our folder; the original script is in the first folder here.
SEARCH_PATH = os.pathsep.join(
    (
        *filter(None, [os.environ.get("TEST_SERVER_PATH")]),
        *("/usr/lib/rabbitmq/bin", os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"),
    )
)

MARIADB_PACKAGES = ("mariadb-server-core", "mariadb-client-core")  # the programs without the service
REDIS_PACKAGES = ("redis-server",)
RABBITMQ_PACKAGES = ("rabbitmq-server",)

# For MariaDB where no test cuts the power: a killed server's writes are in the kernel's cache, synced or not.
UNSYNCED = ("--innodb-flush-method=nosync", "--debug-no-sync")

# Variables of the caller's shell that would configure a private server.
FOREIGN_SETTINGS = ("RABBITMQ_", "ERL_", "MYSQL_", "MARIADB_", "TOMBOLA_", "NOTIFY_SOCKET")


class Unavailable(Exception):
    """A server, or a feature of it, is not available on this machine; the message says why."""


@dataclass
class Launch:
    """How a private server is started, kept for a restart on the same port and data."""

    argv: list[str]
    environment: dict[str, str]
    folder: Path
    start_timeout_s: float
    process: subprocess.Popen[bytes] | None = None

    def log_tail(self) -> str:
        log = self.folder / "log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return "\n".join(lines[-LOG_TAIL_LINES:])


@dataclass
class Server:
    """One server that answers at `url`; without `launch`, one that the environment names."""

    name: str
    url: str
    probe: Callable[[str], None]
    launch: Launch | None = None
    pid: int | None = None

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    @property
    def folder(self) -> Path:
        """The folder of a private server: its data, and its output in the file `log`."""
        return self._own().folder

    def kill(self) -> None:
        """SIGKILL the server and its children; return when the server has ended."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Shut the server down in order. `restart` starts it again with its data."""
        self._end(signal.SIGTERM)

    def restart(self) -> None:
        """Stop the server if it runs, start it on the same port and data, and return when it answers."""
        self.stop()
        launch = self._own()
        launch.process = _spawn(launch)
        self.pid = launch.process.pid
        self._await_answer(launch.start_timeout_s)

    def _own(self) -> Launch:
        if self.launch is None:
            raise Unavailable(f"the {self.name} server is named in the environment: tests neither end nor start it")
        return self.launch

    def _end(self, signal_number: signal.Signals) -> None:
        launch = self._own()
        process, launch.process, self.pid = launch.process, None, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _await_answer(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._check_alive()
            try:
                self.probe(self.url)
                return
            except Unavailable:
                raise
            except Exception as error:  # each driver raises its own exceptions while a server starts
                if time.monotonic() > deadline_s:
                    raise Unavailable(self._with_log(f"no answer in {timeout_s:g} s: {error}")) from error
            time.sleep(POLL_INTERVAL_S)

    def _check_alive(self) -> None:
        process = self.launch.process if self.launch else None
        if process is not None and process.poll() is not None:
            raise Unavailable(self._with_log(f"ended with status {process.returncode} before it answered"))

    def _with_log(self, problem: str) -> str:
        if self.launch is None:
            return f"{self.name} as named in the environment: {problem}"
        return f"{self.name}: {problem}; its log ends:\n{self.launch.log_tail()}"


@dataclass
class RabbitMQ(Server):
    """RabbitMQ, with virtual hosts that are made in milliseconds."""

    distribution_port: int = 0

    def add_vhost(self, name: str) -> str:
        """Make a virtual host with all permissions for guest; return its URL."""
        self._evaluate(
            f'rabbit_vhost:add(<<"{name}">>, <<"tests">>), rabbit_auth_backend_internal:set_permissions('
            f'<<"guest">>, <<"{name}">>, <<".*">>, <<".*">>, <<".*">>, <<"tests">>).'
        )
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with its queues, and close its connections."""
        self._evaluate(f'rabbit_vhost:delete(<<"{name}">>, <<"tests">>).')

    @contextmanager
    def alarm(self, resource: str = "memory") -> Iterator[None]:
        """Raise the alarm of low `memory` or `disk`: RabbitMQ stops reading from connections that publish."""
        self._evaluate(f"rabbit_alarm:set_alarm({{{{resource_limit, {resource}, node()}}, []}}).")
        try:
            yield
        finally:
            self._evaluate(f"rabbit_alarm:clear_alarm({{resource_limit, {resource}, node()}}).")

    @contextmanager
    def policy(self, url: str, pattern: str = ".*", /, **definition: int) -> Iterator[None]:
        """Set a policy on the queues of the virtual host in `url`; `message_ttl=200` sets `message-ttl`."""
        vhost = urlsplit(url).path[1:]
        terms = ", ".join(f'{{<<"{name.replace("_", "-")}">>, {value}}}' for name, value in definition.items())
        where = f'<<"{vhost}">>, <<"tests">>'
        self._evaluate(f'rabbit_policy:set({where}, <<"{pattern}">>, [{terms}], 0, <<"queues">>, <<"guest">>).')
        try:
            yield
        finally:
            self._evaluate(f'rabbit_policy:delete({where}, <<"guest">>).')

    def _evaluate(self, expression: str) -> None:
        """Run Erlang in the server by erl_call. rabbitmqctl would boot another Erlang, which takes seconds;
        the management plugin would slow every start and collect statistics during the benchmarks."""
        launch = self._own()
        erlang_root = Path(_binary("erl", RABBITMQ_PACKAGES)).resolve().parent.parent
        erl_call = next(erlang_root.glob("erts-*/bin/erl_call"), None)
        if erl_call is None:
            raise Unavailable("this Erlang has no erl_call, which makes virtual hosts")
        answer = subprocess.run(
            [str(erl_call), "-address", f"{HOST}:{self.distribution_port}", "-e"],
            input=f"{expression}\n",  # erl_call needs the newline
            env=launch.environment,  # the cookie is in its HOME
            capture_output=True,
            text=True,
            timeout=STOP_TIMEOUT_S,
        )
        if not answer.stdout.startswith("{ok,"):
            raise RuntimeError(f"rabbitmq refused {expression}: {answer.stdout}{answer.stderr}")


AnyServer = TypeVar("AnyServer", bound=Server)


@contextmanager
def mariadb(
    *,
    private: bool = False,
    buffer_pool_mib: int = 64,
    flush_log_at_trx_commit: int = 1,
    options: Sequence[str] = (),
    start_timeout_s: float = 60.0,
) -> Iterator[Server]:
    """MariaDB, with user root and no password; durable by default. `options` are passed to mariadbd."""
    named_url = _named("TEST_MARIADB_URL", private)
    if named_url:
        yield _from_environment(Server("mariadb", named_url, _probe_mariadb))
        return
    mariadbd = _binary("mariadbd", MARIADB_PACKAGES)
    install_db = _binary("mariadb-install-db", MARIADB_PACKAGES)
    with _temporary_folder() as folder:
        data = folder / "data"
        environment = _environment(folder)
        # mariadbd refuses to run as root without --user=root.
        common = ["--no-defaults", f"--datadir={data}", *(["--user=root"] if os.geteuid() == 0 else [])]
        # Simultaneous installations delete each other's temporary tables in a shared TMPDIR.
        _install_mariadb([install_db, *common], environment | {"TMPDIR": str(folder)})
        port = _free_port()
        argv = [
            mariadbd,
            *common,
            f"--bind-address={HOST}",
            f"--port={port}",
            "--socket=socket",  # relative to the data folder: a socket's path has at most 107 bytes
            f"--tmpdir={folder}",  # a server that starts deletes other servers' temporary tables in a shared folder
            "--skip-name-resolve",
            "--skip-log-bin",
            f"--innodb-buffer-pool-size={buffer_pool_mib}M",
            f"--innodb-flush-log-at-trx-commit={flush_log_at_trx_commit}",
            *options,
        ]
        launch = Launch(argv, environment, folder, start_timeout_s)
        probe = functools.partial(_probe_mariadb, data=data)
        yield from _running(Server("mariadb", f"mysql+pymysql://root@{HOST}:{port}/", probe, launch))


@contextmanager
def redis(
    *,
    private: bool = False,
    appendonly: bool = False,
    appendfsync: str = "everysec",
    password: str = "",
    options: Sequence[str] = (),
    start_timeout_s: float = 20.0,
) -> Iterator[Server]:
    """Redis, in memory only unless `appendonly`; it never evicts."""
    named_url = _named("TEST_REDIS_URL", private)
    if named_url:
        yield _from_environment(Server("redis", named_url, _probe_redis))
        return
    redis_server = _binary("redis-server", REDIS_PACKAGES)
    with _temporary_folder() as folder:
        port = _free_port()
        argv = [redis_server, "--bind", HOST, "--port", str(port), "--dir", str(folder)]
        argv += ["--save", "", "--maxmemory-policy", "noeviction"]
        argv += ["--appendonly", "yes" if appendonly else "no", "--appendfsync", appendfsync]
        argv += ["--requirepass", password] if password else []
        launch = Launch([*argv, *options], _environment(folder), folder, start_timeout_s)
        login = f":{password}@" if password else ""
        probe = functools.partial(_probe_redis, folder=folder)
        yield from _running(Server("redis", f"redis://{login}{HOST}:{port}/0", probe, launch))


@contextmanager
def rabbitmq(*, private: bool = False, start_timeout_s: float = 90.0) -> Iterator[RabbitMQ]:
    """RabbitMQ without plugins; guest has all permissions."""
    named_url = _named("TEST_RABBITMQ_URL", private)
    if named_url:
        yield _from_environment(RabbitMQ("rabbitmq", named_url, _probe_rabbitmq))
        return
    script = _binary("rabbitmq-server", RABBITMQ_PACKAGES)
    with _temporary_folder() as folder:
        port, distribution_port = _free_port(), _free_port()
        node = f"tombola-{secrets.token_hex(6)}"
        environment = _rabbitmq_environment(folder, f"{node}@localhost", port, distribution_port)
        launch = Launch([script], environment, folder, start_timeout_s)
        probe = functools.partial(_probe_rabbitmq, node=node)
        url = f"amqp://guest:guest@{HOST}:{port}//"
        yield from _running(RabbitMQ("rabbitmq", url, probe, launch, distribution_port=distribution_port))


def _named(variable: str, private: bool) -> str:
    return "" if private else os.environ.get(variable, "")


def _from_environment(server: AnyServer) -> AnyServer:
    # A CI job starts its servers at the same time as the tests: they may not answer yet.
    server._await_answer(NAMED_SERVER_TIMEOUT_S)
    return server


def _running(server: AnyServer) -> Iterator[AnyServer]:
    try:
        server.restart()
        yield server
    finally:
        server.kill()  # the data is deleted anyway: an orderly shutdown would only take longer


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="tombola-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()


def _environment(folder: Path, **settings: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN_SETTINGS)}
    return inherited | {"PATH": SEARCH_PATH, "HOME": str(folder)} | settings


def _rabbitmq_environment(folder: Path, node: str, port: int, distribution_port: int) -> dict[str, str]:
    """Settings that confine a broker to its folder, to 127.0.0.1, and to one process that tests can kill."""
    cookie = folder / ".erlang.cookie"
    cookie.write_text(secrets.token_hex(16))
    cookie.chmod(0o400)
    (folder / "rabbitmq-env.conf").touch()
    (folder / "enabled_plugins").write_text("[].")
    # Erlang terms: for the other format RabbitMQ first reads the schemas of all plugins.
    (folder / "rabbitmq.config").write_text("[].")
    arguments = (
        # With the name given here RabbitMQ finds its node registered and does not start epmd ...
        f"-sname {node} -erl_epmd_port {distribution_port} -kernel inet_dist_use_interface {{127,0,0,1}}"
        # ... and threads that spin briefly before they sleep halve the start, which reads thousands of files
        # and would wake a thread for each.
        " +sbwt very_short +sbwtdio very_short"
    )
    return _environment(
        folder,
        RABBITMQ_NODENAME=node,
        RABBITMQ_NODE_IP_ADDRESS=HOST,
        RABBITMQ_NODE_PORT=str(port),
        RABBITMQ_DIST_PORT=str(distribution_port),
        RABBITMQ_MNESIA_BASE=str(folder / "data"),
        RABBITMQ_LOG_BASE=str(folder / "logs"),
        RABBITMQ_LOGS="-",
        RABBITMQ_CONF_ENV_FILE=str(folder / "rabbitmq-env.conf"),
        RABBITMQ_CONFIG_FILE=str(folder / "rabbitmq.config"),
        RABBITMQ_CONFIG_FILES=str(folder / "conf.d"),
        RABBITMQ_ADVANCED_CONFIG_FILE=str(folder / "advanced.config"),
        RABBITMQ_ENABLED_PLUGINS_FILE=str(folder / "enabled_plugins"),
        RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=arguments,
        # RabbitMQ starts a second Erlang every minute to look for epmd; these flags apply to that Erlang as well.
        ERL_FLAGS="-start_epmd false",
        ERL_CRASH_DUMP_BYTES="0",
        # The script execs the server. Otherwise a shell waits for the server and outlives a SIGKILL.
        RUNNING_UNDER_SYSTEMD="true",
    )


def _install_mariadb(install_db: list[str], environment: dict[str, str]) -> None:
    """Make the system tables, without syncing: an unfinished folder is thrown away anyway."""
    fast = [*UNSYNCED, "--innodb-flush-log-at-trx-commit=0"]
    accounts = ["--auth-root-authentication-method=normal", "--skip-test-db"]
    made = subprocess.run([*install_db, *accounts, *fast], env=environment, capture_output=True, text=True)
    if made.returncode != 0:
        raise Unavailable(f"mariadb: no system tables: {made.stdout[-2000:]}{made.stderr[-2000:]}")


# Probes: each raises until the server answers in its own protocol. A probe also checks that a private server
# is the one that was started: another program may have taken the port since it was chosen.


def _probe_mariadb(url: str, data: Path | None = None) -> None:
    timeouts = {"connect_timeout": PROBE_TIMEOUT_S, "read_timeout": PROBE_TIMEOUT_S, "ssl_disabled": True}
    with create_engine(url, poolclass=NullPool, connect_args=timeouts).connect() as connection:
        answer = connection.execute(text("SELECT @@datadir")).scalar_one()
    if data is not None and Path(answer) != data:
        raise Unavailable(f"another MariaDB has taken the port of {url}")


def _probe_redis(url: str, folder: Path | None = None) -> None:
    no_retry = Retry(NoBackoff(), 0)  # the default waits a second between attempts
    options = {"retry": no_retry, "socket_timeout": PROBE_TIMEOUT_S, "decode_responses": True}
    with Redis.from_url(url, **options) as client:
        client.ping()
        if folder is not None and client.config_get("dir") != {"dir": str(folder)}:
            raise Unavailable(f"another Redis has taken the port of {url}")


def _probe_rabbitmq(url: str, node: str = "") -> None:
    connect: Callable[..., Any] = Connection  # kombu has no types
    # The transport's method: the connection's would wait two seconds before its next attempt.
    transport = connect(url, connect_timeout=PROBE_TIMEOUT_S).transport
    connection = transport.establish_connection()
    cluster = str(connection.server_properties.get("cluster_name", ""))
    transport.close_connection(connection)
    if node and not cluster.startswith(f"{node}@"):
        raise Unavailable(f"another RabbitMQ has taken the port of {url}")


# Processes and ports.

_ports_given: set[int] = set()


def _free_port() -> int:
    for _ in range(len(PORTS)):
        # Not `random`: test runs with the same seed would race for the same ports.
        port = secrets.choice(PORTS)
        with socket.socket() as trial, suppress(OSError):
            trial.bind((HOST, port))
            if port not in _ports_given:
                _ports_given.add(port)
                return port
    raise Unavailable(f"no free port on {HOST} in {PORTS}")


def _spawn(launch: Launch) -> subprocess.Popen[bytes]:
    # PR_SET_PDEATHSIG kills the child when the *thread* that started it ends: this thread lasts.
    return _spawner(os.getpid()).submit(_spawn_here, launch).result()


@functools.cache
def _spawner(pid: int) -> ThreadPoolExecutor:
    """The thread that starts servers in process `pid`; a forked child needs a thread of its own."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"servers-{pid}")


def _spawn_here(launch: Launch) -> subprocess.Popen[bytes]:
    with open(launch.folder / "log", "ab") as log:
        return subprocess.Popen(
            launch.argv,
            cwd=launch.folder,
            env=launch.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C goes to the tests, which end their servers themselves
            preexec_fn=_die_with(os.getpid()) if sys.platform == "linux" else None,
        )


def _die_with(parent_pid: int) -> Callable[[], None]:
    """Return what the child runs first: it asks the kernel to kill it when this process ends in any way."""
    libc = ctypes.CDLL(None)  # before the fork: little is safe between fork and exec
    pr_set_pdeathsig = 1

    def in_child() -> None:
        libc.prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent_pid:  # the parent ended before prctl: no signal will come
            os._exit(1)

    return in_child


# Binaries.


def _binary(name: str, packages: tuple[str, ...]) -> str:
    found = shutil.which(name, path=SEARCH_PATH)
    if found is None:
        problem = _apt_install(packages)
        found = shutil.which(name, path=SEARCH_PATH)
        if found is None:
            raise Unavailable(f"{name} is not on this machine; {problem or 'its package does not contain it'}")
    return found


@functools.cache
def _apt_install(packages: tuple[str, ...]) -> str:
    """Install Debian packages; return the reason if that fails. Cached: each is tried once per run."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"only root on Debian installs it ({' '.join(packages)})"
    # One at a time: simultaneous runs would find the package lists locked.
    with Path(gettempdir(), "tombola-tests-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _install_alone(packages)


def _install_alone(packages: tuple[str, ...]) -> str:
    with _services_held_back():
        return _apt_update() or _apt_get("install", "-y", "--no-install-recommends", *packages)


@functools.cache
def _apt_update() -> str:
    return _apt_get("update")


def _apt_get(*arguments: str) -> str:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    command = ["apt-get", "-o", "DPkg::Lock::Timeout=120", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"apt-get {arguments[0]} took more than {INSTALL_TIMEOUT_S:g} s"
    return f"apt-get {arguments[0]} failed: {done.stderr.strip()[-1000:]}" if done.returncode else ""


@contextmanager
def _services_held_back() -> Iterator[None]:
    """Keep packages from starting their services: they ask policy-rc.d, which is left alone if it exists."""
    policy = Path("/usr/sbin/policy-rc.d")
    try:
        with policy.open("x") as script:
            script.write("#!/bin/sh\nexit 101\n")
    except FileExistsError:
        yield
        return
    try:
        policy.chmod(0o755)
        yield
    finally:
        policy.unlink()
