"""A transfer: an amount from one account to another account of the same asset."""

from __future__ import annotations

from decimal import Decimal
from types import MappingProxyType
from typing import Final

from tombola.producers.domain.contract import ACCOUNT_ID_MAX
from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.operations import movements
from tombola.producers.domain.operations.movements import (
    OTHER_ASSET,
    AmountRequest,
    notes_of,
    why_not_added,
    why_not_taken,
)
from tombola.producers.domain.operations.operation import (
    Decision,
    Findings,
    Locked,
    LockedAccount,
    Movement,
    Needs,
    Rejection,
    Written,
)

TRANSFER_OUT: Final = "transfer_out"
TRANSFER_IN: Final = "transfer_in"


class TransferRequest(AmountRequest, frozen=True, kw_only=True):
    """Move `amount` from `account_id` to the account `to`."""

    kind = "transfer"

    to: int

    def __post_init__(self) -> None:
        AmountRequest.__post_init__(self)
        check_receiver(self.account_id, self.to)


def check_receiver(account_id: int, to: int) -> None:
    """Raise InvalidRequest if `to` cannot receive from `account_id`."""
    if type(to) is not int or not 1 <= to <= ACCOUNT_ID_MAX:
        raise InvalidRequest(f"`to` is an account: an integer from 1 to {ACCOUNT_ID_MAX}, not {to!r:.40}")
    if to == account_id:
        raise InvalidRequest(f"account {to} cannot transfer to itself")


FIELDS: Final = TransferRequest
TYPES: Final = MappingProxyType({"transfer_out": TRANSFER_OUT, "transfer_in": TRANSFER_IN})
HOUSE: Final = MappingProxyType({TRANSFER_OUT: "", TRANSFER_IN: ""})

result = movements.result


def needs(request: TransferRequest, _wheels: Wheels) -> Needs:
    """Both accounts."""
    return Needs((request.account_id, request.to))


def decide(request: TransferRequest, locked: Locked) -> Decision:
    """The amount moved, or a rejection."""
    payer, receiver = locked.accounts.get(request.account_id), locked.accounts.get(request.to)
    return (
        why_not_taken(payer, request.moved)
        or why_not_received(payer, receiver, request.moved)
        or transferred(request.account_id, request.to, request.moved, request.reference)
    )


def why_not_received(payer: LockedAccount | None, receiver: LockedAccount | None, amount: Decimal) -> Rejection | None:
    """Why `receiver` cannot get `amount` from `payer`, which has it; None if it can."""
    told = None if payer is None else payer.balance  # the answer shows the balance of the request's own account only
    if payer is not None and receiver is not None and receiver.asset_code != payer.asset_code:
        return Rejection(OTHER_ASSET, told)
    why_not = why_not_added(receiver, amount)
    return None if why_not is None else why_not._replace(balance=told)


def transferred(account_id: int, to: int, amount: Decimal, reference: str) -> list[Movement]:
    """The two movements of a transfer."""
    ref = ("reference", reference)
    return [
        Movement(account_id, "transfer_out", TRANSFER_OUT, -amount, notes_of(("to", str(to)), ref)),
        Movement(to, "transfer_in", TRANSFER_IN, amount, notes_of(("from", str(account_id)), ref)),
    ]


def check(request: TransferRequest, written: Written) -> Findings:
    """The rows are what the request says (I14)."""
    expected = transferred(request.account_id, request.to, request.moved, request.reference)
    return {"I14": movements.differences(request, written, expected)}
