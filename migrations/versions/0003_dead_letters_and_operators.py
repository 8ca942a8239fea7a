"""Dead letters that can be replayed, operators and their actions: an expansion, as 0002.

Column types are spelled out here, not imported from column_types: this revision must build the same tables for ever.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError
from sqlalchemy.dialects import mysql

from tombola.migrations import repeatable

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TABLE_OPTIONS: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
IDENTITY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
REQUESTS = "api_idempotency_requests"
DEAD_LETTERS = "dead_letters"
INDEXES = {
    "idx_state_group": ["state", "group_id", "cause", "last_parked_at"],
    "idx_dead_letter_request_key": ["request_key"],
    "idx_dead_letter_session": ["lottery_session_id"],
    "idx_dead_letter_account": ["account_id", "state"],
    "idx_dead_letter_replay": ["replay_id", "state"],
    "idx_edited_from": ["edited_from"],
}
SHA_BEFORE = "the same message parked twice is one row"
SHA_NOW = "of the request, or of the body that is none: one row"


def key(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def _request_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("deliveries", sa.Integer(), nullable=True, comment="how often it had been delivered when it settled"),
        sa.Column("settled_by", sa.String(100), nullable=True, comment="the worker"),
    ]


def _dead_letter_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column(
            "state",
            key(16),
            nullable=False,
            server_default=sa.text("'parked'"),
            comment="see worker.dead_letters",
        ),
        sa.Column("state_at", TIME, nullable=True, comment="since when; null: parked by the previous release"),
        sa.Column("error_type", key(100), nullable=True, comment="the exception's name"),
        sa.Column("traceback", sa.Text(), nullable=True),
        sa.Column(
            "group_id",
            key(16),
            nullable=False,
            server_default=sa.text("''"),
            comment="alike in cause, type and place",
        ),
        sa.Column("headers", sa.Text(), nullable=True, comment="JSON: what came beside the body"),
        sa.Column("lottery_session_id", key(100), nullable=True),
        sa.Column("worker", sa.String(100), nullable=True, comment="who parked it, the last time"),
        sa.Column("version", sa.String(32), nullable=True, comment="its release"),
        sa.Column(
            "edited_from", sa.BigInteger(), nullable=True, comment="the dead letter that this is an edited copy of"
        ),
        sa.Column("replay_id", sa.BigInteger(), nullable=True, comment="the last replay that took it"),
    ]


def upgrade() -> None:
    for column in _request_columns():
        repeatable.add_column(REQUESTS, column)
    for column in _dead_letter_columns():
        repeatable.add_column(DEAD_LETTERS, column)
    _comment(SHA_NOW)
    for name, columns in INDEXES.items():
        repeatable.create_index(name, DEAD_LETTERS, columns)
    repeatable.create_table(
        "replays",
        sa.Column("id", IDENTITY, autoincrement=True, nullable=False),
        sa.Column("operator", sa.String(100), nullable=False, comment="who"),
        sa.Column("reason", sa.Text(), nullable=False, comment="why"),
        sa.Column("selection", sa.Text(), nullable=False, comment="JSON: which dead letters"),
        sa.Column("options", sa.Text(), nullable=False, comment="JSON: rate, limit, canary"),
        sa.Column("status", key(16), nullable=False, comment="running, done, stopped or failed"),
        sa.Column("stopped_because", sa.Text(), nullable=True, comment="why it ended early"),
        sa.Column("selected", sa.Integer(), nullable=False, comment="how many it was to replay when it began"),
        sa.Column("sent", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("settled", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("parked_again", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column(
            "refused",
            sa.Integer(),
            nullable=False,
            server_default=sa.text("0"),
            comment="left parked: see the forecast",
        ),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("seen_at", TIME, nullable=False, comment="the last sign of life of whoever runs it"),
        sa.Column("ended_at", TIME, nullable=True),
        sa.Column("stop_asked_at", TIME, nullable=True),
        sa.Column("stop_asked_by", sa.String(100), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_replays")),
        sa.CheckConstraint("status IN ('running', 'done', 'stopped', 'failed')", name=op.f("ck_replays_status")),
        sqlite_autoincrement=True,
        **TABLE_OPTIONS,
    )
    repeatable.create_index("idx_replay_status", "replays", ["status"])
    repeatable.create_table(
        "operators",
        sa.Column("name", key(64), nullable=False),
        sa.Column("role", key(16), nullable=False, comment="viewer or operator"),
        sa.Column("password_hash", sa.String(255), nullable=False, comment="argon2"),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_operators")),
        sa.CheckConstraint("role IN ('viewer', 'operator')", name=op.f("ck_operators_role")),
        **TABLE_OPTIONS,
    )
    repeatable.create_table(
        "operator_sessions",
        sa.Column("token_sha256", key(64), nullable=False),
        sa.Column("operator", key(64), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("seen_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("token_sha256", name=op.f("pk_operator_sessions")),
        **TABLE_OPTIONS,
    )
    repeatable.create_index("idx_operator_session_operator", "operator_sessions", ["operator"])
    repeatable.create_table(
        "operator_actions",
        sa.Column("id", IDENTITY, autoincrement=True, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("operator", sa.String(100), nullable=False, comment="who: a user's name, or shell:account@host"),
        sa.Column("action", key(32), nullable=False, comment="what"),
        sa.Column("reason", sa.Text(), nullable=False, comment="why"),
        sa.Column("count", sa.Integer(), nullable=False, comment="how many"),
        sa.Column("details", sa.Text(), nullable=False, comment="JSON: which, and what came of it"),
        sa.Column("replay_id", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operator_actions")),
        sqlite_autoincrement=True,
        **TABLE_OPTIONS,
    )
    repeatable.create_index("idx_action_replay", "operator_actions", ["replay_id"])


def downgrade() -> None:
    if not op.get_context().as_sql and repeatable.has_table("operator_actions"):
        _refuse_to_lose_what_operators_did(op.get_bind())
    for table in ("operator_actions", "operator_sessions", "operators", "replays"):
        repeatable.drop_table(table)
    for name in INDEXES:
        repeatable.drop_index(name, DEAD_LETTERS)
    _comment(SHA_BEFORE)
    for column in reversed(_dead_letter_columns()):
        repeatable.drop_column(DEAD_LETTERS, column.name)
    for column in reversed(_request_columns()):
        repeatable.drop_column(REQUESTS, column.name)


def _comment(text: str) -> None:
    kind = mysql.VARCHAR(64, charset="ascii", collation="ascii_bin")
    repeatable.comment_column(DEAD_LETTERS, "body_sha256", kind, nullable=False, text=text)


def _refuse_to_lose_what_operators_did(connection: sa.Connection) -> None:
    if connection.execute(sa.text("SELECT 1 FROM operator_actions LIMIT 1")).first():
        raise CommandError("operator_actions is kept for ever, and the revision before has no table for it")
