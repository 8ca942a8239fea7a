"""Checks of RabbitMQ: do the two queues exist, with our arguments? A queue that does not exist is not declared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final

import amqp
import kombu

from tombola.producers.brokers.quorum_queues import DEAD_QUORUM_QUEUE, QUORUM_QUEUE
from tombola.producers.brokers.rabbitmq import Connection, blocked_words, unopened
from tombola.producers.brokers.streams import DEAD_QUEUE, QUEUE
from tombola.worker.doctor.checks import (
    ANSWER_TIMEOUT_S,
    NO_ANSWER,
    Check,
    Facts,
    Verdict,
    attempt,
    fail,
    ok,
    release_verdict,
    skip,
    skipped,
    warn,
)

VERSION_MIN: Final = (3, 10)
UNBOUND_KEY: Final = "draws.nobody"  # a routing key without a binding


def examine_queues(url: str, found: Facts) -> Iterator[Check]:
    """Every check of a RabbitMQ."""
    opened: list[Any] = []
    transport = unopened(url, timeout_s=ANSWER_TIMEOUT_S).transport
    yield attempt("broker", lambda: _server(transport, opened))
    if not opened:
        yield from skipped(["queue", "dead-letter queue", "publishing"], "the broker does not answer")
        return
    wire: Connection = opened[0]

    def in_time(look: Callable[[], Verdict]) -> Verdict:
        with wire.within(ANSWER_TIMEOUT_S):
            return look()

    try:
        yield attempt("queue", lambda: in_time(lambda: _queue(wire.channel, found)))
        yield attempt("dead-letter queue", lambda: in_time(lambda: _dead_queue(wire.channel)))
        yield attempt("publishing", lambda: in_time(lambda: _publishing(wire)))
    finally:
        with suppress(Exception):
            transport.close_connection(wire)


def _server(transport: Any, opened: list[Any]) -> Verdict:
    try:
        # The transport's own attempt: the connection's waits two seconds and tries again.
        connection = transport.establish_connection()
    except (amqp.AccessRefused, amqp.NotAllowed) as error:
        return fail(f"RabbitMQ refuses the login: {error.reply_text}", "check user, password and vhost in its URL")
    except (amqp.AMQPError, OSError) as error:
        return fail(f"RabbitMQ does not answer: {error or type(error).__name__}", NO_ANSWER)
    opened.append(connection)
    properties = connection.server_properties
    product, version = (str(properties.get(name, "unknown")) for name in ("product", "version"))
    if product != "RabbitMQ":
        return warn(f"{product} {version}", "tombola is tested with RabbitMQ alone: quorum queues, confirms, returns")
    return release_verdict(product, version, VERSION_MIN)


def _declared(open_channel: Callable[[], Any], queue: kombu.Queue) -> tuple[int, int] | str | None:
    """Messages and consumers of a queue with our arguments; a text if the arguments differ; None without a queue."""
    # An error ends its channel, so each question has a channel of its own.
    try:
        with open_channel() as channel:
            there = channel.queue_declare(queue.name, passive=True)
    except amqp.NotFound:
        return None
    try:
        with open_channel() as channel:
            queue(channel).queue_declare()  # the queue exists: RabbitMQ only compares, and says what differs
    except amqp.PreconditionFailed as error:
        return str(error.reply_text).removeprefix("PRECONDITION_FAILED - ")
    return int(there.message_count), int(there.consumer_count)


def _queue(open_channel: Callable[[], Any], found: Facts) -> Verdict:
    declared = _declared(open_channel, QUORUM_QUEUE)
    if declared is None:
        found.queued = found.consumers = 0
        return warn(f"no queue `{QUEUE}` yet", "start a worker, or enqueue a draw: the first one declares it")
    if isinstance(declared, str):
        return fail(declared, f"stop the workers, let it run empty, delete `{QUEUE}`: the next worker declares it")
    found.queued, found.consumers = declared
    return ok(f"{found.queued:,} waiting, {found.consumers} consumers")


def _publishing(connection: Connection) -> Verdict:
    """Whether RabbitMQ takes messages: publishes one with a routing key without a binding, which RabbitMQ drops.

    Only a publisher finds out: RabbitMQ blocks its connection when it takes no messages.
    """
    confirmed: list[int] = []
    channel = connection.channel()
    channel.confirm_select()
    channel.events["basic_ack"].add(lambda tag, _multiple: confirmed.append(tag))
    channel.basic_publish(amqp.Message(b""), exchange=QUEUE, routing_key=UNBOUND_KEY)
    try:
        while not confirmed and not connection.blocked:
            connection.drain_events()
    except amqp.NotFound:
        return skip(f"no exchange `{QUEUE}` yet")
    if connection.blocked:
        return fail(
            blocked_words(connection.blocked),
            "give it more of that; until then draws are accepted, and published later",
        )
    return ok("RabbitMQ takes messages; see `rabbitmqctl list_policies` for what its policies do to them")


def _dead_queue(open_channel: Callable[[], Any]) -> Verdict:
    declared = _declared(open_channel, DEAD_QUORUM_QUEUE)
    if declared is None:
        return warn(f"no queue `{DEAD_QUEUE}` yet", "start a worker: it declares this queue")
    if isinstance(declared, str):
        return fail(declared, f"move away what it holds, delete `{DEAD_QUEUE}`: the next worker declares it")
    if declared[0]:
        return warn(f"{declared[0]:,} messages that RabbitMQ gave up on", "start a worker: it parks them")
    return ok("empty")
