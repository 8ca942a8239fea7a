"""Read the ledger: a session's rows, an account. Only workers write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Engine, func, select, text

from tombola.producers.domain.money import CENT
from tombola.producers.domain.operations.draw import CONSUME
from tombola.producers.domain.operations.operation import HoldState
from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import account_holds as holds
from tombola.producers.storage.schema import asset_transactions as transactions


class Posting(NamedTuple):
    """One ledger row, read from the table or about to be written."""

    account_id: int
    lottery_session_id: str
    idempotency_key: str
    business_type: str
    asset_code: str
    delta: Decimal
    before: Decimal
    after: Decimal
    notes: str

    @property
    def ledger_key(self) -> str:
        """What `idempotency_key` is derived from: for nearly all kinds the request key (Request.ledger_key)."""
        return self.idempotency_key.partition(":")[0]


class Account(NamedTuple):
    """An account with its current `balance`, in units of `asset_code`; `held` is what its open holds took from it."""

    account_id: int
    user_id: int
    asset_code: str
    balance: Decimal
    held: Decimal = Decimal("0.00")


def session_rows(connection: Connection, lottery_session_id: str) -> list[dict[str, Any]]:
    """All ledger rows of a session, by `transaction_id`: a dict per row, by column name."""
    rows = connection.execute(
        select(transactions)
        .where(transactions.c.lottery_session_id == lottery_session_id)
        .order_by(transactions.c.transaction_id)
    )
    # In a legacy ledger the column may compare `ABC` and `abc` as equal, and a row may have no key yet.
    found = [with_key(dict(row)) for row in rows.mappings() if row["lottery_session_id"] == lottery_session_id]
    is_perhaps_old = not found or any(row["idempotency_key"].startswith("tx_") for row in found)
    if is_perhaps_old and connection.dialect.name != "sqlite":  # SQLite never has a legacy ledger
        found += _old_rows(connection, lottery_session_id)
    return found


def _old_rows(connection: Connection, business_id: str) -> list[dict[str, Any]]:
    """The rows of a legacy ledger (`tombola legacy`) that the backfill has not reached, with the values it will write.

    In any other ledger the column is NOT NULL, and the server answers without reading a row.
    """
    rows = connection.execute(
        select(transactions)
        .where(transactions.c.business_id == business_id, text("lottery_session_id IS NULL"))
        .order_by(transactions.c.transaction_id)
    )
    return [
        with_key(dict(row) | {"lottery_session_id": business_id})
        for row in rows.mappings()
        if row["business_id"] == business_id  # old columns may compare `ABC` and `abc` as equal
    ]


def with_key(row: dict[str, Any]) -> dict[str, Any]:
    """`row`; a row without a key gets the key that the backfill would write."""
    if row["idempotency_key"] is None:
        row["idempotency_key"] = f"tx_{row['transaction_id']}"
    return row


def rows_under(connection: Connection, ledger_key: str, entry_type: str = "") -> list[dict[str, Any]]:
    """All rows whose keys derive from `ledger_key`, by `transaction_id`, of whatever session.

    For a draw: its own rows, and those of its refund. `entry_type` leaves out types that do not begin with it.
    """
    first = f"{ledger_key}:{entry_type}"
    behind = first[:-1] + chr(ord(first[-1]) + 1)  # keys compare as bytes
    rows = connection.execute(
        select(transactions)
        .where(transactions.c.idempotency_key >= first, transactions.c.idempotency_key < behind)
        .order_by(transactions.c.transaction_id)
    )
    return [dict(row) for row in rows.mappings()]


def postings_of_request(connection: Connection, lottery_session_id: str, ledger_key: str) -> list[Posting]:
    """The request's own rows by `transaction_id`. A recharge may have the same session id: its rows are left out.

    A draw of old code (`tombola legacy`) is recognised by its session and its charge, since its keys are arbitrary.
    """
    postings = [posting_of(row) for row in session_rows(connection, lottery_session_id)]
    own = [it for it in postings if it.ledger_key == ledger_key]
    return postings if not own and any(it.business_type == CONSUME for it in postings) else own


def postings_of_sessions(connection: Connection, lottery_session_ids: Sequence[str]) -> dict[str, list[Posting]]:
    """The rows of these sessions by session and `transaction_id`, in one query; rows of old code may be missing."""
    found: dict[str, list[Posting]] = {}
    if lottery_session_ids:
        rows = connection.execute(
            select(transactions)
            .where(transactions.c.lottery_session_id.in_(lottery_session_ids), text("idempotency_key IS NOT NULL"))
            .order_by(transactions.c.transaction_id)
        )
        for row in rows.mappings():
            found.setdefault(row["lottery_session_id"], []).append(posting_of(dict(row)))
    return found


def posting_of(row: Mapping[str, Any]) -> Posting:
    """The ledger row with these values, by column name."""
    return Posting(
        row["account_id"],
        row["lottery_session_id"],
        row["idempotency_key"],
        row["business_type"],
        row["asset_code"],
        row["delta_amount"].quantize(CENT),
        row["balance_before"].quantize(CENT),
        row["balance_after"].quantize(CENT),
        row["notes"] or "",
    )


def get_lottery_session_transactions(lottery_session_id: str, *, engine: Engine) -> list[dict[str, Any]]:
    """All ledger rows of a session, by `transaction_id`: a dict per row, by column name."""
    with engine.connect().execution_options(read_only=True) as connection:
        return session_rows(connection, lottery_session_id)


def find_account(connection: Connection, account_id: int) -> Account | None:
    """The account with its current balance; None where it does not exist."""
    row = connection.execute(_ACCOUNTS.where(accounts.c.id == account_id)).first()
    return None if row is None else Account._make(row)


def accounts_of_user(connection: Connection, user_id: int, *, after_id: int = 0, rows_max: int) -> list[Account]:
    """Up to `rows_max` of a user's accounts behind `after_id`, by id."""
    found = connection.execute(
        _ACCOUNTS.where(accounts.c.user_id == user_id, accounts.c.id > after_id)
        # The sum keeps the database from walking the primary key: a user has few accounts, found by their user.
        .order_by(accounts.c.id + 0)
        .limit(rows_max)
    )
    return [Account._make(row) for row in found]


# What an account has and holds, in one query.
_ACCOUNTS: Final = select(
    *(accounts.c[name] for name in ("id", "user_id", "asset_code", "balance")),
    select(func.coalesce(func.sum(holds.c.amount), 0))
    .where(holds.c.account_id == accounts.c.id, holds.c.state == HoldState.OPEN)
    .scalar_subquery(),
)


def find_hold(connection: Connection, hold_key: str) -> dict[str, Any] | None:
    """The row of a hold, by column name; None where it does not exist."""
    row = connection.execute(select(holds).where(holds.c.hold_key == hold_key)).mappings().first()
    return None if row is None else dict(row)


class Hold(NamedTuple):
    """A hold that is open: what it took, and when it is voided if it has not ended by then."""

    hold_key: str
    amount: Decimal
    created_at: datetime
    expires_at: datetime


def open_holds(connection: Connection, account_id: int, *, rows_max: int) -> list[Hold]:
    """Up to `rows_max` of an account's open holds, the next one to expire first."""
    found = connection.execute(
        select(*(holds.c[name] for name in Hold._fields))
        .where(holds.c.account_id == account_id, holds.c.state == HoldState.OPEN)
        .order_by(holds.c.expires_at, holds.c.hold_key)
        .limit(rows_max)
    )
    return [Hold._make(row) for row in found]


def users_of(connection: Connection, account_ids: Sequence[int]) -> dict[int, int]:
    """The users of these accounts: user id by account id, without missing accounts."""
    rows = connection.execute(select(accounts.c.id, accounts.c.user_id).where(accounts.c.id.in_(sorted(account_ids))))
    return {row.id: row.user_id for row in rows}
