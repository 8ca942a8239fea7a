"""The tables that both sides know: the owner's ledger (SPEC, Tables), the requests and who may make them.

Frontends read the ledger, workers write it. `api_idempotency_requests` is the first of the three layers (SPEC, plan A).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from producers.database import Body, Identity, Key, Money, UtcTime

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

api_idempotency_requests = Table(
    "api_idempotency_requests",
    metadata,
    Column("request_key", Key(64), nullable=False),
    Column("lottery_session_id", Key(100), nullable=False),
    Column("account_id", BigInteger, nullable=False, comment="as asked for: the account may not exist"),
    Column("campaign", Key(64), nullable=False),
    Column("fingerprint", Key(64), nullable=False, comment="SHA-256 of the canonical request"),
    Column("status", Key(16), nullable=False, comment="accepted, completed, rejected or dead"),
    Column("reason", String(50), comment="why it was rejected, or is dead"),
    Column("result", Body(), comment="the first result, byte for byte; archived: rebuilt from the ledger"),
    Column("created_at", UtcTime, nullable=False),
    Column("settled_at", UtcTime),
    Column("caller", Key(64), nullable=False, server_default=text("''"), comment="whose key it is; empty: no API key"),
    Column("accepted_at", UtcTime, comment="when it was promised, the last time; null: it came by the broker alone"),
    Column("balance_told", Money, comment="the balance in an archived rejection"),
    Column("publish_attempts", Integer, nullable=False, server_default=text("0")),
    Column("publish_error", String(200), comment="why the last attempt failed"),
    Column("published_at", UtcTime, comment="the last attempt"),
    Column("publish_at", UtcTime, comment="when the relay publishes it, if it is still only accepted"),
    Column("deliveries", Integer, comment="how often it had been delivered when it settled"),
    Column("settled_by", String(100), comment="the worker"),
    PrimaryKeyConstraint("request_key"),
    # A session is one draw's, or its result would change when the second one settles.
    UniqueConstraint("lottery_session_id", name="uk_request_lottery_session_id"),
    # The outbox for the relay, and the settled ones in the order of their age for retention.
    Index("idx_status_publish_at", "status", "publish_at"),
    CheckConstraint("status IN ('accepted', 'completed', 'rejected', 'dead')", name="status"),
    CheckConstraint("result IS NULL OR status IN ('completed', 'rejected')", name="result"),
    **TABLE_OPTIONS,
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", Key(16), nullable=False, comment="the part of the key that may be shown"),
    Column("caller", Key(64), nullable=False, comment="who holds it; several keys may be one caller's"),
    Column("secret_sha256", Key(64), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("revoked_at", UtcTime),
    Column("accounts", Key(2000), comment="the accounts that it is for, e.g. 6,7,100-199"),
    Column("user_prefix", Key(19), comment="it is for the accounts of users whose id begins so; both null: for all"),
    PrimaryKeyConstraint("key_id"),
    Index("idx_caller", "caller"),
    **TABLE_OPTIONS,
)
