"""What may become of a request, and of a message that does not settle: each word once, as it stands in the tables."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class Status(StrEnum):
    """Of a request: accepted means that it will happen, dead that only an operator's replay can make it happen."""

    ACCEPTED = "accepted"
    COMPLETED = "completed"
    REJECTED = "rejected"
    DEAD = "dead"


class DeadReason(StrEnum):
    """Why a request is dead: nothing was charged, and an operator can replay it under the same key."""

    NEVER_SETTLED = "NEVER_SETTLED"
    TIMED_OUT = "TIMED_OUT"
    PARKED = "PARKED"


_WHY_DEAD: Final[Mapping[str, str]] = {
    DeadReason.NEVER_SETTLED: "published again and again, and no worker has settled it",
    DeadReason.TIMED_OUT: "accepted too long ago, and no worker has settled it",
    DeadReason.PARKED: "a worker could not settle it, and set it aside as a dead letter",
}


def why_dead(reason: str | None) -> str | None:
    """What a reason means; None for one that this release does not know."""
    return _WHY_DEAD.get(reason or "")


def dead_because(reason: str | None) -> str:
    """What to tell of a dead request: why, and what can be done."""
    why = why_dead(reason) or "given up"
    return f"This draw is dead ({reason}): {why}. Nothing was charged; an operator can replay it under the same key."


class LetterState(StrEnum):
    """Of a dead letter: parked until an operator replays or discards it. A replay settles it, or it is parked again."""

    PARKED = "parked"
    REPLAYING = "replaying"
    SETTLED = "settled"
    PARKED_AGAIN = "parked again"
    DISCARDED = "discarded"


OPEN_STATES: Final = (LetterState.PARKED, LetterState.PARKED_AGAIN)


class Cause(StrEnum):
    """Why a message was parked."""

    UNPARSABLE = "unparsable"
    UNKNOWN_VERSION = "unknown version"
    INVALID = "invalid"
    NOT_SIGNED = "not signed"
    NOT_ACCEPTED = "not accepted"
    FINGERPRINT_MISMATCH = "fingerprint mismatch"
    UNKNOWN_CAMPAIGN = "unknown campaign"
    TOO_MANY_DELIVERIES = "too many deliveries"
    NEVER_SETTLED = "never settled"
    FAILED_ALONE = "failed alone"


# Messages that may be anybody's. What they ask for is perhaps an honest caller's as well, who must not suffer for it:
# they are known by another name than his request's, and nothing is given up for them.
STRANGERS: Final = frozenset({Cause.NOT_SIGNED, Cause.NOT_ACCEPTED})
