"""What all operations but the draw share: their texts on the wire, their result, and how the audit compares rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Final

import msgspec

from tombola.producers.domain.contract import (
    ACCOUNT_NOT_FOUND,
    INSUFFICIENT_BALANCE,
    TERMS_LENGTH_MAX,
    MovementResult,
    Request,
    Row,
    shown,
)
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.money import AMOUNT_MAX, parse_amount
from tombola.producers.domain.operations.operation import LockedAccount, Movement, Outcome, Rejection, Written

# Why a movement is rejected, beside ACCOUNT_NOT_FOUND and INSUFFICIENT_BALANCE. A rejection is final.
BALANCE_LIMIT: Final = "BALANCE_LIMIT"  # the account would hold more than AMOUNT_MAX
OTHER_ASSET: Final = "OTHER_ASSET"  # the accounts of a transfer hold different assets

REFERENCE_LENGTH_MAX: Final = 100
REASON_LENGTH_MAX: Final = 100

_is_reference = re.compile(r"[!-~]{0,100}").fullmatch
_is_channel = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}").fullmatch


class AmountRequest(Request, frozen=True, kw_only=True):
    """A request that moves `amount` (text with two decimals) and may have a `reference` outside, such as an order's id.

    Raises InvalidRequest for an amount or a reference out of bounds.
    """

    amount: str
    reference: str = ""

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        msgspec.structs.force_setattr(self, "amount", str(parse_amount(self.amount, is_signed=self.is_signed)))
        check_reference(self.reference)
        check_terms(self)

    @property
    def is_signed(self) -> bool:
        """Whether the amount may be below zero."""
        return False

    @property
    def moved(self) -> Decimal:
        """The amount as a number."""
        return Decimal(self.amount)


# ---- texts on the wire -----------------------------------------------------------------------------------------------


def check_reference(text: str) -> None:
    """Raise InvalidRequest if `text` cannot be a reference."""
    if type(text) is not str or not _is_reference(text):
        raise InvalidRequest(f"a reference has up to 100 ASCII characters and no blank: {text!r:.120}")


def check_channel(text: str) -> None:
    """Raise InvalidRequest if `text` is neither empty nor the name of a channel."""
    if text and (type(text) is not str or not _is_channel(text)):
        raise InvalidRequest(f"a channel's name is up to 32 characters of a-z 0-9 . _ and -: {text!r:.40}")


def check_reason(text: str, *, is_required: bool) -> None:
    """Raise InvalidRequest if `text` cannot be a reason, which people write and read."""
    if type(text) is not str or len(text) > REASON_LENGTH_MAX or not text.isprintable():
        raise InvalidRequest(f"a reason has up to {REASON_LENGTH_MAX} printable characters: {text!r:.120}")
    if is_required and not text.strip():
        raise InvalidRequest("this needs a reason: say why, for the record")


def check_terms(request: Request) -> None:
    """Raise InvalidRequest if the fields of this kind do not fit into the request's row."""
    length = len(request.terms or "")
    if length > TERMS_LENGTH_MAX:
        raise InvalidRequest(
            f"the fields of a {request.kind} request take {length} characters as JSON, at most {TERMS_LENGTH_MAX}: "
            "shorten the reference or the reason"
        )


def notes_of(*parts: tuple[str, str]) -> str:
    """The notes of a ledger row: `name=text`, parted by blanks; a part without text is absent, a reason stands last."""
    return " ".join(f"{name}={text}" for name, text in parts if text)


def read_notes(notes: str) -> Mapping[str, str]:
    """The parts of such notes, without the reason."""
    told = notes.partition(" reason=")[0]
    return {name: text for name, is_part, text in (it.partition("=") for it in told.split(" ")) if is_part}


# ---- decisions -------------------------------------------------------------------------------------------------------


def why_not_added(account: LockedAccount | None, amount: Decimal) -> Rejection | None:
    """Why `amount` cannot be added to the account; None if it can."""
    if account is None:
        return Rejection(ACCOUNT_NOT_FOUND, None)
    if account.balance + amount > AMOUNT_MAX:
        return Rejection(BALANCE_LIMIT, account.balance)
    return None


def why_not_taken(account: LockedAccount | None, amount: Decimal) -> Rejection | None:
    """Why `amount` cannot be taken from the account; None if it can."""
    if account is None:
        return Rejection(ACCOUNT_NOT_FOUND, None)
    if account.balance < amount:
        return Rejection(INSUFFICIENT_BALANCE, account.balance)
    return None


# ---- results and audit -----------------------------------------------------------------------------------------------


def result(request: Request, outcome: Outcome) -> bytes:
    """The result's bytes. Raises ValueError for a completed request without a row on its own account."""
    reason, balance = outcome if isinstance(outcome, Rejection) else (None, None)
    rows: Sequence[Row] = () if isinstance(outcome, Rejection) else outcome
    for row in rows:
        if row.account_id == request.account_id:
            balance = row.after
    if reason is None and balance is None:
        raise ValueError(f"the ledger has no row of {request.kind} {request.request_key}")
    return MovementResult(
        kind=request.kind,
        request_key=request.request_key,
        lottery_session_id=request.lottery_session_id,
        account_id=request.account_id,
        status="completed" if reason is None else "rejected",
        reason=reason,
        balance_after=None if balance is None else str(balance),
        reference=getattr(request, "reference", ""),
        transactions=[shown(row) for row in rows],
    ).encode()


def differences(request: Request, written: Written, expected: Sequence[Movement]) -> Iterator[str]:
    """How the rows of a completed request differ from the `expected` movements (I14)."""
    if not written.is_completed:
        return
    wanted = [
        (f"{request.ledger_key}:{it.entry_type}", it.account_id, it.business_type, it.delta, it.notes)
        for it in expected
    ]
    found = [(it.idempotency_key, it.account_id, it.business_type, it.delta, it.notes) for it in written.rows]
    for key, account_id, _, delta, _ in (it for it in wanted if it not in found):
        yield f"lacks the ledger row {key} of {delta} on account {account_id}"
    for key, account_id, _, delta, _ in (it for it in found if it not in wanted):
        yield f"has a ledger row {key} of {delta} on account {account_id} that it does not say"
