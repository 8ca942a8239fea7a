"""The broker: where draws are queued, how both sides declare it, and publishing that is confirmed.

    redis://   Stream `draws`, consumer group `workers`; an entry has a field `body`
    amqp://    quorum queue `draws` on the direct exchange `draws`; what the broker gives up on goes to `draws.dead`

Whoever comes first declares the topology. It is written down once, here and in producers.brokers.quorum_queues, so it
is equal on both sides.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final, Protocol

import redis

from tombola.producers.brokers.redis_clients import UnsupportedRedis, open_redis
from tombola.producers.domain.errors import PublishFailed
from tombola.producers.domain.signatures import NO_KEYS, Headers, Keyring
from tombola.producers.settings import Settings

QUEUE: Final = "draws"
GROUP: Final = "workers"
BODY_FIELD: Final = b"body"
DEAD_QUEUE: Final = "draws.dead"


class Broker(Protocol):
    """Publishes bodies on the queue `draws`, each with its signature where there is a secret: they are canonical.

    Threads may share one, and a forked child may go on with it.
    """

    def publish(self, bodies: Sequence[bytes], headers: Headers | None = None) -> None:
        """Publish all `bodies`, each with its own of `headers`; return when the broker has confirmed every one.

        Raises PublishFailed otherwise: some may be queued. Publish them again; a second copy does no harm. It is a
        BrokerBlocked where the broker says that it takes no messages at present.
        """

    def backlog(self) -> int:
        """How many messages wait, those included that a worker has in hand where the broker counts them.

        Raises PublishFailed when it cannot say; BrokerBlocked where it takes no messages and has told us so.
        """

    def close(self) -> None:
        """Let go of the connection."""


def broker_of(settings: Settings) -> Broker:
    """The broker of these settings, which signs what it publishes; it connects at first use."""
    url, timeout_s = settings.need("broker_url"), settings.publish_timeout_s
    return open_broker(url, publish_timeout_s=timeout_s, keyring=settings.keyring)


def open_broker(url: str, *, publish_timeout_s: float, keyring: Keyring = NO_KEYS) -> Broker:
    """The broker behind `url`; it connects at first use. With `keyring` it signs what it publishes."""
    if url.startswith("redis"):
        return StreamBroker(open_redis(url, timeout_s=publish_timeout_s), keyring=keyring)
    from tombola.producers.brokers.quorum_queues import (
        QueueBroker,  # not everybody has RabbitMQ: its library takes a moment to import
    )

    return QueueBroker(url, publish_timeout_s=publish_timeout_s, keyring=keyring)


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


class StreamBroker:
    """Publishing to a Redis Stream: a pipeline of XADD, confirmed by its replies."""

    def __init__(self, client: redis.Redis, *, keyring: Keyring = NO_KEYS) -> None:
        self._client = client
        self._keyring = keyring
        self._declared = False

    def publish(self, bodies: Sequence[bytes], headers: Headers | None = None) -> None:
        headers = self._keyring.beside(bodies, headers)
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
