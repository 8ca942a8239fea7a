"""The database as every room sees it: engines, exact column types, transactions, and which errors mean "again".

The settle path runs several thousand draws a second through a handful of multi-row statements, so it talks to the
driver itself through `Transaction`; everything else uses SQLAlchemy Core on the same engine.
"""

from __future__ import annotations

import enum
import json
import random
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Final, TypeVar

import pymysql
from pymysql.constants import CR, SERVER_STATUS
from sqlalchemy import (
    BigInteger,
    Connection,
    DateTime,
    Dialect,
    Engine,
    Integer,
    Numeric,
    String,
    Text,
    TypeDecorator,
    create_engine,
    event,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError
from sqlalchemy.types import TypeEngine

from tombola.producers.domain.errors import ConfigurationError, DrawError, InternalError, ServiceUnavailable
from tombola.producers.forks import in_child
from tombola.producers.storage.mysql_connections import connect_by

Value = str | int | None
NO_COPIES: Final[Mapping[str, str]] = MappingProxyType({})
CENT: Final = Decimal("0.01")

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

# ---- column types ----------------------------------------------------------------------------------------------------


def Key(length: int) -> String:
    """A string that compares byte by byte: MySQL's default collations hold `ABC` and `abc` for equal."""
    return String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def Body() -> Text:
    """Text up to 16 MB in the bytes it came in."""
    return Text().with_variant(mysql.MEDIUMTEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")


# SQLite counts rows up only in a column of type INTEGER.
Identity = BigInteger().with_variant(Integer, "sqlite")


class Money(TypeDecorator[Decimal]):
    """DECIMAL(10,2). SQLite would keep that as a float: there it is a whole number of hundredths, exact in SUM too."""

    impl = Numeric(10, 2)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(BigInteger() if dialect.name == "sqlite" else Numeric(10, 2))

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        amount = Decimal(value)
        if amount != amount.quantize(CENT):
            raise ValueError(f"an amount has at most two decimals: {value}")
        return int(amount.scaleb(2)) if dialect.name == "sqlite" else amount

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        if value is None:
            return None
        return Decimal(value).scaleb(-2) if dialect.name == "sqlite" else Decimal(value)


class UtcTime(TypeDecorator[datetime]):
    """An aware datetime in Python, UTC with microseconds in the database."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(mysql.DATETIME(fsp=6) if dialect.name in ("mysql", "mariadb") else DateTime())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


def time_text(moment: datetime) -> str:
    """`moment` as both databases write it: UTC, `YYYY-MM-DD HH:MM:SS.ffffff`."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(sep=" ", timespec="microseconds")


def utc_now() -> datetime:
    """Now, aware, in UTC."""
    return datetime.now(UTC)


# ---- engines ---------------------------------------------------------------------------------------------------------


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


# 1047 a Galera node outside its cluster, 1290 --read-only, 1792 1836 1874 read-only in other words, 3032 offline mode.
_WRONG_SERVER: Final = frozenset({1047, 1290, 1792, 1836, 1874, 3032})


def is_wrong_server(error: BaseException) -> bool:
    """Whether this server takes no writes now, though another one behind the same address perhaps does: a failover."""
    return isinstance(error, pymysql.MySQLError) and bool(error.args) and error.args[0] in _WRONG_SERVER


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


class WhenHeld(enum.Enum):
    """What a locking read does about a row that another transaction holds."""

    WAIT = ""  # until it is free, or for innodb_lock_wait_timeout
    SKIP = " SKIP LOCKED"
    FAIL = " NOWAIT"


class RowsChanged(Exception):
    """Rows are no longer as this transaction read them: somebody else was quicker."""


# ---- transactions on the driver --------------------------------------------------------------------------------------


class Transaction:
    """One open transaction and the few multi-row statements the settle path is made of.

    Statements use `?` for a parameter and `??` for a list of them. Values are str, int or None; amounts travel as
    text and are exact in both databases.
    """

    def __init__(self, connection: Any, *, is_sqlite: bool) -> None:
        self._connection = connection
        self._cursor = connection.cursor()
        self.is_sqlite = is_sqlite

    def select(
        self, statement: str, keys: Sequence[Value], *, lock: bool = False, when_held: WhenHeld = WhenHeld.WAIT
    ) -> Sequence[tuple[Any, ...]]:
        """Rows of `statement`, whose `??` stands for `keys`; `lock` holds them until the end (FOR UPDATE).

        `when_held` says what happens to a row that another transaction holds.
        """
        if lock and not self.is_sqlite:  # SQLite has one writer at a time: BEGIN IMMEDIATE is its lock
            statement += f" FOR UPDATE{when_held.value}"
        if self.is_sqlite:
            self._cursor.execute(statement.replace("??", ",".join("?" * len(keys))), keys)
        else:
            self._cursor.execute(statement.replace("??", ",".join(self._literals(keys))))
        rows: Sequence[tuple[Any, ...]] = self._cursor.fetchall()
        return rows

    @property
    def _is_mariadb(self) -> bool:
        return "MariaDB" in self._connection.server_version

    def within(self, wait_s_max: float, query: str) -> str:
        """`query`, a SELECT, as one that the server ends after `wait_s_max` (1969, 3024), whatever it waits for."""
        if self.is_sqlite:
            return query
        if self._is_mariadb:
            return f"SET STATEMENT max_statement_time={wait_s_max:g} FOR {query}"
        return query.replace("SELECT", f"SELECT /*+ MAX_EXECUTION_TIME({wait_s_max * 1000:.0f}) */", 1)

    def held(self, table: str, index: str, column: str, values: Iterable[str]) -> set[str]:
        """Those of `values` in `column` whose row another transaction holds, also one inserted and not committed.

        A plain read sees nothing of that. Nothing waits, but what is free is locked until the end. Only for a
        transaction that writes nothing: a refused lock may have ended it (innodb_rollback_on_timeout).
        """
        if self.is_sqlite:  # it has one lock for all: a transaction that has begun waits for no other
            return set()
        # A join looks the values up one by one, by the unique `index`; for IN (…) the server may read a small table
        # from end to end, past the locks of others.
        statement = (
            "SELECT 1 FROM JSON_TABLE(??, '$[*]' COLUMNS (value VARCHAR(100) CHARACTER SET ascii COLLATE ascii_bin "
            f"PATH '$')) AS asked STRAIGHT_JOIN {table} FORCE INDEX ({index}) ON {table}.{column} = asked.value "
            # MySQL would lock what was asked as well, and refuses; MariaDB does not know the word.
            f"FOR UPDATE{'' if self._is_mariadb else f' OF {table}'}{WhenHeld.FAIL.value}"
        )
        refused: set[str] = set()
        parts = [sorted(set(values))]
        while parts:
            some = parts.pop()
            if not some:
                continue
            try:
                self.select(statement, [json.dumps(some)])
            except pymysql.MySQLError as error:
                if not is_lock_timeout(error):
                    raise
                middle = len(some) // 2
                if middle:
                    parts += [some[:middle], some[middle:]]
                else:
                    refused.add(some[0])
        return refused

    def insert(
        self,
        table: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Value]],
        *,
        copies: Mapping[str, str] = NO_COPIES,
    ) -> None:
        """Insert all `rows` in one statement, in their order.

        `copies` are further columns, each with the one of `columns` whose value it takes: sent once, not twice.
        """
        if not rows:
            return
        head = f"INSERT INTO {table} ({','.join((*columns, *copies))}) VALUES "
        width = len(columns)
        if self.is_sqlite:
            places = (*range(1, width + 1), *(columns.index(source) + 1 for source in copies.values()))
            self._cursor.executemany(f"{head}({','.join(f'?{place}' for place in places)})", rows)
            return
        literals = self._literals([value for row in rows for value in row])
        tail = "".join(f",{source}" for source in copies.values())
        self._cursor.execute(
            head + ",".join([f"({','.join(literals[i : i + width])}{tail})" for i in range(0, len(literals), width)])
        )

    def update(
        self, table: str, key: str, columns: Sequence[str], rows: Sequence[Sequence[Value]], *, where: str = ""
    ) -> None:
        """Set `columns` of the rows whose `key` is the first value of each of `rows`, all in one statement.

        `where` is what must hold of each of them; raises RowsChanged when it does not, or one is gone.
        """
        if not rows:
            return
        condition = f" AND {where}" if where else ""
        if self.is_sqlite:
            assignments = ",".join(f"{column}=?" for column in columns)
            self._cursor.executemany(
                f"UPDATE {table} SET {assignments} WHERE {key}=?{condition}", [(*row[1:], row[0]) for row in rows]
            )
        else:
            keys, *by_column = [self._literals(values) for values in zip(*rows, strict=True)]
            cases = [f"{column}={_case(key, keys, values)}" for column, values in zip(columns, by_column, strict=True)]
            self._cursor.execute(f"UPDATE {table} SET {','.join(cases)} WHERE {key} IN ({','.join(keys)}){condition}")
        if where and self._cursor.rowcount != len(rows):
            raise RowsChanged

    def money(self, amount: Decimal) -> Value:
        """`amount` as this database stores it (see Money)."""
        return int(amount.scaleb(2)) if self.is_sqlite else str(amount)

    def moment(self, stored: Any) -> datetime:
        """The aware datetime behind a stored UTC time."""
        naive = datetime.fromisoformat(stored) if self.is_sqlite else stored
        moment: datetime = naive.replace(tzinfo=UTC)
        return moment

    def amount(self, stored: Any) -> Decimal:
        """The Decimal behind a stored amount, two decimals."""
        return Decimal(stored).scaleb(-2) if self.is_sqlite else stored.quantize(CENT)

    def _literals(self, values: Sequence[Value]) -> list[str]:
        """`values` as SQL literals, right in every sql_mode.

        Inside quotes MySQL needs just two characters escaped, the quote itself, which doubled is one in every mode, and
        the backslash, except under NO_BACKSLASH_ESCAPES (manual, String Literals): our own sessions leave that mode
        off, but a transaction that we join may be anybody's, and every answer of the server tells. And '' is NULL under
        MariaDB's EMPTY_STRING_IS_NULL, where no bytes at all are none. All values are escaped at once, joined by a
        control character that none may hold: the driver's way, a call and a table look-up for each character, takes
        longer than all the rest of a draw's Python.
        """
        texts = ["" if value is None else str(value) for value in values]
        joined = _UNIT.join(texts).replace("'", "''")
        status = getattr(self._connection, "server_status", 0)  # of the driver: as of the last answer
        if not status & SERVER_STATUS.SERVER_STATUS_NO_BACKSLASH_ESCAPES:
            joined = joined.replace("\\", "\\\\")
        escaped = joined.split(_UNIT)
        if len(escaped) != len(texts):
            raise ValueError("a value holds the control character U+001F")
        return [
            "NULL" if value is None else text if type(value) is int else f"'{text}'" if text else NO_TEXT
            for value, text in zip(values, escaped, strict=True)
        ]


_UNIT: Final = "\x1f"
NO_TEXT: Final = "X''"


def _case(key: str, keys: Sequence[str], values: Sequence[str]) -> str:
    if values.count(values[0]) == len(values):
        return values[0]
    return f"CASE {key} {' '.join([f'WHEN {k} THEN {v}' for k, v in zip(keys, values, strict=True)])} END"


@contextmanager
def statement(engine: Engine) -> Iterator[Transaction]:
    """Statements that commit themselves, each by itself: one round trip where a transaction takes three.

    Only on MySQL and MariaDB, where a statement of many rows happens whole or not at all.
    """
    proxy = engine.raw_connection()
    try:
        connection: Any = proxy.driver_connection
        connection.autocommit(True)  # a round trip the first time only
        yield Transaction(connection, is_sqlite=False)
    except BaseException as error:
        if not _is_answered(error):
            proxy.invalidate()
        if is_wrong_server(error):
            engine.dispose()
        raise
    finally:
        proxy.close()


@contextmanager
def transaction(engine: Engine, *, read_only: bool = False) -> Iterator[Transaction]:
    """A transaction on the driver's own connection: committed at the end, or rolled back whole.

    A read-only one cannot write: the server itself refuses. After an error the connection is thrown away, not returned:
    whatever state it is in, nobody meets it again. Only after a conflict or a refusal that the server has answered,
    and its answer to the rollback, is its state known: to connect anew takes as long as a hundred draws.
    """
    proxy = engine.raw_connection()
    try:
        connection: Any = proxy.driver_connection
        is_sqlite = engine.dialect.name == "sqlite"
        open_transaction = Transaction(connection, is_sqlite=is_sqlite)
        if is_sqlite:
            connection.execute("BEGIN" if read_only else "BEGIN IMMEDIATE")
        elif read_only:
            connection.query("START TRANSACTION READ ONLY")
        else:
            connection.begin()
        yield open_transaction
        connection.commit()
    except BaseException as error:
        is_clean = False
        with suppress(Exception):  # a lost connection has rolled back by itself
            proxy.driver_connection.rollback()  # type: ignore[union-attr]
            is_clean = _is_answered(error)
        if not is_clean:
            proxy.invalidate()
        if is_wrong_server(error):
            engine.dispose()
        raise
    finally:
        proxy.close()


# ---- conflicts -------------------------------------------------------------------------------------------------------

T = TypeVar("T")


def conflict_pause_s(tries: int) -> float:
    """How long a transaction that met another one waits before it runs again: at random, and longer with its `tries`.

    So two that have met do not meet again.
    """
    return random.uniform(0, 0.01 * 2**tries)


def again_after_conflicts(engine: Engine, act: Callable[[Connection], T], *, tries_max: int) -> T:
    """`act` in a transaction of its own, and in another one when it met others: `tries_max` in all.

    Raises what `act` and the driver raise.
    """
    for attempt in range(1, tries_max + 1):
        try:
            with engine.begin() as connection:
                return act(connection)
        except Exception as error:
            if attempt == tries_max or fault_of(error) is not Fault.CONFLICT:
                raise
        time.sleep(conflict_pause_s(attempt))
    raise AssertionError("the last attempt returns or raises")


# ---- errors ----------------------------------------------------------------------------------------------------------


class Fault(enum.Enum):
    """What a database error asks for."""

    CONFLICT = "run the whole transaction again: it met another one"
    OUTAGE = "the database cannot be used now: nothing is wrong with the draws, wait"
    REFUSED = "the database refuses these values, and will again"


# 1020 record changed (snapshot isolation), 1062 duplicate key, 1180 error during COMMIT, 1205 lock wait, 1213 deadlock
# (on Galera also at COMMIT), 3101 group replication conflict.
_CONFLICTS: Final = frozenset({1020, 1062, 1180, 1205, 1213, 3101})
# Statements that were not to wait for so long: MariaDB's max_statement_time, MySQL's max_execution_time and NOWAIT.
_TIMEOUTS: Final = frozenset({1205, 1969, 3024, 3572})
# What a server answers that cannot serve anybody just now, or not us (MySQL manual, Server Error Message Reference).
_OUTAGES: Final = frozenset(
    {
        *(1040, 1042, 1043, 1129, 1130, 1135, 1152, 1158, 1159, 1160, 1161, 1184, 1203, 1226, 4031),  # connections
        *(1015, 1016, 1017, 1021, 1023, 1026, 1028, 1030, 1034, 1114, 1194, 1195, 1712),  # disk full, files, tables
        *(1037, 1038, 1041, 1206),  # memory
        *(1036, 1209, 1223, 1290, 1792, 1836, 1874, 3032),  # read-only
        *(1047, 1053, 1077, 1079, 1105, 1317, 1815, 1927, 3168, 3169),  # shutting down, killed, not (yet) in a cluster
        *(1044, 1045, 1049, 1142, 1143, 1227, 1370),  # we may not
        *(1054, 1136, 1146, 1305, 1356, 1364, 1449),  # tables, columns or triggers that are not as they should be
    }
)


def code_of(error: BaseException) -> int | None:
    """The number of a MySQL or MariaDB error, whichever library raised it; None for any other."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    code = error.args[0] if isinstance(error, pymysql.MySQLError) and error.args else None
    return code if isinstance(code, int) else None


def fault_of(error: BaseException) -> Fault:
    """Say what an error inside a transaction asks for.

    An outage never dead-letters a draw, and everybody waits for its end: so only what says that the server cannot be
    used is one. Whatever else it *answers* is about these values, or is our own mistake with these draws, and must not
    stop the others.
    """
    code = code_of(error)
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    if code in _CONFLICTS or code in _TIMEOUTS or is_duplicate_key(error) or isinstance(error, RowsChanged):
        return Fault.CONFLICT
    if isinstance(error, pymysql.MySQLError):
        # The client's own errors, from 2000 on or without a number: there was no answer.
        return Fault.OUTAGE if not code or code in _OUTAGES or 2000 <= code < 3000 else Fault.REFUSED
    if isinstance(error, sqlite3.Error):
        return Fault.OUTAGE if type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError) else Fault.REFUSED
    if isinstance(error, StatementError):  # a value that its column's type does not take
        return Fault.REFUSED
    return Fault.OUTAGE if isinstance(error, SQLAlchemyError | OSError | DrawError) else Fault.REFUSED


def _is_answered(error: BaseException) -> bool:
    """Whether the server has answered with a conflict or a refusal: its connection is in order."""
    return isinstance(error, pymysql.MySQLError) and fault_of(error) is not Fault.OUTAGE


def is_duplicate_key(error: BaseException) -> bool:
    """Whether a unique constraint objects: somebody else has that key."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    if isinstance(error, sqlite3.IntegrityError):
        return "UNIQUE" in str(error)
    return isinstance(error, pymysql.MySQLError) and error.args[:1] == (1062,)


def is_lock_conflict(error: BaseException) -> bool:
    """Whether another transaction's lock is to blame, so that the draw itself is above suspicion."""
    return (code := code_of(error)) is not None and code != 1062 and fault_of(error) is Fault.CONFLICT


def is_lock_timeout(error: BaseException) -> bool:
    """Whether the statement has waited for a lock for as long as it may."""
    return code_of(error) in _TIMEOUTS


def explain(error: BaseException) -> ServiceUnavailable | ConfigurationError | InternalError:
    """A database error as one sentence that says what to do; no outage where there is none.

    InternalError for what the database refuses, and for mistakes of ours: trying again does not help.
    """
    fault = fault_of(error)
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    code = error.args[0] if error.args else None
    text = " ".join(str(error.args[-1] if error.args else error).split())
    if code == 1146 or "no such table" in text or code == 1054 or "no such column" in text:
        return ConfigurationError(f"the database is not migrated ({text}): run `tombola migrate`")
    if code in (1044, 1045, 1049):
        return ConfigurationError(f"the database refuses us ({text}): check TOMBOLA_DATABASE_URL")
    if code in (CR.CR_AUTH_PLUGIN_CANNOT_LOAD, CR.CR_AUTH_PLUGIN_ERR):
        return ConfigurationError(f"logging in to the database needs what is not there: {text}")
    if code in (1142, 1143, 1227, 1370):
        return ConfigurationError(f"the database's user may not do this ({text}): grant it")
    if code in (1136, 1305, 1356, 1364, 1449):
        return ConfigurationError(f"the database is not as this release needs it: {text}")
    if "unable to open database file" in text:
        return ConfigurationError("the SQLite file cannot be opened: check the folder in TOMBOLA_DATABASE_URL")
    if fault is Fault.REFUSED:
        is_answer = isinstance(error, pymysql.MySQLError | sqlite3.Error)
        return InternalError(f"{'the database refuses this' if is_answer else type(error).__name__}: {text}")
    if fault is Fault.CONFLICT:
        return ServiceUnavailable(f"the database is busy: {text}")
    return ServiceUnavailable(f"the database does not answer: {text}")
