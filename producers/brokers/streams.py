"""Redis: the Stream of draws, its consumer group, and confirmed publishing.

The first process that connects declares the Stream and the group. Their names stand here alone, for both sides of the
broker; RabbitMQ's queues stand in producers.brokers.quorum_queues.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final

import redis

from tombola.producers.brokers.redis_clients import UnsupportedRedis
from tombola.producers.domain.errors import PublishFailed
from tombola.producers.domain.signatures import NO_KEYS, Headers, Keyring

QUEUE: Final = "draws"
GROUP: Final = "workers"
BODY_FIELD: Final = b"body"
DEAD_QUEUE: Final = "draws.dead"


def declare_group(client: redis.Redis) -> None:
    """Create the Stream and the consumer group if they are missing. The group begins at 0: it skips no entry."""
    try:
        client.xgroup_create(QUEUE, GROUP, id="0", mkstream=True)
    except redis.ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise


def stream_error_text(error: redis.RedisError) -> str:
    """An error of the Stream as an operator needs it."""
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
            raise PublishFailed(f"Redis did not take the draws: {stream_error_text(error)}") from error

    def backlog(self) -> int:
        try:
            return int(self._client.xlen(QUEUE))  # an acked entry is deleted as well
        except redis.RedisError as error:
            raise PublishFailed(f"Redis does not answer how many messages wait: {stream_error_text(error)}") from error

    def pending(self) -> int:
        """The number of messages in hand, which RabbitMQ does not report. Raises PublishFailed."""
        try:
            summary: Any = self._client.xpending(QUEUE, GROUP)
            return int(summary["pending"])
        except redis.ResponseError as error:
            if "NOGROUP" in str(error):
                return 0
            raise PublishFailed(f"Redis does not answer how many messages are in hand: {error}") from error
        except redis.RedisError as error:
            raise PublishFailed(f"Redis does not answer how many messages are in hand: {error}") from error

    def close(self) -> None:
        self._client.close()
