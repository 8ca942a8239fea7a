"""Deliveries from a RabbitMQ quorum queue.

The broker pushes up to `prefetch` messages ahead, so that the next batch is here when this batch is done. The callback
is on the AMQP channel itself: building kombu's Message for each message costs as much as settling the draw.

Tags: AMQP numbers the messages of each connection from 1 on. Our tags continue where those of the last connection
ended, so that a delivery from a lost connection is never mistaken for another one.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import kombu
from amqp import spec
from amqp.serialization import dumps

from tombola.producers.brokers.quorum_queues import QueueBroker, declare_queues
from tombola.producers.brokers.rabbitmq import (
    AMQP_ERRORS,
    ANSWER_TIMEOUT_S,
    UNDECODABLE,
    Connection,
    error_text,
    open_amqp,
)
from tombola.producers.brokers.streams import DEAD_QUEUE, QUEUE
from tombola.producers.domain.errors import ServiceUnavailable
from tombola.worker.deliveries import HELD_BYTES_MAX, NO_HEADERS, Delivery, received

COUNT_HEADER: Final = "x-delivery-count"  # the broker overwrites what a publisher writes there
HEADERS_BYTES_MAX: Final = 64 * 1024  # of the headers of a requeued copy; a frame holds twice as much
TAG_FRAME: Final = struct.Struct(">BHIHHQBB")  # a method whose arguments are a delivery tag and a bit
REQUEUE: Final = 1

log = logging.getLogger(__name__)


class QueueDeliveries:
    """See worker.deliveries.Deliveries."""

    def __init__(self, url: str, *, prefetch: int) -> None:
        self._url = url
        self._prefetch = prefetch
        self._connection: kombu.Connection | None = None
        self._wire: Connection | None = None
        self._channel: Any = None
        self._consumer_tag = ""  # empty while nothing is consumed
        self._is_cautious = False  # after a release: fetch nothing ahead until the first ack
        self._waiting: deque[Delivery] = deque()
        self._in_hand: set[int] = set()  # tags that were fetched, and neither acked nor given back
        self._base = 0  # the last tag of earlier connections
        self._last = 0  # the last tag so far
        self._taken_bytes = 0  # by this fetch, before cutting
        self._dead = _DeadQueue(url)
        # On a connection of its own, because RabbitMQ may block connections that publish.
        self._copies = QueueBroker(url, publish_timeout_s=ANSWER_TIMEOUT_S)

    def fetch(self, count_max: int, *, wait_s: float) -> list[Delivery]:
        self._taken_bytes = 0
        with self._explained("the queue cannot be read"):
            wire = self._open()
            wire.heartbeat_tick()
            if not self._waiting:
                _await(wire, wait_s)
            # Messages that are not taken in stay in the socket, and then with the broker.
            wire.take_in(lambda: len(self._waiting) >= count_max or self._taken_bytes >= HELD_BYTES_MAX)
        fetched = [self._waiting.popleft() for _ in range(min(count_max, len(self._waiting)))]
        self._in_hand.update(int(delivery.tag) for delivery in fetched)
        return fetched

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        # Deliveries of a lost connection are delivered again: they cannot be acked any more.
        tags = self._in_hand.intersection(int(delivery.tag) for delivery in deliveries)
        if not tags or self._wire is None:
            return
        self._in_hand -= tags
        with self._explained("the queue cannot be acked"), self._wire.within(ANSWER_TIMEOUT_S):
            if self._is_cautious:  # a consumer's prefetch cannot be changed: the next fetch begins another consumer
                self._is_cautious = False
                self._channel.basic_cancel(self._consumer_tag)
                self._consumer_tag = ""
            if not self._in_hand or max(tags) < (lowest := min(self._in_hand)):
                self._channel.basic_ack(max(tags) - self._base, multiple=True)
                return
            below = [tag for tag in tags if tag < lowest]
            if below:
                self._channel.basic_ack(max(below) - self._base, multiple=True)
            # AMQP acks one tag, or all tags up to one. Above a tag that stays in hand each ack needs a frame of its
            # own; all frames go out in one write.
            self._write(spec.Basic.Ack, (tag for tag in tags if tag > lowest))

    def keep(self, deliveries: Sequence[Delivery]) -> None:
        # Deliveries are ours as long as the connection lives, and the connection lives by heartbeats.
        if self._wire is not None:
            with self._explained("the queue does not answer"), self._wire.within(ANSWER_TIMEOUT_S):
                self._wire.send_heartbeat()

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        if any(delivery.whole is not None for delivery in deliveries):
            raise ValueError("a message whose body was cut cannot be requeued: park it")
        deliveries = [delivery for delivery in deliveries if int(delivery.tag) in self._in_hand]
        if deliveries:
            self._copies.publish([it.body for it in deliveries], [_publishable(it.headers) for it in deliveries])
            self.ack(deliveries)

    def release(self) -> None:
        self._is_cautious = True
        self._close()

    def _close(self) -> None:
        # Closing gives back: the broker requeues all that is not acked.
        connection, self._connection, self._wire, self._channel = self._connection, None, None, None
        self._consumer_tag = ""
        if connection is not None:
            with suppress(Exception):
                connection.release()
        self._waiting.clear()  # last: more may have come while the connection was closing
        self._in_hand.clear()

    def _write(self, method: tuple[int, int], tags: Iterable[int], flag: int = 0) -> None:
        """A frame for each of these, in one write."""
        assert self._wire is not None
        channel_id = self._channel.channel_id
        frames = [TAG_FRAME.pack(1, channel_id, 13, *method, tag - self._base, flag, 0xCE) for tag in sorted(tags)]
        self._wire.transport.write(b"".join(frames))

    def fetch_dead(self, count_max: int) -> list[Delivery]:
        return self._dead.fetch(count_max)

    def ack_dead(self, deliveries: Sequence[Delivery]) -> None:
        self._dead.ack(deliveries)

    def close(self) -> None:
        self._close()
        self._dead.close()
        with suppress(Exception):
            self._copies.close()

    def _open(self) -> Connection:
        if self._wire is None:
            self._connection = open_amqp(self._url)
            self._wire = self._connection.connection
            self._base = self._last
            self._channel = self._wire.channel()
            self._channel.auto_decode = False  # a body is bytes, whatever its content encoding says
            declare_queues(self._channel)
        if not self._consumer_tag:
            self._channel.basic_qos(0, 1 if self._is_cautious else self._prefetch, False)
            # The broker names each consumer anew: with a known name it would get back what is still in hand.
            self._consumer_tag = self._channel.basic_consume(QUEUE, callback=self._on_message)
        return self._wire

    def _on_message(self, message: Any) -> None:
        self._taken_bytes += len(message.body)
        self._last = self._base + message.delivery_info["delivery_tag"]
        self._waiting.append(_delivery(message, self._last))

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Close the connection after any of its errors, and raise ServiceUnavailable."""
        with _explained(what, self._close):
            yield


class _DeadQueue:
    """The broker's own dead-letter queue, on a connection of its own, where answers need not wait behind draws."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: kombu.Connection | None = None
        self._channel: Any = None
        self._in_hand: set[int] = set()

    def fetch(self, count_max: int) -> list[Delivery]:
        found: list[Delivery] = []
        bytes_left = HELD_BYTES_MAX
        with _explained("the dead-letter queue cannot be read", self.close):
            channel = self._open()
            while len(found) < count_max and bytes_left > 0 and (message := channel.basic_get(DEAD_QUEUE)) is not None:
                bytes_left -= len(message.body)
                found.append(_delivery(message, message.delivery_info["delivery_tag"]))
        self._in_hand.update(int(delivery.tag) for delivery in found)
        return found

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        if not deliveries or self._channel is None:
            return
        with _explained("the dead-letter queue cannot be acked", self.close):
            tags = {int(delivery.tag) for delivery in deliveries}
            self._in_hand -= tags
            if all(tag > max(tags) for tag in self._in_hand):
                self._channel.basic_ack(max(tags), multiple=True)
            else:  # messages that could not be parked stay
                for tag in tags:
                    self._channel.basic_ack(tag)

    def close(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        self._in_hand.clear()
        if connection is not None:
            with suppress(Exception):
                connection.release()

    def _open(self) -> Any:
        if self._connection is None:
            self._connection = open_amqp(self._url)
            self._channel = self._connection.connection.channel()
            self._channel.auto_decode = False
            declare_queues(self._channel)
        self._connection.connection.heartbeat_tick()
        return self._channel


@contextmanager
def _explained(what: str, close: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except ServiceUnavailable:
        close()
        raise
    except AMQP_ERRORS as error:
        close()
        raise ServiceUnavailable(f"{what}: {error_text(error)}") from error


def _await(wire: Connection, wait_s: float) -> None:
    """Take in the first frame that comes within `wait_s`."""
    if wait_s > 0:
        with suppress(TimeoutError), wire.within(wait_s):
            wire.drain_events()


def _delivery(message: Any, tag: int) -> Delivery:
    properties = message.properties
    problem = properties.get(UNDECODABLE, "")
    headers = properties.get("application_headers") or NO_HEADERS
    return received(
        message.body or b"",  # py-amqp has an empty str where the body is empty
        tag,
        _count(message.delivery_info, headers),
        headers,
        problem=problem and f"its properties cannot be decoded: {problem}",
    )


def _count(info: Mapping[str, Any], headers: Mapping[str, Any]) -> int:
    """The number of deliveries of a message, this one included. On the first one a publisher has written the header."""
    before = headers.get(COUNT_HEADER, 1) if info["redelivered"] else 0
    return before + 1 if isinstance(before, int) and before >= 0 else 1


def _publishable(headers: Mapping[str, Any]) -> dict[str, Any]:
    """The headers of a requeued copy: without the broker's count, and without values that cannot be sent again."""
    kept: dict[str, Any] = {}
    room = HEADERS_BYTES_MAX
    for name, value in headers.items():
        with suppress(Exception):  # struct.error, OverflowError, RecursionError, …
            room -= len(dumps("F", [{name: value}]))
            if room >= 0 and name != COUNT_HEADER:
                kept[name] = value
    return kept
