"""What requests change beside balances: holds, and units that a refund gives back. In the batch's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from tombola.producers.domain.operations.operation import Change, HoldChange, HoldState, UnitsBack
from tombola.producers.storage.transactions import Transaction, time_text
from tombola.worker.campaigns.stock import stock_key

REFUND: Final = "refund"  # in place of an operator, in campaign_stock_changes


def write(transaction: Transaction, changes: Sequence[Change], now: datetime) -> None:
    """Write what the requests of a batch change: a statement for each kind of change.

    Raises RowsChanged where a hold has ended already, or a prize has no stock any more.
    """
    if not changes:
        return
    moment = time_text(now)
    holds = [it for it in changes if isinstance(it, HoldChange)]
    transaction.insert(
        "account_holds",
        ("hold_key", "account_id", "asset_code", "amount", "state", "expires_at", "created_at"),
        [
            (
                it.hold_key,
                it.account_id,
                it.asset_code,
                transaction.money(it.amount),
                it.state,
                time_text(it.expires_at),
                moment,
            )
            for it in holds
            if it.expires_at is not None
        ],
        copies={"updated_at": "created_at"},
    )
    transaction.update(
        "account_holds",
        "hold_key",
        ("state", "updated_at"),
        [(it.hold_key, it.state, moment) for it in holds if it.expires_at is None],
        where=f"state = '{HoldState.OPEN}'",
    )
    _put_back(transaction, [it for it in changes if isinstance(it, UnitsBack)], moment)


def _put_back(transaction: Transaction, units: Sequence[UnitsBack], moment: str) -> None:
    by_row: dict[str, int] = {}
    for it in units:
        key = stock_key(it.campaign, it.prize, 0)
        by_row[key] = by_row.get(key, 0) + it.units
    transaction.insert(
        "campaign_stock_changes",
        ("campaign", "prize", "units", "operator", "reason", "at"),
        [(it.campaign, it.prize, it.units, REFUND, it.draw, moment) for it in units],
    )
    transaction.subtract("campaign_stock", "stock_key", "units", sorted((key, -count) for key, count in by_row.items()))
