"""SQLAlchemy engines for MySQL, MariaDB and SQLite, with timeouts on everything."""

from __future__ import annotations

import sqlite3
from typing import Any, Final

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import ExceptionContext

from tombola.producers.forks import in_child
from tombola.producers.storage.faults import is_wrong_server
from tombola.producers.storage.mysql_connections import connect_by

SQL_MODE: Final = "STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ZERO_DATE,NO_ZERO_IN_DATE,NO_ENGINE_SUBSTITUTION"
READ_TIMEOUT_S: Final = 30  # a server that says nothing for so long is gone; the keys tell what it had done
# Where somebody waits for the answer, or thousands do: statements there take milliseconds.
SHORT_READ_TIMEOUT_S: Final = 5
CONNECT_TIMEOUT_S: Final = 5
PING_TIMEOUT_S: Final = 2
# After a failover behind the same address, readers stay with the old server for so long at most; writers are told.
RECYCLE_S: Final = 60
# A process that is frozen half-way holds its locks for so long: no transaction of ours waits for anything else.
IDLE_TRANSACTION_S: Final = 10


def open_engine(
    url: str, *, lock_wait_s: int = 2, is_lean: bool = False, read_timeout_s: float = READ_TIMEOUT_S
) -> Engine:
    """An engine whose sessions do not trust the server's defaults. It connects at first use.

    A server is given CONNECT_TIMEOUT_S to say hello, PING_TIMEOUT_S to say that it is still there, and `read_timeout_s`
    to answer a statement. `lock_wait_s` 0 waits for no lock on MariaDB, and 1 s on MySQL.

    A lean engine is for `statement`: it neither asks before each use whether the server is still there, nor rolls back
    after it. Whoever uses it must bear that the first statement after an outage fails.

    READ COMMITTED is a rule, not a taste: at REPEATABLE READ batched inserts deadlock, and a repeat would not see
    what another worker has just settled (ARCHITECTURE, The transaction).
    """
    if url.startswith("sqlite"):
        engine = create_engine(url, connect_args={"timeout": lock_wait_s * 5, "check_same_thread": False})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        in_child(engine, _forget_connections)
        return engine
    engine = create_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_pre_ping=not is_lean,
        pool_reset_on_return=None if is_lean else "rollback",
        pool_recycle=RECYCLE_S,
        max_overflow=20,
        connect_args={
            "charset": "utf8mb4",
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": CONNECT_TIMEOUT_S,
            "write_timeout": READ_TIMEOUT_S,
            "init_command": (
                f"SET SESSION sql_mode='{SQL_MODE}', time_zone='+00:00', innodb_lock_wait_timeout={max(1, lock_wait_s)}"
                # MariaDB alone knows the one and takes a 0 for the other, and alone reads this kind of comment.
                f" /*M!100300 , idle_transaction_timeout={IDLE_TRANSACTION_S}"
                f", innodb_lock_wait_timeout={lock_wait_s} */"
            ),
        },
    )
    connect_by(engine)
    _bound_silence(engine, read_timeout_s)
    event.listen(engine, "handle_error", _leave_the_wrong_server)
    in_child(engine, _forget_connections)
    return engine


def _bound_silence(engine: Engine, read_timeout_s: float) -> None:
    """Wait briefly for the first word of a server and for its answer to a ping, longer for that to a statement.

    A frozen server takes connections and says nothing. The driver has one timeout for all, so it is set as the
    connection changes hands; the pool pings between its checkin and its checkout.
    """

    @event.listens_for(engine, "checkout")
    def in_use(connection: Any, *_: object) -> None:
        connection._read_timeout = read_timeout_s

    @event.listens_for(engine, "checkin")
    def idle(connection: Any, *_: object) -> None:
        if connection is not None:  # an invalidated one is gone
            connection._read_timeout = PING_TIMEOUT_S


def _leave_the_wrong_server(context: ExceptionContext) -> None:
    # As after a lost connection: this one and all others of the pool are thrown away, and the next one is new.
    if is_wrong_server(context.original_exception):
        context.is_disconnect = True


def _forget_connections(engine: Engine) -> None:
    """In a forked child: what is pooled is its parent's, who would read our answers and we the parent's."""
    engine.dispose(close=False)


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver's own transaction handling opens them too late: we say BEGIN ourselves.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Any) -> None:
    # IMMEDIATE: a reader that turns writer half-way is refused at once, without waiting for its turn.
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
