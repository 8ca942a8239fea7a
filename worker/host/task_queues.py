"""Celery's own queues, and connections to them that survive what lies there.

    tombola.tasks   ours: beat's housekeeping, and shops that care; on RabbitMQ a quorum queue
    tombola         the shops' door: `send_task("tombola.draw", …, queue="tombola")` from a Celery app without settings
                    declares it, on RabbitMQ as a classic queue. Before tombola.tasks it was ours as well: what an older
                    release left there is consumed like the rest.
    tombola.dead    what no worker can make a task of, as it came; the log says why

Draws never travel here, apart from `tombola.draw` for shops. See worker.host.hosting for the consumer of these queues.
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
DEAD_TASKS_MAX: Final = 10_000  # the oldest go: a flood must not fill the broker
SHOWN_CHARACTERS_MAX: Final = 300
PUT_TIMEOUT_S: Final = 10.0

# Exactly what a Celery app makes of its defaults; the other one of task_create_missing_queue_type="quorum".
SHOP_QUEUE: Final = kombu.Queue(SHOPS, kombu.Exchange(SHOPS, type="direct"), routing_key=SHOPS)
TASK_QUEUE: Final = kombu.Queue(
    TASKS, kombu.Exchange(TASKS, type="direct"), routing_key=TASKS, queue_arguments={"x-queue-type": "quorum"}
)
DEAD_QUEUE: Final = kombu.Queue(
    DEAD,
    kombu.Exchange(""),
    routing_key=DEAD,
    queue_arguments={"x-queue-type": "quorum", "x-max-length": DEAD_TASKS_MAX},
)

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


def shown(content: Any) -> str:
    """The beginning of `content` for a log: one line, with everything escaped that is not printable ASCII."""
    text = content if isinstance(content, bytes | str) else str(content)
    return ascii(text[:SHOWN_CHARACTERS_MAX])[:SHOWN_CHARACTERS_MAX]


def _errors_of(headers: Any) -> list[ExcInfo]:
    """A message that unpacks itself can be a thousand times as large: it is not looked into."""
    if isinstance(headers, dict) and headers.get("compression"):
        error = InvalidTaskError("compressed messages are not taken")
        return [(InvalidTaskError, error, None)]
    return []


# What a lost connection to Redis raises. kombu's own list has KeyError and AttributeError as well.
LOST: Final = (redis.ConnectionError, redis.TimeoutError, OSError)


# ---- Redis: lists ----------------------------------------------------------------------------------------------------


class ListMessage(virtual.Message):  # type: ignore[misc]
    def __init__(self, payload: dict[str, Any], channel: Any = None, **options: Any) -> None:
        self.errors = _errors_of(payload.get("headers"))
        super().__init__(payload, channel=channel, **options)


class ListQoS(lists.QoS):  # type: ignore[misc]
    """What workers have in hand lies in a hash, and comes back from there when they die."""

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        with self.channel.conn_or_acquire(client) as open_client:
            # First: a transaction that fails half-way has removed it.
            held = open_client.hget(self.unacked_key, tag)
            try:
                super().restore_by_tag(tag, open_client, leftmost)
            except LOST:
                raise
            except Exception as error:
                # It would be in the way of all others at each look.
                self.channel.set_aside(held or b"", f"it cannot be given back: {error!r}")
                self._remove_from_indices(tag).execute()


class ListChannel(lists.Channel):  # type: ignore[misc]
    """Sets aside each element that is no message, before kombu sees it."""

    Message = ListMessage
    QoS = ListQoS
    # After a failover by address they leave the old primary, as all of our connections do.
    connection_class = redis_clients.PrimaryConnection
    connection_class_ssl = redis_clients.TlsPrimaryConnection

    def _create_client(self, asynchronous: bool = False) -> Any:
        client = super()._create_client(asynchronous)
        client.set_response_callback("BRPOP", self._screened)
        return client

    def _screened(self, answer: Sequence[bytes] | None, **_options: Any) -> tuple[bytes, bytes] | None:
        """BRPOP's answer: the list's name and an element that is a message, or nothing."""
        if not answer:
            return None
        key, element = answer
        try:
            return key, self._readdressed(json.loads(element), key.decode().split(self.sep)[0])
        except Exception as error:
            self.set_aside(element, f"it is no message: {error!r}")
            return None

    def _readdressed(self, envelope: dict[str, Any], queue: str) -> bytes:
        """The same message with a tag of its own, to be given back to where it came from, whatever it says itself."""
        envelope.setdefault("headers", {})
        delivery_info = {"exchange": "", "routing_key": queue}
        envelope["properties"] |= {"delivery_tag": self._next_delivery_tag(), "delivery_info": delivery_info}
        if not isinstance(envelope["headers"], dict) or not isinstance(envelope.get("body"), str):
            raise TypeError("headers or body of the wrong type")
        self.Message(envelope, channel=self)  # raises for what it cannot make a message of
        return json.dumps(envelope).encode()

    def _do_restore_message(
        self, payload: Any, exchange: Any, routing_key: Any, pipe: Any, leftmost: bool = False
    ) -> None:
        # Where it is bound to no queue any more kombu would drop it.
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
        """The element that `message` was."""
        return json.dumps(message._raw).encode()

    def set_aside(self, element: bytes, why: str) -> None:
        """Keep `element` in the list tombola.dead, and say so. Never raises but for a lost connection."""
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
    """Puts messages on RabbitMQ's queue tombola.dead, confirmed, over a connection of its own."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._connection: Any = None
        self._producer: Any = None

    def put(self, message: Any, why: str) -> None:
        """Keep this kombu message's body, and of its headers what can be sent. Raises what kombu and py-amqp raise."""
        about = {
            "x-why": why[:SHOWN_CHARACTERS_MAX],
            "x-queue": str(message.delivery_info.get("routing_key"))[:SHOWN_CHARACTERS_MAX],
        }
        try:
            try:
                self._publish(message, {**message.headers, **about})
            except (TypeError, ValueError, OverflowError, UnicodeError, AttributeError):
                # What could be read cannot always be written.
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
            declare=[DEAD_QUEUE],
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
    """Where a Celery app's connections come from."""

    Connection = TaskConnection
    BrokerConnection = TaskConnection
