"""All tables: the owner's ledger (ARCHITECTURE, Tables), the requests, API keys, dead letters, operators.

Frontends read the ledger, workers write the ledger. `api_idempotency_requests` is the first layer
(ARCHITECTURE, Three layers).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects import mysql

from tombola.producers.storage.column_types import Body, Identity, Key, Money, Total, UtcTime

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

# Every table names its engine and character set: the server's default may be latin1, or ignore case.
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
    # DECIMAL(10,2) has this limit by itself; SQLite's whole hundredths have none.
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
    # Null: rebuilt from the ledger (ARCHITECTURE, The transaction). Older releases stored the first result here.
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
    Column("odds_hash", Key(64), comment="the version that was live at acceptance; null: default"),
    Column("kind", Key(16), comment="what is asked for; null: a draw of contract v1"),
    Column("terms", Key(255), comment="JSON: the fields of that kind"),
    Column("seed_epoch", Integer, comment="the epoch that a draw is bound to; null: it binds when it settles"),
    PrimaryKeyConstraint("request_key"),
    # A session belongs to one draw; otherwise its result would change when a second draw settles.
    UniqueConstraint("lottery_session_id", name="uk_request_lottery_session_id"),
    # The outbox for the relay, and settled requests by age for audits and retention.
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
    Column("scopes", Key(64), comment="what it may do, e.g. draw,read,money; null: draw,read"),
    Column("expires_at", UtcTime, comment="from when on it is refused; null: never"),
    PrimaryKeyConstraint("key_id"),
    Index("idx_caller", "caller"),
    **TABLE_OPTIONS,
)

# ---- behind the broker -----------------------------------------------------------------------------------------------

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
    # Lists are by state, newest or oldest first, perhaps of one cause or group; counts read only the index.
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

# Rows are never changed or deleted: worker.operators only inserts.
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
    Column("act_key", Key(64), comment="the act happens once under it; null: the action has no key"),
    Index("idx_action_replay", "replay_id"),
    Index("uk_act_key", "act_key", unique=True),
    sqlite_autoincrement=True,
    **TABLE_OPTIONS,
)

# ---- campaigns -------------------------------------------------------------------------------------------------------

campaigns = Table(
    "campaigns",
    metadata,
    Column("name", Key(64), nullable=False),
    Column("live_hash", Key(64), comment="the version that new requests are drawn by"),
    Column("state", Key(16), nullable=False, comment="draft, open, paused or closed"),
    Column("revision", BigInteger, nullable=False, comment="rises with every change of any campaign"),
    Column("updated_at", UtcTime, nullable=False),
    PrimaryKeyConstraint("name"),
    Index("uk_campaign_revision", "revision", unique=True),
    CheckConstraint("state IN ('draft', 'open', 'paused', 'closed')", name="state"),
    **TABLE_OPTIONS,
)

# Rows are only added: ledger rows name the odds that they were drawn by.
campaign_versions = Table(
    "campaign_versions",
    metadata,
    Column("odds_hash", Key(64), nullable=False, comment="SHA-256 of the manifest's canonical form"),
    Column("campaign", Key(64), nullable=False),
    Column("version", Integer, nullable=False),
    Column("manifest", Body(), nullable=False, comment="the canonical form, to the byte"),
    Column("created_by", String(100), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("published_at", UtcTime, nullable=False),
    PrimaryKeyConstraint("odds_hash"),
    UniqueConstraint("campaign", "version", name="uk_campaign_version"),
    **TABLE_OPTIONS,
)

campaign_accounts = Table(
    "campaign_accounts",
    metadata,
    Column("standing_key", Key(100), nullable=False, comment="account id and campaign"),
    Column("account_id", BigInteger, nullable=False),
    Column("campaign", Key(64), nullable=False),
    Column("standing", Text, nullable=False, comment="JSON: pulls, spending, counters"),
    Column("updated_at", UtcTime, nullable=False),
    PrimaryKeyConstraint("standing_key"),
    Index("idx_campaign_account", "account_id"),
    **TABLE_OPTIONS,
)

campaign_stock = Table(
    "campaign_stock",
    metadata,
    Column("stock_key", Key(120), nullable=False, comment="campaign, prize and shard"),
    Column("campaign", Key(64), nullable=False),
    Column("prize", Key(64), nullable=False),
    Column("units", BigInteger, nullable=False, comment="what is left in this shard"),
    PrimaryKeyConstraint("stock_key"),
    CheckConstraint("units >= 0", name="units"),
    **TABLE_OPTIONS,
)

# Rows are only added: their sum is what was ever there to be won.
campaign_stock_changes = Table(
    "campaign_stock_changes",
    metadata,
    Column("id", Identity, primary_key=True, autoincrement=True),
    Column("campaign", Key(64), nullable=False),
    Column("prize", Key(64), nullable=False),
    Column("units", BigInteger, nullable=False, comment="published or restocked; negative: withdrawn"),
    Column("operator", String(100), nullable=False, comment="who"),
    Column("reason", Text, nullable=False, comment="why"),
    Column("at", UtcTime, nullable=False),
    Index("idx_stock_change_prize", "campaign", "prize"),
    sqlite_autoincrement=True,
    **TABLE_OPTIONS,
)

campaign_codes = Table(
    "campaign_codes",
    metadata,
    Column("code", Key(100), nullable=False, comment="handed out once, ever"),
    Column("campaign", Key(64), nullable=False),
    Column("prize", Key(64), nullable=False),
    Column("taken_by", Key(100), comment="the ledger row that handed it out"),
    PrimaryKeyConstraint("code"),
    Index("idx_code_free", "campaign", "prize", "taken_by"),
    **TABLE_OPTIONS,
)

account_lists = Table(
    "account_lists",
    metadata,
    Column("name", Key(64), nullable=False),
    Column("account_id", BigInteger, nullable=False),
    PrimaryKeyConstraint("name", "account_id"),
    **TABLE_OPTIONS,
)

# ---- seeds -----------------------------------------------------------------------------------------------------------

# Rows are only added: the anchor is published, and later secrets are checked against it.
seed_chains = Table(
    "seed_chains",
    metadata,
    Column("chain", Integer, nullable=False, autoincrement=False, comment="from 1; 0: draws of before the epochs"),
    Column("anchor", Key(64), nullable=False, comment="what all secrets of the chain hash down to"),
    Column("epochs", Integer, nullable=False, comment="how many"),
    Column("seed_id", Key(16), nullable=False, comment="of its master seed: the beginning of its SHA-256"),
    Column("begun_at", UtcTime, nullable=False, comment="when its first epoch opens"),
    PrimaryKeyConstraint("chain"),
    Index("uk_seed_anchor", "anchor", unique=True),
    **TABLE_OPTIONS,
)

seed_epochs = Table(
    "seed_epochs",
    metadata,
    Column("id", Integer, nullable=False, autoincrement=False, comment="10,000 for each chain, and the epoch"),
    Column("chain", Integer, nullable=False),
    Column("epoch", Integer, nullable=False, comment="within its chain, from 1"),
    Column("opens_at", UtcTime, nullable=False, comment="draws bind to it from here on"),
    Column("closes_at", UtcTime, comment="and up to here; as opens_at: its chain ended before"),
    Column("commitment", Key(64), nullable=False, comment="a hash of its secret, known before it opens"),
    Column("revealed", Key(64), comment="its secret, once no draw can be bound to it any more"),
    Column("revealed_at", UtcTime),
    PrimaryKeyConstraint("id"),
    Index("idx_seed_epoch_opens", "opens_at"),
    **TABLE_OPTIONS,
)

# ---- what happens outside --------------------------------------------------------------------------------------------

webhooks = Table(
    "webhooks",
    metadata,
    Column("name", Key(64), nullable=False),
    Column("url", String(500), nullable=False),
    Column("secret", Key(128), nullable=False, comment="signs what is sent; never shown again"),
    Column("events", Key(255), nullable=False, comment="JSON: which events it gets"),
    Column("campaign", Key(64), comment="of one campaign only; null: of all"),
    Column("former_secret", Key(128), comment="signs as well, until former_until"),
    Column("former_until", UtcTime),
    Column("created_by", String(100), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("removed_at", UtcTime),
    PrimaryKeyConstraint("name"),
    **TABLE_OPTIONS,
)

fulfilments = Table(
    "fulfilments",
    metadata,
    Column("id", Identity, primary_key=True, autoincrement=True),
    Column("idempotency_key", Key(100), nullable=False, comment="the ledger row's key, or the request's"),
    Column("webhook", Key(64), nullable=False, comment="where it goes; empty: not known when it was made"),
    Column("event", Key(64), nullable=False),
    Column("campaign", Key(64), nullable=False),
    Column("account_id", BigInteger, nullable=False),
    Column("lottery_session_id", Key(100), nullable=False),
    Column("state", Key(16), nullable=False, comment="pending, delivered or dead"),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("next_at", UtcTime, nullable=False, comment="when the relay sends it next"),
    Column("error", String(200), comment="why the last attempt failed"),
    Column("created_at", UtcTime, nullable=False),
    Column("ended_at", UtcTime, comment="delivered, or given up"),
    Index("uk_fulfilment", "idempotency_key", "webhook", "event", unique=True),
    # What is due of each webhook, so that one webhook's backlog delays no other.
    Index("idx_fulfilment_due", "state", "webhook", "next_at"),
    Index("idx_fulfilment_session", "lottery_session_id"),
    CheckConstraint("state IN ('pending', 'delivered', 'dead')", name="state"),
    sqlite_autoincrement=True,
    **TABLE_OPTIONS,
)

# ---- books -----------------------------------------------------------------------------------------------------------

# A hold takes its amount from the balance; posting or voiding the hold ends it, once.
account_holds = Table(
    "account_holds",
    metadata,
    Column("hold_key", Key(64), nullable=False, comment="the request key of the hold"),
    Column("account_id", BigInteger, nullable=False),
    Column("asset_code", Key(50), nullable=False),
    Column("amount", Money, nullable=False),
    Column("state", Key(16), nullable=False, comment="open, posted or voided"),
    Column("expires_at", UtcTime, nullable=False, comment="when an open hold is voided"),
    Column("created_at", UtcTime, nullable=False),
    Column("updated_at", UtcTime, nullable=False),
    PrimaryKeyConstraint("hold_key"),
    Index("idx_hold_state_expires", "state", "expires_at"),
    Index("idx_hold_account", "account_id", "state"),
    CheckConstraint("state IN ('open', 'posted', 'voided')", name="state"),
    **TABLE_OPTIONS,
)

# Rows are only added: each block's hash covers the block before it.
books_blocks = Table(
    "books_blocks",
    metadata,
    Column("number", BigInteger, nullable=False, autoincrement=False, comment="from 1, without a gap"),
    Column("first_id", BigInteger, nullable=False, comment="the first transaction_id of the block's range"),
    Column("last_id", BigInteger, nullable=False, comment="the last transaction_id of the block's range"),
    Column("row_count", BigInteger, nullable=False, comment="how many ledger rows the range has"),
    Column("root", Key(64), nullable=False, comment="the Merkle root of the rows (RFC 6962)"),
    Column("sums", Body(), nullable=False, comment="JSON: what house accounts moved"),
    Column("previous", Key(64), nullable=False, comment="the hash of the block before"),
    Column("hash", Key(64), nullable=False),
    Column("sealed_at", UtcTime, nullable=False),
    PrimaryKeyConstraint("number"),
    Index("uk_block_last_id", "last_id", unique=True),
    **TABLE_OPTIONS,
)

# The other side of the ledger's rows, which have the users' side only: one row for each house account that moved.
books_house = Table(
    "books_house",
    metadata,
    Column("block", BigInteger, nullable=False),
    Column("account", Key(128), nullable=False, comment="house/..."),
    Column("asset_code", Key(50), nullable=False),
    Column("delta", Total, nullable=False),
    Column("balance", Total, nullable=False, comment="after this block"),
    PrimaryKeyConstraint("block", "account", "asset_code"),
    Index("idx_house_account", "account", "asset_code", "block"),
    **TABLE_OPTIONS,
)

# One row: whose lock makes a process the leader of sealing.
books_head = Table(
    "books_head",
    metadata,
    Column("name", Key(16), nullable=False, comment="always `head`"),
    Column("seen", Text, nullable=False, comment="JSON: when which transaction_id was the highest"),
    Column("peaks", Text, nullable=False, comment="JSON: the tree over all blocks, as its perfect subtrees"),
    Column("checkpoint", Text, comment="the last signed head; null: no key signs"),
    Column("checkpoint_at", UtcTime, comment="when it was signed"),
    Column("anchored_at", UtcTime, comment="when a checkpoint was last written outside"),
    PrimaryKeyConstraint("name"),
    **TABLE_OPTIONS,
)

books_snapshots = Table(
    "books_snapshots",
    metadata,
    Column("account_id", BigInteger, nullable=False),
    Column("block", BigInteger, nullable=False),
    Column("transaction_id", BigInteger, nullable=False, comment="the account's last ledger row up to this block"),
    Column("balance", Money, nullable=False, comment="after that row"),
    PrimaryKeyConstraint("account_id", "block"),
    Index("idx_snapshot_block", "block"),
    **TABLE_OPTIONS,
)

# Where the last clean audit ended: one row. The next audit goes on from there, if `mac` says that nobody changed it.
audit_marks = Table(
    "audit_marks",
    metadata,
    Column("id", BigInteger, nullable=False, autoincrement=False, comment="always 1"),
    Column("mark", Body(), nullable=False, comment="JSON: worker.audit.marks.Mark"),
    Column("mac", Key(64), nullable=False, comment="HMAC of the mark and of audited_accounts, by the seed"),
    PrimaryKeyConstraint("id"),
    **TABLE_OPTIONS,
)

# What the chain of each account came to at that mark, many accounts to a row.
audited_accounts = Table(
    "audited_accounts",
    metadata,
    Column("band", BigInteger, nullable=False, autoincrement=False, comment="accounts with ids near each other"),
    Column("state", LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb"), nullable=False),
    PrimaryKeyConstraint("band"),
    **TABLE_OPTIONS,
)

# ---- verifiable draws ------------------------------------------------------------------------------------------------

# Rows are never deleted: whoever keeps a receipt finds its key.
receipt_keys = Table(
    "receipt_keys",
    metadata,
    Column("kid", Key(16), nullable=False, comment="SHA-256 of the public key, the first 16 hex digits"),
    Column("public_key", Key(64), nullable=False, comment="Ed25519, 32 bytes in hex"),
    Column("valid_from", UtcTime, nullable=False, comment="when a process first had the key in its settings"),
    Column("valid_until", UtcTime, comment="when a process with a newer key had it no more; null: it signs"),
    PrimaryKeyConstraint("kid"),
    **TABLE_OPTIONS,
)

# ---- conformity ------------------------------------------------------------------------------------------------------

# What draws came to: worker.conformity counts sealed blocks, one part of them after the other. Rows are only added.
conformity_parts = Table(
    "conformity_parts",
    metadata,
    Column("first_block", BigInteger, nullable=False, autoincrement=False),
    Column("block", BigInteger, nullable=False, comment="the last block of the part"),
    Column("draws", BigInteger, nullable=False, comment="charges that were counted"),
    Column("unreadable", BigInteger, nullable=False, comment="charges whose notes say no draw by known odds"),
    Column("counted_at", UtcTime, nullable=False),
    PrimaryKeyConstraint("first_block"),
    **TABLE_OPTIONS,
)

conformity_counts = Table(
    "conformity_counts",
    metadata,
    Column("odds_hash", Key(64), nullable=False),
    Column("hour", UtcTime, nullable=False),
    Column("caller", Key(64), nullable=False, comment="empty: no API key"),
    Column("tier", Key(64), nullable=False, comment="empty: none"),
    Column("since_hit", Key(64), nullable=False, comment="counters of guarantees, as far as chances depend on them"),
    Column("drawn", Key(64), nullable=False, comment="the prize of the ticket, sold out or not"),
    Column("block", BigInteger, nullable=False, comment="the part"),
    Column("pulls", BigInteger, nullable=False),
    PrimaryKeyConstraint("odds_hash", "hour", "caller", "tier", "since_hit", "drawn", "block"),
    **TABLE_OPTIONS,
)

conformity_accounts = Table(
    "conformity_accounts",
    metadata,
    Column("odds_hash", Key(64), nullable=False),
    Column("day", UtcTime, nullable=False),
    Column("account_id", BigInteger, nullable=False),
    Column("block", BigInteger, nullable=False, comment="the part"),
    Column("pulls", BigInteger, nullable=False),
    Column("wins", BigInteger, nullable=False),
    Column("expected", Double, nullable=False, comment="the sum of the chances p of a win"),
    Column("variance", Double, nullable=False, comment="the sum of p(1 - p)"),
    Column("capital_low", Double, nullable=False, comment="ln of what 1 became that staked 0.05 of itself on each win"),
    Column("capital_middle", Double, nullable=False, comment="the same, 0.3"),
    Column("capital_high", Double, nullable=False, comment="the same, 0.9"),
    PrimaryKeyConstraint("odds_hash", "day", "account_id", "block"),
    **TABLE_OPTIONS,
)
