"""The processes of embedded mode: start one with its log, wait until it is ready, stop it with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Final, NamedTuple

from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.settings import PREFIX, Settings
from tombola.worker.embedded.home import Home

START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 20.0


# Settings of each part; and the secrets that a part alone needs.
SHARED: Final = ("database_url", "broker_url", "result_secret")
SECRETS: Final = {"worker": ("seed", "books_key"), "relay": ("books_key",), "gateway": ("receipt_key",), "console": ()}


class Part(NamedTuple):
    """A process of an embedded tombola, and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


@contextlib.contextmanager
def part(home: Home, settings: Settings, name: str, *command: str, **more: str) -> Iterator[Part]:
    """Run `command` as a Python program, with the `settings` that a part of this name needs, and with `more`.

    `more` are environment variables.
    """
    environment = {PREFIX + it.upper(): settings.need(it) for it in (*SHARED, *SECRETS[name])}
    environment[f"{PREFIX}WEBHOOK_PRIVATE"] = str(settings.webhook_private).lower()
    environment[f"{PREFIX}LOG_FORMAT"] = "text"  # for people, although it goes to a file
    log = home.path / f"{name}.log"
    with log.open("wb") as file:
        # In the home folder: Python must find `worker` where it is installed, not in the caller's folder.
        process = spawn([sys.executable, *command], file, home.path, environment | more)
    try:
        yield Part(name, process, log)
    finally:
        stop(process, signal.SIGTERM)


def spawn(
    command: Sequence[str],
    log: IO[bytes],
    folder: Path,
    environment: dict[str, str],
    *,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a process in `folder` that ends with this one; it inherits no TOMBOLA_* variable."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=inherited | environment,
        start_new_session=True,  # `tombola up` handles Ctrl-C: the parts stop in their order
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


def _die_with_parent() -> None:
    """When `tombola up` is killed outright, its parts must not stay behind (prctl, PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def await_part(part: Part, ready: bytes) -> None:
    """Return when `ready` is in the part's log; raises ServiceUnavailable if the part ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while ready not in part.log.read_bytes():
        if part.process.poll() is not None or time.monotonic() > deadline:
            raise ServiceUnavailable(f"the {part.name} did not start: {tail(part.log)}")
        time.sleep(0.05)


def tail(log: Path) -> str:
    """The last three lines of a log, in one line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])


def stop(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Stop a process with the signal `how`; kill it if it has not ended after STOP_TIMEOUT_S."""
    if process.poll() is None:
        process.send_signal(how)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def is_free(port: int) -> bool:
    """Whether a server can listen on this port of the loopback interface."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
