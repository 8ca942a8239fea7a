"""Verifiable draws: the keys of receipts.

An expansion, as 0006.

The previous release runs beside this schema: it neither reads nor writes the new table. Column types are spelled out
here: this revision must build the same tables for ever.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError
from sqlalchemy.dialects import mysql

from tombola.migrations import repeatable

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TABLE_OPTIONS: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
TIME = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def key(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def upgrade() -> None:
    _create_receipt_keys()


def _create_receipt_keys() -> None:
    repeatable.create_table(
        "receipt_keys",
        sa.Column("kid", key(16), nullable=False, comment="SHA-256 of the public key, the first 16 hex digits"),
        sa.Column("public_key", key(64), nullable=False, comment="Ed25519, 32 bytes in hex"),
        sa.Column("valid_from", TIME, nullable=False, comment="when a process first had the key in its settings"),
        sa.Column(
            "valid_until", TIME, nullable=True, comment="when a process with a newer key had it no more; null: it signs"
        ),
        sa.PrimaryKeyConstraint("kid", name=op.f("pk_receipt_keys")),
        **TABLE_OPTIONS,
    )


def downgrade() -> None:
    if not op.get_context().as_sql and repeatable.has_table("receipt_keys"):
        _refuse_to_forget_keys(op.get_bind())
    repeatable.drop_table("receipt_keys")


def _refuse_to_forget_keys(connection: sa.Connection) -> None:
    """Players keep receipts: without the public keys of before nobody could verify them."""
    if connection.execute(sa.text("SELECT 1 FROM receipt_keys LIMIT 1")).first():
        raise CommandError("receipts were signed: without receipt_keys nobody can verify them")
