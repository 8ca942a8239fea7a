"""What settling a draw comes to: an outcome, a refusal, or a deferral; and that it has settled before."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import msgspec

from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import DUPLICATE_REQUEST_IDEMPOTENT, Request
from tombola.producers.storage.requests import RequestRecord


class Settled(msgspec.Struct, frozen=True):
    """The draw has an outcome, of this batch or of an earlier one. `result` holds the bytes of its first result."""

    request: Request
    result: bytes
    settled_at: datetime
    is_repeat: bool = False
    is_rejected: bool = False  # by this batch; False for a repeat of a rejected draw
    accepted_at: datetime | None = None

    @property
    def reason(self) -> str | None:
        """DUPLICATE_REQUEST_IDEMPOTENT for a repeat. The reason of a rejection is in the result."""
        return DUPLICATE_REQUEST_IDEMPOTENT if self.is_repeat else None


@dataclass(frozen=True, slots=True)
class Refused:
    """The draw cannot be settled, now or later: its message becomes a dead letter."""

    request: Request
    cause: Cause
    error: str
    exception: Exception | None = None


@dataclass(frozen=True, slots=True)
class Deferred:
    """Another transaction holds a row that the draw needs. The draw itself is in order: leave its message unacked.

    `is_account_held`: the account's row is held, so every draw of this account has to wait.
    """

    request: Request
    error: str
    is_account_held: bool = False


class Repeat(msgspec.Struct, frozen=True):
    """The request has settled before, as its row says; its result is not read yet (worker.settle.repeats)."""

    request: Request
    known: RequestRecord

    @property
    def is_repeat(self) -> bool:
        return True

    @property
    def is_rejected(self) -> bool:
        return False  # by this batch


Answer = Settled | Refused | Deferred
