"""Why a movement evidently cannot happen, before it is accepted: the movement's own decision, on unlocked reads.

A client then gets an error at once, and no request is on record. Whether a movement happens is decided by the batch
that settles it, under locks: what is not found here may still become a rejection. A repeat meets the obstacles that it
made itself (a draw that it has refunded), so ask `Entry.find_known` before you raise one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sqlalchemy import Connection

from tombola.producers.domain import operations
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import (
    AccountNotFound,
    AlreadyRefunded,
    DrawError,
    DrawNotCompleted,
    HoldEnded,
    HoldExpired,
    HoldNotCompleted,
    PrizeSpent,
)
from tombola.producers.domain.operations.operation import Locked, Rejection
from tombola.producers.domain.operations.post import HOLD_EXPIRED
from tombola.producers.domain.operations.refund import ALREADY_REFUNDED, DRAW_NOT_FOUND, PRIZE_SPENT
from tombola.producers.domain.operations.void import HOLD_ENDED, HOLD_NOT_FOUND
from tombola.producers.storage import accounts, clock, ledger

# The rejections that are told at the door. Of the others nothing is known before the locks: balances change.
TOLD: Final[Mapping[str, type[DrawError]]] = {
    DRAW_NOT_FOUND: DrawNotCompleted,
    ALREADY_REFUNDED: AlreadyRefunded,
    PRIZE_SPENT: PrizeSpent,
    HOLD_NOT_FOUND: HoldNotCompleted,
    HOLD_ENDED: HoldEnded,
    HOLD_EXPIRED: HoldExpired,
}


def find_obstacle(connection: Connection, request: Request) -> DrawError | None:
    """Why this movement evidently cannot happen now; None where nothing is known against it."""
    operation = operations.operation_of(request)
    needs = operation.needs(request, {})
    rows = {key: [ledger.posting_of(row) for row in ledger.rows_under(connection, key)] for key in needs.rows_of}
    touched = {row.account_id for postings in rows.values() for row in postings}
    found = accounts.find_unlocked(connection, touched.union(needs.accounts))
    for account_id in needs.accounts:
        if account_id not in found:
            return AccountNotFound(f"there is no account {account_id}")
    decision = operation.decide(request, Locked(found, {}, rows=rows, now=clock.now(connection)))
    why = TOLD.get(decision.reason) if isinstance(decision, Rejection) else None
    return None if why is None else why()
