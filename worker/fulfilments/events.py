"""Events: what a webhook can subscribe to, and which event a ledger row is.

| event | when | idempotency key |
| --- | --- | --- |
| `draw.settled` | a draw is completed or rejected | the request key |
| `grant.item`, `grant.coupon` | a prize handed out an item, or a coupon | the ledger row's key |
| a notification's name | a prize has `{ notify = "coupon-won" }` | the ledger row's key |

A notification's name has no dot, so it is never one of the other events. `*` subscribes to all events of prizes: to all
but `draw.settled`, of which each draw has one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from tombola.producers.domain.campaigns.pulls import BUSINESS_TYPES
from tombola.producers.domain.errors import InvalidRequest

DRAW_SETTLED: Final = "draw.settled"
GRANT_ITEM: Final = "grant.item"
GRANT_COUPON: Final = "grant.coupon"
WEBHOOK_TEST: Final = "webhook.test"  # of `tombola webhook test`: no webhook subscribes to it
UNNAMED: Final = "notification"  # one whose notes do not name it
EVERY: Final = "*"
DOTTED: Final = frozenset({DRAW_SETTLED, GRANT_ITEM, GRANT_COUPON})

NOTICE: Final = BUSINESS_TYPES["notice"]
_GRANTS: Final[Mapping[str, str]] = {BUSINESS_TYPES["item"]: GRANT_ITEM, BUSINESS_TYPES["coupon"]: GRANT_COUPON}
_notify_in = re.compile(r"(?:^| )notify=([A-Za-z0-9_-]{1,64})(?: |$)").search
_is_notification = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}").fullmatch


class LedgerRow(Protocol):
    """The columns of a ledger row that its event follows from."""

    @property
    def business_type(self) -> str: ...
    @property
    def notes(self) -> str: ...


def event_of(row: LedgerRow) -> str | None:
    """The event that a ledger row is; None for a charge, a reward and any other movement of a balance.

    A notification's row is called by what its notes say after `notify=`. Never raises: no draw fails for its event.
    """
    if row.business_type != NOTICE:
        return _GRANTS.get(row.business_type)
    named = _notify_in(row.notes)
    return named[1] if named else UNNAMED


def checked_events(events: Iterable[str]) -> tuple[str, ...]:
    """`events` without repeats, sorted. Raises InvalidRequest for none, and for a name that no event can have."""
    names = tuple(sorted(set(events)))
    if not names:
        raise InvalidRequest(f"name an event: {', '.join(sorted(DOTTED))}, a notification's name, or {EVERY}")
    for name in names:
        if name != EVERY and name not in DOTTED and not _is_notification(name):
            raise InvalidRequest(
                f"no event is called {name!r:.80}: there are {', '.join(sorted(DOTTED))}, the names of notifications "
                f"(A-Z a-z 0-9 _ and -), and {EVERY} for all but {DRAW_SETTLED}"
            )
    return names
