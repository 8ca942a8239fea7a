"""The relay's loop: publish overdue requests, give up requests that never settle, void expired holds, set gauges.

Fulfilments are delivered and the books are sealed beside it, in threads with connections of their own: neither a
receiver nor a block delays a request.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import Final

from sqlalchemy import Engine

from tombola.producers.brokers.registry import Broker, broker_of
from tombola.producers.domain.errors import ConfigurationError, ServiceUnavailable
from tombola.producers.results import ResultStore
from tombola.producers.settings import Settings
from tombola.producers.storage.chunks import IN_LIST_MAX
from tombola.producers.storage.engines import open_engine
from tombola.producers.telemetry import metrics
from tombola.producers.telemetry.pulse import Pulse
from tombola.worker.books.sealer import Sealer
from tombola.worker.dead_letters import parking, states
from tombola.worker.movements.holds import void_expired_once
from tombola.worker.relay.fulfilling import STOP_S_MAX, Fulfilling
from tombola.worker.relay.given_up import next_time_out_s, relay_name, time_out_once
from tombola.worker.relay.lookout import OperatorsLookout
from tombola.worker.relay.overdue import relay_once

log = logging.getLogger(__name__)

IDLE_WAIT_S: Final = 1.0
TIME_OUT_EVERY_S: Final = 60.0  # or sooner, when the oldest request is due
LOOK_FOR_UNSEEN_EVERY_S: Final = 600.0
LOOK_FOR_EXPIRED_HOLDS_EVERY_S: Final = 5.0
BACKOFF_S_MAX: Final = 10.0


class Relay:
    """Calls `relay_once` again and again, and `time_out_once` when the oldest request is due."""

    def __init__(self, engine: Engine, broker: Broker, settings: Settings) -> None:
        self._results = ResultStore.from_settings(settings) if settings.has("result_url") else None
        self._engine = engine
        self._broker = broker
        self._settings = settings
        self._next_time_out = 0.0
        self._next_look_for_unseen = 0.0
        self._next_look_for_expired_holds = 0.0
        self._operators = OperatorsLookout()

    @classmethod
    def from_settings(cls, settings: Settings) -> Relay:
        """A relay for `settings`; it connects at first use."""
        engine = open_engine(settings.need("database_url"), lock_wait_s=settings.lock_wait_s)
        return cls(engine, broker_of(settings), settings)

    def run_once(self) -> int:
        """Time out the requests that are due, and publish all that are overdue; return how many were published.

        Holds that have expired are voided: their voids are accepted, and published with the others. Replayed dead
        letters whose requests have settled are marked settled, and dead requests without a dead letter get one. Raises
        PublishFailed, ServiceUnavailable or ConfigurationError.
        """
        self._time_out()  # first: it needs no broker, and a broker that is away ends this pass
        self._void_expired_holds()
        published = relay_once(
            self._engine,
            self._broker,
            after_s=self._settings.relay_after_s,
            tries_max=self._settings.relay_tries_max,
            results=self._results,
        )
        states.follow_up_once(self._engine)
        self._bury_unseen()
        if metrics.are_wanted(self._settings):
            self._operators.look(self._engine)
        metrics.LAST_PASS.set_to_current_time()
        return published

    def deliver_once(self) -> int:
        """Deliver fulfilments until none is due; return how many were. Raises as `Fulfilling.run_once` does."""
        fulfilling = Fulfilling.from_settings(self._settings)
        try:
            return fulfilling.run_once()
        finally:
            fulfilling.close()

    def _time_out(self) -> None:
        if time.monotonic() < self._next_time_out:
            return
        timeout_s = self._settings.request_timeout_s
        due_in_s = next_time_out_s(self._engine, timeout_s=timeout_s)
        if due_in_s <= 0:
            while time_out_once(self._engine, timeout_s=timeout_s, results=self._results) == IN_LIST_MAX:
                pass
            due_in_s = next_time_out_s(self._engine, timeout_s=timeout_s)
        # A due request that another transaction holds is still due in the next pass.
        self._next_time_out = time.monotonic() + min(TIME_OUT_EVERY_S, max(0.0, due_in_s))

    def _void_expired_holds(self) -> None:
        if time.monotonic() < self._next_look_for_expired_holds:
            return
        if voided := void_expired_once(self._engine):
            log.info("%d holds have expired", voided)
        self._next_look_for_expired_holds = time.monotonic() + LOOK_FOR_EXPIRED_HOLDS_EVERY_S

    def _bury_unseen(self) -> None:
        if time.monotonic() < self._next_look_for_unseen:
            return
        while parking.bury_unseen_once(self._engine, worker=relay_name()) == states.ROWS_MAX:
            pass
        self._next_look_for_unseen = time.monotonic() + LOOK_FOR_UNSEEN_EVERY_S

    def run(self, stopping: threading.Event) -> None:
        """Relay until `stopping` is set. No error ends this loop: it logs the error, backs off, and goes on.

        The relay also delivers fulfilments, seals the books, shows a pulse, serves metrics, and sets the gauges of the
        whole deployment. Raises ConfigurationError at once where TOMBOLA_BOOKS_KEY is no key.
        """
        sealer = Sealer.from_settings(self._settings)
        pulse = Pulse.open(self._settings, "relay")
        metrics.serve(self._settings)
        lookout = metrics.Lookout(self._settings, self._engine, self._broker)
        fulfilling = Fulfilling.from_settings(self._settings)
        delivering = threading.Thread(target=fulfilling.run, args=(stopping,), name="fulfilments", daemon=True)
        delivering.start()
        sealing = threading.Thread(target=sealer.run, args=(stopping,), name="sealer", daemon=True)
        sealing.start()
        try:
            self._run(stopping, lookout if metrics.are_wanted(self._settings) else None)
        finally:
            delivering.join(STOP_S_MAX + 2 * IDLE_WAIT_S)
            fulfilling.close()
            sealing.join(STOP_S_MAX)
            sealer.close()
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
            except Exception as error:  # our own bugs as well: without a relay no lost message is published again
                failures += 1
                metrics.RELAY_FAILURES.inc()
                mistake = None if isinstance(error, ServiceUnavailable | ConfigurationError) else error
                log.warning("%s; the relay tries again (%d)", error, failures, exc_info=mistake)
                stopping.wait(min(BACKOFF_S_MAX, 0.1 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0))

    def close(self) -> None:
        """Close the connections."""
        self._broker.close()
        self._engine.dispose()
        if self._results is not None:
            self._results.close()
