"""The way in: a request is accepted in the database before anything else happens to it.

What was accepted is remembered here, a bounded number of keys, so that a storm of repeats does not reach the database.
The memory only ever says what the database said before: a request's content, its caller and its outcome never change.

Keys and sessions are each caller's own. Where a name that a caller asks for is another caller's already, the request is
put on record under an alias (producers.domain.keys.alias), again and again the same one: nobody can keep another
caller from drawing by being quicker with a name.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import Final, NamedTuple

import msgspec
from cachetools import LRUCache
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain import keys
from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.draw import CAMPAIGNS
from tombola.producers.domain.errors import DrawError, InternalError, InvalidKey, RequestBusy, UnknownCampaign
from tombola.producers.forks import in_child
from tombola.producers.storage import clock, requests
from tombola.producers.storage.engines import SHORT_READ_TIMEOUT_S, open_engine
from tombola.producers.storage.faults import Fault, explain, fault_of, is_lock_timeout
from tombola.producers.storage.requests import Acceptance, Clash, RequestRecord, SessionState, Submission
from tombola.producers.storage.transactions import Transaction, conflict_pause_s, statement, transaction
from tombola.producers.telemetry.fields import about

log = logging.getLogger(__name__)

TRIES_MAX: Final = 5
REMEMBERED_MAX: Final = 20_000
ACCEPTED_FOR_S: Final = 5.0  # then the database is asked again: it may have settled, and Redis may not say so
BUSY_WAIT_S: Final = 3.0
BUSY_PAUSE_S_MAX: Final = 0.25
BISECT_S_MAX: Final = 0.5
# An outage that takes longer to tell was no stale connection of the pool: a second try would take as long again.
STALE_WITHIN_S: Final = 1.0
RENAMES_MAX: Final = 4  # the key, the session, and once more for each where two ask for one name at the same time

Answer = Acceptance | DrawError
Numbered = tuple[int, Submission]


class _Remembered(NamedTuple):
    """What was answered to the request of that fingerprint, and when (in monotonic time)."""

    fingerprint: str
    request: Request
    known: RequestRecord
    since: float


class _Name(NamedTuple):
    """A request, and for which of its names its caller gets an alias."""

    asked: Submission
    has_other_key: bool = False
    has_other_session: bool = False

    def named(self) -> Submission:
        """The request under the names that it gets."""
        request, caller = self.asked
        key, session = request.request_key, request.lottery_session_id
        is_one_name = key == session
        if self.has_other_key:
            key = keys.alias(caller, key)
        if self.has_other_session or (self.has_other_key and is_one_name):
            session = keys.alias(caller, session)
        return Submission(msgspec.structs.replace(request, request_key=key, lottery_session_id=session), caller)

    def after(self, clash: Clash) -> _Name | None:
        """What to ask for next, after a clash; None where the caller is to be told of it."""
        if clash is Clash.KEY_IS_ANOTHERS and not self.has_other_key:
            return _Name(self.asked, has_other_key=True)
        # Also where the key is the caller's own: the first time, the session may have been another caller's.
        is_final = clash is Clash.SESSION_IS_MINE or self.has_other_session
        return None if is_final else self._replace(has_other_session=True)


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
        self._remembered: LRUCache[tuple[str, str], _Remembered] = LRUCache(REMEMBERED_MAX)  # by caller and request key
        self._make_lock()
        in_child(self, Entry._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    def recall(self, asked: Submission) -> Acceptance | None:
        """The answer to a repeat that was accepted through here; None for what only the database can tell."""
        with self._lock:
            it = self._remembered.get((asked.caller, asked.request.request_key))
        if it is None or not (it.known.is_settled or time.monotonic() < it.since + ACCEPTED_FOR_S):
            return None
        if it.fingerprint != asked.request.fingerprint():
            return Acceptance(asked.request, None)
        return Acceptance(it.request, it.known)

    def accept(self, asked: Sequence[Submission]) -> list[Acceptance]:
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

    def accept_each(self, asked: Sequence[Submission], *, busy_wait_s: float = BUSY_WAIT_S) -> list[Answer]:
        """Accept `asked`, each for itself; what keeps one from being accepted stands in its place. Never raises.

        UnknownCampaign, or InvalidKey for an alias that is not the caller's: nothing was written. RequestBusy: after
        `busy_wait_s` another transaction still held it. InternalError: the database refuses it, or a mistake of ours
        does; the log says why. ServiceUnavailable and ConfigurationError: the database cannot be used; nothing is
        promised, though an accept whose commit was under way may turn out to have happened. Ask again with the same
        key.
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
        return self._told(asked, answers)

    def accept_free(self, asked: Sequence[Submission]) -> list[Answer]:
        """As `accept_each`, but RequestBusy is told at once: of what others hold, and of what may stand beside it."""
        return self._told(asked, self._accept_free(asked))

    def _told(self, asked: Sequence[Submission], answers: Mapping[int, Answer]) -> list[Answer]:
        told = [answers[number] for number in range(len(answers))]
        self._remember(asked, told)
        return told

    def _accept_free(self, asked: Sequence[Submission]) -> dict[int, Answer]:
        part = list(enumerate(asked))
        strangers = [it for it in part if self._why_not(it[1]) is not None]
        if not strangers:
            return self._accept_some(part) if part else {}
        numbers = {number for number, _ in strangers}
        free = [it for it in part if it[0] not in numbers]
        return self._recognise(strangers) | (self._accept_some(free) if free else {})

    def _why_not(self, asked: Submission) -> DrawError | None:
        """Why this cannot be accepted anew, whatever is on record; None if it can."""
        request = asked.request
        if isinstance(request, DrawRequest) and request.campaign not in self._campaigns:
            return UnknownCampaign(f"there is no campaign {request.campaign!r}: nothing was written")
        for name in (request.request_key, request.lottery_session_id):
            if keys.is_alias(name):
                return InvalidKey(f"{name} is of the form of an alias, which is given and cannot be chosen")
        return None

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
            time.sleep(conflict_pause_s(attempt - 1))
        raise AssertionError

    def _accept_together(
        self, unit: AbstractContextManager[Transaction], part: Sequence[Numbered]
    ) -> dict[int, Answer]:
        now = clock.now(self.engine)
        with unit as open_transaction:
            answers = _accept_under_own_names(
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
        """What is on record of requests that cannot be accepted anew (any more, or yet): a repeat of one is told."""
        names = [name for _, it in strangers for name in _spellings(it)]
        try:
            with transaction(self.engine, read_only=True) as reading:
                known = requests.look_up(reading, list({name.named().request.request_key for name in names}))
        except Exception as error:
            return _all(strangers, explain(error))
        return {number: self._as_known(it, known) for number, it in strangers}

    def _as_known(self, asked: Submission, known: Mapping[str, RequestRecord]) -> Answer:
        """The answer to a request that cannot be accepted anew, from what is on record of it."""
        is_used = False
        for name in _spellings(asked):
            request = name.named().request
            found = known.get(request.request_key)
            clash = None if found is None else requests.clash_of(found, request.fingerprint(), asked.caller)
            if found is not None and clash is None:
                return Acceptance(request, found)
            is_used = is_used or clash is Clash.KEY_IS_MINE
        why_not = self._why_not(asked)
        return Acceptance(asked.request, None) if is_used or why_not is None else why_not

    def close(self) -> None:
        """Let go of the connections, the engine's as well."""
        if self._lean is not None:
            self._lean.dispose()
        self.engine.dispose()

    def accept_with(self, connection: Connection, asked: Submission) -> Acceptance:
        """Accept one request inside the caller's transaction: it happens if that commits, and the relay publishes it.

        Raises UnknownCampaign before anything is written, and the driver's errors, after which the caller's
        transaction is to be rolled back.
        """
        if not connection.in_transaction():
            connection.begin()  # or its commit() would find nothing to commit
        now = clock.now(connection)
        joined = Transaction(connection.connection.driver_connection, is_sqlite=connection.dialect.name == "sqlite")
        if self._why_not(asked) is not None:
            found = requests.look_up(joined, [it.named().request.request_key for it in _spellings(asked)])
            if isinstance(told := self._as_known(asked, found), DrawError):
                raise told
            return told
        # Not remembered: it is accepted only when the caller commits.
        (answer,) = _accept_under_own_names(joined, [asked], now, publish_at=now, is_published=False)
        return answer

    def state_of(self, lottery_session_id: str) -> SessionState | None:
        """How a session stands, from the database; None for one that nobody has asked for.

        Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
        """
        try:
            with self.engine.connect().execution_options(read_only=True) as connection:
                return requests.state_of_session(connection, lottery_session_id)
        except SQLAlchemyError as error:
            raise explain(error) from error

    def _remember(self, asked: Sequence[Submission], answers: Sequence[Answer]) -> None:
        now = time.monotonic()
        with self._lock:
            for it, answer in zip(asked, answers, strict=True):
                # Where one of both has no name, the key is the other one's for all other content: not known here.
                if isinstance(answer, Acceptance) and (known := answer.record) and known.caller == it.caller:
                    # What has settled stays as it is; all else may have become something else by then.
                    if not known.is_settled:
                        known = RequestRecord(known.fingerprint, known.caller, Status.ACCEPTED)
                    is_renamed = answer.request is not it.request
                    fingerprint = it.request.fingerprint() if is_renamed else known.fingerprint
                    remembered = _Remembered(fingerprint, answer.request, known, now)
                    self._remembered[it.caller, it.request.request_key] = remembered


def _accept_under_own_names(
    transaction: Transaction, asked: Sequence[Submission], now: datetime, *, publish_at: datetime, is_published: bool
) -> list[Acceptance]:
    """`requests.accept`, with an alias for every name that another caller holds."""

    def accept(some: Sequence[Submission]) -> list[Acceptance]:
        return requests.accept(transaction, some, now, publish_at=publish_at, is_published=is_published)

    answers = accept(asked)
    names: dict[int, _Name] = {}
    for _ in range(RENAMES_MAX):
        again = {
            number: name
            for number, (it, answer) in enumerate(zip(asked, answers, strict=True))
            if answer.clash is not None and (name := names.get(number, _Name(it)).after(answer.clash)) is not None
        }
        if not again:
            break
        names |= again
        for number, answer in zip(again, accept([name.named() for name in again.values()]), strict=True):
            answers[number] = answer
    return [
        Acceptance(it.request, None) if answer.is_conflict else answer
        for it, answer in zip(asked, answers, strict=True)
    ]


def _spellings(asked: Submission) -> list[_Name]:
    """Every form in which this request may be on record."""
    return [
        _Name(asked, has_other_key, has_other_session)
        for has_other_key in (False, True)
        for has_other_session in (False, True)
    ]


def _all(part: Sequence[Numbered], error: DrawError) -> dict[int, Answer]:
    return {number: error for number, _ in part}
