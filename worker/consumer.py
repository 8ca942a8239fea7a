"""The consumer: fetch what is waiting, settle it, put the results, ack. In a thread of its own per lane.

There is no flush timer: the batch is what piled up while the last one was under way, one draw when it is quiet and
hundreds under load. The order is the guarantee: commit, then results, then ack. Whoever dies in between leaves the
draws unacked; they are delivered again, found settled, and answered with their first result.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from sqlalchemy import Engine

from producers.contract import DrawRequest, parse_request
from producers.errors import ConfigurationError, InvalidRequest, ServiceUnavailable, UnknownVersion
from producers.results import ResultStore, StoredResult
from producers.settings import Settings
from worker import batch, dead_letters
from worker.batch import Deferred, Refused, Settled, Wheels
from worker.dead_letters import TOO_MANY_DELIVERIES
from worker.deliveries import Deliveries, Delivery, open_deliveries

log = logging.getLogger(__name__)

T = TypeVar("T")

IDLE_WAIT_S: Final = 1.0  # how long an idle lane waits before it looks whether it should stop
BACKOFF_S_MAX: Final = 5.0


@dataclass(frozen=True, slots=True)
class Report:
    """What one round did."""

    settled: int = 0
    repeats: int = 0
    parked: int = 0
    deferred: int = 0


class Stopping(Exception):
    """The worker shuts down: leave what is in hand unacked."""


@dataclass(slots=True)
class Lane:
    """One loop over one source of deliveries, with its own connections; a worker process has a few side by side."""

    deliveries: Deliveries
    engine: Engine
    results: ResultStore
    wheels: Wheels
    settings: Settings
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Consume until `stopping` is set. No error ends this loop: it backs off, says so, and goes on."""
        failures = 0
        try:
            while not self.stopping.is_set():
                try:
                    self.consume_once()
                    failures = 0
                except Stopping:
                    break
                except (ServiceUnavailable, ConfigurationError) as error:
                    failures += 1
                    log.warning("%s; trying again (%d)", error, failures)
                    self._back_off(failures)
                except Exception:
                    failures += 1
                    log.exception("unexpected error in the consumer; trying again (%d)", failures)
                    self._back_off(failures)
        finally:
            self.deliveries.close()

    def consume_once(self, *, wait_s: float = IDLE_WAIT_S) -> Report:
        """Fetch one batch and see it through; say what became of it.

        Raises Stopping when the worker is told to stop while the database or the result store is away.
        """
        fetched = self.deliveries.fetch(self.settings.batch_size_max, wait_s=wait_s)
        if not fetched:
            return Report()
        suspects = [delivery for delivery in fetched if delivery.count > self.settings.deliveries_max]
        regular = [delivery for delivery in fetched if delivery.count <= self.settings.deliveries_max]
        deferred = [delivery for suspect in suspects for delivery in self._handle_suspect(suspect)]
        report, later = self._persist(lambda: self._handle(regular))
        deferred += later
        # What is left for later goes back first: an ack on RabbitMQ takes in all that came before.
        self.deliveries.give_back(deferred)
        left = {delivery.tag for delivery in deferred}
        self.deliveries.ack([delivery for delivery in fetched if delivery.tag not in left])
        return report

    def _persist(self, step: Callable[[], T]) -> T:
        """Repeat `step` until the servers it needs are there; it is safe to repeat. Raises Stopping on shutdown."""
        failures = 0
        while True:
            try:
                return step()
            except (ServiceUnavailable, ConfigurationError) as error:
                failures += 1
                log.warning("%s; the draws stay queued, trying again (%d)", error, failures)
                self._back_off(failures)
                if self.stopping.is_set():
                    raise Stopping from error

    def _back_off(self, failures: int) -> None:
        self.stopping.wait(min(BACKOFF_S_MAX, 0.05 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0))

    def _handle(self, fetched: Sequence[Delivery]) -> tuple[Report, list[Delivery]]:
        """Park, settle and answer; return what was done, and the deliveries to leave for later."""
        parsed: list[tuple[Delivery, DrawRequest]] = []
        parked = 0
        for delivery in fetched:
            try:
                parsed.append((delivery, parse_request(delivery.body)))
            except InvalidRequest as error:
                cause = "unknown version" if isinstance(error, UnknownVersion) else "invalid"
                self._park(delivery, cause, str(error))
                parked += 1
        if not parsed:
            return Report(parked=parked), []
        draws = [draw for _, draw in parsed]
        answers = batch.settle(self.engine, draws, self.wheels, tries_max=self.settings.tries_max)
        settled: list[Settled] = []
        deferred: list[Delivery] = []
        for (delivery, _), answer in zip(parsed, answers, strict=True):
            match answer:
                case Settled():
                    settled.append(answer)
                case Refused():
                    self._park(delivery, answer.cause, answer.error)
                    parked += 1
                case Deferred():
                    log.warning("draw %s is left for later: %s", answer.request.request_key, answer.error)
                    deferred.append(delivery)
        self.results.put(
            [StoredResult(answer.request.lottery_session_id, answer.result, answer.settled_at) for answer in settled]
        )
        repeats = sum(answer.is_repeat for answer in settled)
        if repeats:
            log.info("%d of %d draws were repeats, answered with their first result", repeats, len(settled))
        return Report(len(settled), repeats, parked, len(deferred)), deferred

    def _handle_suspect(self, delivery: Delivery) -> list[Delivery]:
        """Handle alone a message that has been delivered too often: it may be what kills the workers.

        It is parked before it is tried. If it takes this worker down, too, its row is found next time and it is not
        tried again; if nothing is wrong with it, the row is taken back. Returns it if it is to be left for later.
        """
        why = f"delivered {delivery.count} times and never settled"
        if not self._persist(lambda: dead_letters.park(self.engine, delivery, TOO_MANY_DELIVERIES, why)):
            return []
        log.warning("a message was delivered %d times: handling it alone", delivery.count)
        report, deferred = self._persist(lambda: self._handle([delivery]))
        if not report.parked:
            self._persist(lambda: dead_letters.unpark(self.engine, delivery))
        return deferred

    def _park(self, delivery: Delivery, cause: str, error: str) -> None:
        dead_letters.park(self.engine, delivery, cause, error)
        log.error("parked a dead letter (%s): %s", cause, error)


class Consumer:
    """All lanes of a worker process: started together, stopped together."""

    def __init__(self, settings: Settings, engine: Engine, wheels: Wheels) -> None:
        self._settings = settings
        self._engine = engine
        self._wheels = wheels
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start every lane in a thread of its own."""
        for number in range(self._settings.lanes):
            lane = Lane(
                deliveries=open_deliveries(
                    self._settings.need("broker_url"),
                    claim_after_s=self._settings.claim_after_s,
                    prefetch=2 * self._settings.batch_size_max,
                ),
                engine=self._engine,
                results=ResultStore.open(self._settings.need("result_url"), ttl_s=self._settings.result_ttl_s),
                wheels=self._wheels,
                settings=self._settings,
                stopping=self._stopping,
            )
            thread = threading.Thread(target=lane.run, name=f"draws-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self, *, timeout_s: float) -> bool:
        """Take no more deliveries, finish and ack the batches in hand, give back the rest; whether all were done."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._threads)
