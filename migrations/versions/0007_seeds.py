"""Seeds: epochs of seeds, the epoch of a draw, keys of receipts, counts of conformity: an expansion, as 0005.

The previous release runs beside this schema: the new column is nullable, a draw without an epoch binds when it settles,
and no other release reads the new tables. Column types are spelled out here: this revision must build the same tables
for ever.
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
REQUESTS = "api_idempotency_requests"


def key(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def _request_column() -> sa.Column[Any]:
    comment = "the epoch that a draw is bound to; null: it binds when it settles"
    return sa.Column("seed_epoch", sa.Integer(), nullable=True, comment=comment)


def upgrade() -> None:
    repeatable.add_column(REQUESTS, _request_column())
    _create_epochs()
    _create_receipt_keys()
    _create_conformity()


def _create_epochs() -> None:
    repeatable.create_table(
        "seed_chains",
        sa.Column(
            "chain", sa.Integer(), autoincrement=False, nullable=False, comment="from 1; 0: draws of before the epochs"
        ),
        sa.Column("anchor", key(64), nullable=False, comment="what all secrets of the chain hash down to"),
        sa.Column("epochs", sa.Integer(), nullable=False, comment="how many"),
        sa.Column("seed_id", key(16), nullable=False, comment="of its master seed: the beginning of its SHA-256"),
        sa.Column("begun_at", TIME, nullable=False, comment="when its first epoch opens"),
        sa.PrimaryKeyConstraint("chain", name=op.f("pk_seed_chains")),
        **TABLE_OPTIONS,
    )
    repeatable.create_index("uk_seed_anchor", "seed_chains", ["anchor"], unique=True)
    repeatable.create_table(
        "seed_epochs",
        sa.Column(
            "id", sa.Integer(), autoincrement=False, nullable=False, comment="10,000 for each chain, and the epoch"
        ),
        sa.Column("chain", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False, comment="within its chain, from 1"),
        sa.Column("opens_at", TIME, nullable=False, comment="draws bind to it from here on"),
        sa.Column("closes_at", TIME, nullable=True, comment="and up to here; as opens_at: its chain ended before"),
        sa.Column("commitment", key(64), nullable=False, comment="a hash of its secret, known before it opens"),
        sa.Column("revealed", key(64), nullable=True, comment="its secret, once no draw can be bound to it any more"),
        sa.Column("revealed_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_seed_epochs")),
        **TABLE_OPTIONS,
    )
    repeatable.create_index("idx_seed_epoch_opens", "seed_epochs", ["opens_at"])


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
    if not op.get_context().as_sql and repeatable.has_table("seed_epochs"):
        _refuse_to_forget_epochs(op.get_bind())
    if not op.get_context().as_sql and repeatable.has_table("receipt_keys"):
        _refuse_to_forget_keys(op.get_bind())
    # The counts are made again from sealed blocks by the next upgrade.
    for table in ("conformity_accounts", "conformity_counts", "conformity_parts"):
        repeatable.drop_table(table)
    repeatable.drop_table("receipt_keys")
    repeatable.drop_table("seed_epochs")
    repeatable.drop_table("seed_chains")
    repeatable.drop_column(REQUESTS, _request_column().name)


def _refuse_to_forget_epochs(connection: sa.Connection) -> None:
    """Ledger rows name the epochs that they were drawn in: without their secrets nobody can verify these draws."""
    if connection.execute(sa.text("SELECT 1 FROM seed_chains LIMIT 1")).first():
        raise CommandError("draws are bound to seed epochs: without these the draws cannot be verified")


def _refuse_to_forget_keys(connection: sa.Connection) -> None:
    """Players keep receipts: without the public keys of before nobody could verify them."""
    if connection.execute(sa.text("SELECT 1 FROM receipt_keys LIMIT 1")).first():
        raise CommandError("receipts were signed: without receipt_keys nobody can verify them")
