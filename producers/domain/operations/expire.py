"""An expiry: points that an account has earned before a moment, and not spent since, are taken away.

There are no lots: what was ever taken from an account was taken from its oldest points. So

    due = max(0, earned until the moment - all ever taken)

where what a refund or the end of a hold returns counts as less taken, not as newly earned.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Final

import msgspec

from tombola.producers.domain.contract import ACCOUNT_NOT_FOUND, Request
from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.operations import movements
from tombola.producers.domain.operations.movements import notes_of, read_notes
from tombola.producers.domain.operations.operation import (
    Decision,
    Findings,
    Lifetime,
    Locked,
    Movement,
    Needs,
    Rejection,
    Written,
)
from tombola.producers.domain.operations.post import HOLD_POST
from tombola.producers.domain.operations.refund import REFUND
from tombola.producers.domain.operations.void import HOLD_VOID

NOTHING_DUE: Final = "NOTHING_DUE"

EXPIRY_TYPE: Final = "expiry"
EXPIRY: Final = "expiry"
RETURNED: Final = frozenset({REFUND, HOLD_POST, HOLD_VOID})


class ExpireRequest(Request, frozen=True, kw_only=True):
    """Take away what the account has earned before `until` (ISO 8601 with a zone) and not spent since."""

    kind = "expire"

    until: str

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        try:
            moment = datetime.fromisoformat(self.until)
            if moment.tzinfo is None:
                raise ValueError("no zone")
        except (TypeError, ValueError):
            raise InvalidRequest(
                f"until is a time with a zone, such as 2026-01-01T00:00:00+00:00, not {self.until!r:.60}"
            ) from None
        in_utc = moment.astimezone(UTC).replace(microsecond=0)
        msgspec.structs.force_setattr(self, "until", in_utc.isoformat())

    @property
    def stored_until(self) -> str:
        """`until` as ledger rows have times: UTC, `YYYY-MM-DD HH:MM:SS.ffffff`."""
        moment = datetime.fromisoformat(self.until).replace(tzinfo=None)
        return moment.isoformat(sep=" ", timespec="microseconds")


FIELDS: Final = ExpireRequest
TYPES: Final = MappingProxyType({EXPIRY_TYPE: EXPIRY})
HOUSE: Final = MappingProxyType({EXPIRY: "house/breakage"})

result = movements.result


def needs(request: ExpireRequest, _wheels: Wheels) -> Needs:
    """The account, and what it has earned and spent."""
    return Needs((request.account_id,), earned_until=request.stored_until)


def decide(request: ExpireRequest, locked: Locked) -> Decision:
    """What is due taken away, or a rejection."""
    account = locked.accounts.get(request.account_id)
    if account is None:
        return Rejection(ACCOUNT_NOT_FOUND, None)
    lifetime = locked.lifetimes[request.account_id, request.stored_until]
    due = due_of(lifetime, account.balance)
    if not due:
        return Rejection(NOTHING_DUE, account.balance)
    return [Movement(request.account_id, EXPIRY_TYPE, EXPIRY, -due, _notes(request, lifetime))]


def due_of(lifetime: Lifetime, balance: Decimal) -> Decimal:
    """What expires, never more than the balance."""
    return min(balance, max(Decimal("0.00"), lifetime.earned - lifetime.taken))


def after(lifetime: Lifetime, business_type: str, delta: Decimal, *, is_earned: bool) -> Lifetime:
    """The lifetime after one more ledger row; `is_earned`: the row is before the moment that is asked for."""
    if delta < 0 or business_type in RETURNED:
        return lifetime._replace(taken=lifetime.taken - delta)
    return lifetime._replace(earned=lifetime.earned + delta) if is_earned else lifetime


def check(request: ExpireRequest, written: Written) -> Findings:
    """The row takes what its notes say was due (I14)."""
    return {"I14": _wrong(request, written)}


def _wrong(request: ExpireRequest, written: Written) -> Iterator[str]:
    if not written.is_completed or not written.rows:
        return  # I11 says so
    row = written.rows[0]
    try:
        said = read_notes(row.notes)
        lifetime = Lifetime(Decimal(said["earned"]), Decimal(said["taken"]))
    except (KeyError, ArithmeticError):
        yield f"does not say what was due: {row.notes!r:.100}"
        return
    expected = Movement(
        request.account_id, EXPIRY_TYPE, EXPIRY, -due_of(lifetime, row.before), _notes(request, lifetime)
    )
    yield from movements.differences(request, written, [expected])


def _notes(request: ExpireRequest, lifetime: Lifetime) -> str:
    return notes_of(("until", request.until), ("earned", str(lifetime.earned)), ("taken", str(lifetime.taken)))
