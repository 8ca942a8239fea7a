"""A hold: an amount set aside for a trade that is under way. A post or a void ends it (post.py, void.py), once.

The amount leaves the balance at once, so the balance is what is available. A hold that nobody ends expires: the relay
voids it.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Final

from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.operations import movements
from tombola.producers.domain.operations.movements import AmountRequest, notes_of, read_notes, why_not_taken
from tombola.producers.domain.operations.operation import (
    Decision,
    Findings,
    HoldChange,
    HoldState,
    Locked,
    Movement,
    Moves,
    Needs,
    Written,
)

HOLD_TYPE: Final = "hold"
HOLD: Final = "hold"
VALID_S_DEFAULT: Final = 15 * 60
VALID_S_MAX: Final = 90 * 24 * 3600


class HoldRequest(AmountRequest, frozen=True, kw_only=True):
    """Set `amount` aside for `valid_s` seconds after the hold settles."""

    kind = "hold"

    valid_s: int = VALID_S_DEFAULT

    def __post_init__(self) -> None:
        AmountRequest.__post_init__(self)
        if type(self.valid_s) is not int or not 1 <= self.valid_s <= VALID_S_MAX:
            raise InvalidRequest(f"valid_s is an integer from 1 to {VALID_S_MAX:,} seconds, not {self.valid_s!r:.40}")


FIELDS: Final = HoldRequest
TYPES: Final = MappingProxyType({HOLD_TYPE: HOLD})
HOUSE: Final = MappingProxyType({HOLD: "house/holds"})

result = movements.result


def needs(request: HoldRequest, _wheels: Wheels) -> Needs:
    """The account."""
    return Needs((request.account_id,))


def decide(request: HoldRequest, locked: Locked) -> Decision:
    """The amount set aside, or a rejection."""
    account = locked.accounts.get(request.account_id)
    why_not = why_not_taken(account, request.moved)
    if why_not is not None or account is None:
        return why_not or ()
    until = (locked.now + timedelta(seconds=request.valid_s)).replace(microsecond=0)
    opened = HoldChange(
        request.request_key, HoldState.OPEN, request.account_id, account.asset_code, request.moved, until
    )
    return Moves(_movements(request, until), (opened,))


def until_of(notes: str) -> datetime:
    """The moment at which a hold expires, from the notes of its row; raises ValueError or KeyError for other notes."""
    return datetime.fromisoformat(read_notes(notes)["until"]).astimezone(UTC)


def check(request: HoldRequest, written: Written) -> Findings:
    """The row is what the request says (I14)."""
    until = until_of(written.rows[0].notes) if written.is_completed and written.rows else datetime.min
    return {"I14": movements.differences(request, written, _movements(request, until))}


def _movements(request: HoldRequest, until: datetime) -> list[Movement]:
    notes = notes_of(("until", until.isoformat()), ("reference", request.reference))
    return [Movement(request.account_id, HOLD_TYPE, HOLD, -request.moved, notes)]
