"""Bounds of API keys, for some accounts only: an expansion, as 0002.

Column types are spelled out here, not imported from column_types: this revision must build the same tables for ever.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError
from sqlalchemy.dialects import mysql

from tombola.migrations import repeatable

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

API_KEYS = "api_keys"


def key(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def _columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("accounts", key(2000), nullable=True, comment="the accounts that it is for, e.g. 6,7,100-199"),
        sa.Column(
            "user_prefix",
            key(19),
            nullable=True,
            comment="it is for the accounts of users whose id begins so; both null: for all",
        ),
    ]


def upgrade() -> None:
    for column in _columns():
        repeatable.add_column(API_KEYS, column)


def downgrade() -> None:
    if not op.get_context().as_sql and repeatable.has_column(API_KEYS, "user_prefix"):
        _refuse_to_widen_keys(op.get_bind())
    for column in reversed(_columns()):
        repeatable.drop_column(API_KEYS, column.name)


def _refuse_to_widen_keys(connection: sa.Connection) -> None:
    bound = "SELECT 1 FROM api_keys WHERE revoked_at IS NULL AND (accounts IS NOT NULL OR user_prefix IS NOT NULL)"
    if connection.execute(sa.text(f"{bound} LIMIT 1")).first():
        raise CommandError("some API keys have bounds, and would be valid for all accounts: revoke them first")
