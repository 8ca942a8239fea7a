"""Campaigns: versions, states, stock, counters, lists, codes, and what is delivered outside: an expansion, as 0002.

The previous release runs beside this schema: every new column is nullable, and the release before never draws by a
campaign that it does not know. Column types are spelled out here: this revision must build the same tables for ever.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError
from sqlalchemy.dialects import mysql

from tombola.migrations import repeatable

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TABLE_OPTIONS: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
IDENTITY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
BODY = sa.Text().with_variant(mysql.MEDIUMTEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")
REQUESTS = "api_idempotency_requests"
STATES = "'draft', 'open', 'paused', 'closed'"


def key(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def _request_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column(
            "odds_hash", key(64), nullable=True, comment="the version that was live at acceptance; null: default"
        ),
        sa.Column("kind", key(16), nullable=True, comment="what is asked for; null: a draw of contract v1"),
        sa.Column("terms", key(255), nullable=True, comment="JSON: the fields of that kind"),
    ]


def upgrade() -> None:
    for column in _request_columns():
        repeatable.add_column(REQUESTS, column)
    _create_versions()
    _create_state()
    _create_codes_and_lists()
    _create_fulfilments()


def _create_versions() -> None:
    repeatable.create_table(
        "campaigns",
        sa.Column("name", key(64), nullable=False),
        sa.Column("live_hash", key(64), nullable=True, comment="the version that new requests are drawn by"),
        sa.Column("state", key(16), nullable=False, comment="draft, open, paused or closed"),
        sa.Column("revision", sa.BigInteger(), nullable=False, comment="rises with every change of any campaign"),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_campaigns")),
        sa.CheckConstraint(f"state IN ({STATES})", name=op.f("ck_campaigns_state")),
        **TABLE_OPTIONS,
    )
    repeatable.create_index("uk_campaign_revision", "campaigns", ["revision"], unique=True)
    repeatable.create_table(
        "campaign_versions",
        sa.Column("odds_hash", key(64), nullable=False, comment="SHA-256 of the manifest's canonical form"),
        sa.Column("campaign", key(64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("manifest", BODY, nullable=False, comment="the canonical form, to the byte"),
        sa.Column("created_by", sa.String(100), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("published_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("odds_hash", name=op.f("pk_campaign_versions")),
        sa.UniqueConstraint("campaign", "version", name="uk_campaign_version"),
        **TABLE_OPTIONS,
    )


def _create_state() -> None:
    repeatable.create_table(
        "campaign_accounts",
        sa.Column("standing_key", key(100), nullable=False, comment="account id and campaign"),
        sa.Column("account_id", sa.BigInteger(), nullable=False),
        sa.Column("campaign", key(64), nullable=False),
        sa.Column("standing", sa.Text(), nullable=False, comment="JSON: pulls, spending, counters"),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("standing_key", name=op.f("pk_campaign_accounts")),
        **TABLE_OPTIONS,
    )
    repeatable.create_index("idx_campaign_account", "campaign_accounts", ["account_id"])
    repeatable.create_table(
        "campaign_stock",
        sa.Column("stock_key", key(120), nullable=False, comment="campaign, prize and shard"),
        sa.Column("campaign", key(64), nullable=False),
        sa.Column("prize", key(64), nullable=False),
        sa.Column("units", sa.BigInteger(), nullable=False, comment="what is left in this shard"),
        sa.PrimaryKeyConstraint("stock_key", name=op.f("pk_campaign_stock")),
        sa.CheckConstraint("units >= 0", name=op.f("ck_campaign_stock_units")),
        **TABLE_OPTIONS,
    )
    repeatable.create_table(
        "campaign_stock_changes",
        sa.Column("id", IDENTITY, autoincrement=True, nullable=False),
        sa.Column("campaign", key(64), nullable=False),
        sa.Column("prize", key(64), nullable=False),
        sa.Column("units", sa.BigInteger(), nullable=False, comment="published or restocked; negative: withdrawn"),
        sa.Column("operator", sa.String(100), nullable=False, comment="who"),
        sa.Column("reason", sa.Text(), nullable=False, comment="why"),
        sa.Column("at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_campaign_stock_changes")),
        sqlite_autoincrement=True,
        **TABLE_OPTIONS,
    )
    repeatable.create_index("idx_stock_change_prize", "campaign_stock_changes", ["campaign", "prize"])


def _create_codes_and_lists() -> None:
    repeatable.create_table(
        "campaign_codes",
        sa.Column("code", key(100), nullable=False, comment="handed out once, ever"),
        sa.Column("campaign", key(64), nullable=False),
        sa.Column("prize", key(64), nullable=False),
        sa.Column("taken_by", key(100), nullable=True, comment="the ledger row that handed it out"),
        sa.PrimaryKeyConstraint("code", name=op.f("pk_campaign_codes")),
        **TABLE_OPTIONS,
    )
    repeatable.create_index("idx_code_free", "campaign_codes", ["campaign", "prize", "taken_by"])
    repeatable.create_table(
        "account_lists",
        sa.Column("name", key(64), nullable=False),
        sa.Column("account_id", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", "account_id", name=op.f("pk_account_lists")),
        **TABLE_OPTIONS,
    )


def _create_fulfilments() -> None:
    repeatable.create_table(
        "webhooks",
        sa.Column("name", key(64), nullable=False),
        sa.Column("url", sa.String(500), nullable=False),
        sa.Column("secret", key(128), nullable=False, comment="signs what is sent; never shown again"),
        sa.Column("events", key(255), nullable=False, comment="JSON: which events it gets"),
        sa.Column("campaign", key(64), nullable=True, comment="of one campaign only; null: of all"),
        sa.Column("former_secret", key(128), nullable=True, comment="signs as well, until former_until"),
        sa.Column("former_until", TIME, nullable=True),
        sa.Column("created_by", sa.String(100), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("removed_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_webhooks")),
        **TABLE_OPTIONS,
    )
    repeatable.create_table(
        "fulfilments",
        sa.Column("id", IDENTITY, autoincrement=True, nullable=False),
        sa.Column("idempotency_key", key(100), nullable=False, comment="the ledger row's key, or the request's"),
        sa.Column("webhook", key(64), nullable=False, comment="where it goes; empty: not known when it was made"),
        sa.Column("event", key(64), nullable=False),
        sa.Column("campaign", key(64), nullable=False),
        sa.Column("account_id", sa.BigInteger(), nullable=False),
        sa.Column("lottery_session_id", key(100), nullable=False),
        sa.Column("state", key(16), nullable=False, comment="pending, delivered or dead"),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("next_at", TIME, nullable=False, comment="when the relay sends it next"),
        sa.Column("error", sa.String(200), nullable=True, comment="why the last attempt failed"),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("ended_at", TIME, nullable=True, comment="delivered, or given up"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fulfilments")),
        sa.CheckConstraint("state IN ('pending', 'delivered', 'dead')", name=op.f("ck_fulfilments_state")),
        sqlite_autoincrement=True,
        **TABLE_OPTIONS,
    )
    repeatable.create_index("uk_fulfilment", "fulfilments", ["idempotency_key", "webhook", "event"], unique=True)
    repeatable.create_index("idx_fulfilment_due", "fulfilments", ["state", "webhook", "next_at"])
    repeatable.create_index("idx_fulfilment_session", "fulfilments", ["lottery_session_id"])


def downgrade() -> None:
    if not op.get_context().as_sql and repeatable.has_table("campaign_versions"):
        _refuse_to_forget_odds(op.get_bind())
    for table in (
        "fulfilments",
        "webhooks",
        "account_lists",
        "campaign_codes",
        "campaign_stock_changes",
        "campaign_stock",
        "campaign_accounts",
        "campaign_versions",
        "campaigns",
    ):
        repeatable.drop_table(table)
    for column in reversed(_request_columns()):
        repeatable.drop_column(REQUESTS, column.name)


def _refuse_to_forget_odds(connection: sa.Connection) -> None:
    """Ledger rows name the odds that they were drawn by: without these nobody can verify them."""
    if connection.execute(sa.text("SELECT 1 FROM campaign_versions LIMIT 1")).first():
        raise CommandError("campaigns were published: without their odds the draws by them cannot be verified")
