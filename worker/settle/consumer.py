"""The consumer: fetch what is waiting, settle it, put the results, ack. In a thread of its own.

There is no flush timer: a batch is what has piled up while the last batch was under way, one draw in quiet times and
hundreds under load. The order is the guarantee: commit, then results, then ack. A worker that dies in between leaves
its draws unacked; the draws are delivered again, found settled, and answered with their first result.

Under load the lanes never rest: while the results of one full batch are put, the lanes settle the next one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Final, Self

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.causes import Cause
from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.errors import ConfigurationError, InvalidRequest, NotSigned, ServiceUnavailable
from tombola.producers.results import ResultStore
from tombola.producers.settings import Settings
from tombola.producers.storage import requests
from tombola.producers.telemetry.metrics import are_wanted
from tombola.producers.telemetry.pulse import Pulse
from tombola.worker import metrics
from tombola.worker.dead_letters import parking
from tombola.worker.dead_letters.message import Parking
from tombola.worker.dead_letters.parking import Unparkable
from tombola.worker.deliveries import Deliveries, Delivery, open_deliveries
from tombola.worker.deliveries.losses import left_to_relay
from tombola.worker.ledger.old_rows import OldDraws
from tombola.worker.settle.aside import Aside
from tombola.worker.settle.handler import Begun, Handler, Later, Round, about_message
from tombola.worker.settle.lanes import Lanes
from tombola.worker.settle.outages import CutOff, Outages, Stopping
from tombola.worker.settle.putting import Putting
from tombola.worker.settle.rules import Rules
from tombola.worker.settle.watch import Watch

log = logging.getLogger(__name__)

IDLE_WAIT_S: Final = 1.0  # how long an idle consumer waits for a message before it checks whether to stop
LOOK_FOR_DEAD_EVERY_S: Final = 5.0
DEAD_FETCHED_MAX: Final = 500
KEEPS_PER_TERM: Final = 3  # how often within claim_after_s a consumer renews its claim on what it set aside
RESULT_TIMEOUT_S: Final = 2.0  # waited once for a result store that hangs; then results are put later
HELD_SHOWN_MAX: Final = 5
REQUEUE_PAUSE_S: Final = 0.1  # when only draws that are requeued are queued: do not spin
DATABASE_TIMEOUT_S: Final = 10.0  # a database that is silent for so long is away


class Consumer:
    """One loop over one source of deliveries; a worker process has one consumer."""

    def __init__(
        self,
        deliveries: Deliveries,
        engine: Engine,
        results: ResultStore,
        rules: Rules,
        settings: Settings,
        pulse: Pulse | None = None,
    ):
        self.deliveries = deliveries
        self.engine = engine
        self.results = Putting(results)
        self.settings = settings
        self._name = parking.here()
        self._watch = Watch(pulse, with_latency=are_wanted(settings))
        self._aside = Aside(settings.batch_size_max)
        lanes = Lanes(engine, rules, settings.lanes)
        self._handler = Handler(engine, lanes, self.results, settings.keyring, self._aside, self._watch, self._name)
        self._next_look_for_dead = 0.0
        self._next_keep = 0.0
        self._outages_in_row = 0  # how often in a row what was in hand had to be given back
        self._ahead: Begun | None = None  # a full batch that the lanes settle, begun before the last one was finished
        self._trying: set[str] = set()  # suspects that are parked, and not tried to the end, by their SHA-256
        self._stopping = threading.Event()
        self._outages = Outages(engine, self._stopping)
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
        """A consumer for `settings`, on a ledger with or without `old_draws`. It connects when it starts."""
        deliveries = open_deliveries(
            settings.need("broker_url"), claim_after_s=settings.claim_after_s, prefetch=3 * settings.batch_size_max
        )
        results = ResultStore.from_settings(settings, timeout_s=RESULT_TIMEOUT_S)
        return cls(deliveries, engine, results, Rules.of(settings, engine, wheels, old_draws), settings, pulse)

    def start(self) -> None:
        """Consume in a thread of its own, so that a transaction never blocks the caller's event loop."""
        self._thread.start()

    def stop(self, *, timeout_s: float) -> bool:
        """Take no more deliveries, finish and ack the batch in hand, give back the rest.

        Returns whether that was done within `timeout_s`.
        """
        self._stopping.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def run(self) -> None:
        """Consume until `stop` is called. No error ends this loop: it logs the error, backs off, and goes on."""
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
                    self._outages.back_off(failures)
                except Exception:
                    failures += 1
                    log.exception("unexpected error in the consumer; trying again (%d)", failures)
                    # What is in hand is delivered again and counted: a message that is to blame is soon handled alone.
                    self._let_go()
                    self._outages.back_off(failures)
            self._finish_ahead()
        except (ServiceUnavailable, ConfigurationError, Stopping) as error:
            log.warning("%s; what this worker holds is delivered again", error)
        except Exception:
            log.exception("unexpected error in the last batch; what this worker holds is delivered again")
        finally:
            self.results.close()
            self.deliveries.close()

    def consume_once(self, *, wait_s: float = IDLE_WAIT_S) -> Round:
        """Try again what was set aside and is due; then fetch one batch, settle it, put the results and ack.

        A full batch may only have begun when this returns: the next call finishes it. Returns what became of the
        batches that are finished, without what was set aside before. Waits up to `wait_s` for a first message. Raises
        Stopping when the worker shuts down while the database is away, and ServiceUnavailable when the broker is away.
        """
        if self._outages_in_row:
            self._outages.await_database(self._outages_in_row)
        try:
            self._take_in_dead()
        except CutOff as error:
            self._give_back([], error)
            return Round()
        self._keep()
        done = self._finish_ahead() if len(self._aside) else Round()
        if due := self._aside.take_due(self.settings.batch_size_max):
            self._see_through(due, has_patience=False)
            self._aside.end_try()
            metrics.ASIDE.set(len(self._aside))
        count_max = 1 if self._outages_in_row else self.settings.batch_size_max
        try:
            fetched = self.deliveries.fetch(count_max, wait_s=0 if self._ahead else min(wait_s, self._aside.due_in_s))
        except ServiceUnavailable:
            self._finish_ahead()  # its results are waited for, whatever the broker does
            raise
        if self._may_run_ahead(fetched):
            before, self._ahead = self._ahead, self._handler.begin(fetched)
            return done if before is None else done + self._see_through(before.fetched, before)
        done += self._finish_ahead()
        return done + self._see_through(fetched) if fetched else done

    def _may_run_ahead(self, fetched: Sequence[Delivery]) -> bool:
        """Whether the lanes settle this batch while other work goes on: it is full, and all is in order."""
        return (
            len(fetched) == self.settings.batch_size_max
            and self._handler.are_split(len(fetched))
            and not len(self._aside)
            and not any(it.count > self.settings.deliveries_max for it in fetched)
        )

    def _finish_ahead(self) -> Round:
        """See the batch through that has begun, if any."""
        begun, self._ahead = self._ahead, None
        return Round() if begun is None else self._see_through(begun.fetched, begun)

    def _see_through(
        self, fetched: Sequence[Delivery], begun: Begun | None = None, *, has_patience: bool = True
    ) -> Round:
        """Settle what was fetched, put the results, ack. When an outage lasts, give back what is in hand.

        What has `begun` is not settled again, except after an outage.
        """
        try:
            with self._watch.batch(fetched, time.perf_counter() if begun is None else begun.began_at):
                done = self._see_some_through(fetched, begun, has_patience=has_patience)
        except CutOff as error:
            self._give_back(fetched, error)
            return Round()
        self._outages_in_row = 0
        return done

    def _see_some_through(self, fetched: Sequence[Delivery], begun: Begun | None, *, has_patience: bool) -> Round:
        suspects = [delivery for delivery in fetched if delivery.count > self.settings.deliveries_max]
        regular = [delivery for delivery in fetched if delivery.count <= self.settings.deliveries_max]
        later = [it for suspect in suspects for it in self._handle_suspect(suspect)]

        def handle() -> tuple[Round, list[Later]]:
            nonlocal begun
            taken, begun = begun, None
            return self._handler.finish(taken or self._handler.begin(regular, has_patience=has_patience))

        done, others = self._outages.persist(handle)
        later += others
        left = {it.delivery.tag for it in later}
        self.deliveries.ack([delivery for delivery in fetched if delivery.tag not in left])
        self._set_aside(later)
        return done

    def _set_aside(self, later: Sequence[Later]) -> None:
        """Keep these in hand. When there is no room, they go to the end of the queue."""
        if new := [it.held for it in later if not self._aside.is_held(it.held)]:
            names = (f"account {it}" if isinstance(it, int) else f"request {it}" for it in new[:HELD_SHOWN_MAX])
            shown = ", ".join(dict.fromkeys(names))
            log.warning("%d draws wait, the others go on: another transaction holds %s", len(later), shown)
        too_many = [it.delivery for it in later if not self._aside.add(it.held, it.delivery)]
        too_many = [it for it in too_many if it.whole is None]  # a body that was cut cannot be queued again
        metrics.ASIDE.set(len(self._aside))
        if too_many:
            self.deliveries.requeue(too_many)
            self._stopping.wait(REQUEUE_PAUSE_S)

    def _keep(self) -> None:
        """Renew the claim on what is set aside, if it is time: against other workers, and against the relay."""
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
        """Give back all that is in hand. The next fetches wait for the database, then take one message at a time."""
        log.warning("%s; what this worker holds is given back until the database answers", error)
        if self._outages_in_row:
            # Fetched only to try the database with: this delivery must not count against the message.
            regular = [it for it in fetched if it.count <= self.settings.deliveries_max and it.whole is None]
            with suppress(ServiceUnavailable):
                self.deliveries.requeue(regular)
        self._let_go()
        self._outages_in_row += 1

    def _let_go(self) -> None:
        """Give back all that is in hand. What the lanes settle meanwhile is found settled when it is delivered."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.under_way.wait()
        self._aside.clear()
        self.deliveries.release()

    def _handle_suspect(self, delivery: Delivery) -> list[Later]:
        """Handle alone a message that was delivered too often: perhaps it kills the workers.

        The message is parked before it is tried. If it kills this worker, too, the next worker finds its row and does
        not try it again; if nothing is wrong with it, the row is taken back. Returns the message if it is to be tried
        again later.
        """
        why = f"delivered {delivery.count} times and never settled"
        request = None
        try:
            request = self._handler.read(delivery)
        except NotSigned:  # found at once, and says nothing about the request that it names
            return self._outages.persist(lambda: self._handler.handle([delivery]))[1]
        except InvalidRequest:
            pass
        untried = Parking(delivery, Cause.TOO_MANY_DELIVERIES, why, request, is_tried=False)
        try:
            # This worker may have parked the message itself, before an outage: that does not count against it.
            is_under_trial = untried.sha256 in self._trying or self._outages.persist(
                lambda: parking.park(self.engine, [untried], worker=self._name)[0]
            )
        except Unparkable:
            return [Later(untried.sha256, delivery)]
        fields = about_message(untried)
        if not is_under_trial:
            log.error("a message was delivered %d times: it stays a dead letter", delivery.count, extra=fields)
            # Its request is given up only now.
            self._outages.persist(lambda: self._handler.park([untried._replace(is_tried=True)]))
            return []
        log.warning("a message was delivered %d times: handling it alone", delivery.count, extra=fields)
        self._trying.add(untried.sha256)
        try:
            done, later = self._outages.persist(lambda: self._handler.handle([delivery], has_patience=False))
        except (Stopping, CutOff):
            # The outage is to blame, not the message: with its row left in place it would not be tried again.
            with suppress(ServiceUnavailable, ConfigurationError):
                parking.unpark(self.engine, untried)
                self._trying.discard(untried.sha256)
            raise
        if done.parked == done.strangers:
            self._outages.persist(lambda: parking.unpark(self.engine, untried))
        self._trying.discard(untried.sha256)
        return later

    def _take_in_dead(self) -> None:
        """Park what the broker itself has given up on, if it is time: a net below our own dead letters."""
        if time.monotonic() < self._next_look_for_dead:
            return
        self._next_look_for_dead = time.monotonic() + LOOK_FOR_DEAD_EVERY_S
        persist, handler = self._outages.persist, self._handler
        while dead := self.deliveries.fetch_dead(DEAD_FETCHED_MAX):
            lost = {it.tag for it in persist(lambda dead=dead: left_to_relay(self.engine, dead))}  # type: ignore[misc]
            given_up = [handler.given_up_by_broker(it) for it in dead if it.tag not in lost]
            unparked = persist(lambda given_up=given_up: handler.park(given_up))  # type: ignore[misc]
            left = {it.delivery.tag for it in unparked}
            self.deliveries.ack_dead([delivery for delivery in dead if delivery.tag not in left])
