"""A recharge: an amount added to an account, such as a payment that a provider reports."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.operations import movements
from tombola.producers.domain.operations.movements import AmountRequest, check_channel, notes_of, why_not_added
from tombola.producers.domain.operations.operation import Decision, Findings, Locked, Movement, Needs, Written

RECHARGE: Final = "recharge"


class RechargeRequest(AmountRequest, frozen=True, kw_only=True):
    """Add `amount` to an account. `channel` names where the money came from, such as the payment provider."""

    kind = "recharge"

    channel: str = ""

    def __post_init__(self) -> None:
        AmountRequest.__post_init__(self)
        check_channel(self.channel)


FIELDS: Final = RechargeRequest
TYPES: Final = MappingProxyType({"recharge": RECHARGE})
HOUSE: Final = MappingProxyType({RECHARGE: "house/issued/{channel}"})

result = movements.result


def needs(request: RechargeRequest, _wheels: Wheels) -> Needs:
    """The account that receives the amount."""
    return Needs((request.account_id,))


def decide(request: RechargeRequest, locked: Locked) -> Decision:
    """The amount added, or a rejection."""
    return why_not_added(locked.accounts.get(request.account_id), request.moved) or _movements(request)


def check(request: RechargeRequest, written: Written) -> Findings:
    """The row is what the request says (I14)."""
    return {"I14": movements.differences(request, written, _movements(request))}


def _movements(request: RechargeRequest) -> list[Movement]:
    notes = notes_of(("channel", request.channel), ("reference", request.reference))
    return [Movement(request.account_id, "recharge", RECHARGE, request.moved, notes)]
