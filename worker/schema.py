"""The owner's tables (SPEC, Tables), and the dead letters."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects import mysql

from producers.database import Identity, Key, Money, UtcTime
from producers.schema import TABLE_OPTIONS, metadata

account_asset_balances = Table(
    "account_asset_balances",
    metadata,
    Column("id", Identity, primary_key=True, autoincrement=True),
    Column("user_id", BigInteger, nullable=False),
    Column("asset_code", Key(50), nullable=False),
    Column("balance", Money, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    UniqueConstraint("user_id", "asset_code", name="uk_user_asset"),
    CheckConstraint("balance >= 0", name="balance"),
    # DECIMAL(10,2) ends there by itself; in hundredths SQLite would go on counting.
    CheckConstraint("balance <= 9999999999", name="balance_max").ddl_if(dialect="sqlite"),
    sqlite_autoincrement=True,
    **TABLE_OPTIONS,
)

asset_transactions = Table(
    "asset_transactions",
    metadata,
    Column("transaction_id", Identity, primary_key=True, autoincrement=True),
    Column("account_id", BigInteger, ForeignKey(account_asset_balances.c.id), nullable=False),
    Column("business_id", Key(100), nullable=False, comment="deprecated: the session id, for old readers"),
    Column("lottery_session_id", Key(100), nullable=False),
    Column("idempotency_key", Key(100), nullable=False),
    Column("business_type", Key(50), nullable=False),
    Column("asset_code", Key(50), nullable=False),
    Column("delta_amount", Money, nullable=False),
    Column("balance_before", Money, nullable=False),
    Column("balance_after", Money, nullable=False),
    Column("notes", Text),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    Index("uk_idempotency_key", "idempotency_key", unique=True),
    Index("idx_lottery_session_id", "lottery_session_id"),
    Index("idx_account_created", "account_id", "created_at"),
    CheckConstraint("balance_before >= 0 AND balance_after >= 0", name="balance"),
    sqlite_autoincrement=True,
    **TABLE_OPTIONS,
)

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
