"""Alembic's operations, each of which looks first: after an interrupted migration they do only what is missing.

Alembic's own `if_not_exists` writes IF NOT EXISTS, which MySQL does not know for columns and indexes. In a script
(--sql) there is no database to look at, and the operations are Alembic's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op


def create_table(name: str, *parts: sa.schema.SchemaItem, **options: Any) -> None:
    if (there := _look()) is None or not there.has_table(name):
        op.create_table(name, *parts, **options)


def drop_table(name: str) -> None:
    if has_table(name):
        op.drop_table(name)


def create_index(name: str, table: str, columns: Sequence[str], *, unique: bool = False) -> None:
    if (there := _look()) is None or not _has_index(there, table, name):
        op.create_index(name, table, columns, unique=unique)


def drop_index(name: str, table: str) -> None:
    if (there := _look()) is None or _has_index(there, table, name):
        op.drop_index(name, table)


def add_column(table: str, column: sa.Column[Any]) -> None:
    if is_to_be_added(table, column.name):
        op.add_column(table, column)


def drop_column(table: str, name: str) -> None:
    if has_column(table, name):
        op.drop_column(table, name)


def drop_check(table: str, name: str) -> None:
    """Drop a CHECK constraint, in a syntax of both MySQL and MariaDB."""
    there = _look()
    if there is None or any(it["name"] == name for it in there.get_check_constraints(table)):
        op.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")


def comment_column(table: str, name: str, kind: sa.types.TypeEngine[Any], *, nullable: bool, text: str) -> None:
    """Set a column's comment; SQLite keeps none."""
    if op.get_context().dialect.name == "sqlite":
        return
    there = _look()
    if there is None or all(it["comment"] != text for it in there.get_columns(table) if it["name"] == name):
        op.alter_column(table, name, existing_type=kind, existing_nullable=nullable, comment=text)


def has_table(name: str) -> bool:
    """Whether the table exists; True in a script, where it may."""
    return (there := _look()) is None or there.has_table(name)


def has_column(table: str, name: str) -> bool:
    """Whether the column exists; True in a script, where it may."""
    return (there := _look()) is None or _has_column(there, table, name)


def is_to_be_added(table: str, column: str) -> bool:
    """Whether the column is missing; True in a script, where it may be."""
    return (there := _look()) is None or not _has_column(there, table, column)


def _look() -> sa.Inspector | None:
    """An inspector of the database; None in a script."""
    return None if op.get_context().as_sql else sa.inspect(op.get_bind())


def _has_column(there: sa.Inspector, table: str, name: str) -> bool:
    return there.has_table(table) and any(it["name"] == name for it in there.get_columns(table))


def _has_index(there: sa.Inspector, table: str, name: str) -> bool:
    return there.has_table(table) and any(it["name"] == name for it in there.get_indexes(table))
