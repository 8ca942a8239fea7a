"""Overdue requests: published again until they settle, and given up in the end.

A broker can lose messages (FLUSHALL, a failover, a disk), and a frontend can die between its two writes. The request's
row is the promise; the message only brings it to a worker quickly. Publishing twice does no harm.

A request is *overdue* when it has not settled `after_s` after its last publish; the wait doubles with each attempt, up
to DELAY_S_MAX. With a long queue an overdue request is not lost. So while the queue holds any message, the relay
publishes only requests that are overtaken: published well before the requests that settle now.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Final, NamedTuple

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.brokers.registry import Broker
from tombola.producers.domain.causes import DeadReason
from tombola.producers.domain.errors import PublishFailed
from tombola.producers.results import ResultStore
from tombola.producers.storage import clock, requests
from tombola.producers.storage.chunks import IN_LIST_MAX
from tombola.producers.storage.faults import explain
from tombola.producers.storage.requests import Lease
from tombola.producers.telemetry import metrics
from tombola.producers.telemetry.fields import about
from tombola.worker.dead_letters import parking
from tombola.worker.relay.given_up import announce_given_up, relay_name

log = logging.getLogger(__name__)

RELAYED_MAX: Final = 1_000_000
AFTER_S: Final = 10.0
TRIES_MAX: Final = 10
DELAY_S_MAX: Final = 300.0


class Patience(NamedTuple):
    """How long a request may be under way before it is overdue, and how often it is published before it is given up."""

    after_s: float = AFTER_S
    tries_max: int = TRIES_MAX

    def delay_after(self, attempts: int) -> timedelta:
        """How long after the last of so many attempts a request is overdue."""
        return timedelta(seconds=min(DELAY_S_MAX, self.after_s * 2.0 ** (attempts - 1)))


def relay_once(
    engine: Engine,
    broker: Broker,
    *,
    rows_max: int = RELAYED_MAX,
    after_s: float = AFTER_S,
    tries_max: int = TRIES_MAX,
    results: ResultStore | None = None,
) -> int:
    """Republish up to `rows_max` accepted requests that are overdue, IN_LIST_MAX in a transaction; return how many.

    A request that was published `tries_max` times is given up (NEVER_SETTLED): it becomes a dead letter, announced in
    `results`. Any number of relays may run at once: a relay skips rows that another relay has locked. Raises
    PublishFailed when the broker does not take the requests, which counts as no attempt, and ServiceUnavailable or
    ConfigurationError when the database cannot be used.
    """
    patience = Patience(after_s, tries_max)
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            now = clock.now(connection)
            if not requests.is_any_overdue(connection, now):
                return 0
            overtaken = requests.overtaken_before(connection, after_s)
        published_before = None
        # Read once: messages that are queued after this may be our own, and say nothing about the other requests.
        if broker.backlog():
            published_before = now - timedelta(days=36500) if overtaken is None else overtaken
    except SQLAlchemyError as error:
        raise explain(error) from error
    published = 0
    while published < rows_max:
        try:
            with engine.begin() as connection:
                lease = requests.lease(
                    connection,
                    now,
                    rows_max=min(IN_LIST_MAX, rows_max - published),
                    tries_max=tries_max,
                    delay_after=patience.delay_after,
                    published_before=published_before,
                )
                parking.bury(connection, lease.dead, DeadReason.NEVER_SETTLED, worker=relay_name())
        except SQLAlchemyError as error:
            raise explain(error) from error
        _announce(lease, tries_max, results)
        if lease.due:
            _publish(engine, broker, lease, patience)
        elif not lease.dead:
            break
        published += len(lease.due)
    return published


def _announce(lease: Lease, tries_max: int, results: ResultStore | None) -> None:
    announce_given_up(results, lease.dead, DeadReason.NEVER_SETTLED)
    for request in lease.dead:
        key = request.request_key
        log.error("request %s is dead: published %d times and never settled", key, tries_max, extra=about(request))


def _publish(engine: Engine, broker: Broker, lease: Lease, patience: Patience) -> None:
    try:
        broker.publish([request.encode() for request in lease.due])
    except PublishFailed as error:
        try:
            with engine.begin() as connection:
                keys = [request.request_key for request in lease.due]
                requests.put_off(connection, keys, str(error), clock.now(connection) + patience.delay_after(1))
        except SQLAlchemyError:
            log.warning("the relay could not take %d attempts back", len(lease.due))
        raise
    metrics.PUBLISHED_AGAIN.inc(len(lease.due))
