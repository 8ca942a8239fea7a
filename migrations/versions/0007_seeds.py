"""Seeds: what draws came to, as conformity counts them: an expansion, as 0005.

The previous release runs beside this schema: it neither reads nor writes the new tables. Column types are spelled out
here: this revision must build the same tables for ever.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
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
    _create_conformity()


def _create_conformity() -> None:
    repeatable.create_table(
        "conformity_parts",
        sa.Column("first_block", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("block", sa.BigInteger(), nullable=False, comment="the last block of the part"),
        sa.Column("draws", sa.BigInteger(), nullable=False, comment="charges that were counted"),
        sa.Column(
            "unreadable", sa.BigInteger(), nullable=False, comment="charges whose notes say no draw by known odds"
        ),
        sa.Column("counted_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("first_block", name=op.f("pk_conformity_parts")),
        **TABLE_OPTIONS,
    )
    repeatable.create_table(
        "conformity_counts",
        sa.Column("odds_hash", key(64), nullable=False),
        sa.Column("hour", TIME, nullable=False),
        sa.Column("caller", key(64), nullable=False, comment="empty: no API key"),
        sa.Column("tier", key(64), nullable=False, comment="empty: none"),
        sa.Column(
            "since_hit", key(64), nullable=False, comment="counters of guarantees, as far as chances depend on them"
        ),
        sa.Column("drawn", key(64), nullable=False, comment="the prize of the ticket, sold out or not"),
        sa.Column("block", sa.BigInteger(), nullable=False, comment="the part"),
        sa.Column("pulls", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint(
            *("odds_hash", "hour", "caller", "tier", "since_hit", "drawn", "block"), name=op.f("pk_conformity_counts")
        ),
        **TABLE_OPTIONS,
    )
    repeatable.create_table(
        "conformity_accounts",
        sa.Column("odds_hash", key(64), nullable=False),
        sa.Column("day", TIME, nullable=False),
        sa.Column("account_id", sa.BigInteger(), nullable=False),
        sa.Column("block", sa.BigInteger(), nullable=False, comment="the part"),
        sa.Column("pulls", sa.BigInteger(), nullable=False),
        sa.Column("wins", sa.BigInteger(), nullable=False),
        sa.Column("expected", sa.Double(), nullable=False, comment="the sum of the chances p of a win"),
        sa.Column("variance", sa.Double(), nullable=False, comment="the sum of p(1 - p)"),
        sa.Column(
            "capital_low",
            sa.Double(),
            nullable=False,
            comment="ln of what 1 became that staked 0.05 of itself on each win",
        ),
        sa.Column("capital_middle", sa.Double(), nullable=False, comment="the same, 0.3"),
        sa.Column("capital_high", sa.Double(), nullable=False, comment="the same, 0.9"),
        sa.PrimaryKeyConstraint("odds_hash", "day", "account_id", "block", name=op.f("pk_conformity_accounts")),
        **TABLE_OPTIONS,
    )


def downgrade() -> None:
    """The counts are made again from sealed blocks by the next upgrade."""
    for table in ("conformity_accounts", "conformity_counts", "conformity_parts"):
        repeatable.drop_table(table)
