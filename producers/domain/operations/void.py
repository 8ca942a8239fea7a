"""A void: a hold ends, and its amount returns to the account."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from types import MappingProxyType
from typing import Final

from tombola.producers.domain.contract import ACCOUNT_NOT_FOUND, Request, Row
from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.keys import check_request_key
from tombola.producers.domain.operations import movements
from tombola.producers.domain.operations.hold import HOLD_TYPE
from tombola.producers.domain.operations.movements import check_reason, check_terms, notes_of, why_not_added
from tombola.producers.domain.operations.operation import (
    Decision,
    Findings,
    HoldChange,
    HoldState,
    Locked,
    Movement,
    Moves,
    Needs,
    Rejection,
    Written,
)

HOLD_NOT_FOUND: Final = "HOLD_NOT_FOUND"
HOLD_ENDED: Final = "HOLD_ENDED"

VOID_TYPE: Final = "void"
POST_TYPE: Final = "post"
HOLD_VOID: Final = "hold_void"


class VoidRequest(Request, frozen=True, kw_only=True):
    """End `hold`, the request key of a hold of this account, without a payment."""

    kind = "void"

    hold: str
    reason: str = ""

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        check_request_key(self.hold)
        check_reason(self.reason, is_required=False)
        check_terms(self)

    @property
    def ledger_key(self) -> str:
        return self.hold


FIELDS: Final = VoidRequest
TYPES: Final = MappingProxyType({VOID_TYPE: HOLD_VOID})
HOUSE: Final = MappingProxyType({HOLD_VOID: "house/holds"})

result = movements.result


def needs(request: VoidRequest, _wheels: Wheels) -> Needs:
    """The account, and the rows of the hold."""
    return Needs((request.account_id,), rows_of=(request.hold,))


def decide(request: VoidRequest, locked: Locked) -> Decision:
    """The amount returned, or a rejection."""
    held = held_amount(request.account_id, request.hold, locked)
    if isinstance(held, Rejection):
        return held
    why_not = why_not_added(locked.accounts[request.account_id], held)
    return why_not or Moves(_movements(request, held), (HoldChange(request.hold, HoldState.VOIDED),))


def held_amount(account_id: int, hold: str, locked: Locked) -> Decimal | Rejection:
    """The amount of an open hold of this account, or why there is none."""
    account = locked.accounts.get(account_id)
    if account is None:
        return Rejection(ACCOUNT_NOT_FOUND, None)
    opened = hold_row(hold, locked.rows.get(hold, ()))
    if opened is None or opened.account_id != account_id:
        return Rejection(HOLD_NOT_FOUND, account.balance)
    if any(row.idempotency_key in (f"{hold}:{POST_TYPE}", f"{hold}:{VOID_TYPE}") for row in locked.rows[hold]):
        return Rejection(HOLD_ENDED, account.balance)
    return -opened.delta


def hold_row(hold: str, rows: Sequence[Row]) -> Row | None:
    """The row that opened the hold, among the rows under its ledger key."""
    return next((row for row in rows if row.idempotency_key == f"{hold}:{HOLD_TYPE}"), None)


def check(request: VoidRequest, written: Written) -> Findings:
    """The row returns what the hold took, and nothing else has ended the hold (I14)."""
    return {"I14": _wrong(request, written)}


def _wrong(request: VoidRequest, written: Written) -> Iterator[str]:
    if not written.is_completed:
        return
    rows = written.rows_of(request.hold)
    opened = hold_row(request.hold, rows)
    if opened is None:
        yield f"voids a hold {request.hold} that the ledger does not have"
        return
    if any(row.idempotency_key == f"{request.hold}:{POST_TYPE}" for row in rows):
        yield f"voids the hold {request.hold}, which was posted"
    yield from movements.differences(request, written, _movements(request, -opened.delta))


def _movements(request: VoidRequest, held: Decimal) -> list[Movement]:
    return [Movement(request.account_id, VOID_TYPE, HOLD_VOID, held, notes_of(("reason", request.reason)))]
