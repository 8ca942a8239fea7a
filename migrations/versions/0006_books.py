"""Books: holds, sealed blocks, house accounts, snapshots, what an API key may do, keys of operators' acts.

An expansion, as 0005.

The previous release runs beside this schema: it neither reads nor writes the new tables, and takes keys without looking
at their scopes. Column types are spelled out here: this revision must build the same tables for ever.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError
from sqlalchemy.dialects import mysql

from tombola.migrations import repeatable

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TABLE_OPTIONS: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
TIME = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
BODY = sa.Text().with_variant(mysql.MEDIUMTEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")
MONEY = sa.Numeric(10, 2).with_variant(sa.BigInteger(), "sqlite")
TOTAL = sa.Numeric(20, 2).with_variant(sa.BigInteger(), "sqlite")


def key(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def _api_key_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("scopes", key(64), nullable=True, comment="what it may do, e.g. draw,read,money; null: draw,read"),
        sa.Column("expires_at", TIME, nullable=True, comment="from when on it is refused; null: never"),
    ]


def _act_key() -> sa.Column[Any]:
    comment = "the act happens once under it; null: the action has no key"
    return sa.Column("act_key", key(64), nullable=True, comment=comment)


def upgrade() -> None:
    for column in _api_key_columns():
        repeatable.add_column("api_keys", column)
    repeatable.add_column("operator_actions", _act_key())
    repeatable.create_index("uk_act_key", "operator_actions", ["act_key"], unique=True)
    _create_holds()
    _create_blocks()
    _create_snapshots()
    _create_marks()


def _create_holds() -> None:
    repeatable.create_table(
        "account_holds",
        sa.Column("hold_key", key(64), nullable=False, comment="the request key of the hold"),
        sa.Column("account_id", sa.BigInteger(), nullable=False),
        sa.Column("asset_code", key(50), nullable=False),
        sa.Column("amount", MONEY, nullable=False),
        sa.Column("state", key(16), nullable=False, comment="open, posted or voided"),
        sa.Column("expires_at", TIME, nullable=False, comment="when an open hold is voided"),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("hold_key", name=op.f("pk_account_holds")),
        sa.CheckConstraint("state IN ('open', 'posted', 'voided')", name=op.f("ck_account_holds_state")),
        **TABLE_OPTIONS,
    )
    repeatable.create_index("idx_hold_state_expires", "account_holds", ["state", "expires_at"])
    repeatable.create_index("idx_hold_account", "account_holds", ["account_id", "state"])


def _create_blocks() -> None:
    repeatable.create_table(
        "books_blocks",
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False, comment="from 1, without a gap"),
        sa.Column("first_id", sa.BigInteger(), nullable=False, comment="the first transaction_id of the block's range"),
        sa.Column("last_id", sa.BigInteger(), nullable=False, comment="the last transaction_id of the block's range"),
        sa.Column("row_count", sa.BigInteger(), nullable=False, comment="how many ledger rows the range has"),
        sa.Column("root", key(64), nullable=False, comment="the Merkle root of the rows (RFC 6962)"),
        sa.Column("sums", BODY, nullable=False, comment="JSON: what house accounts moved"),
        sa.Column("previous", key(64), nullable=False, comment="the hash of the block before"),
        sa.Column("hash", key(64), nullable=False),
        sa.Column("sealed_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_books_blocks")),
        **TABLE_OPTIONS,
    )
    repeatable.create_index("uk_block_last_id", "books_blocks", ["last_id"], unique=True)
    repeatable.create_table(
        "books_house",
        sa.Column("block", sa.BigInteger(), nullable=False),
        sa.Column("account", key(128), nullable=False, comment="house/..."),
        sa.Column("asset_code", key(50), nullable=False),
        sa.Column("delta", TOTAL, nullable=False),
        sa.Column("balance", TOTAL, nullable=False, comment="after this block"),
        sa.PrimaryKeyConstraint("block", "account", "asset_code", name=op.f("pk_books_house")),
        **TABLE_OPTIONS,
    )
    repeatable.create_index("idx_house_account", "books_house", ["account", "asset_code", "block"])
    repeatable.create_table(
        "books_head",
        sa.Column("name", key(16), nullable=False, comment="always `head`"),
        sa.Column("seen", sa.Text(), nullable=False, comment="JSON: when which transaction_id was the highest"),
        sa.Column(
            "peaks", sa.Text(), nullable=False, comment="JSON: the tree over all blocks, as its perfect subtrees"
        ),
        sa.Column("checkpoint", sa.Text(), nullable=True, comment="the last signed head; null: no key signs"),
        sa.Column("checkpoint_at", TIME, nullable=True, comment="when it was signed"),
        sa.Column("anchored_at", TIME, nullable=True, comment="when a checkpoint was last written outside"),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_books_head")),
        **TABLE_OPTIONS,
    )


def _create_snapshots() -> None:
    repeatable.create_table(
        "books_snapshots",
        sa.Column("account_id", sa.BigInteger(), nullable=False),
        sa.Column("block", sa.BigInteger(), nullable=False),
        sa.Column(
            "transaction_id",
            sa.BigInteger(),
            nullable=False,
            comment="the account's last ledger row up to this block",
        ),
        sa.Column("balance", MONEY, nullable=False, comment="after that row"),
        sa.PrimaryKeyConstraint("account_id", "block", name=op.f("pk_books_snapshots")),
        **TABLE_OPTIONS,
    )
    repeatable.create_index("idx_snapshot_block", "books_snapshots", ["block"])


def _create_marks() -> None:
    repeatable.create_table(
        "audit_marks",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False, comment="always 1"),
        sa.Column("mark", BODY, nullable=False, comment="JSON: worker.audit.marks.Mark"),
        sa.Column("mac", key(64), nullable=False, comment="HMAC of the mark and of audited_accounts, by the seed"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_marks")),
        **TABLE_OPTIONS,
    )
    repeatable.create_table(
        "audited_accounts",
        sa.Column(
            "band", sa.BigInteger(), autoincrement=False, nullable=False, comment="accounts with ids near each other"
        ),
        sa.Column("state", sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb"), nullable=False),
        sa.PrimaryKeyConstraint("band", name=op.f("pk_audited_accounts")),
        **TABLE_OPTIONS,
    )


def downgrade() -> None:
    if not op.get_context().as_sql and repeatable.has_table("books_blocks"):
        _refuse_to_forget_books(op.get_bind())
    # The column that is dropped first: without it an earlier run has looked already, and was broken off.
    if not op.get_context().as_sql and repeatable.has_column("api_keys", _api_key_columns()[-1].name):
        _refuse_to_widen_keys(op.get_bind())
    ours = ("audited_accounts", "audit_marks", "books_snapshots", "books_head", "books_house", "books_blocks")
    for table in (*ours, "account_holds"):
        repeatable.drop_table(table)
    repeatable.drop_index("uk_act_key", "operator_actions")
    repeatable.drop_column("operator_actions", "act_key")
    for column in reversed(_api_key_columns()):
        repeatable.drop_column("api_keys", column.name)


def _refuse_to_widen_keys(connection: sa.Connection) -> None:
    """The previous release knows neither scopes nor an end: it would let every valid key draw and read, for ever."""
    narrow = "scopes IS NOT NULL AND NOT (scopes LIKE '%draw%' AND scopes LIKE '%read%') OR expires_at IS NOT NULL"
    if connection.execute(sa.text(f"SELECT 1 FROM api_keys WHERE revoked_at IS NULL AND ({narrow}) LIMIT 1")).first():
        raise CommandError("some API keys have an end, or may not draw or not read, and would lose that: revoke them")


def _refuse_to_forget_books(connection: sa.Connection) -> None:
    """Sealed blocks prove that the ledger was not changed, and holds hold money: nothing can make them again."""
    if connection.execute(sa.text("SELECT 1 FROM books_blocks LIMIT 1")).first():
        raise CommandError("blocks were sealed: without them nothing proves that the ledger was not changed")
    if connection.execute(sa.text("SELECT 1 FROM account_holds LIMIT 1")).first():
        raise CommandError("accounts have holds: the previous release could neither post nor void them")
