"""Celery's own queues, and connections that survive any message on them.

    tombola.tasks   our own: beat's housekeeping, and shops that choose it; on RabbitMQ a quorum queue
    tombola         for shops: `send_task("tombola.draw", …, queue="tombola")` from a Celery app without settings
                    declares it, on RabbitMQ as a classic queue. Older releases had their own tasks there, too: they
                    are consumed like the rest.
    tombola.dead    messages that are no task, unchanged; the log says why

Draws do not travel here, apart from `tombola.draw` for shops. worker.host.hosting consumes these queues.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final

import kombu
import redis
from celery import Celery
from celery.app.amqp import AMQP
from celery.exceptions import InvalidTaskError
from kombu.transport import pyamqp, virtual
from kombu.transport import redis as lists

from tombola.producers.brokers import rabbitmq, redis_clients

log = logging.getLogger(__name__)

SHOPS: Final = "tombola"
TASKS: Final = "tombola.tasks"
DEAD: Final = "tombola.dead"
DEAD_TASKS_MAX: Final = 10_000  # beyond this the oldest are dropped: a flood must not fill the broker
SHOWN_CHARACTERS_MAX: Final = 300
PUT_TIMEOUT_S: Final = 10.0

# SHOP_QUEUE is what a Celery app declares by default; TASK_QUEUE with task_create_missing_queue_type="quorum".
SHOP_QUEUE: Final = kombu.Queue(SHOPS, kombu.Exchange(SHOPS, type="direct"), routing_key=SHOPS)
TASK_QUEUE: Final = kombu.Queue(
    TASKS, kombu.Exchange(TASKS, type="direct"), routing_key=TASKS, queue_arguments={"x-queue-type": "quorum"}
)
DEAD_TASK_QUEUE: Final = kombu.Queue(
    DEAD,
    kombu.Exchange(""),
    routing_key=DEAD,
    queue_arguments={"x-queue-type": "quorum", "x-max-length": DEAD_TASKS_MAX},
)

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


def shown(content: Any) -> str:
    """The beginning of `content` for a log: one line of printable ASCII, all other characters escaped."""
    text = content if isinstance(content, bytes | str) else str(content)
    return ascii(text[:SHOWN_CHARACTERS_MAX])[:SHOWN_CHARACTERS_MAX]


def _errors_of(headers: Any) -> list[ExcInfo]:
    """An error for a compressed message: unpacked, it could be a thousand times as large."""
    if isinstance(headers, dict) and headers.get("compression"):
        error = InvalidTaskError("compressed messages are not taken")
        return [(InvalidTaskError, error, None)]
    return []


# The errors of a lost connection to Redis. kombu's own list has KeyError and AttributeError as well.
LOST: Final = (redis.ConnectionError, redis.TimeoutError, OSError)


# ---- Redis: lists ----------------------------------------------------------------------------------------------------


class ListMessage(virtual.Message):  # type: ignore[misc]
    def __init__(self, payload: dict[str, Any], channel: Any = None, **options: Any) -> None:
        self.errors = _errors_of(payload.get("headers"))
        super().__init__(payload, channel=channel, **options)


class ListQoS(lists.QoS):  # type: ignore[misc]
    """Restores the messages in hand of dead workers, from a hash in Redis; sets aside what cannot be restored."""

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        with self.channel.conn_or_acquire(client) as open_client:
            # Read it first: a transaction that fails half-way has removed it.
            held = open_client.hget(self.unacked_key, tag)
            try:
                super().restore_by_tag(tag, open_client, leftmost)
            except LOST:
                raise
            except Exception as error:
                # Otherwise it would hold up all other messages at each attempt.
                self.channel.set_aside(held or b"", f"it cannot be given back: {error!r}")
                self._remove_from_indices(tag).execute()


class ListChannel(lists.Channel):  # type: ignore[misc]
    """Sets aside every element that is no message, before kombu sees it."""

    Message = ListMessage
    QoS = ListQoS
    # Like all our connections, these leave the old primary after a failover by address.
    connection_class = redis_clients.PrimaryConnection
    connection_class_ssl = redis_clients.TlsPrimaryConnection

    def _create_client(self, asynchronous: bool = False) -> Any:
        client = super()._create_client(asynchronous)
        client.set_response_callback("BRPOP", self._screened)
        return client

    def _screened(self, answer: Sequence[bytes] | None, **_options: Any) -> tuple[bytes, bytes] | None:
        """BRPOP's answer if its element is a message: the list's name and the message; None otherwise."""
        if not answer:
            return None
        key, element = answer
        try:
            return key, self._readdressed(json.loads(element), key.decode().split(self.sep)[0])
        except Exception as error:
            self.set_aside(element, f"it is no message: {error!r}")
            return None

    def _readdressed(self, envelope: dict[str, Any], queue: str) -> bytes:
        """The message with a tag of our own, and with the queue that it came from as the place to give it back to."""
        envelope.setdefault("headers", {})
        delivery_info = {"exchange": "", "routing_key": queue}
        envelope["properties"] |= {"delivery_tag": self._next_delivery_tag(), "delivery_info": delivery_info}
        if not isinstance(envelope["headers"], dict) or not isinstance(envelope.get("body"), str):
            raise TypeError("headers or body of the wrong type")
        self.Message(envelope, channel=self)  # raises for an envelope that is no message
        return json.dumps(envelope).encode()

    def _do_restore_message(
        self, payload: Any, exchange: Any, routing_key: Any, pipe: Any, leftmost: bool = False
    ) -> None:
        # kombu would drop a message that is bound to no queue any more.
        payload["headers"]["redelivered"] = True
        if not self._lookup(exchange, routing_key):
            raise LookupError(f"no queue is bound to {exchange!r} with {routing_key!r}")
        super()._do_restore_message(payload, exchange, routing_key, pipe, leftmost)

    def _deliver_fanout_message(self, message: Any, exchange: str) -> Any:
        try:
            return super()._deliver_fanout_message(message, exchange)
        except LOST:
            raise
        except Exception as error:
            log.warning("remote control: this is no message: %s: %s", shown(error), shown(message))
            return None

    @staticmethod
    def raw(message: Any) -> bytes:
        """The element of the list that `message` was made from."""
        return json.dumps(message._raw).encode()

    def set_aside(self, element: bytes, why: str) -> None:
        """Keep `element` in the list tombola.dead, and log it. Raises only for a lost connection."""
        log.error("a task is set aside in %s: %s: %s", DEAD, why[:SHOWN_CHARACTERS_MAX], shown(element))
        try:
            with self.conn_or_acquire() as client, client.pipeline() as pipeline:
                pipeline.lpush(DEAD, element).ltrim(DEAD, 0, DEAD_TASKS_MAX - 1).execute()
        except LOST:
            raise
        except Exception as error:
            log.error("a task that is no message is lost, apart from the log: %r", error)


class ListTransport(lists.Transport):  # type: ignore[misc]
    Channel = ListChannel


# ---- RabbitMQ: queues ------------------------------------------------------------------------------------------------


class QueueMessage(pyamqp.Message):  # type: ignore[misc]
    def __init__(self, msg: Any, channel: Any = None, **options: Any) -> None:
        self.errors = _errors_of(msg.properties.get("application_headers"))
        super().__init__(msg, channel=channel, **options)


class QueueChannel(rabbitmq.Channel):
    Message = QueueMessage


class QueueConnection(rabbitmq.Connection):
    Channel = QueueChannel


class QueueTransport(rabbitmq.Transport):
    Connection = QueueConnection


class QueueSSLTransport(rabbitmq.SSLTransport):
    Connection = QueueConnection


class DeadTasks:
    """Publishes to RabbitMQ's queue tombola.dead, with confirms, over a connection of its own."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._connection: Any = None
        self._producer: Any = None

    def put(self, message: Any, why: str) -> None:
        """Keep the body of a kombu message, and those of its headers that can be sent. Raises kombu's errors."""
        about = {
            "x-why": why[:SHOWN_CHARACTERS_MAX],
            "x-queue": str(message.delivery_info.get("routing_key"))[:SHOWN_CHARACTERS_MAX],
        }
        try:
            try:
                self._publish(message, {**message.headers, **about})
            except (TypeError, ValueError, OverflowError, UnicodeError, AttributeError):
                # Headers that could be read cannot always be written.
                self._publish(message, {**about, "x-headers": shown(repr(message.headers))})
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            connection.release()

    def _publish(self, message: Any, headers: dict[str, Any]) -> None:
        if self._producer is None:
            self._connection = self._app.connection_for_write()
            self._connection.transport_options = {**self._connection.transport_options, "confirm_publish": True}
            self._producer = self._connection.Producer(auto_declare=False)
        self._producer.publish(
            message.body.encode() if isinstance(message.body, str) else bytes(message.body or b""),
            exchange="",
            routing_key=DEAD,
            headers=headers,
            content_type="application/octet-stream",
            content_encoding="binary",
            declare=[DEAD_TASK_QUEUE],
            retry=False,
            timeout=PUT_TIMEOUT_S,
        )


# ---- both ------------------------------------------------------------------------------------------------------------

TRANSPORTS: Final = {
    "redis": ListTransport,
    "rediss": ListTransport,
    "amqp": QueueTransport,
    "amqps": QueueSSLTransport,
}


class TaskConnection(kombu.Connection):  # type: ignore[misc]
    def get_transport_cls(self) -> Any:
        return TRANSPORTS.get(self.transport_cls) or super().get_transport_cls()


class TaskAMQP(AMQP):  # type: ignore[misc]
    """Gives a Celery app our connections."""

    Connection = TaskConnection
    BrokerConnection = TaskConnection
