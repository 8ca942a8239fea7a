"""The states of requests and dead letters, and why they are reached: each word once, as the tables store it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class Status(StrEnum):
    """Of a request. Accepted is a promise to settle; a dead request settles only after an operator's replay."""

    ACCEPTED = "accepted"
    COMPLETED = "completed"
    REJECTED = "rejected"
    DEAD = "dead"


class DeadReason(StrEnum):
    """Why a request is dead. Nothing was charged, and an operator can replay the request under the same key."""

    NEVER_SETTLED = "NEVER_SETTLED"
    TIMED_OUT = "TIMED_OUT"
    PARKED = "PARKED"


_WHY_DEAD: Final[Mapping[str, str]] = {
    DeadReason.NEVER_SETTLED: "published many times, and no worker has settled it",
    DeadReason.TIMED_OUT: "accepted too long ago, and no worker has settled it",
    DeadReason.PARKED: "a worker could not settle it, and parked it as a dead letter",
}


def why_dead(reason: str | None) -> str | None:
    """The meaning of a reason; None for a reason that this release does not know."""
    return _WHY_DEAD.get(reason or "")


def dead_because(reason: str | None) -> str:
    """The message about a dead request: why it is dead, and what an operator can do."""
    why = why_dead(reason) or "given up"
    return f"This draw is dead ({reason}): {why}. Nothing was charged; an operator can replay it under the same key."


class LetterState(StrEnum):
    """Of a dead letter: parked until an operator replays or discards it; a replay ends as settled or parked again."""

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


# Messages of unknown senders. Such a message may copy the request of an honest caller, whom it must not harm: its dead
# letter has a name of its own, and no request is given up for it.
STRANGERS: Final = frozenset({Cause.NOT_SIGNED, Cause.NOT_ACCEPTED})


class FulfilmentState(StrEnum):
    """Of a fulfilment. Pending until the receiver has taken it; a dead one waits for an operator's replay."""

    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"
