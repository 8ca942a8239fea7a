"""What only those behind the broker know: the dead letters, the operators, and what operators did."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    Integer,
    LargeBinary,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects import mysql

from producers.database import Identity, Key, UtcTime
from producers.schema import TABLE_OPTIONS, metadata

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", Identity, primary_key=True, autoincrement=True),
    Column("body_sha256", Key(64), nullable=False, comment="of the request, or of the body that is none: one row"),
    Column("state", Key(16), nullable=False, server_default=text("'parked'"), comment="see worker.dead_letters"),
    Column("state_at", UtcTime, comment="since when; null: parked by the previous release"),
    Column("cause", Key(32), nullable=False),
    Column("error", Text, nullable=False, comment="what was wrong, in one line"),
    Column("error_type", Key(100), comment="the exception's name"),
    Column("traceback", Text),
    Column("group_id", Key(16), nullable=False, server_default=text("''"), comment="alike in cause, type and place"),
    Column("body", LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb"), nullable=False),
    Column("body_bytes", Integer, nullable=False, comment="its whole length: body keeps the beginning"),
    Column("headers", Text, comment="JSON: what came beside the body"),
    Column("request_key", Key(64)),
    Column("lottery_session_id", Key(100)),
    Column("account_id", BigInteger),
    Column("queue", String(50), nullable=False),
    Column("deliveries", Integer, nullable=False),
    Column("times_parked", Integer, nullable=False),
    Column("first_parked_at", UtcTime, nullable=False),
    Column("last_parked_at", UtcTime, nullable=False),
    Column("worker", String(100), comment="who parked it, the last time"),
    Column("version", String(32), comment="its release"),
    Column("edited_from", BigInteger, comment="the dead letter that this is an edited copy of"),
    Column("replay_id", BigInteger, comment="the last replay that took it"),
    Index("uk_body_sha256", "body_sha256", unique=True),
    # Lists are by state, newest or oldest first, perhaps of one cause or group; counts need nothing but the index.
    Index("idx_state_group", "state", "group_id", "cause", "last_parked_at"),
    Index("idx_dead_letter_request_key", "request_key"),
    Index("idx_dead_letter_session", "lottery_session_id"),
    Index("idx_dead_letter_account", "account_id", "state"),
    Index("idx_dead_letter_replay", "replay_id", "state"),
    Index("idx_edited_from", "edited_from"),
    sqlite_autoincrement=True,
    **TABLE_OPTIONS,
)

replays = Table(
    "replays",
    metadata,
    Column("id", Identity, primary_key=True, autoincrement=True),
    Column("operator", String(100), nullable=False, comment="who"),
    Column("reason", Text, nullable=False, comment="why"),
    Column("selection", Text, nullable=False, comment="JSON: which dead letters"),
    Column("options", Text, nullable=False, comment="JSON: rate, limit, canary"),
    Column("status", Key(16), nullable=False, comment="running, done, stopped or failed"),
    Column("stopped_because", Text, comment="why it ended early"),
    Column("selected", Integer, nullable=False, comment="how many it was to replay when it began"),
    Column("sent", Integer, nullable=False, server_default=text("0")),
    Column("settled", Integer, nullable=False, server_default=text("0")),
    Column("parked_again", Integer, nullable=False, server_default=text("0")),
    Column("refused", Integer, nullable=False, server_default=text("0"), comment="left parked: see the forecast"),
    Column("started_at", UtcTime, nullable=False),
    Column("seen_at", UtcTime, nullable=False, comment="the last sign of life of whoever runs it"),
    Column("ended_at", UtcTime),
    Column("stop_asked_at", UtcTime),
    Column("stop_asked_by", String(100)),
    Index("idx_replay_status", "status"),
    CheckConstraint("status IN ('running', 'done', 'stopped', 'failed')", name="status"),
    sqlite_autoincrement=True,
    **TABLE_OPTIONS,
)

operators = Table(
    "operators",
    metadata,
    Column("name", Key(64), nullable=False),
    Column("role", Key(16), nullable=False, comment="viewer or operator"),
    Column("password_hash", String(255), nullable=False, comment="argon2"),
    Column("created_at", UtcTime, nullable=False),
    PrimaryKeyConstraint("name"),
    CheckConstraint("role IN ('viewer', 'operator')", name="role"),
    **TABLE_OPTIONS,
)

operator_sessions = Table(
    "operator_sessions",
    metadata,
    Column("token_sha256", Key(64), nullable=False),
    Column("operator", Key(64), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("seen_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    PrimaryKeyConstraint("token_sha256"),
    Index("idx_operator_session_operator", "operator"),
    **TABLE_OPTIONS,
)

# Nothing here is ever changed or deleted: worker.operators only inserts.
operator_actions = Table(
    "operator_actions",
    metadata,
    Column("id", Identity, primary_key=True, autoincrement=True),
    Column("at", UtcTime, nullable=False),
    Column("operator", String(100), nullable=False, comment="who: a user's name, or shell:account@host"),
    Column("action", Key(32), nullable=False, comment="what"),
    Column("reason", Text, nullable=False, comment="why"),
    Column("count", Integer, nullable=False, comment="how many"),
    Column("details", Text, nullable=False, comment="JSON: which, and what came of it"),
    Column("replay_id", BigInteger),
    Index("idx_action_replay", "replay_id"),
    sqlite_autoincrement=True,
    **TABLE_OPTIONS,
)
