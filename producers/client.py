"""DrawClient: how a web frontend enqueues draws and waits for their results."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Final, NamedTuple

from sqlalchemy import Connection

from tombola.producers.domain.contract import DUPLICATE_REQUEST_IDEMPOTENT, DrawRequest, DrawResult, parse_result
from tombola.producers.domain.errors import (
    CampaignClosed,
    CampaignNotOpen,
    CampaignPaused,
    DrawError,
    IdempotencyKeyReused,
    InternalError,
    InvalidKey,
    PullsNotSold,
    ReceiptNotFound,
    RequestBusy,
    SessionNotFound,
    UnknownCampaign,
)
from tombola.producers.domain.keys import check_session_id
from tombola.producers.movements import MovementClient
from tombola.producers.storage.chunks import IN_LIST_MAX
from tombola.producers.storage.requests import Acceptance, Submission

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
    """What finds the result of an accepted draw. A repeat that has settled has a `result`."""

    request_key: str
    lottery_session_id: str
    result: DrawResult | None = None

    @property
    def reason(self) -> str | None:
        """DUPLICATE_REQUEST_IDEMPOTENT for a repeat that has settled."""
        return None if self.result is None else DUPLICATE_REQUEST_IDEMPOTENT


class DrawClient(MovementClient):
    """Enqueues draws, moves money otherwise (see MovementClient), and waits for results.

    One per process: threads share a client, and on RabbitMQ take turns, since only one thread at a time can use a
    connection. A forked child opens connections of its own. A client imports no Celery and connects at first use. Where
    several applications share a ledger, `caller` owns the keys and sessions of this client, as with API keys.
    """

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
        request again does no harm. TransactionOutdated, with `connection` alone: the database has rolled your
        transaction back. InternalError is a bug in tombola that concerns this one draw.
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

    def receipt(self, lottery_session_id: str) -> str:
        """The signed receipt of a session: of its acceptance, and once it has settled of its result.

        A JWS in compact form, which producers.domain.receipts.verify reads. It is made of the database's row, and has
        equal bytes whenever it is made. Raises SessionNotFound for an unknown session and for one of another caller,
        ReceiptNotFound where TOMBOLA_RECEIPT_KEY is not set, ServiceUnavailable when the database does not answer.
        """
        if not self._receipts:
            raise ReceiptNotFound
        state = self._entry.state_of(check_session_id(lottery_session_id))
        if state is None or (self._caller and state.caller != self._caller):
            raise SessionNotFound
        self._receipts.learn(state.seed_epoch)
        return self._receipts.sign(state)

    def _first_result(self, answer: Acceptance) -> DrawResult | None:
        """The first result, for the ticket of a repeat; None before the draw has settled."""
        if (kept := self._kept_result(answer)) is not None:
            return parse_result(kept)
        if (body := self._peek(answer)) is None:
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
