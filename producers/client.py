"""DrawClient: how a web frontend enqueues draws and waits for their results."""

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
    CampaignClosed,
    CampaignNotOpen,
    CampaignPaused,
    DrawError,
    IdempotencyKeyReused,
    InternalError,
    InvalidKey,
    PublishFailed,
    PullsNotSold,
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
# Errors that concern one draw, and not the other draws of a chunk.
NAMED: Final[dict[type[DrawError], str]] = {
    InternalError: "a bug in tombola (see the log) met these requests",
    UnknownCampaign: "these requests name unknown campaigns",
    CampaignPaused: "the campaigns of these requests are paused",
    CampaignClosed: "the campaigns of these requests have ended",
    CampaignNotOpen: "the campaigns of these requests are not open yet",
    PullsNotSold: "the campaigns of these requests do not sell so many pulls at once",
    IdempotencyKeyReused: "keys that belong to other requests",
    InvalidKey: "aliases that are not this caller's",
    RequestBusy: "requests that other transactions hold",
}


class Ticket(NamedTuple):
    """The receipt of an accepted draw, which finds the result. A repeat that has settled has a `result`."""

    request_key: str
    lottery_session_id: str
    result: DrawResult | None = None

    @property
    def reason(self) -> str | None:
        """DUPLICATE_REQUEST_IDEMPOTENT for a repeat that has settled."""
        return None if self.result is None else DUPLICATE_REQUEST_IDEMPOTENT


class DrawClient:
    """Enqueues draws and waits for their results.

    One per process: threads share a client, and on RabbitMQ take turns, since only one thread at a time can use a
    connection. A forked child opens connections of its own. A client imports no Celery and connects at first use. Where
    several applications share a ledger, `caller` owns the keys and sessions of this client, as with API keys.
    """

    def __init__(self, entry: Entry, broker: Broker, results: ResultStore | None = None, *, caller: str = "") -> None:
        """Raises InvalidRequest for a `caller` that is not a valid name; empty means no caller."""
        if caller:
            check_caller(caller)
        self._entry = entry
        self._broker = broker
        self._results = results
        self._caller = caller

    @classmethod
    def from_env(cls) -> Self:
        """A client from TOMBOLA_* (see producers.settings); raises ConfigurationError for invalid settings."""
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
        """Accept a draw and publish it; return its ticket when the draw is durably accepted.

        An accepted draw will happen: where the broker does not take its message now, the relay publishes it later. A
        repeat gets the same ticket, with the first result once the draw has settled (reason
        DUPLICATE_REQUEST_IDEMPOTENT).

        With `connection` the draw is accepted inside your own transaction: it happens if and only if you commit, and
        the relay publishes it after the commit.

        The ticket has the names in the database: an alias for a key or session that another caller holds.

        Raises IdempotencyKeyReused when the key or the session belongs to another request of this caller, InvalidKey
        for an alias of another caller, UnknownCampaign, CampaignPaused, CampaignClosed, CampaignNotOpen or PullsNotSold
        before anything is written, and ServiceUnavailable when the
        database does not answer, or (RequestBusy) another transaction holds the key for seconds: enqueuing the same
        request again does no harm. InternalError is a bug in tombola that concerns this one draw.
        """
        submission = Submission(request, self._caller)
        if connection is not None:
            answer = self._entry.accept_with(connection, submission)
        else:
            answer = self._entry.recall(submission) or self._entry.accept([submission])[0]
        if answer.is_conflict:
            raise IdempotencyKeyReused
        accepted = answer.request
        if answer.is_new:
            if connection is None:
                self._publish([accepted])
            return Ticket(accepted.request_key, accepted.lottery_session_id)
        return Ticket(accepted.request_key, accepted.lottery_session_id, self._first_result(answer))

    def enqueue_many(self, requests: Iterable[DrawRequest]) -> int:
        """Accept and publish draws, PUBLISH_SIZE_MAX in a transaction and in memory; return how many are accepted.

        Repeats count as accepted. An error that concerns some draws is raised at the end, after all others are
        accepted: IdempotencyKeyReused for keys of other requests, or an error that `enqueue` raises for one draw. After
        ServiceUnavailable send all draws again. Where another caller may hold a name, use `enqueue`, whose ticket has
        the alias.
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
        """The result of a settled draw. Raises ResultNotReady before, DrawDead (with a `reason`) for a dead draw."""
        return parse_result(self._store().get(lottery_session_id))

    def wait(self, lottery_session_id: str, *, timeout_s: float = 2.0) -> DrawResult:
        """Wait for the result. Raises DrawDead once the draw is dead, ResultNotReady after `timeout_s`."""
        return self._store().wait(lottery_session_id, timeout_s=timeout_s)

    def close(self) -> None:
        """Close the connections."""
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
        """Publish at once. Where the broker fails, the draws stay accepted, and the relay publishes them."""
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
        """The first result, for the ticket of a repeat; None before the draw has settled."""
        if answer.record is not None and answer.record.result is not None:
            return parse_result(answer.record.result)
        session_id = answer.request.lottery_session_id
        if answer.record is not None and answer.record.is_settled:  # archived
            state = self._entry.state_of(session_id)
            return None if state is None or state.result is None else parse_result(state.result)
        body = None if self._results is None else self._results.peek(session_id)
        if body is None:
            return None
        result, request = parse_result(body), answer.request
        # Redis may hold another request's result under this session: only the database is trusted.
        campaign = request.campaign if isinstance(request, DrawRequest) else None
        is_own = (result.request_key, result.account_id, result.campaign) == (
            request.request_key,
            request.account_id,
            campaign,
        )
        return result if is_own else None
