"""Deliveries from a RabbitMQ quorum queue.

The broker pushes up to `prefetch` messages ahead, so that the next batch is here when this one is done. The callback
sits on the AMQP channel itself: kombu's Message, which it would build for each, costs as much as settling the draw.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import kombu

from producers.broker import AMQP_ERRORS, DEAD_QUEUE, QUEUE, declare_queues, open_amqp
from producers.errors import ServiceUnavailable
from worker.deliveries import NO_HEADERS, Delivery, received


class QueueDeliveries:
    """See worker.deliveries.Deliveries."""

    def __init__(self, url: str, *, prefetch: int) -> None:
        self._url = url
        self._prefetch = prefetch
        self._connection: kombu.Connection | None = None
        self._channel: Any = None
        self._dead_channel: Any = None  # of its own: its delivery tags must not mix with the others
        self._waiting: deque[Delivery] = deque()

    def fetch(self, count_max: int, *, wait_s: float) -> list[Delivery]:
        try:
            connection = self._open()
            connection.heartbeat_check()
            if not self._waiting:
                self._drain(connection, wait_s)
            while len(self._waiting) < count_max and self._drain(connection, 0):
                pass
        except (*AMQP_ERRORS, *_recoverable(self._connection)) as error:
            self._forget()
            raise ServiceUnavailable(f"the queue cannot be read: {error or type(error).__name__}") from error
        return [self._waiting.popleft() for _ in range(min(count_max, len(self._waiting)))]

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        if not deliveries or self._channel is None:
            return  # the connection they came on is gone, and with it the right to ack them: they come back
        try:
            # "All up to this one" holds what was given back, too: those were nacked before, and are not the broker's.
            self._channel.basic_ack(max(int(delivery.tag) for delivery in deliveries), multiple=True)
        except (*AMQP_ERRORS, *_recoverable(self._connection)) as error:
            self._forget()
            raise ServiceUnavailable(f"the queue cannot be acked: {error or type(error).__name__}") from error

    def give_back(self, deliveries: Sequence[Delivery]) -> None:
        if self._channel is None:
            return
        try:
            for delivery in deliveries:
                self._channel.basic_reject(int(delivery.tag), requeue=True)
        except (*AMQP_ERRORS, *_recoverable(self._connection)) as error:
            self._forget()
            raise ServiceUnavailable(f"the queue cannot be given back to: {error or type(error).__name__}") from error

    def fetch_dead(self, count_max: int) -> list[Delivery]:
        try:
            connection = self._open()
            if self._dead_channel is None:
                self._dead_channel = connection.channel()
            found: list[Delivery] = []
            while len(found) < count_max and (message := self._dead_channel.basic_get(DEAD_QUEUE)) is not None:
                found.append(_delivery(message))
            return found
        except (*AMQP_ERRORS, *_recoverable(self._connection)) as error:
            self._forget()
            raise ServiceUnavailable(
                f"the dead-letter queue cannot be read: {error or type(error).__name__}"
            ) from error

    def ack_dead(self, deliveries: Sequence[Delivery]) -> None:
        if not deliveries or self._dead_channel is None:
            return
        try:
            self._dead_channel.basic_ack(max(int(delivery.tag) for delivery in deliveries), multiple=True)
        except (*AMQP_ERRORS, *_recoverable(self._connection)) as error:
            self._forget()
            raise ServiceUnavailable(
                f"the dead-letter queue cannot be acked: {error or type(error).__name__}"
            ) from error

    def close(self) -> None:
        # Closing the channel is what gives back: the broker requeues all that is not acked.
        self._forget()

    def _open(self) -> kombu.Connection:
        if self._connection is None:
            self._connection = open_amqp(self._url)
            self._channel = self._connection.channel()
            declare_queues(self._channel)
            self._channel.basic_qos(0, self._prefetch, False)
            self._channel.basic_consume(QUEUE, callback=self._on_message)
        return self._connection

    def _drain(self, connection: kombu.Connection, wait_s: float) -> bool:
        """Take in what the connection holds; whether there was anything."""
        try:
            connection.drain_events(timeout=wait_s)
        except TimeoutError:
            return False
        return True

    def _on_message(self, message: Any) -> None:
        self._waiting.append(_delivery(message))

    def _forget(self) -> None:
        connection, self._connection, self._channel, self._dead_channel = self._connection, None, None, None
        self._waiting.clear()  # their tags belong to the channel
        if connection is not None:
            with suppress(Exception):
                connection.release()


def _delivery(message: Any) -> Delivery:
    body = message.body
    headers = message.properties.get("application_headers") or NO_HEADERS
    return received(
        body if isinstance(body, bytes) else str(body).encode("utf-8", "surrogateescape"),
        message.delivery_tag,
        _count(headers),
        headers,
    )


def _count(headers: Mapping[str, Any]) -> int:
    """How often the broker has delivered it; a header of that name that is no number is somebody else's."""
    before = headers.get("x-delivery-count", 0)
    return before + 1 if isinstance(before, int) and before >= 0 else 1


def _recoverable(connection: kombu.Connection | None) -> tuple[type[Exception], ...]:
    if connection is None:
        return ()
    errors: tuple[type[Exception], ...] = (*connection.connection_errors, *connection.channel_errors)
    return errors
