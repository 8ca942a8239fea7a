"""The ledger, the requests and the dead letters.

Column types are spelled out here, not imported from column_types: this revision must build the same tables for ever.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError
from sqlalchemy.dialects import mysql

from tombola.migrations import repeatable

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLE_OPTIONS: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
IDENTITY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
MONEY = sa.Numeric(10, 2).with_variant(sa.BigInteger(), "sqlite")  # hundredths there: its DECIMAL is a float
TIME = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def key(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def upgrade() -> None:
    repeatable.create_table(
        "account_asset_balances",
        sa.Column("id", IDENTITY, autoincrement=True, nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("asset_code", key(50), nullable=False),
        sa.Column("balance", MONEY, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_account_asset_balances")),
        sa.UniqueConstraint("user_id", "asset_code", name=op.f("uk_user_asset")),
        sa.CheckConstraint("balance >= 0", name=op.f("ck_account_asset_balances_balance")),
        # DECIMAL(10,2) has this limit by itself; SQLite's whole hundredths have none.
        sa.CheckConstraint("balance <= 9999999999", name=op.f("ck_account_asset_balances_balance_max")).ddl_if(
            dialect="sqlite"
        ),
        sqlite_autoincrement=True,
        **TABLE_OPTIONS,
    )
    repeatable.create_table(
        "asset_transactions",
        sa.Column("transaction_id", IDENTITY, autoincrement=True, nullable=False),
        sa.Column("account_id", sa.BigInteger(), nullable=False),
        sa.Column("business_id", key(100), nullable=False, comment="deprecated: the session id, for old readers"),
        sa.Column("lottery_session_id", key(100), nullable=False),
        sa.Column("idempotency_key", key(100), nullable=False),
        sa.Column("business_type", key(50), nullable=False),
        sa.Column("asset_code", key(50), nullable=False),
        sa.Column("delta_amount", MONEY, nullable=False),
        sa.Column("balance_before", MONEY, nullable=False),
        sa.Column("balance_after", MONEY, nullable=False),
        sa.Column("notes", sa.Text(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("transaction_id", name=op.f("pk_asset_transactions")),
        sa.CheckConstraint("balance_before >= 0 AND balance_after >= 0", name=op.f("ck_asset_transactions_balance")),
        sa.ForeignKeyConstraint(
            ["account_id"], ["account_asset_balances.id"], name=op.f("fk_asset_transactions_account_id")
        ),
        sqlite_autoincrement=True,
        **TABLE_OPTIONS,
    )
    repeatable.create_index("uk_idempotency_key", "asset_transactions", ["idempotency_key"], unique=True)
    repeatable.create_index("idx_lottery_session_id", "asset_transactions", ["lottery_session_id"])
    repeatable.create_index("idx_account_created", "asset_transactions", ["account_id", "created_at"])
    repeatable.create_table(
        "api_idempotency_requests",
        sa.Column("request_key", key(64), nullable=False),
        sa.Column("lottery_session_id", key(100), nullable=False),
        sa.Column("account_id", sa.BigInteger(), nullable=False, comment="as asked for: the account may not exist"),
        sa.Column("campaign", key(64), nullable=False),
        sa.Column("fingerprint", key(64), nullable=False, comment="SHA-256 of the canonical request"),
        sa.Column("status", key(16), nullable=False, comment="accepted, completed or rejected"),
        sa.Column("reason", sa.String(50), nullable=True, comment="why it was rejected"),
        sa.Column(
            "result",
            sa.Text().with_variant(mysql.MEDIUMTEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"),
            nullable=True,
            comment="the first result, byte for byte",
        ),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("settled_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("request_key", name=op.f("pk_api_idempotency_requests")),
        sa.UniqueConstraint("lottery_session_id", name=op.f("uk_request_lottery_session_id")),
        sa.CheckConstraint(
            "status IN ('accepted', 'completed', 'rejected')", name=op.f("ck_api_idempotency_requests_status")
        ),
        sa.CheckConstraint("(status = 'accepted') = (result IS NULL)", name=op.f("ck_api_idempotency_requests_result")),
        **TABLE_OPTIONS,
    )
    repeatable.create_table(
        "dead_letters",
        sa.Column("id", IDENTITY, autoincrement=True, nullable=False),
        sa.Column("body_sha256", key(64), nullable=False, comment="the same message parked twice is one row"),
        sa.Column("cause", key(32), nullable=False),
        sa.Column("error", sa.Text(), nullable=False, comment="what was wrong, in one line"),
        sa.Column("body", sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb"), nullable=False),
        sa.Column("body_bytes", sa.Integer(), nullable=False, comment="its whole length: body keeps the beginning"),
        sa.Column("request_key", key(64), nullable=True),
        sa.Column("account_id", sa.BigInteger(), nullable=True),
        sa.Column("queue", sa.String(50), nullable=False),
        sa.Column("deliveries", sa.Integer(), nullable=False),
        sa.Column("times_parked", sa.Integer(), nullable=False),
        sa.Column("first_parked_at", TIME, nullable=False),
        sa.Column("last_parked_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dead_letters")),
        sqlite_autoincrement=True,
        **TABLE_OPTIONS,
    )
    repeatable.create_index("uk_body_sha256", "dead_letters", ["body_sha256"], unique=True)


def downgrade() -> None:
    if not op.get_context().as_sql and repeatable.has_table("asset_transactions"):
        _refuse_to_drop_a_ledger_in_use(op.get_bind())
    repeatable.drop_table("dead_letters")
    repeatable.drop_table("api_idempotency_requests")
    repeatable.drop_table("asset_transactions")
    repeatable.drop_table("account_asset_balances")


def _refuse_to_drop_a_ledger_in_use(connection: sa.Connection) -> None:
    if connection.execute(sa.text("SELECT 1 FROM asset_transactions LIMIT 1")).first():
        raise CommandError("asset_transactions holds rows: a ledger is not dropped. Empty or rename it first.")
