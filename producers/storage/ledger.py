"""The ledger as it is read: a session's rows, an account, and the result that they amount to. Workers write it.

A result is made of the ledger's rows alone, here, so that what was forgotten is rebuilt to the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Engine, select, text

from tombola.producers.domain.contract import DrawRequest, DrawResult, LedgerRow
from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import asset_transactions as transactions

CONSUME: Final = "lottery_consume"
REWARD: Final = "lottery_reward"
RECHARGE: Final = "recharge"
NO_PRIZE: Final = "0.00"


class Account(NamedTuple):
    """An account as it stands; `balance` in units of `asset_code`."""

    account_id: int
    user_id: int
    asset_code: str
    balance: Decimal


def completed(draw: DrawRequest, rows: Sequence[LedgerRow]) -> DrawResult:
    """The result of a draw that went through, from its ledger rows alone: the same bytes now and in ten years."""
    rewards = [Decimal(row.delta_amount) for row in rows if row.business_type == REWARD]
    return DrawResult(
        request_key=draw.request_key,
        lottery_session_id=draw.lottery_session_id,
        account_id=draw.account_id,
        campaign=draw.campaign,
        status="completed",
        reason=None,
        prize_amount=str(sum(rewards, Decimal(NO_PRIZE))),
        balance_after=rows[-1].balance_after,
        transactions=list(rows),
    )


def rejected(draw: DrawRequest, reason: str, balance: Decimal | None) -> DrawResult:
    """The result of a draw that was told no; `balance` is what the account held then, None without an account."""
    return DrawResult(
        request_key=draw.request_key,
        lottery_session_id=draw.lottery_session_id,
        account_id=draw.account_id,
        campaign=draw.campaign,
        status="rejected",
        reason=reason,
        prize_amount=NO_PRIZE,
        balance_after=None if balance is None else str(balance),
        transactions=[],
    )


def session_rows(connection: Connection, lottery_session_id: str) -> list[dict[str, Any]]:
    """All ledger rows of a session, by `transaction_id`: a dict per row, by column name."""
    rows = connection.execute(
        select(transactions)
        .where(transactions.c.lottery_session_id == lottery_session_id)
        .order_by(transactions.c.transaction_id)
    )
    # A legacy ledger's column may hold `ABC` and `abc` for equal, and a row may have no key yet.
    found = [_keyed(dict(row)) for row in rows.mappings() if row["lottery_session_id"] == lottery_session_id]
    is_perhaps_old = not found or any(row["idempotency_key"].startswith("tx_") for row in found)
    if is_perhaps_old and connection.dialect.name != "sqlite":  # where no old code has ever been
        found += _old_rows(connection, lottery_session_id)
    return found


def _old_rows(connection: Connection, business_id: str) -> list[dict[str, Any]]:
    """Rows of a legacy ledger (`tombola legacy`) that the backfill has not come to, as it will leave them.

    In any other ledger no row is without a session, and the server knows that without looking.
    """
    rows = connection.execute(
        select(transactions)
        .where(transactions.c.business_id == business_id, text("lottery_session_id IS NULL"))
        .order_by(transactions.c.transaction_id)
    )
    return [
        _keyed(dict(row) | {"lottery_session_id": business_id})
        for row in rows.mappings()
        if row["business_id"] == business_id  # old columns may hold `ABC` and `abc` for equal
    ]


def _keyed(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with the key that the backfill would give it, if it has none."""
    if row["idempotency_key"] is None:
        row["idempotency_key"] = f"tx_{row['transaction_id']}"
    return row


def shown(row: Any) -> LedgerRow:
    """A row, by column name, as a result shows it."""
    amounts = (row["delta_amount"], row["balance_before"], row["balance_after"])
    return LedgerRow(
        row["idempotency_key"], row["business_type"], row["asset_code"], *(f"{amount:.2f}" for amount in amounts)
    )


def get_lottery_session_transactions(lottery_session_id: str, *, engine: Engine) -> list[dict[str, Any]]:
    """All ledger rows of a session, by `transaction_id`: a dict per row, by column name."""
    with engine.connect().execution_options(read_only=True) as connection:
        return session_rows(connection, lottery_session_id)


def find_account(connection: Connection, account_id: int) -> Account | None:
    """The account as it stands; None if there is none."""
    row = connection.execute(
        select(accounts.c.id, accounts.c.user_id, accounts.c.asset_code, accounts.c.balance).where(
            accounts.c.id == account_id
        )
    ).first()
    return None if row is None else Account(*row)


def users_of(connection: Connection, account_ids: Sequence[int]) -> dict[int, int]:
    """Whose these accounts are: user ids by account id; unknown accounts are absent."""
    rows = connection.execute(select(accounts.c.id, accounts.c.user_id).where(accounts.c.id.in_(sorted(account_ids))))
    return {row.id: row.user_id for row in rows}
