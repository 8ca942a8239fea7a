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
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, NamedTuple, Self, TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import Request
from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.errors import (
    ConfigurationError,
    InvalidRequest,
    NotSigned,
    ServiceUnavailable,
    UnknownVersion,
    Unparsable,
)
from tombola.producers.domain.signatures import SIGNATURE
from tombola.producers.results import ResultStore, StoredResult
from tombola.producers.settings import Settings
from tombola.producers.storage import requests
from tombola.producers.telemetry.metrics import are_wanted
from tombola.producers.telemetry.pulse import Pulse
from tombola.worker import metrics
from tombola.worker.dead_letters import parking
from tombola.worker.dead_letters.parking import Parking, Unparkable
from tombola.worker.deliveries import Deliveries, Delivery, open_deliveries
from tombola.worker.deliveries.losses import left_to_relay
from tombola.worker.ledger.old_rows import OldDraws
from tombola.worker.settle.aside import Aside, Held
from tombola.worker.settle.batch import Deferred, Effort, Handling, Refused, Settled
from tombola.worker.settle.lanes import Lanes
from tombola.worker.settle.putting import Putting, tell_dead
from tombola.worker.settle.watch import Watch

log = logging.getLogger(__name__)

T = TypeVar("T")

IDLE_WAIT_S: Final = 1.0  # how long an idle lane waits before it looks whether it should stop
BACKOFF_S_MAX: Final = 5.0
LOOK_FOR_DEAD_EVERY_S: Final = 5.0
DEAD_FETCHED_MAX: Final = 500
KEEPS_PER_TERM: Final = 3  # how often within claim_after_s a consumer says that it still sees to what it set aside
RESULT_TIMEOUT_S: Final = 2.0  # once, where the result store hangs: from then on nothing waits for it
HELD_SHOWN_MAX: Final = 5
REQUEUE_PAUSE_S: Final = 0.1  # where nothing but draws to be requeued is queued: do not spin
DATABASE_TIMEOUT_S: Final = 10.0  # a database that says nothing for so long: others may have the draws
# An outage that lasts: other workers may have what this one holds.
FAILURES_MAX: Final = 3
FAILING_S_MAX: Final = 5.0
OUTAGE_PAUSE_S_MAX: Final = 30.0


@dataclass(frozen=True, slots=True)
class Report:
    """What one round did."""

    settled: int = 0
    repeats: int = 0
    parked: int = 0
    deferred: int = 0
    strangers: int = 0  # of those that were parked, the ones that nobody vouches for


class Stopping(Exception):
    """The worker shuts down: leave what is in hand unacked."""


class CutOff(ServiceUnavailable):
    """The database has been away from this worker for longer than a moment."""


class _Later(NamedTuple):
    """A delivery to try again later, and what it waits for."""

    held: Held
    delivery: Delivery


class Consumer:
    """One loop over one source of deliveries; a worker process has one."""

    def __init__(
        self,
        deliveries: Deliveries,
        engine: Engine,
        results: ResultStore,
        wheels: Wheels,
        settings: Settings,
        pulse: Pulse | None = None,
        *,
        old_draws: OldDraws | None = None,
    ):
        self.deliveries = deliveries
        self.engine = engine
        self.results = Putting(results)
        self.settings = settings
        self._keyring = settings.keyring
        self._lanes = Lanes(engine, wheels, settings.lanes, old_draws=old_draws, accepted_only=settings.accepted_only)
        self._name = parking.here()
        self._watch = Watch(pulse, with_latency=are_wanted(settings))
        self._aside = Aside(settings.batch_size_max)
        self._next_look_for_dead = 0.0
        self._next_keep = 0.0
        self._outages = 0  # how often in a row what was in hand had to be given back
        self._trying: set[str] = set()  # suspects that are parked, and not tried to the end, by their SHA-256
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
        old_draws: OldDraws | None = None,
    ) -> Self:
        """A consumer for `settings`, on a ledger with `old_draws` or without; it connects when it starts."""
        deliveries = open_deliveries(
            settings.need("broker_url"), claim_after_s=settings.claim_after_s, prefetch=3 * settings.batch_size_max
        )
        results = ResultStore.from_settings(settings, timeout_s=RESULT_TIMEOUT_S)
        return cls(deliveries, engine, results, wheels, settings, pulse, old_draws=old_draws)

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
                    # What is in hand comes again, counted: if one message is to blame, it is soon handled alone.
                    self._aside.clear()
                    self.deliveries.release()
                    self._back_off(failures)
        finally:
            self.results.close()
            self.deliveries.close()

    def consume_once(self, *, wait_s: float = IDLE_WAIT_S) -> Report:
        """Fetch one batch and see it through, after what was set aside and is due; say what became of the batch.

        Raises Stopping when the worker is told to stop while the database is away.
        """
        if self._outages:
            self._await_database()
        try:
            self._take_in_dead()
        except CutOff as error:
            self._give_back([], error)
            return Report()
        self._keep()
        if due := self._aside.take_due(self.settings.batch_size_max):
            with self._watch.batch(due):
                self._see_through(due, has_patience=False)
            self._aside.tell_tried()
            metrics.ASIDE.set(len(self._aside))
        count_max = 1 if self._outages else self.settings.batch_size_max
        fetched = self.deliveries.fetch(count_max, wait_s=min(wait_s, self._aside.due_in_s))
        if not fetched:
            return Report()
        with self._watch.batch(fetched):
            return self._see_through(fetched)

    def _see_through(self, fetched: Sequence[Delivery], *, has_patience: bool = True) -> Report:
        """Settle what was fetched, put the results, ack; where the database stays away give back what is in hand."""
        try:
            report = self._see_some_through(fetched, has_patience=has_patience)
        except CutOff as error:
            self._give_back(fetched, error)
            return Report()
        self._outages = 0
        return report

    def _see_some_through(self, fetched: Sequence[Delivery], *, has_patience: bool) -> Report:
        suspects = [delivery for delivery in fetched if delivery.count > self.settings.deliveries_max]
        regular = [delivery for delivery in fetched if delivery.count <= self.settings.deliveries_max]
        later = [it for suspect in suspects for it in self._handle_suspect(suspect)]
        report, others = self._persist(lambda: self._handle(regular, has_patience=has_patience))
        later += others
        left = {it.delivery.tag for it in later}
        self.deliveries.ack([delivery for delivery in fetched if delivery.tag not in left])
        self._set_aside(later)
        return report

    def _set_aside(self, later: Sequence[_Later]) -> None:
        """Keep these in hand; those for which there is no room go to the end of the queue."""
        if new := [it.held for it in later if not self._aside.is_held(it.held)]:
            names = (f"account {it}" if isinstance(it, int) else f"request {it}" for it in new[:HELD_SHOWN_MAX])
            shown = ", ".join(dict.fromkeys(names))
            log.warning("%d draws wait, the others go on: another transaction holds %s", len(later), shown)
        too_many = [it.delivery for it in later if not self._aside.add(it.held, it.delivery)]
        too_many = [it for it in too_many if it.whole is None]  # of the others we have the beginning alone
        metrics.ASIDE.set(len(self._aside))
        if too_many:
            self.deliveries.requeue(too_many)
            self._stopping.wait(REQUEUE_PAUSE_S)

    def _keep(self) -> None:
        """Tell the others, now and then, that what is set aside is being seen to: other workers, and the relay."""
        if not len(self._aside) or time.monotonic() < self._next_keep:
            return
        settings = self.settings
        every_s = min(settings.claim_after_s, settings.relay_after_s) / KEEPS_PER_TERM
        self._next_keep = time.monotonic() + every_s
        self.deliveries.keep([delivery for _, delivery in self._aside])
        accounts_held = [delivery.request() for held, delivery in self._aside if isinstance(held, int)]
        keys = [request.request_key for request in accounts_held]
        with suppress(SQLAlchemyError):  # then the relay publishes some of them once more: harmless
            requests.postpone(self.engine, keys, timedelta(seconds=settings.relay_after_s))

    def _give_back(self, fetched: Sequence[Delivery], error: CutOff) -> None:
        """Let other workers have what is in hand, and fetch no more until the database answers, then one by one."""
        log.warning("%s; what this worker holds is given back until it does", error)
        if self._outages:
            # It was fetched to try with: that is no delivery to count against it.
            regular = [it for it in fetched if it.count <= self.settings.deliveries_max and it.whole is None]
            with suppress(ServiceUnavailable):
                self.deliveries.requeue(regular)
        self._aside.clear()
        self.deliveries.release()
        self._outages += 1

    def _await_database(self) -> None:
        """Return when the database can be written to; raises Stopping on shutdown."""
        self._stopping.wait(min(OUTAGE_PAUSE_S_MAX, 0.1 * 2.0**self._outages))
        failures = 0
        while not self._stopping.is_set():
            try:
                requests.try_writing(self.engine)
                return
            except (ServiceUnavailable, ConfigurationError) as error:
                failures += 1
                metrics.OUTAGES.inc()
                log.warning("%s; trying again (%d)", error, failures)
                self._back_off(failures)
        raise Stopping

    def _persist(self, step: Callable[[], T]) -> T:
        """Repeat `step` until the database is there; it is safe to repeat.

        Raises CutOff when that takes too long, and Stopping on shutdown.
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
                self._back_off(failures)
                if self._stopping.is_set():
                    raise Stopping from error

    def _back_off(self, failures: int) -> None:
        self._stopping.wait(min(BACKOFF_S_MAX, 0.05 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0))

    def _handle(self, fetched: Sequence[Delivery], *, has_patience: bool = True) -> tuple[Report, list[_Later]]:
        """Park, settle and answer; return what was done, and the deliveries to try again later."""
        parsed: list[tuple[Delivery, Request]] = []
        parkings: list[Parking] = []
        later: list[_Later] = []
        for delivery in fetched:
            try:
                request = self._read(delivery)
            except InvalidRequest as error:
                parkings.append(Parking(delivery, _cause_of(error), str(error), exception=error))
                continue
            if has_patience and self._aside.is_held(request.account_id):
                later.append(_Later(request.account_id, delivery))
            else:
                parsed.append((delivery, request))
        answers = self._lanes.settle(
            [draw for _, draw in parsed],
            Handling(self._name, {draw.request_key: delivery.count for delivery, draw in parsed if delivery.count > 1}),
            Effort(self.settings.tries_max, self.settings.lock_wait_s, has_patience),
        )
        settled: list[Settled] = []
        for (delivery, _), answer in zip(parsed, answers, strict=True):
            match answer:
                case Settled():
                    settled.append(answer)
                case Refused():
                    is_echo = answer.cause == Cause.NEVER_SETTLED
                    parkings.append(
                        Parking(delivery, answer.cause, answer.error, answer.request, answer.exception, is_echo=is_echo)
                    )
                case Deferred():
                    request = answer.request
                    later.append(
                        _Later(request.account_id if answer.is_account_held else request.request_key, delivery)
                    )
        self.results.put(
            [StoredResult(answer.request.lottery_session_id, answer.result, answer.settled_at) for answer in settled]
        )
        unparked = self._park(parkings)
        later += [_Later(it.sha256, it.delivery) for it in unparked]
        self._watch.tell(settled, len(later))
        repeats = sum(answer.is_repeat for answer in settled)
        if repeats:
            log.info("%d of %d draws were repeats, answered with their first result", repeats, len(settled))
        strangers = sum(it.is_strangers for it in parkings)
        return Report(len(settled), repeats, len(parkings) - len(unparked), len(later), strangers), later

    def _read(self, delivery: Delivery) -> Request:
        """The draw that a message asks for; raises InvalidRequest, and NotSigned for what may be anybody's."""
        request = delivery.request()
        if self._keyring.secrets:
            self._keyring.check(request, delivery.headers.get(SIGNATURE))
        return request

    def _handle_suspect(self, delivery: Delivery) -> list[_Later]:
        """Handle alone a message that has been delivered too often: it may be what kills the workers.

        It is parked before it is tried. If it takes this worker down, too, its row is found next time and it is not
        tried again; if nothing is wrong with it, the row is taken back. Returns it if it is to be tried again later.
        """
        why = f"delivered {delivery.count} times and never settled"
        request = None
        try:
            request = self._read(delivery)
        except NotSigned:  # known in a moment: it says nothing of the request that it names
            return self._persist(lambda: self._handle([delivery]))[1]
        except InvalidRequest:
            pass
        untried = Parking(delivery, Cause.TOO_MANY_DELIVERIES, why, request, is_tried=False)
        try:
            # Parked by this worker, in an outage that kept it from going on: that says nothing against the message.
            is_under_trial = untried.sha256 in self._trying or self._persist(
                lambda: parking.park(self.engine, [untried], worker=self._name)[0]
            )
        except Unparkable:
            return [_Later(untried.sha256, delivery)]
        if not is_under_trial:
            log.error(
                "a message was delivered %d times: it stays among the dead letters",
                delivery.count,
                extra=_about(untried),
            )
            # Its request is given up only now.
            self._persist(lambda: self._park([untried._replace(is_tried=True)]))
            return []
        log.warning("a message was delivered %d times: handling it alone", delivery.count, extra=_about(untried))
        self._trying.add(untried.sha256)
        try:
            report, later = self._persist(lambda: self._handle([delivery], has_patience=False))
        except (Stopping, CutOff):
            # An outage, not the message: left in the books it would not be tried again.
            with suppress(ServiceUnavailable, ConfigurationError):
                parking.unpark(self.engine, untried)
                self._trying.discard(untried.sha256)
            raise
        if report.parked == report.strangers:
            self._persist(lambda: parking.unpark(self.engine, untried))
        self._trying.discard(untried.sha256)
        return later

    def _take_in_dead(self) -> None:
        """Park, now and then, what the broker has given up on by itself: a net below our own."""
        if time.monotonic() < self._next_look_for_dead:
            return
        self._next_look_for_dead = time.monotonic() + LOOK_FOR_DEAD_EVERY_S
        while dead := self.deliveries.fetch_dead(DEAD_FETCHED_MAX):
            lost = {it.tag for it in self._persist(lambda dead=dead: left_to_relay(self.engine, dead))}  # type: ignore[misc]
            given_up = [self._given_up_by_broker(it) for it in dead if it.tag not in lost]
            unparked = self._persist(lambda given_up=given_up: self._park(given_up))  # type: ignore[misc]
            left = {it.delivery.tag for it in unparked}
            self.deliveries.ack_dead([delivery for delivery in dead if delivery.tag not in left])

    def _given_up_by_broker(self, delivery: Delivery) -> Parking:
        """A message from RabbitMQ's own dead-letter queue: beyond its delivery limit, unless it says otherwise."""
        request = None
        try:
            request = self._read(delivery)
        except NotSigned as error:
            return Parking(delivery, Cause.NOT_SIGNED, str(error), exception=error)
        except InvalidRequest:
            pass
        told = delivery.headers.get("x-first-death-reason")
        why = told if isinstance(told, str) else "delivery_limit"
        return Parking(delivery, Cause.TOO_MANY_DELIVERIES, f"RabbitMQ gave it up: {why}", request)

    def _park(self, parkings: Sequence[Parking]) -> list[Parking]:
        """Set these aside in the database; return those that it refuses, which stay unacked."""
        unparked: list[Parking] = []
        if parkings:
            try:
                parking.park(self.engine, parkings, worker=self._name)
            except Unparkable as error:
                unparked = error.parkings
            tell_dead(self.engine, self.results, parkings)
        refused = {it.delivery.tag for it in unparked}
        for it in parkings:
            if it.delivery.tag in refused:
                continue
            self._watch.tell_parked(it.cause)
            log.error("parked a dead letter (%s): %s", it.cause, it.error, extra={"cause": it.cause, **_about(it)})
        return unparked


def _about(it: Parking) -> dict[str, str]:
    """Which draw a line of the log is about, as far as the message says."""
    key, session, _ = it.claims
    said = {"request_key": key, "lottery_session_id": session or key}
    return {name: text for name, text in said.items() if text is not None}


def _cause_of(error: InvalidRequest) -> str:
    if isinstance(error, UnknownVersion):
        return Cause.UNKNOWN_VERSION
    if isinstance(error, NotSigned):
        return Cause.NOT_SIGNED
    return Cause.UNPARSABLE if isinstance(error, Unparsable) else Cause.INVALID
