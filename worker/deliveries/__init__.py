"""Where messages come from: one contract, a Redis Stream (streams.py) or a RabbitMQ quorum queue (queues.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Protocol

from tombola.producers.brokers.registry import REDIS, kind_of
from tombola.producers.domain.contract import BODY_BYTES_MAX, Request
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.operations import parse_request

NO_HEADERS: Final[Mapping[str, Any]] = MappingProxyType({})
BODY_KEPT_BYTES_MAX: Final = 64 * 1024  # of a body that is too large to be a draw: as much as a dead letter keeps
HELD_BYTES_MAX: Final = 32 * 1024 * 1024  # bodies that one fetch takes in, before they are cut to BODY_KEPT_BYTES_MAX
COUNT_MAX: Final = 2**31 - 1  # what the column of a dead letter holds


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message in hand. `count` says how often it has been delivered, this time included.

    `headers` is what came beside the body: a Stream entry's other fields, an AMQP message's application headers.
    `body` is the beginning of a body that was larger than BODY_KEPT_BYTES_MAX; `body_bytes` and `sha256` are the whole
    one's. `problem` says what is wrong with a message that cannot be a draw whatever its body says.
    """

    body: bytes
    tag: bytes | int
    count: int = 1
    headers: Mapping[str, Any] = field(default_factory=lambda: NO_HEADERS, hash=False)
    whole: tuple[int, str] | None = None  # length and SHA-256 of the whole body, if `body` is only its beginning
    problem: str = ""

    @property
    def body_bytes(self) -> int:
        """The length of the whole body."""
        return len(self.body) if self.whole is None else self.whole[0]

    @property
    def sha256(self) -> str:
        """SHA-256 of the whole body, 64 hex digits."""
        return hashlib.sha256(self.body).hexdigest() if self.whole is None else self.whole[1]

    def request(self) -> Request:
        """The draw that it asks for; raises InvalidRequest with what is wrong."""
        if self.problem:
            raise InvalidRequest(self.problem)
        if self.whole is not None:
            raise InvalidRequest(f"a draw request has at most {BODY_BYTES_MAX:,} bytes, this one has {self.whole[0]:,}")
        return parse_request(self.body)


def received(
    body: bytes, tag: bytes | int, count: int = 1, headers: Mapping[str, Any] = NO_HEADERS, *, problem: str = ""
) -> Delivery:
    """The delivery of a message as a broker hands it over: no larger and no more often than we can keep."""
    whole = None
    if len(body) > BODY_KEPT_BYTES_MAX:
        whole = (len(body), hashlib.sha256(body).hexdigest())
        body = body[:BODY_KEPT_BYTES_MAX]
    return Delivery(body, tag, min(max(1, count), COUNT_MAX), headers, whole, problem)


class Deliveries(Protocol):
    """A source of deliveries, for one thread. Every method raises ServiceUnavailable when the broker is away.

    What was fetched is *in hand* until it is acked, requeued or released. What is in hand when the process dies, or
    when the broker takes it for dead, comes back to this or another consumer with a higher count.
    """

    def fetch(self, count_max: int, *, wait_s: float) -> list[Delivery]:
        """Whatever is waiting, up to `count_max`; when nothing is, wait up to `wait_s` for the first to come.

        Takes in no more than about HELD_BYTES_MAX at once, however large the messages are.
        """

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Tell the broker that these are done with, each at most once. What else is in hand stays in hand."""

    def keep(self, deliveries: Sequence[Delivery]) -> None:
        """Say that these are still being seen to, so that no other consumer takes them over.

        To be called more often than every `claim_after_s` for what stays in hand.
        """

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        """Put these at the end of the queue, as new messages, and out of hand: others get their turn before them."""

    def release(self) -> None:
        """Give back at once all that is in hand or was fetched ahead: other consumers can have it. Never raises.

        The next fetch begins anew, and until the first ack nothing is fetched ahead: what has gone wrong may go on.
        """

    def fetch_dead(self, count_max: int) -> list[Delivery]:
        """Up to `count_max` of the messages that the broker itself has given up on, in its own dead-letter queue."""

    def ack_dead(self, deliveries: Sequence[Delivery]) -> None:
        """Take these out of the broker's dead-letter queue. The last fetch_dead's only, each at most once."""

    def close(self) -> None:
        """Release, and let go of the connection. Never raises."""


def open_deliveries(url: str, *, claim_after_s: float, prefetch: int) -> Deliveries:
    """The source behind a broker URL; it connects at first use."""
    if kind_of(url) is REDIS:
        from tombola.worker.deliveries.streams import StreamDeliveries

        return StreamDeliveries(url, claim_after_s=claim_after_s)
    from tombola.worker.deliveries.queues import QueueDeliveries

    return QueueDeliveries(url, prefetch=prefetch)
