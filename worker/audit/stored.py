"""Stored values as the driver gives them: a broken value must be found, and must not end the audit."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Column, ColumnElement, Connection, type_coerce
from sqlalchemy.types import NullType

FETCH_SIZE: Final = 2000


class Unreadable(Exception):
    """A stored value is not of its column's kind."""


def stored(column: Column[Any], prefix: str = "") -> ColumnElement[Any]:
    """A column as the driver gives it: reading never fails, whatever the column holds."""
    return type_coerce(column, NullType()).label(f"{prefix}{column.name}")


def amount_of(connection: Connection, value: Any) -> Decimal:
    """The amount behind a stored value; raises Unreadable."""
    is_sqlite = connection.dialect.name == "sqlite"
    if not isinstance(value, int if is_sqlite else Decimal):
        raise Unreadable(f"{value!r:.60} is no amount")
    return Decimal(value).scaleb(-2) if is_sqlite else Decimal(value)
