"""Stored values as the driver gives them: a broken value must be found, and must not end the audit."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Column, ColumnElement, Connection, type_coerce
from sqlalchemy.types import NullType

LINE_SEPARATOR: Final = "\x1e"
TEXT_BYTES_MAX: Final = 2**26
CENTS_MAX: Final = 10**14  # SQLite's columns take any whole number


class Unreadable(Exception):
    """A stored value is not of its column's kind."""


def stored(column: Column[Any], prefix: str = "") -> ColumnElement[Any]:
    """A column as the driver gives it: reading never fails, whatever the column holds."""
    return type_coerce(column, NullType()).label(f"{prefix}{column.name}")


def raw_rows(connection: Connection, statement: str) -> Sequence[tuple[Any, ...]]:
    """The rows of a statement without parameters as the driver's own tuples. Raises the driver's errors, wrapped."""
    result = connection.exec_driver_sql(statement)
    rows: Sequence[tuple[Any, ...]] = result.cursor.fetchall()
    result.close()
    return rows


def texts(connection: Connection, text: str, rest: str) -> list[str]:
    """The values of the expression `text` in the rows of the statement `SELECT … {rest}`, in any order, without NULLs.

    MySQL and MariaDB send them in one value: the driver takes longer for each row of an answer than the server for the
    row itself. If the server warns that it had to cut the value off, or a value holds the separator, they are read one
    by one.
    """
    if connection.dialect.name != "sqlite":
        connection.exec_driver_sql(f"SET SESSION group_concat_max_len = {TEXT_BYTES_MAX}, max_error_count = 64")
        at_once = f"SELECT COUNT({text}), GROUP_CONCAT({text} SEPARATOR '{LINE_SEPARATOR}') {rest}"
        result = connection.exec_driver_sql(at_once)
        cursor: Any = result.cursor
        is_cut, ((count, joined),) = cursor.warning_count > 0, cursor.fetchall()
        result.close()
        found: list[str] = joined.split(LINE_SEPARATOR) if joined else []
        if len(found) == count and not is_cut:
            return found
    return [value for (value,) in raw_rows(connection, f"SELECT {text} {rest}") if value is not None]


def amount_of(connection: Connection, value: Any) -> Decimal:
    """The amount behind a stored value; raises Unreadable."""
    is_sqlite = connection.dialect.name == "sqlite"
    if not isinstance(value, int if is_sqlite else Decimal):
        raise Unreadable(f"{value!r:.60} is no amount")
    return Decimal(value).scaleb(-2) if is_sqlite else Decimal(value)


def cents_of(connection: Connection, value: Any) -> int:
    """The amount behind a stored value in hundredths; raises Unreadable."""
    hundredths = amount_of(connection, value).scaleb(2)
    if hundredths != int(hundredths) or abs(hundredths) > CENTS_MAX:
        raise Unreadable(f"{value!r:.60} is no amount in hundredths")
    return int(hundredths)


def shown(cents: int) -> Decimal:
    """An amount in hundredths as it is said: with two decimals."""
    return Decimal(cents).scaleb(-2)
