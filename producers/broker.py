"""The broker: where draws are queued, how both sides declare it, and publishing that is confirmed.

    redis://   Stream `draws`, consumer group `workers`; an entry has a field `body`
    amqp://    quorum queue `draws` on the direct exchange `draws`; what the broker gives up on goes to `draws.dead`

Whoever comes first declares the topology. It is written down here once, so it is equal on both sides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

import amqp
import kombu
import redis
from kombu.exceptions import KombuError

from producers.errors import PublishFailed, ServiceUnavailable
from producers.redis_clients import UnsupportedRedis
from producers.redis_clients import open_redis as open_redis

QUEUE: Final = "draws"
GROUP: Final = "workers"
BODY_FIELD: Final = b"body"
DEAD_QUEUE: Final = "draws.dead"
# Our own parking comes long before; this net is for a worker that dies too early to park anything. It stays generous
# because the broker counts a clean shutdown's returned messages as deliveries, too.
DELIVERY_LIMIT: Final = 200
HEARTBEAT_S: Final = 20

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
        # A dead letter leaves the queue only when the other queue has it; that needs reject-publish.
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    },
)

# What kombu and py-amqp raise when a connection is gone or refused.
AMQP_ERRORS: Final = (amqp.AMQPError, KombuError, OSError)


# What travels beside each body, the trace it belongs to: see producers.tracing.
Headers = Sequence[Mapping[str, str]]


class Broker(Protocol):
    """Publishes bodies on the queue `draws`. One per thread."""

    def publish(self, bodies: Sequence[bytes], headers: Headers | None = None) -> None:
        """Publish all `bodies`, each with its own of `headers`; return when the broker has confirmed every one.

        Raises PublishFailed otherwise: some may be queued. Publish them again; a second copy does no harm.
        """

    def backlog(self) -> int:
        """How many messages wait, those included that a worker has in hand where the broker counts them.

        Raises PublishFailed when it cannot say.
        """

    def close(self) -> None:
        """Let go of the connection."""


def open_broker(url: str, *, publish_timeout_s: float) -> Broker:
    """The broker behind `url`; it connects at first use."""
    if url.startswith("redis"):
        return StreamBroker(open_redis(url, timeout_s=publish_timeout_s))
    return QueueBroker(url, publish_timeout_s=publish_timeout_s)


def declare_group(client: redis.Redis) -> None:
    """Create the consumer group, and the Stream with it, unless they are there. From 0: nothing sent is skipped."""
    try:
        client.xgroup_create(QUEUE, GROUP, id="0", mkstream=True)
    except redis.ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise


def told_of_stream(error: redis.RedisError) -> str:
    """What an operator needs to know of an error of the Stream."""
    if str(error).startswith("WRONGTYPE"):
        return (
            f"the key `{QUEUE}` is not a Stream but another program's: give tombola a database of its own, "
            "redis://host/NUMBER in TOMBOLA_BROKER_URL"
        )
    return str(error)


def declare_queues(channel: Any) -> None:
    """Declare both exchanges and both quorum queues on a kombu channel."""
    DEAD_QUORUM_QUEUE(channel).declare()
    QUORUM_QUEUE(channel).declare()


class StreamBroker:
    """Publishing to a Redis Stream: a pipeline of XADD, confirmed by its replies."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._declared = False

    def publish(self, bodies: Sequence[bytes], headers: Headers | None = None) -> None:
        try:
            if not self._declared:
                declare_group(self._client)
                self._declared = True
            with self._client.pipeline(transaction=False) as pipeline:
                if headers is None:
                    for body in bodies:
                        pipeline.execute_command("XADD", QUEUE, "*", BODY_FIELD, body)
                else:
                    for body, beside in zip(bodies, headers, strict=True):
                        fields = itertools.chain.from_iterable(beside.items())
                        pipeline.execute_command("XADD", QUEUE, "*", BODY_FIELD, body, *fields)
                pipeline.execute()
        except UnsupportedRedis:
            raise
        except redis.RedisError as error:
            self._declared = False
            raise PublishFailed(f"Redis did not take the draws: {told_of_stream(error)}") from error

    def backlog(self) -> int:
        try:
            return int(self._client.xlen(QUEUE))  # what is acked is deleted as well
        except redis.RedisError as error:
            raise PublishFailed(f"Redis does not tell how much is queued: {told_of_stream(error)}") from error

    def pending(self) -> int:
        """How many messages workers have in hand, which RabbitMQ does not tell. Raises PublishFailed."""
        try:
            told: Any = self._client.xpending(QUEUE, GROUP)
            return int(told["pending"])
        except redis.ResponseError as error:
            if "NOGROUP" in str(error):
                return 0
            raise PublishFailed(f"Redis does not tell how much is in hand: {error}") from error
        except redis.RedisError as error:
            raise PublishFailed(f"Redis does not tell how much is in hand: {error}") from error

    def close(self) -> None:
        self._client.close()


class QueueBroker:
    """Publishing to a RabbitMQ quorum queue: persistent, mandatory, and confirmed in batches.

    A connection that breaks is opened again by the next call, which the caller makes: what it raised told it that the
    fate of these messages is unknown.
    """

    def __init__(self, url: str, *, publish_timeout_s: float) -> None:
        self._url = url
        self._timeout_s = publish_timeout_s
        self._connection: kombu.Connection | None = None
        self._channel: Any = None
        self._confirms = _Confirms()

    def publish(self, bodies: Sequence[bytes], headers: Headers | None = None) -> None:
        besides = itertools.repeat(None, len(bodies)) if headers is None else headers
        messages = list(zip(bodies, besides, strict=True))
        with self._open() as channel:
            for body, beside in messages:
                self._confirms.sent += 1
                channel.basic_publish(
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
                assert self._connection is not None
                self._connection.drain_events(timeout=self._timeout_s)
            self._confirms.check()

    def backlog(self) -> int:
        with self._open() as channel:
            return int(channel.queue_declare(QUEUE, passive=True).message_count)

    def close(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            connection.release()

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """The channel, opened if need be; whatever breaks while it is used closes it, and is a PublishFailed."""
        try:
            if self._channel is None:
                self._connection = open_amqp(self._url)
                self._channel = self._connection.channel()
                declare_queues(self._channel)
                self._channel.confirm_select()
                self._confirms = _Confirms()
                self._confirms.listen(self._channel)
            yield self._channel
        except PublishFailed:
            self.close()
            raise
        except ServiceUnavailable as error:  # there is no connection to be had
            self.close()
            raise PublishFailed(str(error)) from error
        except AMQP_ERRORS as error:
            self.close()
            raise PublishFailed(f"RabbitMQ did not confirm the draws: {error or type(error).__name__}") from error


class _Confirms:
    """What the broker has confirmed of one channel: publishes are counted from 1, as the broker does."""

    def __init__(self) -> None:
        self.sent = 0
        self._confirmed = 0
        self._ahead: set[int] = set()  # confirmed out of order, above _confirmed
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
        self._problem = "it could not be routed: the queue `draws` is gone"


def open_amqp(url: str) -> kombu.Connection:
    """An open connection to RabbitMQ; raises ServiceUnavailable when there is none to be had."""
    connection = kombu.Connection(
        url, heartbeat=HEARTBEAT_S, connect_timeout=5, transport_options={"read_timeout": 30, "write_timeout": 30}
    )
    try:
        connection.connect()
    except (*AMQP_ERRORS, *connection.connection_errors) as error:
        connection.release()
        raise ServiceUnavailable(f"RabbitMQ does not answer: {error or type(error).__name__}") from error
    return connection
