"""Where messages come from: one contract, a Redis Stream (streams.py) or a RabbitMQ quorum queue (queues.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Protocol

NO_HEADERS: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message in hand. `count` says how often it has been delivered, this time included.

    `headers` is what came beside the body: a Stream entry's other fields, an AMQP message's application headers.
    """

    body: bytes
    tag: bytes | int
    count: int = 1
    headers: Mapping[str, Any] = field(default_factory=lambda: NO_HEADERS, hash=False)


class Deliveries(Protocol):
    """A source of deliveries, for one thread. Every method raises ServiceUnavailable when the broker is away.

    What was fetched and not acked comes back, to this or another consumer, with a higher count: after `close()`, when
    the process dies, or when the broker takes it for dead.
    """

    def fetch(self, count_max: int, *, wait_s: float) -> list[Delivery]:
        """Whatever is waiting, up to `count_max`; when nothing is, wait up to `wait_s` for the first to come."""

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Tell the broker that these are done with. The last fetch's only, each at most once."""

    def give_back(self, deliveries: Sequence[Delivery]) -> None:
        """Leave these of the last fetch for later, unacked."""

    def fetch_dead(self, count_max: int) -> list[Delivery]:
        """Up to `count_max` of the messages that the broker itself has given up on, in its own dead-letter queue."""

    def ack_dead(self, deliveries: Sequence[Delivery]) -> None:
        """Take these out of the broker's dead-letter queue. The last fetch_dead's only, each at most once."""

    def close(self) -> None:
        """Give back what is in hand and let go of the connection. Never raises."""


def open_deliveries(url: str, *, claim_after_s: float, prefetch: int) -> Deliveries:
    """The source behind a broker URL; it connects at first use."""
    if url.startswith("redis"):
        from worker.deliveries.streams import StreamDeliveries

        return StreamDeliveries(url, claim_after_s=claim_after_s)
    from worker.deliveries.queues import QueueDeliveries

    return QueueDeliveries(url, prefetch=prefetch)
