"""Prometheus metrics of the relay and of the deployment's state, and the port that serves metrics.

The gateway's own metrics are in producers.gateway, the worker's in worker.metrics. A label is never a key or an
account: their number has no limit.

The relay looks up the state (backlogs, ages, members) every few seconds, not when Prometheus scrapes. Every process
exports these names, with 0 where it does not look them up: take their `max()`.
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

# Where it is set, all processes of a machine write into that folder, and each serves the metrics of all.
MULTIPROCESS_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"

LOOK_EVERY_S: Final = 5.0
LOOK_SHARE_MAX: Final = 0.05  # of the relay's time, for looking up state
ROLES: Final = ("worker", "relay", "gateway", "beat")

PUBLISHED_AGAIN: Final = Counter("tombola_relay_published", "accepted requests that the relay published again")
GIVEN_UP: Final = Counter("tombola_relay_given_up", "requests that the relay has given up, by reason", ["reason"])
RELAY_FAILURES: Final = Counter("tombola_relay_failures", "passes of the relay that failed")
LAST_PASS: Final = Gauge(
    "tombola_relay_last_pass_timestamp_seconds",
    "when the relay last completed a pass over all overdue requests",
    multiprocess_mode="mostrecent",
)
BACKLOG: Final = Gauge(
    "tombola_accepted_backlog",
    "accepted requests that have not settled, counted up to the limit",
    multiprocess_mode="mostrecent",
)
OLDEST: Final = Gauge(
    "tombola_accepted_oldest_seconds",
    "the age of the oldest accepted request",
    multiprocess_mode="mostrecent",
)
BROKER_BACKLOG: Final = Gauge(
    "tombola_broker_backlog", "messages in the broker that are not acked", multiprocess_mode="mostrecent"
)
BROKER_PENDING: Final = Gauge(
    "tombola_broker_pending",
    "messages that workers have in hand; RabbitMQ does not report them",
    multiprocess_mode="mostrecent",
)
BROKER_BLOCKED: Final = Gauge(
    "tombola_broker_blocked",
    "1 while the broker takes no messages of this process: low on memory or on disk",
    multiprocess_mode="livemax",
)
MEMBERS: Final = Gauge("tombola_members", "processes with a pulse, by role", ["role"], multiprocess_mode="mostrecent")


# At 0 from the start: Prometheus does not see an increase from no value to 1.
for _reason in (DeadReason.NEVER_SETTLED, DeadReason.TIMED_OUT):
    GIVEN_UP.labels(_reason)


def serve(settings: Settings) -> None:
    """Serve this process's metrics at TOMBOLA_METRICS_PORT, in a thread. A port in use is only logged."""
    if not settings.metrics_port:
        return
    try:
        start_http_server(settings.metrics_port, settings.metrics_host, registry())
    except (OSError, OverflowError) as error:
        log.warning(
            "metrics are not served: %s:%d is not available (%s)", settings.metrics_host, settings.metrics_port, error
        )
        return
    log.info("metrics at http://%s:%d/metrics", settings.metrics_host, settings.metrics_port)


def are_wanted(settings: Settings) -> bool:
    """Whether this process's metrics are served; otherwise it skips the metrics that cost queries."""
    return settings.metrics_port > 0 or MULTIPROCESS_VARIABLE in os.environ


def registry() -> CollectorRegistry:
    """This process's metrics, or the metrics of all processes that share PROMETHEUS_MULTIPROC_DIR."""
    if MULTIPROCESS_VARIABLE not in os.environ:
        return REGISTRY
    together = CollectorRegistry()
    MultiProcessCollector(together)  # type: ignore[no-untyped-call]
    return together


@contextmanager
def watching_blocked() -> Iterator[None]:
    """Set BROKER_BLOCKED from the outcome of the calls to the broker inside."""
    try:
        yield
    except PublishFailed as error:
        BROKER_BLOCKED.set(isinstance(error, BrokerBlocked))
        raise
    BROKER_BLOCKED.set(0)


class Throttle:
    """Limits how often work runs: every `every_s`, and less often where the work takes long."""

    def __init__(self, every_s: float = LOOK_EVERY_S) -> None:
        self._every_s = every_s
        self._next = 0.0
        self._began = 0.0

    def is_due(self) -> bool:
        """Whether to run now; call `done` afterwards."""
        self._began = time.monotonic()
        return self._began >= self._next

    def done(self) -> None:
        """The work that was due has ended or failed."""
        now = time.monotonic()
        self._next = now + max(self._every_s, (now - self._began) / LOOK_SHARE_MAX)


class Lookout:
    """Looks up the deployment's state for the gauges. One per relay; it connects at first use."""

    def __init__(self, settings: Settings, engine: Engine, broker: Broker) -> None:
        self._engine = engine
        self._broker = broker
        self._count_max = settings.backlog_max + 1
        self._results = open_redis(settings.need("result_url"), timeout_s=5) if settings.has("result_url") else None
        self._throttle = Throttle()

    def look(self) -> None:
        """Set the gauges if it is time. A gauge keeps its value when a server is away, which other metrics show."""
        if not self._throttle.is_due():
            return
        try:
            self._look_at_requests()
            self._look_at_broker()
            self._look_at_members()
        except SQLAlchemyError as error:
            log.warning("the backlog is unknown: %s", explain(error))
        except PublishFailed as error:
            log.warning("the broker's backlog is unknown: %s", error)
        except redis.RedisError as error:
            log.warning("the members are unknown: %s", error)
        finally:
            self._throttle.done()

    def close(self) -> None:
        """Close the connection."""
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
        with watching_blocked():
            BROKER_BACKLOG.set(self._broker.backlog())
        if isinstance(self._broker, StreamBroker):
            BROKER_PENDING.set(self._broker.pending())

    def _look_at_members(self) -> None:
        if self._results is None:
            return
        roles = [member.role for member in pulse.members(self._results)]
        for role in ROLES:
            MEMBERS.labels(role).set(roles.count(role))
