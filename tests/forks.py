"""Workers and gateways forked from a process that has imported their libraries: most of a start is spent on imports.

    process = forks.start([sys.executable, "-m", "celery", …], env=env, cwd=folder, log=log)
    process.pid, process.wait(10), process.returncode    # as subprocess.Popen

The fork runs the command as an interpreter of its own would: session, folder, environment, arguments, output, and an
interpreter's end. Libraries that read the environment when they are imported are left to it. `python -m tests.forks`
is the process that forks; each test process starts one at first use.
"""

from __future__ import annotations

import array
import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

PROJECT = Path(__file__).parents[1]
LIBRARIES = (
    *("alembic.op", "amqp", "billiard.pool", "celery.apps.worker", "celery.bin.celery", "celery.concurrency.prefork"),
    *("celery.worker.consumer", "cryptography.hazmat.primitives.asymmetric.ed25519", "httpx", "kombu.transport.pyamqp"),
    *("kombu.transport.redis", "litestar", "msgspec.json", "pydantic_settings", "pymysql", "redis", "redis.cluster"),
    *("rich.progress", "rich.table", "sqlalchemy.dialects.mysql.pymysql", "sqlalchemy.dialects.sqlite", "structlog"),
    *("typer", "uvicorn", "uvicorn.protocols.http.httptools_impl", "uvicorn.lifespan.on"),
)
READ_THE_ENVIRONMENT = ("prometheus_client", "tombola.worker.celery")
LOOK_EVERY_S = 0.02


class Process(Protocol):
    """What tests ask of a process, whether it is a Fork or subprocess.Popen."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Fork:
    """A forked process, in the words of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def ended(self, returncode: int) -> None:
        self.returncode = returncode
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            assert timeout is not None
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(command: Sequence[str], *, env: Mapping[str, str], cwd: Path | str, log: IO[bytes]) -> Process:
    """Run `command` with `log` as its output, in a session of its own.

    What is neither a module nor a script of this interpreter's environment is started, not forked.
    """
    if Path(command[0]).parent != Path(sys.executable).parent:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    sys.audit("subprocess.Popen", command[0], list(command), None, None)  # a test that may start none is refused here
    return _forker().start(list(command), dict(env), str(cwd), log.fileno())


class _Forker:
    """The process that forks, from outside."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(theirs.fileno())],
                cwd=PROJECT,
                env={name: value for name, value in os.environ.items() if not name.startswith("TOMBOLA_")}
                | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._forks: dict[int, Fork] = {}
        self._started: list[Fork] = []
        self._changed = threading.Condition()
        self._starting = threading.Lock()
        threading.Thread(target=self._hear, daemon=True).start()

    def start(self, command: list[str], env: dict[str, str], cwd: str, log: int) -> Fork:
        asked = json.dumps([command, env, cwd]).encode()
        with self._starting, self._changed:
            head = len(asked).to_bytes(8, "big")
            self._socket.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [log]))])
            self._socket.sendall(asked)
            assert self._changed.wait_for(lambda: self._started, timeout=60), "tests.forks does not answer"
            return self._started.pop()

    def stop(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _hear(self) -> None:
        """Lines: `1234` is started, `1234 -9` has ended with that code."""
        with self._socket.makefile("r", encoding="ascii") as told:
            for line in told:
                pid, *code = map(int, line.split())
                with self._changed:
                    if code:
                        self._forks.pop(pid).ended(code[0])
                    else:
                        self._forks[pid] = Fork(pid)
                        self._started.append(self._forks[pid])
                        self._changed.notify_all()


@functools.cache
def _forker() -> _Forker:
    made = _Forker()
    atexit.register(made.stop)
    return made


# ---- the process that forks ------------------------------------------------------------------------------------------


def _serve(connection: socket.socket) -> tuple[list[str], dict[str, str], str, int] | None:
    """Fork at each request, and tell which forks have ended. Returns the command in a fork, None at the end."""
    running: set[int] = set()
    while True:
        for pid in list(running):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                running.remove(pid)
                connection.sendall(f"{pid} {os.waitstatus_to_exitcode(status)}\n".encode())
        if not select.select([connection], [], [], LOOK_EVERY_S)[0]:
            continue
        head, rights, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(4))
        if not head:
            return None
        (log,) = array.array("i", rights[0][2])
        command, env, cwd = json.loads(_exactly(connection, int.from_bytes(head, "big")))
        pid = os.fork()
        if pid == 0:
            connection.close()
            return command, env, cwd, log
        os.close(log)
        running.add(pid)
        connection.sendall(f"{pid}\n".encode())


def _exactly(connection: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count:
        content += connection.recv(count - len(content))
    return content


def _become(command: list[str], env: dict[str, str], cwd: str, log: int) -> None:
    """Run the command in this process as if it had been started anew."""
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    sys.path[1:1] = [it for it in env.get("PYTHONPATH", "").split(os.pathsep) if it]
    program, *arguments = command
    if program == sys.executable and arguments[0] == "-m":
        module = arguments[1]
        sys.argv = [module, *arguments[2:]]
        sys.path[0] = cwd
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    for name in LIBRARIES:
        importlib.import_module(name)
    early = sys.modules.keys() & set(READ_THE_ENVIRONMENT)
    assert not early, f"imported before the environment is known: {early}"
    gc.freeze()  # collecting would copy the pages that forks share
    asked: Any = _serve(connection)
    if asked is not None:
        _become(*asked)


if __name__ == "__main__":
    main()
