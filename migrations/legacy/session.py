"""Sessions of the steps: connections with timeouts of their own, and ALTERs that block writers only briefly."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import DBAPIError

from tombola import migrations
from tombola.producers.domain.errors import ConfigurationError, ServiceUnavailable
from tombola.producers.storage.engines import open_engine

Say = Callable[[str], None]
OnProgress = Callable[[str, int, int], None]  # progress: what is running, how far it is, where it ends

# While an ALTER waits for a table, all later statements on it wait, too: 1 s is the shortest wait of a server.
TABLE_LOCK_WAIT_S: Final = 1
ROW_LOCK_WAIT_S: Final = 1
ALTER_TRIES_MAX: Final = 60
LONG_TRANSACTION_S: Final = 1  # such transactions are waited for before the ALTER, so that writers do not queue
TURN_WAIT_S: Final = 3600
_IS_BUSY: Final = (1205, 1213)
CANNOT: Final = (1845, 1846)  # the server does not support this algorithm, or this lock


def open_session(url: str) -> Engine:
    """An engine for the steps: statements may take as long as a large table needs, waits for locks are short."""
    if not url.startswith(("mysql", "mariadb")):
        raise ConfigurationError(
            "the legacy table is on MySQL or MariaDB: TOMBOLA_DATABASE_URL names another kind of database"
        )
    engine = open_engine(url, lock_wait_s=ROW_LOCK_WAIT_S)

    @event.listens_for(engine, "do_connect")
    def without_read_timeout(_dialect: Any, _record: Any, _args: Any, keywords: dict[str, Any]) -> None:
        keywords["read_timeout"] = None
        keywords["init_command"] += f", lock_wait_timeout={TABLE_LOCK_WAIT_S}"

    return engine


def code_of(error: DBAPIError) -> int | None:
    """The server's number for an error."""
    return error.orig.args[0] if error.orig is not None and error.orig.args else None


@contextmanager
def each_by_itself(engine: Engine) -> Iterator[Connection]:
    """A connection on which each statement commits by itself."""
    with engine.connect() as plain:
        yield plain.execution_options(isolation_level="AUTOCOMMIT")


@contextmanager
def turn(engine: Engine, say: Say) -> Iterator[Connection]:
    """A connection with the lock on definitions: no other step, and no Alembic upgrade, runs until the end.

    A killed step leaves its statement running in the server: that session keeps the lock until the statement ends.
    """
    with each_by_itself(engine) as connection:
        name = migrations.TURN_LOCK
        if connection.execute(text(f"SELECT GET_LOCK({name}, 0)")).scalar() != 1:
            say("another run, or the statement of a killed run, holds the lock: waiting for its end")
            if connection.execute(text(f"SELECT GET_LOCK({name}, {TURN_WAIT_S})")).scalar() != 1:
                raise ServiceUnavailable(f"another upgrade of this database has been running for {TURN_WAIT_S} s")
        try:
            yield connection
        finally:
            with suppress(DBAPIError):
                connection.execute(text(f"SELECT RELEASE_LOCK({name})"))


def alter(connection: Connection, variants: Sequence[str], say: Say) -> None:
    """Run the first of `variants` that the server supports, with retries; writers queue behind it for about 1 s.

    Raises ServiceUnavailable when the table was never free, DBAPIError when the server refuses the change itself.
    """
    for number, statement in enumerate(variants):
        try:
            return _alter(connection, statement, say)
        except DBAPIError as error:
            if code_of(error) not in CANNOT or number == len(variants) - 1:
                raise
    return None


def _alter(connection: Connection, statement: str, say: Say) -> None:
    for attempt in range(1, ALTER_TRIES_MAX + 1):
        _wait_for_long_transactions(connection, say)
        try:
            connection.execute(text(statement))
            return
        except DBAPIError as error:
            if code_of(error) not in _IS_BUSY:
                raise
        say(f"the table is in use, trying again ({attempt} of {ALTER_TRIES_MAX}): {statement:.60}…")
        time.sleep(random.uniform(0.2, 1.0))
    raise ServiceUnavailable(f"the table was in use {ALTER_TRIES_MAX} times in a row; nothing has changed: {statement}")


def _wait_for_long_transactions(connection: Connection, say: Say, *, patience_s: float = 60) -> None:
    old = text(
        "SELECT COUNT(*) FROM information_schema.innodb_trx WHERE TIMESTAMPDIFF(SECOND, trx_started, "
        f"CONVERT_TZ(UTC_TIMESTAMP(), '+00:00', 'SYSTEM')) > {LONG_TRANSACTION_S}"
    )
    deadline, has_said = time.monotonic() + patience_s, False
    while time.monotonic() < deadline:
        try:
            if not connection.execute(old).scalar():
                return
        except DBAPIError:
            return  # the PROCESS privilege is missing: only the lock's timeout protects the writers
        if not has_said:
            say("waiting for a long transaction to end, so that writers do not queue behind it")
            has_said = True
        time.sleep(0.2)
