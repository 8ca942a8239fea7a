"""The outbox, retention and API keys: an expansion, workers of the previous release go on writing.

Column types are spelled out here, not imported from column_types: this revision must build the same tables for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError
from sqlalchemy.dialects import mysql

from tombola.migrations import repeatable

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLE_OPTIONS: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
MONEY = sa.Numeric(10, 2).with_variant(sa.BigInteger(), "sqlite")  # hundredths there: its DECIMAL is a float
TIME = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
REQUESTS = "api_idempotency_requests"
STATUS = "ck_api_idempotency_requests_status"
RESULT = "ck_api_idempotency_requests_result"
STATUSES_BEFORE = "status IN ('accepted', 'completed', 'rejected')"
STATUSES = "status IN ('accepted', 'completed', 'rejected', 'dead')"
HAS_RESULT_BEFORE = "(status = 'accepted') = (result IS NULL)"
HAS_RESULT = "result IS NULL OR status IN ('completed', 'rejected')"
TEXT = sa.Text().with_variant(mysql.MEDIUMTEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")
# Columns whose comment changes: column, type, nullable, comment before, comment after.
COMMENTS: tuple[tuple[str, Any, bool, str, str], ...] = (
    (
        "status",
        mysql.VARCHAR(16, charset="ascii", collation="ascii_bin"),
        False,
        "accepted, completed or rejected",
        "accepted, completed, rejected or dead",
    ),
    ("reason", sa.String(50), True, "why it was rejected", "why it was rejected, or is dead"),
    (
        "result",
        TEXT,
        True,
        "the first result, byte for byte",
        "the first result, byte for byte; archived: rebuilt from the ledger",
    ),
)


def key(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def _requests(*added: sa.Column[Any], statuses: str, has_result: str) -> sa.Table:
    """The table as it is before a change, for SQLite, which cannot alter a table and copies it."""
    return sa.Table(
        REQUESTS,
        sa.MetaData(),
        sa.Column("request_key", key(64), nullable=False),
        sa.Column("lottery_session_id", key(100), nullable=False),
        sa.Column("account_id", sa.BigInteger(), nullable=False),
        sa.Column("campaign", key(64), nullable=False),
        sa.Column("fingerprint", key(64), nullable=False),
        sa.Column("status", key(16), nullable=False),
        sa.Column("reason", sa.String(50), nullable=True),
        sa.Column("result", TEXT, nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("settled_at", TIME, nullable=True),
        *added,
        sa.PrimaryKeyConstraint("request_key", name=op.f("pk_api_idempotency_requests")),
        sa.UniqueConstraint("lottery_session_id", name=op.f("uk_request_lottery_session_id")),
        sa.CheckConstraint(statuses, name=op.f(STATUS)),
        sa.CheckConstraint(has_result, name=op.f(RESULT)),
    )


def _added() -> list[sa.Column[Any]]:
    return [
        sa.Column(
            "caller",
            key(64),
            nullable=False,
            server_default=sa.text("''"),
            comment="whose key it is; empty: no API key",
        ),
        sa.Column(
            "accepted_at",
            TIME,
            nullable=True,
            comment="when it was promised, the last time; null: it came by the broker alone",
        ),
        sa.Column("balance_told", MONEY, nullable=True, comment="the balance in an archived rejection"),
        sa.Column("publish_attempts", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("publish_error", sa.String(200), nullable=True, comment="why the last attempt failed"),
        sa.Column("published_at", TIME, nullable=True, comment="the last attempt"),
        sa.Column(
            "publish_at", TIME, nullable=True, comment="when the relay publishes it, if it is still only accepted"
        ),
    ]


def upgrade() -> None:
    before = _requests(statuses=STATUSES_BEFORE, has_result=HAS_RESULT_BEFORE)
    with _altering(before) as table:
        for column in _added():
            if repeatable.is_to_be_added(REQUESTS, column.name):
                table.add_column(column)
        table.create_check_constraint(op.f(STATUS), sa.text(STATUSES))
        table.create_check_constraint(op.f(RESULT), sa.text(HAS_RESULT))
    _comment(after=True)
    # Retention finds settled requests by publish_at.
    op.execute(f"UPDATE {REQUESTS} SET publish_at = created_at WHERE publish_at IS NULL")
    repeatable.create_index("idx_status_publish_at", REQUESTS, ["status", "publish_at"])
    repeatable.create_table(
        "api_keys",
        sa.Column("key_id", key(16), nullable=False, comment="the part of the key that may be shown"),
        sa.Column("caller", key(64), nullable=False, comment="who holds it; several keys may be one caller's"),
        sa.Column("secret_sha256", key(64), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("revoked_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_api_keys")),
        **TABLE_OPTIONS,
    )
    repeatable.create_index("idx_caller", "api_keys", ["caller"])


def downgrade() -> None:
    if not op.get_context().as_sql:
        _refuse_to_lose_what_only_this_revision_can_say(op.get_bind())
    repeatable.drop_table("api_keys")
    repeatable.drop_index("idx_status_publish_at", REQUESTS)
    with _altering(_requests(*_added(), statuses=STATUSES, has_result=HAS_RESULT)) as table:
        for column in _added():
            if repeatable.has_column(REQUESTS, column.name):
                table.drop_column(column.name)
        table.create_check_constraint(op.f(STATUS), sa.text(STATUSES_BEFORE))
        table.create_check_constraint(op.f(RESULT), sa.text(HAS_RESULT_BEFORE))
    _comment(after=False)


@contextmanager
def _altering(before: sa.Table) -> Iterator[Any]:
    """Alter the requests table after dropping its two checks. SQLite cannot alter a table, and copies it."""
    with op.batch_alter_table(REQUESTS, copy_from=before) as table:
        if op.get_context().dialect.name == "sqlite":
            table.drop_constraint(op.f(STATUS), type_="check")
            table.drop_constraint(op.f(RESULT), type_="check")
        else:
            for name in (STATUS, RESULT):
                repeatable.drop_check(REQUESTS, name)
        yield table


def _comment(*, after: bool) -> None:
    for column, kind, nullable, before, now in COMMENTS:
        repeatable.comment_column(REQUESTS, column, kind, nullable=nullable, text=now if after else before)


def _refuse_to_lose_what_only_this_revision_can_say(connection: sa.Connection) -> None:
    lost = f"SELECT 1 FROM {REQUESTS} WHERE status = 'dead' OR (status <> 'accepted' AND result IS NULL) LIMIT 1"
    if connection.execute(sa.text(lost)).first():
        raise CommandError(f"{REQUESTS} holds dead or archived requests, which the revision before cannot express")
