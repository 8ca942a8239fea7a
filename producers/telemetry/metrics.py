"""What Prometheus is told of the relay and of the state of everything, and the port where it asks.

The gateway's own figures are in producers.gateway, the worker's in worker.metrics. No label is ever a key or an
account: what has no end does not belong in a metric.

State (backlogs, ages, who is alive) is looked up by the relay every few seconds, not when somebody scrapes. Any process
may export these names, and those that do not look have 0 there: take the `max()` of them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import redis
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.brokers.redis_clients import open_redis
from tombola.producers.brokers.registry import Broker
from tombola.producers.brokers.streams import StreamBroker
from tombola.producers.domain.causes import DeadReason, Status
from tombola.producers.domain.errors import BrokerBlocked, PublishFailed
from tombola.producers.settings import Settings
from tombola.producers.storage import clock
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.telemetry import pulse

log = logging.getLogger(__name__)

# Where it is set, all processes on a machine write into that folder, and each of them can tell the metrics of all.
MULTIPROCESS_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"

LOOK_EVERY_S: Final = 5.0
LOOK_SHARE_MAX: Final = 0.05  # of the time, spent on looking
ROLES: Final = ("worker", "relay", "gateway", "beat")

PUBLISHED_AGAIN: Final = Counter("tombola_relay_published", "accepted requests that the relay published again")
GIVEN_UP: Final = Counter("tombola_relay_given_up", "requests that the relay has given up, by reason", ["reason"])
RELAY_FAILURES: Final = Counter("tombola_relay_failures", "passes of the relay that failed")
LAST_PASS: Final = Gauge(
    "tombola_relay_last_pass_timestamp_seconds",
    "when the relay last got through all that was overdue",
    multiprocess_mode="mostrecent",
)
BACKLOG: Final = Gauge(
    "tombola_accepted_backlog",
    "accepted requests that have not settled, counted up to the limit",
    multiprocess_mode="mostrecent",
)
OLDEST: Final = Gauge(
    "tombola_accepted_oldest_seconds",
    "how long ago the oldest of the accepted requests was accepted",
    multiprocess_mode="mostrecent",
)
BROKER_BACKLOG: Final = Gauge(
    "tombola_broker_backlog", "messages in the broker that are not acked", multiprocess_mode="mostrecent"
)
BROKER_PENDING: Final = Gauge(
    "tombola_broker_pending",
    "messages that workers have in hand; not told by RabbitMQ",
    multiprocess_mode="mostrecent",
)
BROKER_BLOCKED: Final = Gauge(
    "tombola_broker_blocked",
    "1 while the broker tells this process that it takes no messages: low on memory or on disk",
    multiprocess_mode="livemax",
)
MEMBERS: Final = Gauge(
    "tombola_members", "processes that give a sign of life, by role", ["role"], multiprocess_mode="mostrecent"
)


# There from the beginning, at 0: an increase from nothing to one would not be seen.
for _reason in (DeadReason.NEVER_SETTLED, DeadReason.TIMED_OUT):
    GIVEN_UP.labels(_reason)


def serve(settings: Settings) -> None:
    """Serve this process's metrics at TOMBOLA_METRICS_PORT, in a thread. A port that is taken is only logged."""
    if not settings.metrics_port:
        return
    try:
        start_http_server(settings.metrics_port, settings.metrics_host, registry())
    except (OSError, OverflowError) as error:
        log.warning(
            "metrics are not served: %s:%d cannot be had (%s)", settings.metrics_host, settings.metrics_port, error
        )
        return
    log.info("metrics at http://%s:%d/metrics", settings.metrics_host, settings.metrics_port)


def are_wanted(settings: Settings) -> bool:
    """Whether anybody can ask for this process's metrics: what costs something to know is left out otherwise."""
    return settings.metrics_port > 0 or MULTIPROCESS_VARIABLE in os.environ


def registry() -> CollectorRegistry:
    """What to tell: this process's metrics, or those of all that share PROMETHEUS_MULTIPROC_DIR."""
    if MULTIPROCESS_VARIABLE not in os.environ:
        return REGISTRY
    together = CollectorRegistry()
    MultiProcessCollector(together)  # type: ignore[no-untyped-call]
    return together


@contextmanager
def telling_of_blocked() -> Iterator[None]:
    """Around what is asked of the broker: tell whether it takes messages."""
    try:
        yield
    except PublishFailed as error:
        BROKER_BLOCKED.set(isinstance(error, BrokerBlocked))
        raise
    BROKER_BLOCKED.set(0)


class Throttle:
    """Says when it is time again: every `every_s`, and less often where what is done takes its time."""

    def __init__(self, every_s: float = LOOK_EVERY_S) -> None:
        self._every_s = every_s
        self._next = 0.0
        self._began = 0.0

    def is_due(self) -> bool:
        """Whether to begin now; call `done` afterwards."""
        self._began = time.monotonic()
        return self._began >= self._next

    def done(self) -> None:
        """What was due has been done, or has failed."""
        now = time.monotonic()
        self._next = now + max(self._every_s, (now - self._began) / LOOK_SHARE_MAX)


class Lookout:
    """Looks up the state of everything for the gauges. One per relay; it connects at first use."""

    def __init__(self, settings: Settings, engine: Engine, broker: Broker) -> None:
        self._engine = engine
        self._broker = broker
        self._count_max = settings.backlog_max + 1
        self._results = open_redis(settings.need("result_url"), timeout_s=5) if settings.has("result_url") else None
        self._throttle = Throttle()

    def look(self) -> None:
        """Set the gauges if it is time. What cannot be looked up keeps its last value: other metrics tell of that."""
        if not self._throttle.is_due():
            return
        try:
            self._look_at_requests()
            self._look_at_broker()
            self._look_at_members()
        except SQLAlchemyError as error:
            log.warning("the backlog is not known: %s", explain(error))
        except PublishFailed as error:
            log.warning("the broker's backlog is not known: %s", error)
        except redis.RedisError as error:
            log.warning("who is alive is not known: %s", error)
        finally:
            self._throttle.done()

    def close(self) -> None:
        """Let go of the connection."""
        if self._results is not None:
            with suppress(redis.RedisError):
                self._results.close()

    def _look_at_requests(self) -> None:
        some = (
            select(requests.c.accepted_at).where(requests.c.status == Status.ACCEPTED).limit(self._count_max).subquery()
        )
        with self._engine.connect().execution_options(read_only=True) as connection:
            count, oldest = connection.execute(select(func.count(), func.min(some.c.accepted_at))).one()
            now = clock.now(connection)
        BACKLOG.set(count)
        OLDEST.set(0 if oldest is None else max(0.0, (now - oldest).total_seconds()))

    def _look_at_broker(self) -> None:
        with telling_of_blocked():
            BROKER_BACKLOG.set(self._broker.backlog())
        if isinstance(self._broker, StreamBroker):
            BROKER_PENDING.set(self._broker.pending())

    def _look_at_members(self) -> None:
        if self._results is None:
            return
        roles = [member.role for member in pulse.members(self._results)]
        for role in ROLES:
            MEMBERS.labels(role).set(roles.count(role))
