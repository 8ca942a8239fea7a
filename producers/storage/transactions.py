"""Transactions on the driver's own connection, for the paths where microseconds count; and how they run again.

The settle path runs several thousand draws a second through a handful of statements of many rows, so it uses the driver
directly through `Transaction`. All other code uses SQLAlchemy Core on the same engine.
"""

from __future__ import annotations

import enum
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Final, Self, TypeVar

import pymysql
from pymysql.constants import SERVER_STATUS
from sqlalchemy import Connection, Engine

from tombola.producers.domain.money import CENT
from tombola.producers.storage.faults import Fault, RowsChanged, fault_of, is_answered, is_lock_timeout, is_wrong_server

Value = str | int | None
RANGE_ROWS_MIN: Final = 8  # fewer are not worth a range of their own in a CASE
NO_COPIES: Final[Mapping[str, str]] = MappingProxyType({})


class WhenHeld(enum.Enum):
    """What a locking read does about a row that another transaction holds."""

    WAIT = ""  # until the row is free, at most for innodb_lock_wait_timeout
    SKIP = " SKIP LOCKED"
    FAIL = " NOWAIT"


class Transaction:
    """One open transaction, and the few statements of many rows that the settle path is made of.

    In a statement `??` stands for a list of values. Values are str, int or None; amounts are sent as text (see
    `money`), and are exact on MySQL, MariaDB and SQLite.
    """

    def __init__(self, connection: Any, *, is_sqlite: bool) -> None:
        self._connection = connection
        self._cursor = connection.cursor()
        self.is_sqlite = is_sqlite
        # An amount as this database stores it (see column_types.Money).
        self.money: Callable[[Decimal], Value] = _hundredths if is_sqlite else str

    @classmethod
    def joining(cls, connection: Connection) -> Self:
        """The transaction that is open on `connection`, whose owner commits it or rolls it back."""
        return cls(connection.connection.driver_connection, is_sqlite=connection.dialect.name == "sqlite")

    def select(
        self,
        statement: str,
        keys: Sequence[Value],
        *,
        lock: bool = False,
        when_held: WhenHeld = WhenHeld.WAIT,
        index: str = "PRIMARY",
    ) -> Sequence[tuple[Any, ...]]:
        """The rows of `statement`, whose `??` stands for `keys`; `lock` locks them until the end (FOR UPDATE).

        They are locked along `index`, which the keys are of. `when_held` says what happens at a row that another
        transaction holds.
        """
        if lock and not self.is_sqlite:  # SQLite has one writer at a time: BEGIN IMMEDIATE is the lock
            statement = f"{_along(index, statement)} FOR UPDATE{when_held.value}"
        if self.is_sqlite:
            self._cursor.execute(statement.replace("??", ",".join("?" * len(keys))), keys)
        else:
            self._cursor.execute(statement.replace("??", ",".join(self._literals(keys))))
        rows: Sequence[tuple[Any, ...]] = self._cursor.fetchall()
        return rows

    def select_joined(
        self, statement: str, keys: Sequence[Value], *, lock: bool = False, when_held: WhenHeld = WhenHeld.WAIT
    ) -> list[list[str | None]] | None:
        """As `select`, of a statement `SELECT {joined(…)} …`: the rows as their texts. None: ask with `select` instead.

        All rows come as one value, since the driver takes longer for each row than the server does for all its work on
        it. SQLite has no driver in between; any server cuts what is longer than `group_concat_max_len`, and warns.
        """
        if self.is_sqlite:
            return None
        ((text,),) = self.select(statement, keys, lock=lock, when_held=when_held)
        if self._cursor.warning_count:
            return None
        rows: list[list[str | None]] = [] if text is None else [it.split(_UNIT) for it in text.split(_RECORD)]
        width = statement.count(_UNIT) + 1
        if any(len(row) != width for row in rows):  # a value holds a control character, as old code may write them
            return None
        return [[None if it == _NULL else it for it in row] for row in rows] if text and _NULL in text else rows

    @property
    def _is_mariadb(self) -> bool:
        return "MariaDB" in self._connection.server_version

    def within(self, wait_s_max: float, query: str) -> str:
        """The SELECT `query` with a time limit: the server ends it after `wait_s_max` with error 1969 or 3024."""
        if self.is_sqlite:
            return query
        if self._is_mariadb:
            return f"SET STATEMENT max_statement_time={wait_s_max:g} FOR {query}"
        return query.replace("SELECT", f"SELECT /*+ MAX_EXECUTION_TIME({wait_s_max * 1000:.0f}) */", 1)

    def held(self, table: str, index: str, column: str, values: Iterable[str]) -> set[str]:
        """The `values` of `column` whose rows another transaction holds, rows that it has not committed among them.

        A plain read cannot tell. The call never waits, and locks the free rows until the end. Use it only in a
        transaction that writes nothing: a refused lock may end the transaction (innodb_rollback_on_timeout).
        """
        if self.is_sqlite:  # SQLite has one lock for all rows: a transaction that has begun waits for no other one
            return set()
        # A join looks up each value in the unique `index`; for IN (…) the server may scan a small table, and would meet
        # locks on rows that were not asked for.
        statement = (
            "SELECT 1 FROM JSON_TABLE(??, '$[*]' COLUMNS (value VARCHAR(100) CHARACTER SET ascii COLLATE ascii_bin "
            f"PATH '$')) AS asked STRAIGHT_JOIN {table} FORCE INDEX ({index}) ON {table}.{column} = asked.value "
            # MySQL would lock the JSON_TABLE as well, and refuses to; MariaDB does not know the word OF.
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

        `copies` maps further columns to the columns whose values they take: each value is sent once, not twice.
        """
        if not rows:
            return
        head = f"INSERT INTO {table} ({','.join((*columns, *copies))}) VALUES "
        width = len(columns)
        if self.is_sqlite:
            places = (*range(1, width + 1), *(columns.index(source) + 1 for source in copies.values()))
            self._cursor.executemany(f"{head}({','.join(f'?{place}' for place in places)})", rows)
            return
        # By columns: values of one kind become literals without a look at each.
        literals = zip(*[self._literals(values) for values in zip(*rows, strict=True)], strict=True)
        tail = "".join(f",{source}" for source in copies.values())
        self._cursor.execute(f"{head}({f'{tail}),('.join(map(','.join, literals))}{tail})")

    def update(
        self, table: str, key: str, columns: Sequence[str], rows: Sequence[Sequence[Value]], *, where: str = ""
    ) -> None:
        """Set `columns` in many rows with one statement; each of `rows` is the value of `key`, then the new values.

        `key` is the table's primary key.

        `where` is a condition on every row. Raises RowsChanged when it does not hold for a row, or a row is gone.
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
            are_numbers = type(rows[0][0]) is int
            in_order = sorted(rows) if are_numbers else rows  # type: ignore[type-var]
            keys, *by_column = [self._literals(values) for values in zip(*in_order, strict=True)]
            case = _case_of_ranges if are_numbers else _case
            cases = [f"{column}={case(key, keys, values)}" for column, values in zip(columns, by_column, strict=True)]
            self._cursor.execute(
                f"UPDATE {table} FORCE INDEX (PRIMARY) SET {','.join(cases)} "
                f"WHERE {key} IN ({','.join(keys)}){condition}"
            )
        if where and self._cursor.rowcount != len(rows):
            raise RowsChanged

    def subtract(self, table: str, key: str, column: str, rows: Sequence[tuple[str, int]]) -> None:
        """Take an amount off `column` in many rows with one statement; each of `rows` is the value of `key` and amount.

        Raises RowsChanged when a row holds less, or is gone.
        """
        if not rows:
            return
        if self.is_sqlite:
            self._cursor.executemany(
                f"UPDATE {table} SET {column}={column}-?1 WHERE {key}=?2 AND {column}>=?1",
                [(amount, value) for value, amount in rows],
            )
        else:
            keys = self._literals([value for value, _ in rows])
            amounts = _case(key, keys, [str(amount) for _, amount in rows])
            self._cursor.execute(
                f"UPDATE {table} FORCE INDEX (PRIMARY) SET {column}={column}-({amounts}) "
                f"WHERE {key} IN ({','.join(keys)}) AND {column}>=({amounts})"
            )
        if self._cursor.rowcount != len(rows):
            raise RowsChanged

    def amount(self, stored: Any) -> Decimal:
        """A stored amount as a Decimal with two decimals."""
        return Decimal(stored).scaleb(-2) if self.is_sqlite else Decimal(stored).quantize(CENT)

    def _literals(self, values: Sequence[Value]) -> list[str]:
        """`values` as SQL literals, right in every sql_mode.

        Inside quotes MySQL needs two characters escaped (manual, String Literals): the quote, which is doubled in every
        mode, and the backslash, except under NO_BACKSLASH_ESCAPES. Sessions of tombola leave that mode off, but
        `Entry.accept_with` joins a transaction of the calling application; every answer of the server carries the mode.
        Under MariaDB's EMPTY_STRING_IS_NULL '' is NULL, and X'' is still an empty string. All values are escaped at
        once, joined by a control character that no value may hold: the driver's own escaping, a call and a table
        look-up for each character, takes longer than all other Python of a draw.
        """
        kinds = set(map(type, values))
        if kinds == {int}:
            return list(map(str, values))
        if type(None) in kinds or int in kinds:
            texts = iter(self._texts([str(value) for value in values if value is not None and type(value) is not int]))
            return ["NULL" if it is None else str(it) if type(it) is int else next(texts) for it in values]
        return self._texts(values)  # type: ignore[arg-type]

    def _texts(self, values: Sequence[str]) -> list[str]:
        """`_literals` of texts."""
        joined = _UNIT.join(values).replace("'", "''")
        status = getattr(self._connection, "server_status", 0)  # the driver keeps it from the last answer
        if not status & SERVER_STATUS.SERVER_STATUS_NO_BACKSLASH_ESCAPES:
            joined = joined.replace("\\", "\\\\")
        quoted = joined.replace(_UNIT, f"'{_UNIT}'")
        texts = f"'{quoted}'".split(_UNIT) if values else []
        if len(texts) != len(values):
            raise ValueError("a value holds the control character U+001F")
        return [NO_TEXT if it == "''" else it for it in texts] if "" in values else texts


def _along(index: str, statement: str) -> str:
    """`statement`, reading along this index.

    When a list names most rows of a small table, servers would rather read all of it, by MariaDB 11's estimates even
    along another index: then they wait for rows that nobody asked for, and lock in another order.
    """
    return statement.replace(" WHERE ", f" FORCE INDEX ({index}) WHERE ", 1)


def joined(*columns: str, nullable: Sequence[str] = (), order_by: str = "") -> str:
    """What a statement for `Transaction.select_joined` selects: `columns`, then those that may be null."""
    values = f", '{_UNIT}', ".join([*columns, *[f"COALESCE({column}, '{_NULL}')" for column in nullable]])
    order = f" ORDER BY {order_by}" if order_by else ""
    return f"GROUP_CONCAT({values}{order} SEPARATOR '{_RECORD}')"


_UNIT: Final = "\x1f"
_RECORD: Final = "\x1e"
_NULL: Final = "\x1a"
NO_TEXT: Final = "X''"


def _case(key: str, keys: Sequence[str], values: Sequence[str]) -> str:
    if values.count(values[0]) == len(values):
        return values[0]
    return f"CASE {key} {' '.join([f'WHEN {k} THEN {v}' for k, v in zip(keys, values, strict=True)])} END"


def _case_of_ranges(key: str, keys: Sequence[str], values: Sequence[str]) -> str:
    """`_case` of numbers in ascending order, in two steps: the server compares a row with one WHEN after the other."""
    size = math.isqrt(len(keys)) + 1
    if size <= RANGE_ROWS_MIN or values.count(values[0]) == len(values):
        return _case(key, keys, values)
    starts = range(0, len(keys), size)
    ranges = [_case(key, keys[it : it + size], values[it : it + size]) for it in starts]
    whens = [f"WHEN {key}<{keys[start]} THEN {it}" for start, it in zip(starts[1:], ranges, strict=False)]
    return f"CASE {' '.join(whens)} ELSE {ranges[-1]} END"


@contextmanager
def statement(engine: Engine) -> Iterator[Transaction]:
    """A connection on which each statement commits by itself: one round trip where a transaction takes three.

    Only for MySQL and MariaDB, where a statement of many rows is atomic.
    """
    proxy = engine.raw_connection()
    try:
        connection: Any = proxy.driver_connection
        connection.autocommit(True)  # a round trip only the first time
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
    """A transaction on the driver's own connection: committed at the end, or rolled back as a whole.

    With `read_only` the server refuses writes. After an error the connection is closed, since its state is not known,
    and does not return to the pool. It returns only where the server has answered both the statement, with a conflict
    or a refusal, and the rollback: a new connection takes as long as a hundred draws.
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
        with suppress(Exception):  # the server rolls a lost connection back by itself
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
    """How long to wait before a transaction runs again after a conflict: random, and doubled with each of its `tries`.

    The jitter keeps two transactions from meeting again.
    """
    return random.uniform(0, 0.01 * 2**tries)


def again_after_conflicts(engine: Engine, act: Callable[[Connection], T], *, tries_max: int) -> T:
    """Run `act` in a transaction, and again in a new one after a conflict, `tries_max` times in all; return its value.

    Raises the errors of `act` and of the driver.
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


def _hundredths(amount: Decimal) -> int:
    return int(amount.scaleb(2))


def time_text(moment: datetime) -> str:
    """`moment` as all three databases write it: UTC, `YYYY-MM-DD HH:MM:SS.ffffff`."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(sep=" ", timespec="microseconds")
