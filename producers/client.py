"""DrawClient: what a web frontend holds. Enqueue a draw, wait for its result."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from types import TracebackType
from typing import Final, NamedTuple, Self

from sqlalchemy import Connection

from tombola.producers.brokers.registry import Broker, broker_of
from tombola.producers.domain.contract import (
    DUPLICATE_REQUEST_IDEMPOTENT,
    DrawRequest,
    DrawResult,
    Request,
    parse_result,
)
from tombola.producers.domain.errors import (
    DrawError,
    IdempotencyKeyReused,
    InternalError,
    InvalidKey,
    PublishFailed,
    RequestBusy,
    UnknownCampaign,
)
from tombola.producers.domain.keys import check_caller
from tombola.producers.entry import Entry
from tombola.producers.results import LOOK_TIMEOUT_S, ResultStore
from tombola.producers.settings import Settings
from tombola.producers.storage.chunks import IN_LIST_MAX
from tombola.producers.storage.engines import SHORT_READ_TIMEOUT_S, open_engine
from tombola.producers.storage.requests import Acceptance, Submission
from tombola.producers.telemetry import tracing

log = logging.getLogger(__name__)

PUBLISH_SIZE_MAX = IN_LIST_MAX
REFUSED_SHOWN_MAX = 10
# What keeps a draw from being accepted, and not those beside it.
NAMED: Final[dict[type[DrawError], str]] = {
    InternalError: "a mistake of ours (see the log) met the requests",
    UnknownCampaign: "there are no such campaigns as these requests name",
    IdempotencyKeyReused: "keys that belong to other requests",
    InvalidKey: "aliases that are not this caller's",
    RequestBusy: "requests that other transactions hold",
}


class Ticket(NamedTuple):
    """The receipt of a draw: keep it, it finds the result. `result` is there when the request is a known repeat."""

    request_key: str
    lottery_session_id: str
    result: DrawResult | None = None

    @property
    def reason(self) -> str | None:
        """DUPLICATE_REQUEST_IDEMPOTENT when this was a repeat, answered with its first result."""
        return None if self.result is None else DUPLICATE_REQUEST_IDEMPOTENT


class DrawClient:
    """Enqueues draws and waits for their results.

    One per process: threads share it, and on RabbitMQ take turns, as a connection is one thread's at a time. A forked
    child goes on with connections of its own. It imports no Celery and connects at first use. `caller` is whose keys
    and sessions these are, where several applications share a ledger: the same rule as for the callers of API keys.
    """

    def __init__(self, entry: Entry, broker: Broker, results: ResultStore | None = None, *, caller: str = "") -> None:
        """Raises InvalidRequest for a `caller` that is none; empty is nobody's name."""
        if caller:
            check_caller(caller)
        self._entry = entry
        self._broker = broker
        self._results = results
        self._caller = caller

    @classmethod
    def from_env(cls) -> Self:
        """A client from TOMBOLA_* (see producers.settings); raises ConfigurationError when they are not right."""
        return cls.from_settings(Settings.from_env())

    @classmethod
    def from_settings(cls, settings: Settings, *, caller: str = "") -> Self:
        """A client from `settings`: a database and a broker, and a result store to wait for results."""
        url, lock_wait_s = settings.need("database_url"), settings.lock_wait_s
        engine = open_engine(url, lock_wait_s=lock_wait_s, read_timeout_s=SHORT_READ_TIMEOUT_S)
        broker = broker_of(settings)
        results = None
        if settings.has("result_url"):
            results = ResultStore.from_settings(settings, engine=engine, timeout_s=LOOK_TIMEOUT_S)
        return cls(Entry(engine, relay_after_s=settings.relay_after_s), broker, results, caller=caller)

    def enqueue(self, request: DrawRequest, *, connection: Connection | None = None) -> Ticket:
        """Accept a draw and publish it; return its ticket when it is durably accepted.

        Accepted means it will happen: where the broker does not take it now, the relay publishes it later. A repeat
        gets the same ticket, with the first result if there is one (reason DUPLICATE_REQUEST_IDEMPOTENT).

        With `connection` the draw is accepted inside your own transaction: it happens if and only if you commit, and
        the relay publishes it then.

        The ticket's names are those on record: an alias of its own for a key or session that another caller holds.

        Raises IdempotencyKeyReused when the key or the session belongs to another request of this caller, InvalidKey
        for an alias that is not his, UnknownCampaign before anything is written, and ServiceUnavailable when the
        database does not answer, or (RequestBusy) another transaction holds the key for seconds: enqueue the same
        request again then, it does no harm. InternalError is a mistake of ours with this one draw.
        """
        asked = Submission(request, self._caller)
        if connection is not None:
            answer = self._entry.accept_with(connection, asked)
        else:
            answer = self._entry.recall(asked) or self._entry.accept([asked])[0]
        if answer.is_conflict:
            raise IdempotencyKeyReused
        accepted = answer.request
        if answer.is_new:
            if connection is None:
                self._publish([accepted])
            return Ticket(accepted.request_key, accepted.lottery_session_id)
        return Ticket(accepted.request_key, accepted.lottery_session_id, self._first_result(answer))

    def enqueue_many(self, requests: Iterable[DrawRequest]) -> int:
        """Accept and publish draws, PUBLISH_SIZE_MAX in a transaction, holding no more than these in memory.

        Returns how many are accepted now; known repeats count as well. What keeps some from being accepted does not
        keep the others: it is raised at the end, IdempotencyKeyReused for keys that belong to other requests, or
        InvalidKey, UnknownCampaign, RequestBusy, InternalError. After ServiceUnavailable send all of them again. Where
        another caller may hold one of the names, use `enqueue`, whose ticket tells the alias.
        """
        count = 0
        refused: dict[type[DrawError], list[str]] = {}
        remaining = iter(requests)
        while chunk := list(itertools.islice(remaining, PUBLISH_SIZE_MAX)):
            answers = self._entry.accept_each([Submission(request, self._caller) for request in chunk])
            self._publish([it.request for it in answers if isinstance(it, Acceptance) and it.is_new])
            for answer in answers:
                if isinstance(answer, DrawError) and type(answer) not in NAMED:
                    raise answer
            for request, answer in zip(chunk, answers, strict=True):
                if isinstance(answer, Acceptance) and not answer.is_conflict:
                    count += 1
                    continue
                keys = refused.setdefault(IdempotencyKeyReused if isinstance(answer, Acceptance) else type(answer), [])
                if len(keys) < REFUSED_SHOWN_MAX:
                    keys.append(request.request_key)
        for kind, said in NAMED.items():
            if kind in refused:
                raise kind(f"{said}: {', '.join(refused[kind])}")
        return count

    def result(self, lottery_session_id: str) -> DrawResult:
        """The result, if there is one now. Raises ResultNotReady, or DrawDead (with a `reason`) if given up."""
        return parse_result(self._store().get(lottery_session_id))

    def wait(self, lottery_session_id: str, *, timeout_s: float = 2.0) -> DrawResult:
        """The result, as soon as it is there. Raises DrawDead once it is dead, ResultNotReady after `timeout_s`."""
        return self._store().wait(lottery_session_id, timeout_s=timeout_s)

    def close(self) -> None:
        """Let go of the connections."""
        self._broker.close()
        self._entry.close()
        if self._results is not None:
            self._results.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _store(self) -> ResultStore:
        if self._results is None:
            raise DrawError("this client has no result store: set TOMBOLA_RESULT_URL")
        return self._results

    def _publish(self, requests: list[Request]) -> None:
        """The fast path. What does not get through is accepted all the same, and the relay's to publish."""
        if not requests:
            return
        try:
            with tracing.publishing(len(requests)) as beside:
                bodies = [request.encode() for request in requests]
                if beside is None:
                    self._broker.publish(bodies)
                else:
                    self._broker.publish(bodies, [beside] * len(bodies))
        except PublishFailed as error:
            log.warning("%s; %d accepted draws are left to the relay", error, len(requests))

    def _first_result(self, answer: Acceptance) -> DrawResult | None:
        """What a repeat is told: the first result, if there is one by now."""
        if answer.record is not None and answer.record.result is not None:
            return parse_result(answer.record.result.encode())
        session_id = answer.request.lottery_session_id
        if answer.record is not None and answer.record.is_settled:  # archived
            state = self._entry.state_of(session_id)
            return None if state is None or state.result is None else parse_result(state.result)
        known = None if self._results is None else self._results.peek(session_id)
        if known is None:
            return None
        result = parse_result(known)
        mine = answer.request
        # The caller was checked already. A result of something else was put there by somebody else.
        theirs = (result.request_key, result.account_id, result.campaign)
        return result if theirs == (mine.request_key, mine.account_id, mine.terms) else None
