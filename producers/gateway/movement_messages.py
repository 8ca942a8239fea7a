"""The bodies of HTTP requests for movements, and of their answers; the OpenAPI document has their schemas."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from tombola.producers.domain.contract import ACCOUNT_ID_MAX, MovementResult
from tombola.producers.domain.operations.hold import VALID_S_DEFAULT, VALID_S_MAX
from tombola.producers.domain.operations.movements import REASON_LENGTH_MAX, REFERENCE_LENGTH_MAX
from tombola.producers.domain.operations.operation import HoldState
from tombola.producers.domain.operations.refund import Policy
from tombola.producers.gateway.messages import AccountId

_DIGITS: Final = r"[0-9]{1,8}(\.[0-9]{1,2})?$"
AmountText = Annotated[
    str, msgspec.Meta(pattern=f"^{_DIGITS}", description="Above 0, with two decimals at most.", examples=["5.00"])
]
SignedText = Annotated[
    str, msgspec.Meta(pattern=f"^-?{_DIGITS}", description="Below 0: taken away.", examples=["5.00", "-5.00"])
]
Reference = Annotated[
    str,
    msgspec.Meta(
        max_length=REFERENCE_LENGTH_MAX, pattern="^[!-~]*$", description="A name outside, such as an order's id."
    ),
]
Reason = Annotated[str, msgspec.Meta(max_length=REASON_LENGTH_MAX, description="Why, for the record.")]
RequiredReason = Annotated[Reason, msgspec.Meta(min_length=1)]
Channel = Annotated[
    str,
    msgspec.Meta(
        pattern="^([a-z0-9][a-z0-9._-]{0,31})?$", description="Where the money came from, such as the payment provider."
    ),
]
AssetCode = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9._-]{1,50}$")]
UserId = Annotated[int, msgspec.Meta(ge=1, le=ACCOUNT_ID_MAX)]
ValidS = Annotated[int, msgspec.Meta(ge=1, le=VALID_S_MAX, description="Seconds until the hold expires.")]


class NewAccount(msgspec.Struct, forbid_unknown_fields=True):
    """An account to open. `amount` is what it is given at its opening, "0" for nothing."""

    user_id: UserId
    asset_code: AssetCode = "POINT"
    amount: AmountText = "0"
    reference: Reference = ""


class NewRecharge(msgspec.Struct, forbid_unknown_fields=True):
    """An amount to add to an account."""

    amount: AmountText
    reference: Reference = ""
    channel: Channel = ""


class NewTransfer(msgspec.Struct, forbid_unknown_fields=True, rename={"payer": "from"}):
    """An amount to move between two accounts of one asset."""

    payer: AccountId
    to: AccountId
    amount: AmountText
    reference: Reference = ""


class NewRefund(msgspec.Struct, forbid_unknown_fields=True):
    """A draw to take back. `policy` says what happens where a prize is spent.

    `refuse` does nothing then; `write_off` collects what is there; `charge_only` returns the cost and collects nothing.
    """

    reason: Reason = ""
    policy: Policy = "refuse"


class NewAdjustment(msgspec.Struct, forbid_unknown_fields=True):
    """A balance to correct."""

    amount: SignedText
    reason: RequiredReason
    reference: Reference = ""


class NewHold(msgspec.Struct, forbid_unknown_fields=True):
    """An amount to set aside."""

    amount: AmountText
    valid_s: ValidS = VALID_S_DEFAULT
    reference: Reference = ""


class NewPost(msgspec.Struct, forbid_unknown_fields=True):
    """A payment that ends a hold: of all of it without `amount`, to the house without `to`."""

    amount: AmountText | None = None
    to: AccountId | None = None
    reference: Reference = ""


class NewVoid(msgspec.Struct, forbid_unknown_fields=True):
    """The end of a hold, without a payment."""

    reason: Reason = ""


class MovementTicket(msgspec.Struct, frozen=True):
    """The ticket of an accepted movement; repeats get the same ticket until it has settled, and its result then."""

    request_key: str
    lottery_session_id: str
    status: Literal["accepted"] = "accepted"


class DeadMovement(msgspec.Struct, frozen=True):
    """A dead movement: nothing was moved. `detail` says why, and what can be done."""

    kind: str
    request_key: str
    lottery_session_id: str
    account_id: int
    status: Literal["dead"]
    reason: str | None
    detail: str


class OpenedAccount(msgspec.Struct, frozen=True):
    """The user's account. `ticket` is that of its opening amount, and `recharge` the result once that has settled.

    Both are null without an amount, and where the account was opened before, under another key.
    """

    account_id: int
    user_id: int
    asset_code: str
    ticket: MovementTicket | None
    recharge: MovementResult | None


class HoldView(msgspec.Struct, frozen=True):
    """A hold; an open one that has expired is about to be voided. Times are UTC."""

    request_key: str
    account_id: int
    asset_code: str
    amount: str
    state: HoldState
    expires_at: str
    created_at: str
    updated_at: str
