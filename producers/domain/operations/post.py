"""A post: a hold ends with a payment, of all of it or of a part; the rest returns to the account.

The whole hold returns first, and then the payment is taken: to another account, or to the house as a purchase. So each
row has one other side.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from types import MappingProxyType
from typing import Final

import msgspec

from tombola.producers.domain.contract import Request
from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.keys import check_request_key
from tombola.producers.domain.money import parse_amount
from tombola.producers.domain.operations import movements
from tombola.producers.domain.operations.hold import until_of
from tombola.producers.domain.operations.movements import check_reference, check_terms, notes_of, why_not_added
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
from tombola.producers.domain.operations.transfer import (
    TRANSFER_IN,
    TRANSFER_OUT,
    check_receiver,
    transferred,
    why_not_received,
)
from tombola.producers.domain.operations.void import POST_TYPE, VOID_TYPE, held_amount, hold_row

AMOUNT_ABOVE_HOLD: Final = "AMOUNT_ABOVE_HOLD"
HOLD_EXPIRED: Final = "HOLD_EXPIRED"

HOLD_POST: Final = "hold_post"
PURCHASE: Final = "purchase"


class PostRequest(Request, frozen=True, kw_only=True):
    """End `hold`, the request key of a hold of this account, with a payment of `amount`, empty for all of it.

    The payment goes `to` an account of the same asset; None: to the house, for a purchase.
    """

    kind = "post"

    hold: str
    amount: str = ""
    to: int | None = None
    reference: str = ""

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        check_request_key(self.hold)
        if self.amount:
            msgspec.structs.force_setattr(self, "amount", str(parse_amount(self.amount)))
        if self.to is not None:
            check_receiver(self.account_id, self.to)
        check_reference(self.reference)
        check_terms(self)

    @property
    def ledger_key(self) -> str:
        return self.hold


FIELDS: Final = PostRequest
TYPES: Final = MappingProxyType(
    {POST_TYPE: HOLD_POST, "transfer_out": TRANSFER_OUT, "transfer_in": TRANSFER_IN, "purchase": PURCHASE}
)
HOUSE: Final = MappingProxyType({HOLD_POST: "house/holds", PURCHASE: "house/purchases"})

result = movements.result


def needs(request: PostRequest, _wheels: Wheels) -> Needs:
    """The accounts, and the rows of the hold."""
    receivers = () if request.to is None else (request.to,)
    return Needs((request.account_id, *receivers), rows_of=(request.hold,))


def decide(request: PostRequest, locked: Locked) -> Decision:
    """The hold returned and the payment taken, or a rejection."""
    held = held_amount(request.account_id, request.hold, locked)
    if isinstance(held, Rejection):
        return held
    account = locked.accounts[request.account_id]
    opened = hold_row(request.hold, locked.rows[request.hold])
    if opened is None or locked.now >= until_of(opened.notes):
        return Rejection(HOLD_EXPIRED, account.balance)
    paid = Decimal(request.amount) if request.amount else held
    if paid > held:
        return Rejection(AMOUNT_ABOVE_HOLD, account.balance)
    why_not = why_not_added(account, held)
    if why_not is None and request.to is not None:
        why_not = why_not_received(account, locked.accounts.get(request.to), paid)
    return why_not or Moves(_movements(request, held), (HoldChange(request.hold, HoldState.POSTED),))


def check(request: PostRequest, written: Written) -> Findings:
    """The rows are what hold and request say, and nothing else has ended the hold (I14)."""
    return {"I14": _wrong(request, written)}


def _wrong(request: PostRequest, written: Written) -> Iterator[str]:
    if not written.is_completed:
        return
    rows = written.rows_of(request.hold)
    opened = hold_row(request.hold, rows)
    if opened is None:
        yield f"posts a hold {request.hold} that the ledger does not have"
        return
    if any(row.idempotency_key == f"{request.hold}:{VOID_TYPE}" for row in rows):
        yield f"posts the hold {request.hold}, which was voided"
    if request.amount and Decimal(request.amount) > -opened.delta:
        yield f"pays {request.amount} of a hold of {-opened.delta}"
    yield from movements.differences(request, written, _movements(request, -opened.delta))


def _movements(request: PostRequest, held: Decimal) -> list[Movement]:
    paid = Decimal(request.amount) if request.amount else held
    released = Movement(request.account_id, POST_TYPE, HOLD_POST, held, notes_of(("reference", request.reference)))
    if request.to is not None:
        return [released, *transferred(request.account_id, request.to, paid, request.reference)]
    notes = notes_of(("reference", request.reference))
    return [released, Movement(request.account_id, "purchase", PURCHASE, -paid, notes)]
