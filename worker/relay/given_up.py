"""Time out requests that were accepted too long ago: each becomes a dead letter, announced to waiting frontends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.causes import DeadReason
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.results import ResultStore
from tombola.producers.storage import clock, requests
from tombola.producers.storage.chunks import IN_LIST_MAX
from tombola.producers.storage.faults import explain
from tombola.producers.telemetry import metrics
from tombola.producers.telemetry.fields import about
from tombola.worker.dead_letters import parking

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 86_400.0


def relay_name() -> str:
    """The name of this process in the dead letters that it parks."""
    return f"relay@{parking.here()}"


def announce_given_up(results: ResultStore | None, dead: Sequence[Request], reason: DeadReason) -> None:
    """Count these requests as given up, and announce this to frontends that wait for their results. Never raises."""
    metrics.GIVEN_UP.labels(reason).inc(len(dead))
    if dead and results is not None:
        try:
            results.put_dead(dead, reason)
        except ServiceUnavailable as error:  # waiting frontends ask the database in the end
            log.warning("%s", error)


def time_out_once(
    engine: Engine, *, rows_max: int = IN_LIST_MAX, timeout_s: float = TIMEOUT_S, results: ResultStore | None = None
) -> int:
    """Give up requests that were accepted more than `timeout_s` ago, up to `rows_max`; return how many.

    Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    try:
        with engine.begin() as connection:
            accepted_before = clock.now(connection) - timedelta(seconds=timeout_s)
            dead = requests.time_out(connection, accepted_before, rows_max=rows_max)
            parking.bury(connection, dead, DeadReason.TIMED_OUT, worker=relay_name())
    except SQLAlchemyError as error:
        raise explain(error) from error
    announce_given_up(results, dead, DeadReason.TIMED_OUT)
    for request in dead:
        log.error("request %s is dead: not settled within %g s", request.request_key, timeout_s, extra=about(request))
    return len(dead)


def next_time_out_s(engine: Engine, *, timeout_s: float = TIMEOUT_S) -> float:
    """Seconds until the oldest accepted request times out; 0 or less if it is due.

    Requests that are accepted after this call are due later. Raises as `time_out_once` does.
    """
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            oldest = requests.oldest_accepted(connection)
            age_s = 0.0 if oldest is None else (clock.now(connection) - oldest).total_seconds()
    except SQLAlchemyError as error:
        raise explain(error) from error
    return timeout_s - age_s
