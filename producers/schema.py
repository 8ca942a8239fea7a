"""The tables' MetaData, and `api_idempotency_requests`: the first of the three layers (SPEC, plan A)."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    UniqueConstraint,
)

from producers.database import Body, Key, UtcTime

# Constraints need names to be changed later; `uk_` and `idx_` are the owner's prefixes.
metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uk_%(column_0_name)s",
        "ix": "idx_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)

# Every table says its engine and character set: the server's default may be latin1, or compare without case.
TABLE_OPTIONS: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}

api_idempotency_requests = Table(
    "api_idempotency_requests",
    metadata,
    Column("request_key", Key(64), nullable=False),
    Column("lottery_session_id", Key(100), nullable=False),
    Column("account_id", BigInteger, nullable=False, comment="as asked for: the account may not exist"),
    Column("campaign", Key(64), nullable=False),
    Column("fingerprint", Key(64), nullable=False, comment="SHA-256 of the canonical request"),
    Column("status", Key(16), nullable=False, comment="accepted, completed or rejected"),
    Column("reason", String(50), comment="why it was rejected"),
    Column("result", Body(), comment="the first result, byte for byte"),
    Column("created_at", UtcTime, nullable=False),
    Column("settled_at", UtcTime),
    PrimaryKeyConstraint("request_key"),
    # A session is one draw's, or its result would change when the second one settles.
    UniqueConstraint("lottery_session_id", name="uk_request_lottery_session_id"),
    CheckConstraint("status IN ('accepted', 'completed', 'rejected')", name="status"),
    CheckConstraint("(status = 'accepted') = (result IS NULL)", name="result"),
    **TABLE_OPTIONS,
)
