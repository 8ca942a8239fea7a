"""The relay: publish accepted requests that never came through, until they are settled or given up.

A broker can lose what it was given (FLUSHALL, a failover, a disk), and a frontend can die between its two writes. The
request's row is the promise; a message is only how a worker hears of it quickly. Publishing twice does no harm.

A request is *overdue* when it has not settled `after_s` after its last publish; the wait doubles with each attempt, up
to DELAY_S_MAX. But when much is queued, overdue is not lost: while the queue holds anything, only requests are
published again that others have overtaken, that is, published well before what is being settled now.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.brokers.streams import Broker, broker_of
from tombola.producers.domain.causes import DeadReason
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import ConfigurationError, PublishFailed, ServiceUnavailable
from tombola.producers.results import ResultStore
from tombola.producers.settings import Settings
from tombola.producers.storage import clock, requests
from tombola.producers.storage.database import explain, open_engine
from tombola.producers.storage.requests import Lease
from tombola.producers.telemetry import metrics
from tombola.producers.telemetry.fields import about
from tombola.producers.telemetry.pulse import Pulse

log = logging.getLogger(__name__)

ROWS_MAX: Final = 800  # below 900, where MariaDB gives up on an IN list
RELAYED_MAX: Final = 1_000_000
AFTER_S: Final = 10.0
TRIES_MAX: Final = 10
DELAY_S_MAX: Final = 300.0
TIMEOUT_S: Final = 86_400.0
IDLE_WAIT_S: Final = 1.0
TIME_OUT_EVERY_S: Final = 60.0  # at most: it is looked at when the oldest is due
BACKOFF_S_MAX: Final = 10.0

# What is told, in the same transaction, of requests that are given up: which, and why.
Bury = Callable[[Connection, Sequence[DrawRequest], str], None]


def _forget(_connection: Connection, _dead: Sequence[DrawRequest], _reason: str) -> None:
    """Nobody is told."""


def relay_once(
    engine: Engine,
    broker: Broker,
    *,
    rows_max: int = RELAYED_MAX,
    after_s: float = AFTER_S,
    tries_max: int = TRIES_MAX,
    bury: Bury = _forget,
    results: ResultStore | None = None,
) -> int:
    """Republish up to rows_max accepted requests that are overdue, ROWS_MAX in a transaction; return how many.

    Those that were published `tries_max` times before are dead from here on (NEVER_SETTLED), and told to `bury`, and
    to those who wait for their `results`. Any number of relays may run at once: rows that another one has in hand are
    skipped. Raises PublishFailed when the broker does not take them, which is no attempt, and ServiceUnavailable or
    ConfigurationError when the database cannot be used.
    """
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            now = clock.now(connection)
            if not requests.is_any_overdue(connection, now):
                return 0
            settled_up_to = requests.last_settled_publish(connection)
        overtaken = None
        # Looked at once: what is queued from here on are our own, and say nothing of those that are still to come.
        if broker.backlog():
            # Nothing known to be settled: then nothing has been overtaken.
            overtaken = now - timedelta(days=36500) if settled_up_to is None else settled_up_to
            overtaken -= timedelta(seconds=after_s)
    except SQLAlchemyError as error:
        raise explain(error) from error
    published = 0
    while published < rows_max:
        lease = _relay_some(
            engine,
            broker,
            now,
            rows_max=min(ROWS_MAX, rows_max - published),
            after_s=after_s,
            tries_max=tries_max,
            published_before=overtaken,
            bury=bury,
            results=results,
        )
        if not lease.due and not lease.dead:
            break
        published += len(lease.due)
    return published


def _relay_some(
    engine: Engine,
    broker: Broker,
    now: datetime,
    *,
    rows_max: int,
    after_s: float,
    tries_max: int,
    published_before: datetime | None,
    bury: Bury,
    results: ResultStore | None,
) -> Lease:
    def delay_after(attempts: int) -> timedelta:
        return timedelta(seconds=min(DELAY_S_MAX, after_s * 2.0 ** (attempts - 1)))

    try:
        with engine.begin() as connection:
            lease = requests.lease(
                connection,
                now,
                rows_max=rows_max,
                tries_max=tries_max,
                delay_after=delay_after,
                published_before=published_before,
            )
            if lease.dead:
                bury(connection, lease.dead, DeadReason.NEVER_SETTLED)
    except SQLAlchemyError as error:
        raise explain(error) from error
    _tell_dead(results, lease.dead, DeadReason.NEVER_SETTLED)
    for request in lease.dead:
        log.error(
            "request %s is dead: published %d times and never settled",
            request.request_key,
            tries_max,
            extra=about(request),
        )
    if not lease.due:
        return lease
    try:
        broker.publish([request.encode() for request in lease.due])
    except PublishFailed as error:
        try:
            with engine.begin() as connection:
                keys = [request.request_key for request in lease.due]
                requests.put_off(connection, keys, str(error), clock.now(connection) + delay_after(1))
        except SQLAlchemyError:
            log.warning("the relay could not take %d attempts back", len(lease.due))
        raise
    metrics.PUBLISHED_AGAIN.inc(len(lease.due))
    return lease


def _tell_dead(results: ResultStore | None, dead: Sequence[DrawRequest], reason: str) -> None:
    metrics.GIVEN_UP.labels(reason).inc(len(dead))
    if dead and results is not None:
        try:
            results.put_dead(dead, reason)
        except ServiceUnavailable as error:  # those who wait ask the database in the end
            log.warning("%s", error)


def time_out_once(
    engine: Engine,
    *,
    rows_max: int = ROWS_MAX,
    timeout_s: float = TIMEOUT_S,
    bury: Bury = _forget,
    results: ResultStore | None = None,
) -> int:
    """Give up to rows_max requests up that were accepted more than `timeout_s` ago; return how many."""
    try:
        with engine.begin() as connection:
            accepted_before = clock.now(connection) - timedelta(seconds=timeout_s)
            dead = requests.time_out(connection, accepted_before, rows_max=rows_max)
            if dead:
                bury(connection, dead, DeadReason.TIMED_OUT)
    except SQLAlchemyError as error:
        raise explain(error) from error
    _tell_dead(results, dead, DeadReason.TIMED_OUT)
    for request in dead:
        log.error("request %s is dead: not settled within %g s", request.request_key, timeout_s, extra=about(request))
    return len(dead)


def next_time_out_s(engine: Engine, *, timeout_s: float = TIMEOUT_S) -> float:
    """In how many seconds the oldest of the accepted requests is to be given up: 0 or less if that is due.

    Raises as time_out_once does. What is accepted from here on is due later.
    """
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            oldest = requests.oldest_accepted(connection)
            age_s = 0.0 if oldest is None else (clock.now(connection) - oldest).total_seconds()
    except SQLAlchemyError as error:
        raise explain(error) from error
    return timeout_s - age_s


def archive_once(engine: Engine, *, older_than_s: float, rows_max: int = ROWS_MAX) -> int:
    """Archive up to rows_max requests that settled more than `older_than_s` ago; return how many."""
    try:
        with engine.begin() as connection:
            settled_before = clock.now(connection) - timedelta(seconds=older_than_s)
            return requests.archive(connection, settled_before, rows_max=rows_max)
    except SQLAlchemyError as error:
        raise explain(error) from error


class Relay:
    """The relay as a loop: `relay_once` whenever there may be something, and `time_out_once` when the oldest is due.

    `bury` is told of what is given up; `afterwards` is called at the end of each pass.
    """

    def __init__(
        self,
        engine: Engine,
        broker: Broker,
        settings: Settings,
        *,
        bury: Bury = _forget,
        afterwards: Callable[[Engine], object] = lambda _engine: None,
    ) -> None:
        self._results = ResultStore.from_settings(settings) if settings.has("result_url") else None
        self._engine = engine
        self._broker = broker
        self._settings = settings
        self._bury = bury
        self._afterwards = afterwards
        self._next_time_out = 0.0

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        *,
        bury: Bury = _forget,
        afterwards: Callable[[Engine], object] = lambda _engine: None,
    ) -> Relay:
        """A relay for `settings`; it connects at first use."""
        engine = open_engine(settings.need("database_url"), lock_wait_s=settings.lock_wait_s)
        broker = broker_of(settings)
        return cls(engine, broker, settings, bury=bury, afterwards=afterwards)

    def run_once(self) -> int:
        """Time out what is due for it, and publish all that is overdue; return how many were published."""
        self._time_out()  # first: it needs no broker, and a broker that is away ends this here
        published = relay_once(
            self._engine,
            self._broker,
            after_s=self._settings.relay_after_s,
            tries_max=self._settings.relay_tries_max,
            bury=self._bury,
            results=self._results,
        )
        self._afterwards(self._engine)
        metrics.LAST_PASS.set_to_current_time()
        return published

    def _time_out(self) -> None:
        if time.monotonic() < self._next_time_out:
            return
        timeout_s = self._settings.request_timeout_s
        due_in_s = next_time_out_s(self._engine, timeout_s=timeout_s)
        if due_in_s <= 0:
            while time_out_once(self._engine, timeout_s=timeout_s, bury=self._bury, results=self._results) == ROWS_MAX:
                pass
            due_in_s = next_time_out_s(self._engine, timeout_s=timeout_s)
        # One that another transaction holds is overdue still: it is looked at in the next pass.
        self._next_time_out = time.monotonic() + min(TIME_OUT_EVERY_S, max(0.0, due_in_s))

    def run(self, stopping: threading.Event) -> None:
        """Relay until told to stop. No error ends this loop: it backs off, says so, and goes on.

        The relay keeps watch as well: it has a pulse, and looks up the state that its metrics tell.
        """
        pulse = Pulse.open(self._settings, "relay")
        metrics.serve(self._settings)
        lookout = metrics.Lookout(self._settings, self._engine, self._broker)
        try:
            self._run(stopping, lookout if metrics.are_wanted(self._settings) else None)
        finally:
            lookout.close()
            if pulse is not None:
                pulse.stop()

    def _run(self, stopping: threading.Event, lookout: metrics.Lookout | None) -> None:
        failures = 0
        while not stopping.is_set():
            if lookout is not None:
                lookout.look()
            try:
                published = self.run_once()
                failures = 0
                if published:
                    log.info("published %d overdue requests again", published)
                stopping.wait(IDLE_WAIT_S)
            except Exception as error:  # a mistake of ours as well: without a relay nothing that was lost comes back
                failures += 1
                metrics.RELAY_FAILURES.inc()
                mistake = None if isinstance(error, ServiceUnavailable | ConfigurationError) else error
                log.warning("%s; the relay tries again (%d)", error, failures, exc_info=mistake)
                stopping.wait(min(BACKOFF_S_MAX, 0.1 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0))

    def close(self) -> None:
        """Let go of the connections."""
        self._broker.close()
        self._engine.dispose()
        if self._results is not None:
            self._results.close()
