"""I14 of holds: each is what its ledger rows say: open if and only if it was neither posted nor voided."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, or_, select

from tombola.producers.storage.chunks import IN_LIST_MAX, chunks
from tombola.producers.storage.schema import account_holds
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.audit.report import Violation
from tombola.worker.audit.stored import Unreadable, amount_of, stored

# The types in the derived keys of the rows of a hold, and their business types. The first row takes the amount.
TYPES: Final = ("hold", "post", "void")
HOLDS: Final = frozenset({"hold", "hold_post", "hold_void"})
_STATES: Final = {(False, False): "open", (True, False): "posted", (False, True): "voided"}
CHUNK: Final = IN_LIST_MAX // len(TYPES)


def hold_key(key: str) -> str:
    """The key of the hold that a ledger row belongs to."""
    return key.partition(":")[0]


def next_holds(connection: Connection, after: str, since: datetime | None) -> list[str]:
    """The keys of the next holds that are open or that changed `since` then, of all holds if None."""
    query = select(account_holds.c.hold_key).where(account_holds.c.hold_key > after)
    if since is not None:
        query = query.where(or_(account_holds.c.state == "open", account_holds.c.updated_at >= since))
    return list(connection.execute(query.order_by(account_holds.c.hold_key).limit(CHUNK)).scalars())


def check_holds(connection: Connection, hold_keys: Collection[str]) -> Iterator[Violation]:
    """Compare these holds with their ledger rows."""
    for some in chunks(sorted(hold_keys), CHUNK):
        names = [f"{key}:{entry}" for key in some for entry in TYPES]
        columns = ("idempotency_key", "account_id", "asset_code", "delta_amount")
        rows = {
            row.idempotency_key: row
            for row in connection.execute(
                select(*(stored(transactions.c[name]) for name in columns)).where(
                    transactions.c.idempotency_key.in_(names)
                )
            )
        }
        holds = {
            row.hold_key: row
            for row in connection.execute(
                select(*(stored(column) for column in account_holds.c)).where(account_holds.c.hold_key.in_(some))
            )
        }
        for key in some:
            for what in _compare(connection, holds.get(key), [rows.get(f"{key}:{entry}") for entry in TYPES]):
                yield Violation("I14", f"hold {key}", what)


def _compare(connection: Connection, hold: Any, rows: list[Any]) -> Iterator[str]:
    taken, posted, voided = rows
    if hold is None:
        yield "has ledger rows, and is not among the holds"
        return
    if taken is None:
        yield "has no ledger row that took its amount"
        return
    state = _STATES.get((posted is not None, voided is not None))
    if state is None:
        yield "was posted and voided"
    elif hold.state != state:
        yield f"is {hold.state}, its ledger rows say {state}"
    if (hold.account_id, hold.asset_code) != (taken.account_id, taken.asset_code):
        yield f"is of account {hold.account_id}, its ledger row of account {taken.account_id}"
    try:
        amount = amount_of(connection, hold.amount)
        moved = [Decimal(0) if row is None else amount_of(connection, row.delta_amount) for row in rows]
    except Unreadable as error:
        yield f"cannot be checked: {error}"
        return
    if moved[0] != -amount:
        yield f"holds {amount}, its ledger row took {-moved[0]}"
    for row, released in zip(rows[1:], moved[1:], strict=True):
        if row is not None and released != amount:
            yield f"holds {amount}, {row.idempotency_key} released {released}"
