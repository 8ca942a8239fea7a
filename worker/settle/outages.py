"""A database that is away: draws stay queued, steps are repeated, and after some time other workers get the draws."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from sqlalchemy import Engine

from tombola.producers.domain.errors import ConfigurationError, ServiceUnavailable
from tombola.producers.storage import requests
from tombola.worker import metrics

log = logging.getLogger(__name__)

BACKOFF_S_MAX: Final = 5.0
# After so many failures, or so many seconds, an outage lasts: other workers may take what this worker holds.
FAILURES_MAX: Final = 3
FAILING_S_MAX: Final = 5.0
OUTAGE_PAUSE_S_MAX: Final = 30.0

T = TypeVar("T")


class Stopping(Exception):
    """The worker shuts down: leave what is in hand unacked."""


class CutOff(ServiceUnavailable):
    """The outage of the database lasts."""


class Outages:
    """Waits for a database that is away. `stopping` ends every wait. For one thread."""

    def __init__(self, engine: Engine, stopping: threading.Event) -> None:
        self._engine = engine
        self._stopping = stopping

    def persist(self, step: Callable[[], T]) -> T:
        """The result of `step`, which is repeated while the database is away; so `step` must be safe to repeat.

        Raises CutOff when the outage lasts, and Stopping on shutdown.
        """
        failures, began = 0, time.monotonic()
        while True:
            try:
                return step()
            except (ServiceUnavailable, ConfigurationError) as error:
                failures += 1
                metrics.OUTAGES.inc()
                log.warning("%s; the draws stay queued, trying again (%d)", error, failures)
                if self._stopping.is_set():
                    raise Stopping from error
                if failures >= FAILURES_MAX or time.monotonic() - began > FAILING_S_MAX:
                    raise CutOff(str(error)) from error
                self.back_off(failures)
                if self._stopping.is_set():
                    raise Stopping from error

    def await_database(self, outages: int) -> None:
        """Return when the database can be written to, after a pause that doubles with `outages` in a row.

        Raises Stopping on shutdown.
        """
        self._stopping.wait(min(OUTAGE_PAUSE_S_MAX, 0.1 * 2.0**outages))
        failures = 0
        while not self._stopping.is_set():
            try:
                requests.try_writing(self._engine)
                return
            except (ServiceUnavailable, ConfigurationError) as error:
                failures += 1
                metrics.OUTAGES.inc()
                log.warning("%s; trying again (%d)", error, failures)
                self.back_off(failures)
        raise Stopping

    def back_off(self, failures: int) -> None:
        """Pause for a time that doubles with each failure, up to BACKOFF_S_MAX, with jitter."""
        self._stopping.wait(min(BACKOFF_S_MAX, 0.05 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0))
