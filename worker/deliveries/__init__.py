"""The sources of messages: one contract, for a Redis Stream (streams.py) and a RabbitMQ quorum queue (queues.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Protocol

import msgspec

from tombola.producers.brokers.registry import REDIS, kind_of
from tombola.producers.domain.contract import BODY_BYTES_MAX, Request
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.operations import parse_request

NO_HEADERS: Final[Mapping[str, Any]] = MappingProxyType({})
BODY_KEPT_BYTES_MAX: Final = 64 * 1024  # a larger body is no draw; a dead letter keeps its beginning
HELD_BYTES_MAX: Final = 32 * 1024 * 1024  # of bodies in one fetch, before each is cut to BODY_KEPT_BYTES_MAX
COUNT_MAX: Final = 2**31 - 1  # the maximum of a dead letter's column


class Delivery(msgspec.Struct, frozen=True):
    """One message in hand. `count` is the number of its deliveries, this one included.

    `headers` are the other fields of a Stream entry, or the application headers of an AMQP message. Of a body larger
    than BODY_KEPT_BYTES_MAX, `body` is the beginning; `body_bytes` and `sha256` are always of the whole body.
    `problem` says why a message cannot be a draw, whatever its body says; empty otherwise.
    """

    body: bytes
    tag: bytes | int
    count: int = 1
    headers: Mapping[str, Any] = NO_HEADERS
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
        """The draw that the message asks for; raises InvalidRequest, which says what is wrong."""
        if self.problem:
            raise InvalidRequest(self.problem)
        if self.whole is not None:
            raise InvalidRequest(f"a draw request has at most {BODY_BYTES_MAX:,} bytes, this one has {self.whole[0]:,}")
        return parse_request(self.body)


def received(
    body: bytes, tag: bytes | int, count: int = 1, headers: Mapping[str, Any] = NO_HEADERS, *, problem: str = ""
) -> Delivery:
    """The delivery of a message from a broker, with body and count cut to what a dead letter can keep."""
    whole = None
    if len(body) > BODY_KEPT_BYTES_MAX:
        whole = (len(body), hashlib.sha256(body).hexdigest())
        body = body[:BODY_KEPT_BYTES_MAX]
    return Delivery(body, tag, min(max(1, count), COUNT_MAX), headers, whole, problem)


class Deliveries(Protocol):
    """A source of deliveries, for one thread. Every method raises ServiceUnavailable when the broker is away.

    A fetched delivery is *in hand* until it is acked, requeued or released. When the process dies, or the broker takes
    the process for dead, what is in hand is delivered again, to this or another consumer, with a higher count.
    """

    def fetch(self, count_max: int, *, wait_s: float) -> list[Delivery]:
        """The waiting messages, up to `count_max`. When none is waiting, wait up to `wait_s` for the first.

        Takes in about HELD_BYTES_MAX at most, however large the messages are.
        """

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Tell the broker that these are done, each at most once. All other deliveries stay in hand."""

    def keep(self, deliveries: Sequence[Delivery]) -> None:
        """Renew the claim on these deliveries, so that no other consumer takes them over.

        Call it more often than every `claim_after_s` for deliveries that stay in hand.
        """

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        """Put these at the end of the queue, as new messages; they are in hand no more."""

    def release(self) -> None:
        """Give back at once all that is in hand or was fetched ahead, for other consumers. Never raises.

        The next fetch begins anew. Until the first ack nothing is fetched ahead, because the fault may last.
        """

    def fetch_dead(self, count_max: int) -> list[Delivery]:
        """Up to `count_max` messages from the broker's own dead-letter queue, which the broker has given up on."""

    def ack_dead(self, deliveries: Sequence[Delivery]) -> None:
        """Take these out of the broker's dead-letter queue: deliveries of the last fetch_dead, each at most once."""

    def close(self) -> None:
        """Release, and close the connection. Never raises."""


def open_deliveries(url: str, *, claim_after_s: float, prefetch: int) -> Deliveries:
    """The source behind a broker URL. It connects at first use."""
    if kind_of(url) is REDIS:
        from tombola.worker.deliveries.streams import StreamDeliveries

        return StreamDeliveries(url, claim_after_s=claim_after_s)
    from tombola.worker.deliveries.queues import QueueDeliveries

    return QueueDeliveries(url, prefetch=prefetch)
