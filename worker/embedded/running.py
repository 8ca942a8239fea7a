"""Embedded mode: everything on one bare machine. SQLite, a private Redis-compatible server, a worker, a relay, a
gateway and the operators' console.

State lives in one folder (worker.embedded.home) and is found again at the next start. While embedded mode runs,
`up.json` in that folder tells the other commands where to connect; it holds a password, so only its owner can read it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from typing import Final, NamedTuple

from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.settings import HOME_VARIABLE, Settings
from tombola.producers.storage.engines import open_engine
from tombola.worker.embedded import private_redis
from tombola.worker.embedded.home import Home, write_private
from tombola.worker.embedded.processes import Part, await_part, free_port, is_free, part

# The names by which a browser may call these servers: a page elsewhere must not reach them under a name of its own.
ALLOWED_HOSTS: Final = "localhost,127.0.0.1"
GATEWAY_PORT: Final = 8000
CONSOLE_PORT: Final = 8001
CONSOLE_USER: Final = "operator"
_WORKER: Final = (
    *("-m", "celery", "-A", "tombola.worker", "worker", "--pool=solo", "--loglevel=INFO"),
    "--hostname=tombola@%h",
)


class Embedded(NamedTuple):
    """A running embedded tombola. `parts` are the worker, the relay, the gateway and the console.

    `password` belongs to the console's first user, made at this start; None if there were users before. `notice` says
    what became of the state of an earlier start that could not be read; empty if all could be read.
    """

    settings: Settings
    redis_name: str
    notice: str
    gateway_url: str
    console_url: str
    password: str | None
    parts: list[Part]

    def ended(self) -> Part | None:
        """The first part that has ended by itself; None if all run."""
        return next((part for part in self.parts if part.process.poll() is not None), None)


@contextlib.contextmanager
def run(home: Home, *, port: int = GATEWAY_PORT) -> Iterator[Embedded]:
    """Start everything in `home`; at the end stop everything, the console first, Redis last.

    The gateway listens on `port`, or on a free port if that is taken.
    Raises ConfigurationError when another one runs in this folder, ServiceUnavailable when a part does not start.
    """
    home.prepare()
    with _lock(home), contextlib.ExitStack() as stack:
        found = private_redis.find_redis()
        url, redis_name, notice = stack.enter_context(private_redis.any_redis(home, found))
        gateway_url = f"http://127.0.0.1:{port if is_free(port) else free_port()}"
        console_port = CONSOLE_PORT if port != CONSOLE_PORT and is_free(CONSOLE_PORT) else free_port()
        console_url = f"http://127.0.0.1:{console_port}"
        up = {"broker_url": url, "gateway_url": gateway_url, "console_url": console_url, "pid": os.getpid()}
        write_private(home.up_file, json.dumps(up))
        stack.callback(home.up_file.unlink, missing_ok=True)
        settings = home.settings()
        # All at once, because most of a start is imports. The part that is entered last is stopped first.
        worker = stack.enter_context(part(home, settings, "worker", *_WORKER))
        relay = stack.enter_context(part(home, settings, "relay", "-m", "tombola.worker", "relay"))
        gateway = stack.enter_context(
            part(
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
            part(
                home,
                settings,
                "console",
                *("-m", "tombola.worker", "console", "--port", str(console_port)),
                TOMBOLA_ALLOWED_HOSTS=ALLOWED_HOSTS,
            )
        )
        password = _first_user(settings)
        await_part(worker, b"consuming draws")
        await_part(relay, b"relaying")
        await_part(gateway, b"Application startup complete")
        await_part(console, b"Application startup complete")
        yield Embedded(
            settings, redis_name, notice, gateway_url, console_url, password, [worker, relay, gateway, console]
        )


def _first_user(settings: Settings) -> str | None:
    """Make the console's first user; return the password, which cannot be read again. None if there are users."""
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
