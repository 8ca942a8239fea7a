"""The entry of requests: each request is accepted in the database before anything else happens to it.

An Entry remembers a bounded number of accepted keys, so that a storm of repeats does not reach the database. The memory
only repeats the database's answers: a request's content, its caller and its outcome never change.

Keys and sessions belong to a caller. Where another caller holds a name of a request, the request is accepted under an
alias (producers.aliases).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from cachetools import LRUCache
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.aliases import accept_under_own_names, spellings
from tombola.producers.domain import keys
from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.draw import CAMPAIGNS
from tombola.producers.domain.errors import (
    DrawError,
    InternalError,
    InvalidKey,
    PullsNotSold,
    RequestBusy,
    TransactionOutdated,
)
from tombola.producers.forks import in_child
from tombola.producers.storage import clock, requests
from tombola.producers.storage.campaigns import Campaigns
from tombola.producers.storage.engines import SHORT_READ_TIMEOUT_S, open_engine
from tombola.producers.storage.faults import Fault, explain, fault_of, is_lock_timeout, is_outdated
from tombola.producers.storage.requests import Acceptance, Clash, RequestRecord, SessionState, Submission
from tombola.producers.storage.seeds import Epochs
from tombola.producers.storage.transactions import Transaction, conflict_pause_s, statement, transaction
from tombola.producers.telemetry.fields import about

log = logging.getLogger(__name__)

TRIES_MAX: Final = 5
REMEMBERED_MAX: Final = 20_000
ACCEPTED_FOR_S: Final = 5.0  # then the database is asked again: the request may have settled, unknown to Redis
BUSY_WAIT_S: Final = 3.0
BUSY_PAUSE_S_MAX: Final = 0.25
BISECT_S_MAX: Final = 0.5
# An error that takes longer is not from a stale connection of the pool: a second try would take as long again.
STALE_WITHIN_S: Final = 1.0
SNAPSHOT_ISOLATION_SINCE: Final = (11, 6, 2)  # MariaDB's innodb_snapshot_isolation is on by default

EntryAnswer = Acceptance | DrawError
Numbered = tuple[int, Submission]


class _Remembered(NamedTuple):
    """The answer to the request with that fingerprint; `since` is the moment of the answer, in monotonic time."""

    fingerprint: str
    request: Request
    record: RequestRecord
    since: float


class Entry:
    """Accepts requests. Safe to share between threads."""

    def __init__(self, engine: Engine, *, relay_after_s: float) -> None:
        self.engine = engine
        self.campaigns = Campaigns(engine)
        self.epochs = Epochs(engine)
        url = engine.url.render_as_string(hide_password=False)
        # SQLite inserts many rows one by one, and needs a transaction to make them atomic.
        self._lean = (
            None
            if engine.dialect.name == "sqlite"
            else open_engine(url, lock_wait_s=0, is_lean=True, read_timeout_s=SHORT_READ_TIMEOUT_S)
        )
        self._relay_after = timedelta(seconds=relay_after_s)
        self._remembered: LRUCache[tuple[str, str], _Remembered] = LRUCache(REMEMBERED_MAX)  # by caller and request key
        self._results: LRUCache[str, bytes] = LRUCache(REMEMBERED_MAX)  # by session: a first result never changes
        self._make_lock()
        in_child(self, Entry._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    def recall(self, submission: Submission) -> Acceptance | None:
        """The answer to a repeat of a request that this Entry accepted; None where only the database can answer."""
        with self._lock:
            it = self._remembered.get((submission.caller, submission.request.request_key))
        if it is None or not (it.record.is_settled or time.monotonic() < it.since + ACCEPTED_FOR_S):
            return None
        if it.fingerprint != submission.request.fingerprint():
            return Acceptance(submission.request, None)
        return Acceptance(it.request, it.record)

    def accept(self, submissions: Sequence[Submission]) -> list[Acceptance]:
        """Accept `submissions`; return their answers in order when they are durable.

        The calling code must publish the new requests once, now: the relay publishes them only later.
        Raises the first error among the answers of `accept_each`; the other requests may be accepted then.
        """
        answers = []
        for answer in self.accept_each(submissions):
            if isinstance(answer, DrawError):
                raise answer
            answers.append(answer)
        return answers

    def accept_each(self, submissions: Sequence[Submission], *, busy_wait_s: float = BUSY_WAIT_S) -> list[EntryAnswer]:
        """Accept `submissions` independently; return an answer or an error for each, in order. Never raises.

        UnknownCampaign, CampaignPaused, CampaignClosed, CampaignNotOpen, PullsNotSold, or InvalidKey for an alias that
        is not the caller's: nothing was written. RequestBusy: another
        transaction still holds the request after `busy_wait_s`. InternalError: the database refuses the request, or a
        bug in tombola does; the log has the error. ServiceUnavailable and ConfigurationError: the database cannot be
        used; a request whose commit was under way may be accepted all the same. Send it again with the same key.
        """
        bound = [self._bind(it) for it in submissions]
        answers = self._accept_free(submissions, bound)
        deadline, pause_s = time.monotonic() + busy_wait_s, 0.01
        while True:
            part = [
                (number, it)
                for number, it in enumerate(bound)
                if isinstance(answers[number], RequestBusy) and isinstance(it, Submission)
            ]
            if not part:
                break
            answers |= self._accept_some(part, bisect_until=time.monotonic() + BISECT_S_MAX)
            if time.monotonic() >= deadline:
                break
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(BUSY_PAUSE_S_MAX, 2 * pause_s)
        return self._answers_of(submissions, answers)

    def accept_free(self, submissions: Sequence[Submission]) -> list[EntryAnswer]:
        """`accept_each` without waiting: RequestBusy for requests that other transactions hold, or perhaps hold."""
        return self._answers_of(submissions, self._accept_free(submissions, [self._bind(it) for it in submissions]))

    def _answers_of(self, submissions: Sequence[Submission], answers: Mapping[int, EntryAnswer]) -> list[EntryAnswer]:
        in_order = [answers[number] for number in range(len(answers))]
        self._remember(submissions, in_order)
        return in_order

    def _accept_free(
        self, submissions: Sequence[Submission], bound: Sequence[Submission | DrawError]
    ) -> dict[int, EntryAnswer]:
        free = [(number, it) for number, it in enumerate(bound) if isinstance(it, Submission)]
        answers = self._accept_some(free) if free else {}
        refused = [(number, submissions[number], it) for number, it in enumerate(bound) if isinstance(it, DrawError)]
        return answers | self._recognise(refused) if refused else answers

    def _bind(self, submission: Submission) -> Submission | DrawError:
        """The submission with the version of its campaign, or why it cannot be accepted as a new request.

        Asks the database only for an operator's campaign, at most once a second.
        """
        request = submission.request
        for name in (request.request_key, request.lottery_session_id):
            if keys.is_reserved(name):
                return InvalidKey(f"{name} has the form of {keys.reserved_for(name)}, which cannot be chosen")
        if not isinstance(request, DrawRequest):
            return submission
        if request.campaign in CAMPAIGNS:
            if request.pulls is None:
                return submission
            return PullsNotSold(f"campaign {request.campaign} sells single draws, without `pulls`: nothing was written")
        try:
            odds_hash = self.campaigns.bind(request.campaign, request.pulls or 1, clock.now(self.engine))
        except DrawError as error:
            return error
        except SQLAlchemyError as error:
            return explain(error)
        return submission._replace(odds_hash=odds_hash)

    def _accept_some(self, part: Sequence[Numbered], *, bisect_until: float = 0.0) -> dict[int, EntryAnswer]:
        """Accept `part` in one transaction, without requests that others hold; find refused requests by halving.

        Until `bisect_until` (monotonic clock) halving also finds requests behind a lock that `_held` cannot see:
        a gap between two keys.
        """
        busy: dict[int, EntryAnswer] = {}
        unit: AbstractContextManager[Transaction]
        # Accepting writes with one INSERT, which needs no transaction. Where it fails, later tries use a transaction;
        # rows that were inserted after all are found as repeats then, and the relay publishes them.
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
            # On the lean engine, which waits for no lock; on the other engine to get a connection that was pinged.
            unit = transaction(self.engine if is_stale or self._lean is None else self._lean)
            time.sleep(conflict_pause_s(attempt - 1))
        raise AssertionError

    def _accept_together(
        self, unit: AbstractContextManager[Transaction], part: Sequence[Numbered]
    ) -> dict[int, EntryAnswer]:
        now = clock.now(self.engine)
        seed_epoch = self._seed_epoch(now)
        with unit as open_transaction:
            answers = accept_under_own_names(
                open_transaction,
                [it for _, it in part],
                now,
                publish_at=now + self._relay_after,
                is_published=True,
                seed_epoch=seed_epoch,
            )
        return {number: answer for (number, _), answer in zip(part, answers, strict=True)}

    def _seed_epoch(self, now: datetime) -> int | None:
        """The epoch that draws of `now` bind to; None where none is open: these draws bind when they settle."""
        epoch = self.epochs.at(now)
        return None if epoch is None else epoch.id

    def _accept_refused(
        self, part: Sequence[Numbered], error: Exception, bisect_until: float
    ) -> dict[int, EntryAnswer]:
        """The database or tombola's own code fails on a request in `part`: find it, and accept the others."""
        if len(part) > 1:
            return self._halved(part, bisect_until)
        ((_, it),) = part
        log.error("request %s cannot be accepted", it.request.request_key, exc_info=error, extra=about(it.request))
        return _all(part, InternalError())

    def _halved(self, part: Sequence[Numbered], bisect_until: float) -> dict[int, EntryAnswer]:
        middle = len(part) // 2
        first = self._accept_some(part[:middle], bisect_until=bisect_until)
        return first | self._accept_some(part[middle:], bisect_until=bisect_until)

    def _held(self, part: Sequence[Numbered]) -> set[str]:
        """The request keys in `part` that another open transaction holds; none where the database cannot answer."""
        draws = [it.request for _, it in part]
        try:
            with transaction(self.engine if self._lean is None else self._lean) as probe:
                return requests.busy(probe, [it.request_key for it in draws], [it.lottery_session_id for it in draws])
        except Exception as error:  # the next try fails as well, and reports the error
            log.warning("which requests are held is unknown: %s", explain(error))
            return set()

    def _recognise(self, refused: Sequence[tuple[int, Submission, DrawError]]) -> dict[int, EntryAnswer]:
        """Answer requests that cannot be accepted as new ones: a repeat gets its answer, any other request an error."""
        try:
            known = self._look_up({name for _, it, _ in refused for name in _names(it)})
        except DrawError as error:
            return _all([(number, it) for number, it, _ in refused], error)
        return {number: _as_known(it, known) or why_not for number, it, why_not in refused}

    def find_known(self, submission: Submission, *, connection: Connection | None = None) -> Acceptance | None:
        """The answer to a repeat, or to a key of another request, as the database has it; None for a new request.

        For a request that cannot be accepted as a new one. `connection` is a transaction of the application, which sees
        its own requests. Raises ServiceUnavailable or ConfigurationError when the database cannot be used; with
        `connection` the driver's errors.
        """
        names = _names(submission)
        known = (
            self._look_up(names)
            if connection is None
            else requests.look_up(Transaction.joining(connection), list(names), with_odds=True)
        )
        return _as_known(submission, known)

    def _look_up(self, request_keys: Set[str]) -> dict[str, RequestRecord]:
        """The rows of these requests. Raises ServiceUnavailable, ConfigurationError or InternalError."""
        try:
            with transaction(self.engine, read_only=True) as reading:
                return requests.look_up(reading, list(request_keys), with_odds=True)
        except Exception as error:
            raise explain(error) from error

    def close(self) -> None:
        """Close the connections, those of the engine among them."""
        if self._lean is not None:
            self._lean.dispose()
        self.engine.dispose()

    def accept_with(self, connection: Connection, submission: Submission, *, is_published: bool = False) -> Acceptance:
        """Accept one request inside a transaction of the application; once it commits, the relay publishes the request.

        With `is_published` the calling code publishes it once, after the commit. Raises the errors of `accept_each`
        before anything is written, and TransactionOutdated or the driver's errors, after which the application must
        roll its transaction back.
        """
        if not connection.in_transaction():
            connection.begin()  # otherwise the application's commit() would commit nothing
        now = clock.now(connection)
        joined = Transaction.joining(connection)
        bound = self._bind(submission)
        if isinstance(bound, DrawError):
            found = _as_known(submission, requests.look_up(joined, list(_names(submission))))
            if found is None:
                raise bound
            return found
        if _may_be_outdated(connection) and (known := self.find_known(bound)) is not None:
            # Found past the application's transaction, which the attempt to insert it would roll back. A request that
            # came by the broker alone becomes the caller's there, too.
            is_nobodys = known.record is not None and not known.record.caller
            return self.accept([submission])[0] if is_nobodys and submission.caller else known
        publish_at = now + self._relay_after if is_published else now
        # Not remembered: the request is accepted only when the application commits.
        try:
            (answer,) = accept_under_own_names(
                joined, [bound], now, publish_at=publish_at, is_published=is_published, seed_epoch=self._seed_epoch(now)
            )
        except Exception as error:
            if not is_outdated(error):
                raise
            raise TransactionOutdated from error
        return answer

    def state_of(self, lottery_session_id: str) -> SessionState | None:
        """The state of a session, from the database; None for an unknown session.

        Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
        """
        try:
            with self.engine.connect().execution_options(read_only=True) as connection:
                return requests.state_of_session(connection, lottery_session_id)
        except SQLAlchemyError as error:
            raise explain(error) from error

    def first_result(self, lottery_session_id: str) -> bytes | None:
        """The bytes of a session's first result, as remembered or from the database; None before it has settled.

        Raises as `state_of` does.
        """
        with self._lock:
            body = self._results.get(lottery_session_id)
        if body is None and (state := self.state_of(lottery_session_id)) is not None and state.result is not None:
            body = state.result
            with self._lock:
                self._results[lottery_session_id] = body
        return body

    def _remember(self, submissions: Sequence[Submission], answers: Sequence[EntryAnswer]) -> None:
        now = time.monotonic()
        with self._lock:
            for it, answer in zip(submissions, answers, strict=True):
                # Where only the row or only the submission has a caller, other content may be accepted under this key.
                if isinstance(answer, Acceptance) and (record := answer.record) and record.caller == it.caller:
                    # Only a settled record is final: a dead request may have been revived when it is recalled.
                    if record.status == Status.DEAD:
                        record = record._replace(status=Status.ACCEPTED, reason=None)
                    is_renamed = answer.request is not it.request
                    fingerprint = it.request.fingerprint() if is_renamed else record.fingerprint
                    remembered = _Remembered(fingerprint, answer.request, record, now)
                    self._remembered[it.caller, it.request.request_key] = remembered


def _may_be_outdated(connection: Connection) -> bool:
    """Whether the server rolls a transaction back for a row that its snapshot cannot see (faults.is_outdated)."""
    dialect: Any = connection.dialect
    return bool(getattr(dialect, "is_mariadb", False)) and dialect.server_version_info >= SNAPSHOT_ISOLATION_SINCE


def _all(part: Sequence[Numbered], error: DrawError) -> dict[int, EntryAnswer]:
    return {number: error for number, _ in part}


def _names(submission: Submission) -> Set[str]:
    """The request keys under which a row of this submission may stand."""
    return {name.named().request.request_key for name in spellings(submission)}


def _as_known(submission: Submission, known: Mapping[str, RequestRecord]) -> Acceptance | None:
    """The answer to a repeat or a conflict; None for a new request. `known` are the rows under its names."""
    is_used = False
    for name in spellings(submission):
        request = name.named().request
        found = known.get(request.request_key)
        clash = None if found is None else requests.clash_of(found, request.fingerprint(), submission.caller)
        if found is not None and clash is None:
            return Acceptance(request, found)
        is_used = is_used or clash is Clash.KEY_IS_MINE
    return Acceptance(submission.request, None) if is_used else None
