"""Transactions."""

from __future__ import annotations

import enum
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Final, TypeVar

import pymysql
from pymysql.constants import SERVER_STATUS
from sqlalchemy import Connection, Engine

from tombola.producers.storage.column_types import CENT
from tombola.producers.storage.faults import Fault, RowsChanged, fault_of, is_answered, is_lock_timeout, is_wrong_server

Value = str | int | None
NO_COPIES: Final[Mapping[str, str]] = MappingProxyType({})


class WhenHeld(enum.Enum):
    """What a locking read does about a row that another transaction holds."""

    WAIT = ""  # until it is free, or for innodb_lock_wait_timeout
    SKIP = " SKIP LOCKED"
    FAIL = " NOWAIT"


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
        if not is_answered(error):
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
            is_clean = is_answered(error)
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


# ---- values ----------------------------------------------------------------------------------------------------------


def time_text(moment: datetime) -> str:
    """`moment` as both databases write it: UTC, `YYYY-MM-DD HH:MM:SS.ffffff`."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(sep=" ", timespec="microseconds")
