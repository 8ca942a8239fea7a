"""SQLAlchemy engines for MySQL, MariaDB and SQLite: the state of each session is set, and every wait has a timeout."""

from __future__ import annotations

import sqlite3
from typing import Any, Final

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import ExceptionContext

from tombola.producers.forks import in_child
from tombola.producers.storage.faults import is_wrong_server
from tombola.producers.storage.mysql_connections import connect_by

SQL_MODE: Final = "STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ZERO_DATE,NO_ZERO_IN_DATE,NO_ENGINE_SUBSTITUTION"
READ_TIMEOUT_S: Final = 30  # for an answer; after it the server is taken for dead, and the keys tell what was committed
# In frontends and gateways, where callers wait and statements take milliseconds.
SHORT_READ_TIMEOUT_S: Final = 5
CONNECT_TIMEOUT_S: Final = 5
PING_TIMEOUT_S: Final = 2
# The longest time that readers stay with the old server after a failover behind one address; writers get an error.
RECYCLE_S: Final = 60
JOINED_BYTES_MAX: Final = 2**20  # of rows that come as one value (Transaction.select_joined)
# The longest time that a frozen process keeps its locks: a running transaction of tombola never idles that long.
IDLE_TRANSACTION_S: Final = 10


def open_engine(
    url: str, *, lock_wait_s: int = 2, is_lean: bool = False, read_timeout_s: float = READ_TIMEOUT_S
) -> Engine:
    """An engine whose sessions do not rely on the server's defaults. It connects at first use.

    A server has CONNECT_TIMEOUT_S to greet, PING_TIMEOUT_S to answer a ping, and `read_timeout_s` to answer a
    statement. With `lock_wait_s` 0 a statement waits for no lock on MariaDB, and for 1 s on MySQL.

    A lean engine is for `transactions.statement`: it sends no ping before each use and no rollback after it. The first
    statement after an outage may fail there; calling code must run it again.

    READ COMMITTED is required: at REPEATABLE READ batched inserts deadlock, and a repeat would not see the requests
    that another worker has just settled (ARCHITECTURE, The transaction).
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
                f"SET SESSION sql_mode='{SQL_MODE}', time_zone='+00:00', group_concat_max_len={JOINED_BYTES_MAX}"
                f", innodb_lock_wait_timeout={max(1, lock_wait_s)}"
                # Only MariaDB reads this comment; it has idle_transaction_timeout, and accepts a lock wait of 0.
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
    """Give a greeting and a ping a short timeout, and a statement `read_timeout_s`.

    A frozen server accepts connections and stays silent. The driver has one timeout for all reads, so the pool's
    checkout and checkin set it; the pool pings between checkin and checkout.
    """

    @event.listens_for(engine, "checkout")
    def in_use(connection: Any, *_: object) -> None:
        connection._read_timeout = read_timeout_s

    @event.listens_for(engine, "checkin")
    def idle(connection: Any, *_: object) -> None:
        if connection is not None:  # None for an invalidated connection
            connection._read_timeout = PING_TIMEOUT_S


def _leave_the_wrong_server(context: ExceptionContext) -> None:
    # As after a lost connection: the pool closes all its connections, and opens new ones.
    if is_wrong_server(context.original_exception):
        context.is_disconnect = True


def _forget_connections(engine: Engine) -> None:
    """In a forked child: drop the pooled connections, which the parent goes on using."""
    engine.dispose(close=False)


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver would begin a transaction too late: _begin_sqlite sends BEGIN.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Any) -> None:
    # IMMEDIATE: SQLite refuses a reader that becomes a writer half-way at once, without waiting.
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
