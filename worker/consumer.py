"""The consumer: fetch what is waiting, settle it, put the results, ack. In a thread of its own.

There is no flush timer: the batch is what piled up while the last one was under way, one draw when it is quiet and
hundreds under load. The order is the guarantee: commit, then results, then ack. Whoever dies in between leaves the
draws unacked; they are delivered again, found settled, and answered with their first result.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self, TypeVar

from sqlalchemy import Engine

from producers.contract import DrawRequest
from producers.errors import ConfigurationError, InvalidRequest, ServiceUnavailable, UnknownVersion, Unparsable
from producers.logs import about
from producers.metrics import are_wanted
from producers.pulse import Pulse
from producers.results import ResultStore, StoredResult
from producers.settings import Settings
from worker import batch, metrics, parking
from worker.batch import Answer, Deferred, Handling, Refused, Settled, Wheels
from worker.deliveries import Deliveries, Delivery, open_deliveries
from worker.parking import Parking
from worker.watch import Watch

log = logging.getLogger(__name__)

T = TypeVar("T")

IDLE_WAIT_S: Final = 1.0  # how long an idle lane waits before it looks whether it should stop
BACKOFF_S_MAX: Final = 5.0
LOOK_FOR_DEAD_EVERY_S: Final = 5.0
DEAD_FETCHED_MAX: Final = 500
SPLIT_SIZE_MIN: Final = 64  # a smaller batch is sooner done in one transaction


@dataclass(frozen=True, slots=True)
class Report:
    """What one round did."""

    settled: int = 0
    repeats: int = 0
    parked: int = 0
    deferred: int = 0


class Stopping(Exception):
    """The worker shuts down: leave what is in hand unacked."""


class Consumer:
    """One loop over one source of deliveries; a worker process has one.

    A large batch is settled in `lanes` transactions side by side that share no account, so that they never wait for
    each other: two batches of random accounts nearly always do.
    """

    def __init__(
        self,
        deliveries: Deliveries,
        engine: Engine,
        results: ResultStore,
        wheels: Wheels,
        settings: Settings,
        pulse: Pulse | None = None,
        *,
        is_legacy: bool = False,
    ):
        self.deliveries = deliveries
        self.engine = engine
        self.results = results
        self.wheels = wheels
        self.settings = settings
        self._is_legacy = is_legacy
        # SQLite has one writer at a time.
        self._lanes = 1 if engine.dialect.name == "sqlite" else settings.lanes
        self._pool = ThreadPoolExecutor(self._lanes, thread_name_prefix="lane")
        self._name = parking.here()
        self._watch = Watch(pulse, with_latency=are_wanted(settings))
        self._next_look_for_dead = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self.run, name="draws", daemon=True)

    @classmethod
    def open(
        cls,
        settings: Settings,
        engine: Engine,
        wheels: Wheels,
        pulse: Pulse | None = None,
        *,
        is_legacy: bool = False,
    ) -> Self:
        """A consumer for `settings`, on a ledger that was old code's or not; it connects when it starts."""
        deliveries = open_deliveries(
            settings.need("broker_url"), claim_after_s=settings.claim_after_s, prefetch=2 * settings.batch_size_max
        )
        results = ResultStore.from_settings(settings)
        return cls(deliveries, engine, results, wheels, settings, pulse, is_legacy=is_legacy)

    def start(self) -> None:
        """Consume in a thread of its own, so that a transaction never blocks the caller's event loop."""
        self._thread.start()

    def stop(self, *, timeout_s: float) -> bool:
        """Take no more deliveries, finish and ack the batch in hand, give back the rest; whether that was done."""
        self._stopping.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def run(self) -> None:
        """Consume until told to stop. No error ends this loop: it backs off, says so, and goes on."""
        failures = 0
        try:
            while not self._stopping.is_set():
                try:
                    self.consume_once()
                    failures = 0
                except Stopping:
                    break
                except (ServiceUnavailable, ConfigurationError) as error:
                    failures += 1
                    metrics.OUTAGES.inc()
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
        self._take_in_dead()
        fetched = self.deliveries.fetch(self.settings.batch_size_max, wait_s=wait_s)
        if not fetched:
            return Report()
        with self._watch.batch(fetched):
            return self._see_through(fetched)

    def _see_through(self, fetched: Sequence[Delivery]) -> Report:
        """Settle what was fetched, put the results, ack."""
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
                metrics.OUTAGES.inc()
                log.warning("%s; the draws stay queued, trying again (%d)", error, failures)
                self._back_off(failures)
                if self._stopping.is_set():
                    raise Stopping from error

    def _back_off(self, failures: int) -> None:
        self._stopping.wait(min(BACKOFF_S_MAX, 0.05 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0))

    def _handle(self, fetched: Sequence[Delivery]) -> tuple[Report, list[Delivery]]:
        """Park, settle and answer; return what was done, and the deliveries to leave for later."""
        parsed: list[tuple[Delivery, DrawRequest]] = []
        parkings: list[Parking] = []
        for delivery in fetched:
            try:
                parsed.append((delivery, delivery.request()))
            except InvalidRequest as error:
                parkings.append(Parking(delivery, _cause_of(error), str(error), exception=error))
        answers = self._settle(
            [draw for _, draw in parsed],
            Handling(self._name, {draw.request_key: delivery.count for delivery, draw in parsed if delivery.count > 1}),
        )
        settled: list[Settled] = []
        deferred: list[Delivery] = []
        for (delivery, _), answer in zip(parsed, answers, strict=True):
            match answer:
                case Settled():
                    settled.append(answer)
                case Refused():
                    is_echo = answer.cause == parking.NEVER_SETTLED
                    parkings.append(
                        Parking(delivery, answer.cause, answer.error, answer.request, answer.exception, is_echo=is_echo)
                    )
                case Deferred():
                    request = answer.request
                    log.warning(
                        "draw %s is left for later: %s", request.request_key, answer.error, extra=about(request)
                    )
                    deferred.append(delivery)
        self.results.put(
            [StoredResult(answer.request.lottery_session_id, answer.result, answer.settled_at) for answer in settled]
        )
        self._park(parkings)  # last: where the result store is away all of this is repeated
        self._watch.tell(settled, len(deferred))
        repeats = sum(answer.is_repeat for answer in settled)
        if repeats:
            log.info("%d of %d draws were repeats, answered with their first result", repeats, len(settled))
        return Report(len(settled), repeats, len(parkings), len(deferred)), deferred

    def _settle(self, draws: Sequence[DrawRequest], handling: Handling) -> list[Answer]:
        """An answer for each draw, in their order; raises what batch.settle raises, when all lanes are done."""
        tries_max = self.settings.tries_max
        if self._lanes == 1 or len(draws) < SPLIT_SIZE_MIN:
            return batch.settle(
                self.engine, draws, self.wheels, tries_max=tries_max, handling=handling, is_legacy=self._is_legacy
            )
        by_lane: dict[int, list[int]] = {}
        for position, draw in enumerate(draws):
            by_lane.setdefault(_lane_of(draw.account_id, self._lanes), []).append(position)
        under_way = [
            (
                positions,
                self._pool.submit(
                    batch.settle,
                    self.engine,
                    [draws[i] for i in positions],
                    self.wheels,
                    tries_max=tries_max,
                    handling=handling,
                    is_legacy=self._is_legacy,
                ),
            )
            for positions in by_lane.values()
        ]
        wait([future for _, future in under_way])
        answers: dict[int, Answer] = {}
        for positions, future in under_way:
            answers.update(zip(positions, future.result(), strict=True))
        return [answers[position] for position in range(len(draws))]

    def _handle_suspect(self, delivery: Delivery) -> list[Delivery]:
        """Handle alone a message that has been delivered too often: it may be what kills the workers.

        It is parked before it is tried. If it takes this worker down, too, its row is found next time and it is not
        tried again; if nothing is wrong with it, the row is taken back. Returns it if it is to be left for later.
        """
        why = f"delivered {delivery.count} times and never settled"
        request = None
        with suppress(InvalidRequest):
            request = delivery.request()
        untried = Parking(delivery, parking.TOO_MANY_DELIVERIES, why, request, is_tried=False)
        if not self._persist(lambda: parking.park(self.engine, [untried], worker=self._name))[0]:
            log.error(
                "a message was delivered %d times: it stays among the dead letters",
                delivery.count,
                extra=_about(untried),
            )
            # Its request is given up only now.
            self._persist(lambda: self._park([untried._replace(is_tried=True)]))
            return []
        log.warning("a message was delivered %d times: handling it alone", delivery.count, extra=_about(untried))
        try:
            report, deferred = self._persist(lambda: self._handle([delivery]))
        except Stopping:
            # An outage, not the message: left in the books it would not be tried again.
            with suppress(ServiceUnavailable, ConfigurationError):
                parking.unpark(self.engine, untried)
            raise
        if not report.parked:
            self._persist(lambda: parking.unpark(self.engine, untried))
        return deferred

    def _take_in_dead(self) -> None:
        """Park, now and then, what the broker has given up on by itself: a net below our own."""
        if time.monotonic() < self._next_look_for_dead:
            return
        self._next_look_for_dead = time.monotonic() + LOOK_FOR_DEAD_EVERY_S
        while dead := self.deliveries.fetch_dead(DEAD_FETCHED_MAX):
            self._persist(lambda dead=dead: self._park([_given_up_by_broker(it) for it in dead]))  # type: ignore[misc]
            self.deliveries.ack_dead(dead)

    def _park(self, parkings: Sequence[Parking]) -> None:
        if not parkings:
            return
        parking.park(self.engine, parkings, worker=self._name)
        parking.tell_dead(self.engine, self.results, parkings)
        for it in parkings:
            self._watch.tell_parked(it.cause)
            log.error("parked a dead letter (%s): %s", it.cause, it.error, extra={"cause": it.cause, **_about(it)})


def _about(it: Parking) -> dict[str, str]:
    """Which draw a line of the log is about, as far as the message says."""
    key, session, _ = it.claims
    said = {"request_key": key, "lottery_session_id": session or key}
    return {name: text for name, text in said.items() if text is not None}


def _cause_of(error: InvalidRequest) -> str:
    if isinstance(error, UnknownVersion):
        return parking.UNKNOWN_VERSION
    return parking.UNPARSABLE if isinstance(error, Unparsable) else parking.INVALID


def _given_up_by_broker(delivery: Delivery) -> Parking:
    """A message from RabbitMQ's own dead-letter queue: beyond its delivery limit, unless it says otherwise."""
    request = None
    with suppress(InvalidRequest):
        request = delivery.request()
    why = str(delivery.headers.get("x-first-death-reason", "delivery_limit"))
    return Parking(delivery, parking.TOO_MANY_DELIVERIES, f"RabbitMQ gave it up: {why}", request)


def _lane_of(account_id: int, lanes: int) -> int:
    """Always the same lane for an account, spread evenly also where ids come in steps (Galera's auto-increment)."""
    return (account_id * 0x9E3779B1 >> 16) % lanes
