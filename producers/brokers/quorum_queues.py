"""RabbitMQ: the quorum queues of draws, and publishing: persistent, mandatory, confirmed in batches."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

import amqp
import kombu

from tombola.producers.brokers.rabbitmq import (
    AMQP_ERRORS,
    HEARTBEAT_S,
    Connection,
    blocked_words,
    error_text,
    open_amqp,
)
from tombola.producers.brokers.streams import DEAD_QUEUE, QUEUE
from tombola.producers.domain.errors import BrokerBlocked, PublishFailed, ServiceUnavailable
from tombola.producers.domain.signatures import NO_KEYS, Headers, Keyring
from tombola.producers.forks import in_child

# Workers park a message long before this limit, which is for workers that die too early to park. The limit is generous:
# the broker also counts messages that a worker gives back in a clean shutdown as deliveries.
DELIVERY_LIMIT: Final = 200

_DEAD_EXCHANGE: Final = kombu.Exchange(DEAD_QUEUE, type="direct", durable=True)
_EXCHANGE: Final = kombu.Exchange(QUEUE, type="direct", durable=True)
DEAD_QUORUM_QUEUE: Final = kombu.Queue(
    DEAD_QUEUE, _DEAD_EXCHANGE, routing_key=QUEUE, durable=True, queue_arguments={"x-queue-type": "quorum"}
)
QUORUM_QUEUE: Final = kombu.Queue(
    QUEUE,
    _EXCHANGE,
    routing_key=QUEUE,
    durable=True,
    queue_arguments={
        "x-queue-type": "quorum",
        "x-delivery-limit": DELIVERY_LIMIT,
        "x-dead-letter-exchange": DEAD_QUEUE,
        "x-dead-letter-routing-key": QUEUE,
        # A dead letter leaves the queue only after the other queue has stored it; that needs reject-publish.
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    },
)

CONNECT_TIMEOUT_S_MIN: Final = 0.1  # also where the deadline has passed

# The connection is lost; other errors are refusals.
_LOST: Final = (amqp.ConnectionError, OSError)

T = TypeVar("T")


def declare_queues(channel: Any) -> None:
    """Declare both exchanges and both quorum queues on a kombu channel."""
    DEAD_QUORUM_QUEUE(channel).declare()
    QUORUM_QUEUE(channel).declare()


class QueueBroker:
    """Publishes to RabbitMQ. Threads may share one QueueBroker and take turns. A forked child connects anew.

    A call ends at the latest `publish_timeout_s` after the broker's last confirm. A connection that was idle for longer
    than its heartbeat is replaced before use, since the broker closes it. A publish on a connection that turns out to
    be dead is tried once more. After a failure it is unknown whether the messages are queued.
    """

    _lock: threading.Lock
    _connection: kombu.Connection | None
    _wire: Connection | None
    _channel: Any
    _confirms: _Confirms
    _used_at: float

    def __init__(
        self, url: str, *, publish_timeout_s: float, heartbeat_s: float = HEARTBEAT_S, keyring: Keyring = NO_KEYS
    ) -> None:
        self._url = url
        self._keyring = keyring
        self._timeout_s = publish_timeout_s
        self._heartbeat_s = heartbeat_s
        self._forget()
        in_child(self, QueueBroker._forget)

    def publish(self, bodies: Sequence[bytes], headers: Headers | None = None) -> None:
        headers = self._keyring.beside(bodies, headers)
        besides = itertools.repeat(None, len(bodies)) if headers is None else headers
        messages = list(zip(bodies, besides, strict=True))
        self._in_turn(lambda wire: self._publish(wire, messages))

    def backlog(self) -> int:
        return self._in_turn(self._backlog)

    def close(self) -> None:
        with self._lock:
            self._leave()

    def _publish(self, wire: Connection, messages: Sequence[tuple[bytes, Mapping[str, Any] | None]]) -> None:
        for body, beside in messages:
            _check_blocked(wire)
            self._confirms.sent += 1
            self._channel.basic_publish(
                amqp.Message(
                    body,
                    delivery_mode=2,
                    content_type="application/json",
                    content_encoding="utf-8",
                    application_headers=beside or None,
                ),
                exchange=QUEUE,
                routing_key=QUEUE,
                mandatory=True,
                timeout=self._timeout_s,
            )
        while self._confirms.are_due:
            _check_blocked(wire)
            with wire.within(self._timeout_s):
                wire.drain_events()
        self._confirms.check()

    def _backlog(self, wire: Connection) -> int:
        _check_blocked(wire)  # a blocked broker does not read, and would not answer
        with wire.within(self._timeout_s):
            return int(self._channel.queue_declare(QUEUE, passive=True).message_count)

    def _in_turn(self, step: Callable[[Connection], T]) -> T:
        """Run `step` on an open connection that no other thread uses meanwhile. Every error is a PublishFailed."""
        deadline = time.monotonic() + self._timeout_s
        lock = self._lock
        if not lock.acquire(timeout=self._timeout_s):
            raise PublishFailed("RabbitMQ has not confirmed the draws of another thread in time")
        try:
            wire = self._usable()
            if wire is not None:
                try:
                    return step(wire)
                except _LOST as error:
                    if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
                        raise
                    self._leave()  # the connection was lost while it was idle
            return step(self._open(max(CONNECT_TIMEOUT_S_MIN, deadline - time.monotonic())))
        except BrokerBlocked:  # the connection stays: the broker announces on it when it takes messages again
            raise
        except PublishFailed:
            self._leave()
            raise
        except ServiceUnavailable as error:  # no connection could be opened
            self._leave()
            raise PublishFailed(str(error)) from error
        except AMQP_ERRORS as error:
            self._leave()
            raise PublishFailed(f"RabbitMQ did not confirm the draws: {error_text(error)}") from error
        finally:
            self._used_at = time.monotonic()
            lock.release()

    def _usable(self) -> Connection | None:
        """The open connection, unless it is known to be lost; finding out takes no round trip."""
        wire = self._wire
        if wire is None:
            return None
        if time.monotonic() - self._used_at <= (wire.heartbeat or self._heartbeat_s):
            with suppress(*AMQP_ERRORS):
                with wire.within(self._timeout_s):
                    wire.heartbeat_tick()
                wire.take_in(
                    lambda: False
                )  # the broker may have blocked or unblocked publishers, or closed the connection
                return wire
        self._leave()
        return None

    def _open(self, timeout_s: float) -> Connection:
        self._connection = open_amqp(self._url, timeout_s=timeout_s, heartbeat_s=self._heartbeat_s)
        wire: Connection = self._connection.connection
        self._wire = wire
        with wire.within(timeout_s):
            self._channel = wire.channel()
            declare_queues(self._channel)
            self._channel.confirm_select()
        self._confirms = _Confirms()
        self._confirms.listen(self._channel)
        return wire

    def _leave(self) -> None:
        wire = self._wire
        self._connection = self._wire = self._channel = None
        if wire is not None:
            wire.leave()

    def _forget(self) -> None:
        """Start without a connection: at first, and in a forked child, whose parent goes on using the connection."""
        self._lock = threading.Lock()
        self._connection = self._wire = self._channel = None
        self._confirms = _Confirms()
        self._used_at = 0.0


def _check_blocked(wire: Connection) -> None:
    if wire.blocked:
        raise BrokerBlocked(blocked_words(wire.blocked))


class _Confirms:
    """The confirms of one channel. Publishes are counted from 1, as delivery tags are."""

    def __init__(self) -> None:
        self.sent = 0
        self._confirmed = 0
        self._ahead: set[int] = set()  # delivery tags above _confirmed that are confirmed already
        self._problem = ""

    def listen(self, channel: Any) -> None:
        channel.events["basic_ack"].add(self._on_ack)
        channel.events["basic_nack"].add(self._on_nack)
        channel.events["basic_return"].add(self._on_return)

    @property
    def are_due(self) -> bool:
        return self._confirmed < self.sent

    def check(self) -> None:
        if self._problem:
            raise PublishFailed(f"RabbitMQ refused a draw: {self._problem}")

    def _on_ack(self, delivery_tag: int, multiple: bool) -> None:
        if multiple:
            self._confirmed = max(self._confirmed, delivery_tag)
        else:
            self._ahead.add(delivery_tag)
        while self._confirmed + 1 in self._ahead:
            self._confirmed += 1
            self._ahead.remove(self._confirmed)

    def _on_nack(self, delivery_tag: int, multiple: bool) -> None:
        self._problem = "the queue is full, or cannot replicate"
        self._on_ack(delivery_tag, multiple)

    def _on_return(self, error: Exception, exchange: str, routing_key: str, message: object) -> None:
        self._problem = "it could not be routed: the queue `draws` is missing"
