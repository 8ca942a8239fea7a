"""The dead letters: the one table that only what stands behind the broker knows."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
)
from sqlalchemy.dialects import mysql

from producers.database import Identity, Key, UtcTime
from producers.schema import TABLE_OPTIONS, metadata

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", Identity, primary_key=True, autoincrement=True),
    Column("body_sha256", Key(64), nullable=False, comment="the same message parked twice is one row"),
    Column("cause", Key(32), nullable=False),
    Column("error", Text, nullable=False, comment="what was wrong, in one line"),
    Column("body", LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb"), nullable=False),
    Column("body_bytes", Integer, nullable=False, comment="its whole length: body keeps the beginning"),
    Column("request_key", Key(64)),
    Column("account_id", BigInteger),
    Column("queue", String(50), nullable=False),
    Column("deliveries", Integer, nullable=False),
    Column("times_parked", Integer, nullable=False),
    Column("first_parked_at", UtcTime, nullable=False),
    Column("last_parked_at", UtcTime, nullable=False),
    Index("uk_body_sha256", "body_sha256", unique=True),
    sqlite_autoincrement=True,
    **TABLE_OPTIONS,
)
