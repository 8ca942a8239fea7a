"""The way in: a request is accepted in the database before anything else happens to it.

What was accepted is remembered here, a bounded number of keys, so that a storm of repeats does not reach the database.
The memory only ever says what the database said before: a request's content, its caller and its outcome never change.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Final

from cachetools import LRUCache
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from producers import clock, requests
from producers.database import (
    SHORT_READ_TIMEOUT_S,
    Fault,
    Transaction,
    explain,
    fault_of,
    is_lock_timeout,
    open_engine,
    statement,
    transaction,
)
from producers.draw import CAMPAIGNS
from producers.errors import DrawError, InternalError, RequestBusy, UnknownCampaign
from producers.forks import in_child
from producers.logs import about
from producers.requests import Acceptance, Asked, Known, State

log = logging.getLogger(__name__)

TRIES_MAX: Final = 5
REMEMBERED_MAX: Final = 20_000
ACCEPTED_FOR_S: Final = 5.0  # then the database is asked again: it may have settled, and Redis may not say so
BUSY_WAIT_S: Final = 3.0
BUSY_PAUSE_S_MAX: Final = 0.25
BISECT_S_MAX: Final = 0.5
# An outage that takes longer to tell was no stale connection of the pool: a second try would take as long again.
STALE_WITHIN_S: Final = 1.0

Answer = Acceptance | DrawError
Numbered = tuple[int, Asked]


class Entry:
    """Accepts requests. Safe to share between threads. `campaigns` are the names that draws can be made by."""

    def __init__(self, engine: Engine, *, relay_after_s: float, campaigns: Container[str] = CAMPAIGNS) -> None:
        self.engine = engine
        url = engine.url.render_as_string(hide_password=False)
        # SQLite inserts many rows one by one: there it takes a transaction to make them one.
        self._lean = (
            None
            if engine.dialect.name == "sqlite"
            else open_engine(url, lock_wait_s=0, is_lean=True, read_timeout_s=SHORT_READ_TIMEOUT_S)
        )
        self._campaigns = campaigns
        self._relay_after = timedelta(seconds=relay_after_s)
        self._remembered: LRUCache[str, tuple[Known, float]] = LRUCache(REMEMBERED_MAX)  # by request key, with the time
        self._make_lock()
        in_child(self, Entry._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    def recall(self, asked: Asked) -> Acceptance | None:
        """The answer to a repeat that was accepted through here; None for what only the database can tell."""
        with self._lock:
            known, since = self._remembered.get(asked.request.request_key, (None, 0.0))
        if known is None or not (known.is_settled or time.monotonic() < since + ACCEPTED_FOR_S):
            return None
        is_mine = (known.fingerprint, known.caller) == (asked.request.fingerprint(), asked.caller)
        return Acceptance(asked.request, known if is_mine else None)

    def accept(self, asked: Sequence[Asked]) -> list[Acceptance]:
        """Accept `asked`; return when that is durable, with an answer for each in their order.

        The new ones are to be published once, now: the relay looks after them only later.
        Raises the first error that `accept_each` tells of one of them; the others may be accepted then.
        """
        answers = []
        for answer in self.accept_each(asked):
            if isinstance(answer, DrawError):
                raise answer
            answers.append(answer)
        return answers

    def accept_each(self, asked: Sequence[Asked], *, busy_wait_s: float = BUSY_WAIT_S) -> list[Answer]:
        """Accept `asked`, each for itself; what keeps one from being accepted stands in its place. Never raises.

        UnknownCampaign: nothing was written. RequestBusy: after `busy_wait_s` another transaction still held it.
        InternalError: the database refuses it, or a mistake of ours does; the log says why. ServiceUnavailable and
        ConfigurationError: the database cannot be used; nothing is promised, though an accept whose commit was under
        way may turn out to have happened. Ask again with the same key.
        """
        answers = self._accept_free(asked)
        deadline, pause_s = time.monotonic() + busy_wait_s, 0.01
        while True:
            part = [(number, asked[number]) for number, it in answers.items() if isinstance(it, RequestBusy)]
            if not part:
                break
            answers |= self._accept_some(part, bisect_until=time.monotonic() + BISECT_S_MAX)
            if time.monotonic() >= deadline:
                break
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(BUSY_PAUSE_S_MAX, 2 * pause_s)
        return self._told(answers)

    def accept_free(self, asked: Sequence[Asked]) -> list[Answer]:
        """As `accept_each`, but RequestBusy is told at once: of what others hold, and of what may stand beside it."""
        return self._told(self._accept_free(asked))

    def _told(self, answers: Mapping[int, Answer]) -> list[Answer]:
        told = [answers[number] for number in range(len(answers))]
        self._remember(told)
        return told

    def _accept_free(self, asked: Sequence[Asked]) -> dict[int, Answer]:
        part = list(enumerate(asked))
        strangers = [it for it in part if it[1].request.campaign not in self._campaigns]
        if not strangers:
            return self._accept_some(part) if part else {}
        free = [it for it in part if it[1].request.campaign in self._campaigns]
        return self._recognise(strangers) | (self._accept_some(free) if free else {})

    def _accept_some(self, part: Sequence[Numbered], *, bisect_until: float = 0.0) -> dict[int, Answer]:
        """Accept these together, without those that others hold; what is refused is found by halving.

        Until `bisect_until` (of the monotonic clock) also what no probe finds to be held: a gap between two keys.
        """
        busy: dict[int, Answer] = {}
        unit: AbstractContextManager[Transaction]
        # All that is written is one INSERT: it needs no transaction around it. Where that fails, the rest of the tries
        # find out with one; what had been inserted after all is known then, and left to the relay.
        unit = transaction(self.engine) if self._lean is None else statement(self._lean)
        for attempt in range(1, TRIES_MAX + 1):
            began = time.monotonic()
            try:
                return busy | self._accept_together(unit, part)
            except DrawError as error:
                return busy | _all(part, error)
            except Exception as error:
                fault = fault_of(error)
                if is_lock_timeout(error):
                    held = self._held(part)
                    busy |= _all([it for it in part if it[1].request.request_key in held], RequestBusy())
                    part = [it for it in part if it[0] not in busy]
                    if not held and len(part) > 1 and time.monotonic() < bisect_until:
                        return self._halved(part, bisect_until)
                    if not (held and part) or attempt == TRIES_MAX:
                        return busy | _all(part, RequestBusy())
                elif fault is Fault.REFUSED:
                    return busy | self._accept_refused(part, error, bisect_until)
                is_stale = (
                    fault is Fault.OUTAGE
                    and attempt == 1
                    and self._lean is not None
                    and time.monotonic() < began + STALE_WITHIN_S
                )
                if not (fault is Fault.CONFLICT or is_stale) or attempt == TRIES_MAX:
                    return busy | _all(part, explain(error))
            # Of the lean engine, which waits for no lock; of the other one, whose pool looks for a live connection.
            unit = transaction(self.engine if is_stale or self._lean is None else self._lean)
            time.sleep(random.uniform(0, 0.01 * 2 ** (attempt - 1)))
        raise AssertionError

    def _accept_together(
        self, unit: AbstractContextManager[Transaction], part: Sequence[Numbered]
    ) -> dict[int, Answer]:
        now = clock.now(self.engine)
        with unit as open_transaction:
            answers = requests.accept(
                open_transaction, [it for _, it in part], now, publish_at=now + self._relay_after, is_published=True
            )
        return {number: answer for (number, _), answer in zip(part, answers, strict=True)}

    def _accept_refused(self, part: Sequence[Numbered], error: Exception, bisect_until: float) -> dict[int, Answer]:
        """The database refuses something in here, or our own code does: find out what, and accept the others."""
        if len(part) > 1:
            return self._halved(part, bisect_until)
        ((_, it),) = part
        log.error("request %s cannot be accepted", it.request.request_key, exc_info=error, extra=about(it.request))
        return _all(part, InternalError())

    def _halved(self, part: Sequence[Numbered], bisect_until: float) -> dict[int, Answer]:
        middle = len(part) // 2
        first = self._accept_some(part[:middle], bisect_until=bisect_until)
        return first | self._accept_some(part[middle:], bisect_until=bisect_until)

    def _held(self, part: Sequence[Numbered]) -> set[str]:
        """The request keys in `part` that another open transaction holds; none where that cannot be found out."""
        draws = [it.request for _, it in part]
        try:
            with transaction(self.engine if self._lean is None else self._lean) as probe:
                return requests.busy(probe, [it.request_key for it in draws], [it.lottery_session_id for it in draws])
        except Exception as error:  # the next try meets it again, and tells
            log.warning("it is not known which requests are held: %s", explain(error))
            return set()

    def _recognise(self, strangers: Sequence[Numbered]) -> dict[int, Answer]:
        """What is on record of requests whose campaign is not known here, any more or yet: a repeat of one is told."""
        try:
            with transaction(self.engine, read_only=True) as reading:
                known = requests.look_up(reading, [it.request.request_key for _, it in strangers])
        except Exception as error:
            return _all(strangers, explain(error))
        return {number: _as_known(it, known.get(it.request.request_key)) for number, it in strangers}

    def close(self) -> None:
        """Let go of the connections, the engine's as well."""
        if self._lean is not None:
            self._lean.dispose()
        self.engine.dispose()

    def accept_with(self, connection: Connection, asked: Asked) -> Acceptance:
        """Accept one request inside the caller's transaction: it happens if that commits, and the relay publishes it.

        Raises UnknownCampaign before anything is written, and the driver's errors, after which the caller's
        transaction is to be rolled back.
        """
        if not connection.in_transaction():
            connection.begin()  # or its commit() would find nothing to commit
        now = clock.now(connection)
        joined = Transaction(connection.connection.driver_connection, is_sqlite=connection.dialect.name == "sqlite")
        if asked.request.campaign not in self._campaigns:
            known = requests.look_up(joined, [asked.request.request_key])
            if isinstance(told := _as_known(asked, known.get(asked.request.request_key)), DrawError):
                raise told
            return told
        # Not remembered: it is accepted only when the caller commits.
        (answer,) = requests.accept(joined, [asked], now, publish_at=now, is_published=False)
        return answer

    def state_of(self, lottery_session_id: str) -> State | None:
        """How a session stands, from the database; None for one that nobody has asked for.

        Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
        """
        try:
            with self.engine.connect().execution_options(read_only=True) as connection:
                return requests.state_of_session(connection, lottery_session_id)
        except SQLAlchemyError as error:
            raise explain(error) from error

    def _remember(self, answers: Sequence[Answer]) -> None:
        now = time.monotonic()
        with self._lock:
            for answer in answers:
                if isinstance(answer, Acceptance) and (known := answer.known) is not None:
                    # What has settled stays as it is; all else may have become something else by then.
                    if not known.is_settled:
                        known = Known(known.fingerprint, known.caller, requests.ACCEPTED)
                    self._remembered[answer.request.request_key] = (known, now)


def _all(part: Sequence[Numbered], error: DrawError) -> dict[int, Answer]:
    return {number: error for number, _ in part}


def _as_known(asked: Asked, known: Known | None) -> Answer:
    """The answer to a request whose campaign is unknown here, from what is on record under its key."""
    if known is None:
        return UnknownCampaign(f"there is no campaign {asked.request.campaign!r}: nothing was written")
    is_mine = (known.fingerprint, known.caller) == (asked.request.fingerprint(), asked.caller)
    return Acceptance(asked.request, known if is_mine else None)
