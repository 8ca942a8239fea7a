"""An adjustment: an operator corrects a balance, upwards or downwards, and says why."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.operations import movements
from tombola.producers.domain.operations.movements import (
    AmountRequest,
    check_reason,
    notes_of,
    why_not_added,
    why_not_taken,
)
from tombola.producers.domain.operations.operation import Decision, Findings, Locked, Movement, Needs, Written

ADJUSTMENT: Final = "adjustment"


class AdjustRequest(AmountRequest, frozen=True, kw_only=True):
    """Add `amount` to an account, or take it away if it is below zero, for a `reason`."""

    kind = "adjust"

    reason: str

    def __post_init__(self) -> None:
        check_reason(self.reason, is_required=True)
        AmountRequest.__post_init__(self)

    @property
    def is_signed(self) -> bool:
        return True


FIELDS: Final = AdjustRequest
TYPES: Final = MappingProxyType({"adjust": ADJUSTMENT})
HOUSE: Final = MappingProxyType({ADJUSTMENT: "house/adjustments"})

result = movements.result


def needs(request: AdjustRequest, _wheels: Wheels) -> Needs:
    """The account."""
    return Needs((request.account_id,))


def decide(request: AdjustRequest, locked: Locked) -> Decision:
    """The balance corrected, or a rejection."""
    account, amount = locked.accounts.get(request.account_id), request.moved
    why_not = why_not_added(account, amount) if amount > 0 else why_not_taken(account, -amount)
    return why_not or _movements(request)


def check(request: AdjustRequest, written: Written) -> Findings:
    """The row is what the request says (I14)."""
    return {"I14": movements.differences(request, written, _movements(request))}


def _movements(request: AdjustRequest) -> list[Movement]:
    notes = notes_of(("reference", request.reference), ("reason", request.reason))
    return [Movement(request.account_id, "adjust", ADJUSTMENT, request.moved, notes)]
