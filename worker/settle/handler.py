"""What becomes of fetched messages: draws are settled and their results put, the other messages are parked."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import astuple, dataclass
from typing import NamedTuple

from sqlalchemy import Engine

from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import InvalidRequest, NotSigned, UnknownVersion, Unparsable
from tombola.producers.domain.signatures import SIGNATURE, Keyring
from tombola.producers.results import StoredResult
from tombola.worker.dead_letters import parking
from tombola.worker.dead_letters.message import Parking
from tombola.worker.dead_letters.parking import Unparkable
from tombola.worker.deliveries import Delivery
from tombola.worker.deliveries.losses import REASON_HEADER
from tombola.worker.settle.answers import Answer, Deferred, Refused, Repeat, Settled
from tombola.worker.settle.aside import Aside, Held
from tombola.worker.settle.batch import Handling
from tombola.worker.settle.lanes import Lanes, UnderWay
from tombola.worker.settle.putting import Putting, announce_dead
from tombola.worker.settle.watch import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Round:
    """What one round of the consumer did, in messages."""

    settled: int = 0
    repeats: int = 0
    parked: int = 0
    deferred: int = 0
    strangers: int = 0  # parked messages that are neither signed nor accepted

    def __add__(self, other: Round) -> Round:
        return Round(*map(operator.add, astuple(self), astuple(other)))


class Later(NamedTuple):
    """A delivery to try again later, and what the delivery waits for."""

    held: Held
    delivery: Delivery


class Begun(NamedTuple):
    """Fetched messages that are being handled: the draws among them are being settled, in lanes."""

    fetched: Sequence[Delivery]
    parsed: Sequence[tuple[Delivery, Request]]
    unreadable: list[Parking]
    later: list[Later]
    committing: Future[list[Parking]] | None
    under_way: UnderWay
    began_at: float


class Handler:
    """Settles, answers and parks; acks nothing. `name` is the worker's, for the record."""

    def __init__(
        self, engine: Engine, lanes: Lanes, results: Putting, keyring: Keyring, aside: Aside, watch: Watch, name: str
    ) -> None:
        self._engine = engine
        self._lanes = lanes
        self._results = results
        self._keyring = keyring
        self._aside = aside
        self._watch = watch
        self._name = name
        self._parker = ThreadPoolExecutor(1, thread_name_prefix="parking")

    def read(self, delivery: Delivery) -> Request:
        """The draw that a message asks for. Raises InvalidRequest; NotSigned if the signature is missing or wrong."""
        request = delivery.request()
        if self._keyring.secrets:
            self._keyring.check(request, delivery.headers.get(SIGNATURE))
        return request

    def are_split(self, draws: int) -> bool:
        """As Lanes.are_split."""
        return self._lanes.are_split(draws)

    def begin(self, fetched: Sequence[Delivery], *, has_patience: bool = True) -> Begun:
        """Begin to settle the draws among `fetched`, and to park the other messages; `finish` sees to the rest.

        With `has_patience`, draws of accounts that others wait for already are not tried. Never raises.
        """
        began_at = time.perf_counter()
        parsed, unreadable, later = self._sort(fetched, has_patience=has_patience)
        # Messages that are no draws are parked while the draws settle, so that garbage does not make them wait.
        committing = self._parker.submit(self._commit, unreadable) if unreadable else None
        redelivered = {draw.request_key: delivery.count for delivery, draw in parsed if delivery.count > 1}
        under_way = self._lanes.begin(
            [draw for _, draw in parsed], Handling(self._name, redelivered), has_patience=has_patience
        )
        return Begun(fetched, parsed, unreadable, later, committing, under_way, began_at)

    def handle(self, fetched: Sequence[Delivery], *, has_patience: bool = True) -> tuple[Round, list[Later]]:
        """`begin`, and `finish` at once."""
        return self.finish(self.begin(fetched, has_patience=has_patience))

    def finish(self, begun: Begun) -> tuple[Round, list[Later]]:
        """Wait until the draws are settled, and put their results.

        Returns what was done, and the deliveries to try again later; all others can be acked. Raises ServiceUnavailable
        or ConfigurationError when the database cannot be used; it is safe to begin again.
        """
        _, parsed, unreadable, later, committing, under_way, began_at = begun
        try:
            answers = under_way.answers()
        finally:
            if committing is not None:
                wait([committing])
        parkings: list[Parking] = []
        settled: list[Settled | Repeat] = []
        for (delivery, _), answer in zip(parsed, self._with_lacking(answers), strict=True):
            match answer:
                case Settled() | Repeat():
                    settled.append(answer)
                case Refused():
                    is_echo = answer.cause == Cause.NEVER_SETTLED
                    parkings.append(
                        Parking(delivery, answer.cause, answer.error, answer.request, answer.exception, is_echo=is_echo)
                    )
                case Deferred():
                    request = answer.request
                    later.append(Later(request.account_id if answer.is_account_held else request.request_key, delivery))
        read = [it for it in settled if isinstance(it, Settled)]
        self._results.put([StoredResult(it.request.lottery_session_id, it.result, it.settled_at) for it in read])
        unparked = self.park(parkings)
        if committing is not None:
            unparked += self._announce(unreadable, committing.result())
            parkings += unreadable
        later += [Later(it.sha256, it.delivery) for it in unparked]
        self._watch.count(settled, len(later), since=began_at)
        repeats = sum(it.is_repeat for it in settled)
        if repeats:
            log.info("%d of %d draws were repeats, answered with their first result", repeats, len(settled))
        strangers = sum(it.is_strangers for it in parkings)
        return Round(len(settled), repeats, len(parkings) - len(unparked), len(later), strangers), later

    def _with_lacking(self, answers: Sequence[Answer | Repeat]) -> Sequence[Answer | Repeat]:
        """`answers` with the results that the result store lacks; the other repeats stay as they are."""
        sessions = [it.request.lottery_session_id for it in answers if isinstance(it, Repeat)]
        lacking = set(self._results.renew(sessions)) if sessions else ()
        if not lacking:
            return answers
        positions = [i for i, it in enumerate(answers) if it.request.lottery_session_id in lacking]
        told = self._lanes.tell([answers[i] for i in positions])
        merged = list(answers)
        for i, answer in zip(positions, told, strict=True):
            merged[i] = answer
        return merged

    def _sort(
        self, fetched: Sequence[Delivery], *, has_patience: bool
    ) -> tuple[list[tuple[Delivery, Request]], list[Parking], list[Later]]:
        """The draws to settle, the messages that are no draws, and the draws that wait behind others."""
        parsed: list[tuple[Delivery, Request]] = []
        unreadable: list[Parking] = []
        later: list[Later] = []
        for delivery in fetched:
            try:
                request = self.read(delivery)
            except InvalidRequest as error:
                unreadable.append(Parking(delivery, _cause_of(error), str(error), exception=error))
                continue
            if has_patience and self._aside.is_held(request.account_id):
                later.append(Later(request.account_id, delivery))
            else:
                parsed.append((delivery, request))
        return parsed, unreadable, later

    def park(self, parkings: Sequence[Parking]) -> list[Parking]:
        """Park messages in the database; return those that the database refuses, which must stay unacked."""
        return self._announce(parkings, self._commit(parkings)) if parkings else []

    def _commit(self, parkings: Sequence[Parking]) -> list[Parking]:
        """Commit the rows of dead letters; return the messages that the database refuses."""
        try:
            parking.park(self._engine, parkings, worker=self._name)
        except Unparkable as error:
            return error.parkings
        return []

    def _announce(self, parkings: Sequence[Parking], unparked: list[Parking]) -> list[Parking]:
        """Log, count and announce what is parked; return what is not."""
        announce_dead(self._engine, self._results, parkings)
        refused = {it.delivery.tag for it in unparked}
        for it in parkings:
            if it.delivery.tag in refused:
                continue
            self._watch.count_parked(it.cause)
            fields = {"cause": it.cause, **about_message(it)}
            log.error("parked a dead letter (%s): %s", it.cause, it.error, extra=fields)
        return unparked

    def given_up_by_broker(self, delivery: Delivery) -> Parking:
        """The parking of a message from RabbitMQ's own dead-letter queue.

        A message without a reason in its headers is there for its delivery limit.
        """
        request = None
        try:
            request = self.read(delivery)
        except NotSigned as error:
            return Parking(delivery, Cause.NOT_SIGNED, str(error), exception=error)
        except InvalidRequest:
            pass
        header = delivery.headers.get(REASON_HEADER)
        reason = header if isinstance(header, str) else "delivery_limit"
        return Parking(delivery, Cause.TOO_MANY_DELIVERIES, f"RabbitMQ gave it up: {reason}", request)


def about_message(it: Parking) -> dict[str, str]:
    """The fields of a log line that name the message's draw, as far as the message names them."""
    key, session, _ = it.claims
    fields = {"request_key": key, "lottery_session_id": session or key}
    return {name: text for name, text in fields.items() if text is not None}


def _cause_of(error: InvalidRequest) -> str:
    if isinstance(error, UnknownVersion):
        return Cause.UNKNOWN_VERSION
    if isinstance(error, NotSigned):
        return Cause.NOT_SIGNED
    return Cause.UNPARSABLE if isinstance(error, Unparsable) else Cause.INVALID
