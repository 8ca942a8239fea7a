"""Read the ledger: a session's rows, an account. Only workers write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, select, text

from tombola.producers.domain.money import CENT
from tombola.producers.domain.operations.draw import CONSUME
from tombola.producers.storage.schema import account_asset_balances as accounts
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
    """An account with its current `balance`, in units of `asset_code`."""

    account_id: int
    user_id: int
    asset_code: str
    balance: Decimal


def session_rows(connection: Connection, lottery_session_id: str) -> list[dict[str, Any]]:
    """All ledger rows of a session, by `transaction_id`: a dict per row, by column name."""
    rows = connection.execute(
        select(transactions)
        .where(transactions.c.lottery_session_id == lottery_session_id)
        .order_by(transactions.c.transaction_id)
    )
    # In a legacy ledger the column may compare `ABC` and `abc` as equal, and a row may have no key yet.
    found = [_keyed(dict(row)) for row in rows.mappings() if row["lottery_session_id"] == lottery_session_id]
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
        _keyed(dict(row) | {"lottery_session_id": business_id})
        for row in rows.mappings()
        if row["business_id"] == business_id  # old columns may compare `ABC` and `abc` as equal
    ]


def _keyed(row: dict[str, Any]) -> dict[str, Any]:
    """`row`; a row without a key gets the key that the backfill would write."""
    if row["idempotency_key"] is None:
        row["idempotency_key"] = f"tx_{row['transaction_id']}"
    return row


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
    row = connection.execute(
        select(accounts.c.id, accounts.c.user_id, accounts.c.asset_code, accounts.c.balance).where(
            accounts.c.id == account_id
        )
    ).first()
    return None if row is None else Account(*row)


def users_of(connection: Connection, account_ids: Sequence[int]) -> dict[int, int]:
    """The users of these accounts: user id by account id, without missing accounts."""
    rows = connection.execute(select(accounts.c.id, accounts.c.user_id).where(accounts.c.id.in_(sorted(account_ids))))
    return {row.id: row.user_id for row in rows}
