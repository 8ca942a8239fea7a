"""THE transaction: settle a batch of requests so that each is charged once, however often it is delivered.

    lock the accounts ─► who is settled already? ─► decide ─► post ─► move balances ─► finish requests ─► commit

Only then come results, and only then acks (worker.settle.consumer). What a request needs, does and answers is its
operation's to say (producers.domain.operations); nearly all are draws, and called so below. One request key belongs to
one account, so two deliveries of a request meet at that account's lock, and the second one finds the first one's row.
The unique constraints on `idempotency_key` and `request_key` are the proof that this is so: where they object, the
whole transaction runs again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Final, NamedTuple

from sqlalchemy import Engine

from tombola.producers.domain import keys, operations
from tombola.producers.domain.causes import Cause, Status
from tombola.producers.domain.contract import DUPLICATE_REQUEST_IDEMPOTENT, Request
from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.operations.operation import (
    Locked,
    LockedAccount,
    Movement,
    Outcome,
    Refusal,
    Rejection,
)
from tombola.producers.storage import clock, requests
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.faults import (
    Fault,
    explain,
    fault_of,
    is_duplicate_key,
    is_lock_conflict,
    is_lock_timeout,
)
from tombola.producers.storage.ledger import Posting
from tombola.producers.storage.requests import RequestOutcome, RequestRecord
from tombola.producers.storage.transactions import Transaction, conflict_pause_s, transaction
from tombola.producers.telemetry.fields import about
from tombola.worker import metrics
from tombola.worker.ledger import post as ledger
from tombola.worker.ledger.old_rows import OldDraws

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settled:
    """The draw has an outcome, now or since earlier: `result` is the first one's bytes."""

    request: Request
    result: bytes
    settled_at: datetime
    is_repeat: bool = False
    is_rejected: bool = False  # now, not when it was settled before
    accepted_at: datetime | None = None

    @property
    def reason(self) -> str | None:
        """DUPLICATE_REQUEST_IDEMPOTENT for a repeat; why it was rejected is in the result."""
        return DUPLICATE_REQUEST_IDEMPOTENT if self.is_repeat else None


@dataclass(frozen=True, slots=True)
class Refused:
    """The draw cannot be settled, now or later: a dead letter."""

    request: Request
    cause: Cause
    error: str
    exception: Exception | None = None


@dataclass(frozen=True, slots=True)
class Deferred:
    """Another transaction holds what the draw needs. Nothing is wrong with the draw: leave it unacked.

    `is_account_held` says that every draw of this account would have to wait.
    """

    request: Request
    error: str
    is_account_held: bool = False


Answer = Settled | Refused | Deferred


class Handling(NamedTuple):
    """For the record: which worker settles, and how often what came more than once was delivered, by request key."""

    by: str | None = None
    redelivered: Mapping[str, int] = MappingProxyType({})


UNTOLD: Final = Handling()


class Effort(NamedTuple):
    """How hard to try: `tries_max` transactions for a batch as a whole, each waiting `lock_wait_s` for its locks.

    Without patience nothing waits for a lock, from the first try on: for draws that were deferred before.
    """

    tries_max: int = 3
    lock_wait_s: float = 1.0
    has_patience: bool = True


def settle(
    engine: Engine,
    draws: Sequence[Request],
    wheels: Wheels,
    *,
    effort: Effort = Effort(),  # noqa: B008 - immutable
    handling: Handling = UNTOLD,
    sleep: Callable[[float], None] = time.sleep,
    old_draws: OldDraws | None = None,
    accepted_only: bool = False,
) -> list[Answer]:
    """Settle `draws` in one transaction; return an answer for each, in their order.

    After a conflict the whole transaction runs again, up to `tries_max` times; a batch that still fails is halved, so
    that one bad draw is found and the others go through. After the first lock that is not to be had within
    `lock_wait_s` nothing waits any more: what another transaction holds is deferred, and the others settle.

    Raises ServiceUnavailable or ConfigurationError when the database cannot be used: then nothing is known to be
    settled, and the same call later finds out.

    A legacy ledger holds draws by old code as well, `old_draws`: they are not charged again. With `accepted_only`
    nothing is charged that is not on record as accepted, with the same content.
    """
    if not draws:
        return []
    run = _Run(engine, wheels, effort, handling, sleep, old_draws, accepted_only)
    if not effort.has_patience:
        run.wait_no_more(draws)
    return run.settle(draws)


@dataclass(slots=True)
class _Run:
    """One call of `settle`, with what its tries have learned."""

    engine: Engine
    wheels: Wheels
    effort: Effort
    handling: Handling
    sleep: Callable[[float], None]
    old_draws: OldDraws | None
    accepted_only: bool
    has_patience: bool = True
    is_careful: bool = False
    held: set[str] = field(default_factory=set)  # request keys that another transaction holds
    began_at: float = field(default_factory=time.monotonic)

    def settle(self, draws: Sequence[Request], error: Exception | None = None) -> list[Answer]:
        """Settle `draws`, all of the batch or a part of one that has failed with `error`."""
        is_part = error is not None
        if error is not None and is_lock_conflict(error) and self.is_late:
            return [Deferred(draw, _why(error)) for draw in draws]
        for attempt in range(self.effort.tries_max):
            if attempt:
                self.sleep(conflict_pause_s(attempt))
            try:
                return self._try(draws)
            except Exception as raised:
                error = raised
            fault = fault_of(error)
            if fault is Fault.OUTAGE:
                raise explain(error) from error
            metrics.tell_retry(error)
            if is_lock_timeout(error) and self.has_patience:
                self.wait_no_more(draws)
                return self.settle(draws)
            # A part that has waited in full for a lock does not wait again: time is bounded.
            if fault is Fault.REFUSED or (is_lock_timeout(error) and is_part):
                break
            # One of them may ask for another request's session: looked up only now, as hardly any ever does.
            self.is_careful = self.is_careful or is_duplicate_key(error)
        assert error is not None
        if len(draws) > 1:
            middle = len(draws) // 2
            return [*self.settle(draws[:middle], error), *self.settle(draws[middle:], error)]
        (draw,) = draws
        log.warning("draw %s does not settle: %s", draw.request_key, _why(error), exc_info=error, extra=about(draw))
        if is_lock_conflict(error):
            return [Deferred(draw, _why(error))]
        return [Refused(draw, Cause.FAILED_ALONE, _why(error), error)]

    def wait_no_more(self, draws: Sequence[Request]) -> None:
        """From here on do without what another transaction holds."""
        self.has_patience = False
        try:
            with transaction(self.engine) as open_transaction:
                self.held |= _held(open_transaction, draws)
        except Exception as error:
            raise explain(error) from error

    @property
    def is_late(self) -> bool:
        """Whether the time is up in which locks are waited for: the first one, and one for each try."""
        return time.monotonic() - self.began_at > self.effort.lock_wait_s * (self.effort.tries_max + 1)

    def _try(self, draws: Sequence[Request]) -> list[Answer]:
        """One transaction."""
        free = [draw for draw in draws if draw.request_key not in self.held] if self.held else draws
        settled: Iterator[Answer] = iter(())
        if free:
            now = clock.now(self.engine)
            with transaction(self.engine) as open_transaction:
                answers = settle_in(
                    open_transaction,
                    free,
                    self.wheels,
                    now,
                    self.handling,
                    lock_wait_s=self.effort.lock_wait_s if self.has_patience else None,
                    is_careful=self.is_careful,
                    old_draws=self.old_draws,
                    accepted_only=self.accepted_only,
                )
            if free is draws:
                return answers
            settled = iter(answers)
        return [_request_held(it) if it.request_key in self.held else next(settled) for it in draws]


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _held(open_transaction: Transaction, draws: Sequence[Request]) -> set[str]:
    """The keys of those requests that another transaction holds: in their own rows, or in the ledger."""
    request_keys = [draw.request_key for draw in draws]
    sessions = [draw.lottery_session_id for draw in draws]
    return requests.busy(open_transaction, request_keys, sessions) | ledger.busy(open_transaction, draws)


def settle_in(
    open_transaction: Transaction,
    draws: Sequence[Request],
    wheels: Wheels,
    now: datetime,
    handling: Handling = UNTOLD,
    *,
    lock_wait_s: float | None = None,
    is_careful: bool = False,
    old_draws: OldDraws | None = None,
    accepted_only: bool = False,
) -> list[Answer]:
    """Settle `draws` inside `open_transaction`, which the caller commits; nothing is visible before that.

    With `lock_wait_s`, raises the driver's error when the accounts are not to be had in that time; without, draws of
    accounts that another transaction holds are deferred. Where one asks for another request's session, the insert
    raises; a careful one finds and refuses it.
    """
    # Before the locks, what needs none: nobody waits for it.
    fingerprints = [draw.fingerprint() for draw in draws]
    needs = [operations.operation_of(draw).needs(draw, wheels) for draw in draws]
    account_ids = {account_id for need in needs for account_id in need.accounts}
    held: Set[int] = frozenset()
    if lock_wait_s is None:
        accounts, held = ledger.lock_free_accounts(open_transaction, account_ids)
    else:
        accounts = ledger.lock_accounts(open_transaction, account_ids, wait_s_max=lock_wait_s)
    free = [draw for draw, need in zip(draws, needs, strict=True) if held.isdisjoint(need.accounts)] if held else draws
    if not free:
        return [_account_held(draw) for draw in draws]
    book = _Book(
        accounts=accounts,
        # Read only under the locks: what another worker settled before us is visible now, and stays so.
        known=requests.look_up(open_transaction, [draw.request_key for draw in free]),
        wheels=wheels,
        now=now,
        redelivered=handling.redelivered,
        accepted_only=accepted_only,
    )
    if is_careful:
        book.owners = requests.owners_of_sessions(open_transaction, [draw.lottery_session_id for draw in free])
    # The ledger's keys never expire: a request whose own row is gone is not charged again.
    book.charged = ledger.charged(open_transaction, [draw for draw in free if book.needs_ledger(draw.request_key)])
    if old_draws is not None:
        book.meet_old_draws(open_transaction, old_draws, free)
    answers = [
        book.settle(draw, fingerprint) if held.isdisjoint(need.accounts) else _account_held(draw)
        for draw, need, fingerprint in zip(draws, needs, fingerprints, strict=True)
    ]
    ledger.post(open_transaction, book.postings, now)
    ledger.move(open_transaction, book.moved, now)
    requests.finish(open_transaction, book.finished, now, settled_by=handling.by)
    return answers


def _has_alias(draw: Request) -> bool:
    """Whether it has a name that only accepting a request gives."""
    return keys.is_alias(draw.request_key) or keys.is_alias(draw.lottery_session_id)


def _request_held(draw: Request) -> Deferred:
    return Deferred(draw, "another transaction holds its request")


def _account_held(draw: Request) -> Deferred:
    return Deferred(draw, "another transaction holds its account", is_account_held=True)


class Rehearsal:
    """Settling without writing: the same book, read without locks, its balances running on from batch to batch.

    A request that was given up counts as accepted, as it is once it is replayed.
    """

    def __init__(self, wheels: Wheels, *, old_draws: OldDraws | None = None) -> None:
        self._wheels = wheels
        self._old_draws = old_draws
        self._accounts: dict[int, LockedAccount] = {}
        self._seen: dict[str, RequestRecord] = {}
        self._owners: dict[str, str] = {}
        self._charged: dict[str, dict[str, Decimal]] = {}

    def settle(self, open_transaction: Transaction, draws: Sequence[Request]) -> list[Answer]:
        """What `settle_in` would answer; `open_transaction` may be read-only. Raises the driver's errors."""
        if not draws:
            return []
        needs = [operations.operation_of(draw).needs(draw, self._wheels) for draw in draws]
        unread = {account_id for need in needs for account_id in need.accounts} - self._accounts.keys()
        if unread:
            self._accounts |= ledger.lock_accounts(open_transaction, unread, lock=False)
        known = {
            key: it._replace(status=Status.ACCEPTED, reason=None) if it.status == Status.DEAD else it
            for key, it in requests.look_up(open_transaction, [draw.request_key for draw in draws]).items()
        }
        self._owners |= requests.owners_of_sessions(open_transaction, [draw.lottery_session_id for draw in draws])
        book = _Book(
            accounts=self._accounts,
            known=self._seen | known,
            wheels=self._wheels,
            now=utc_now(),
            owners=self._owners,
        )
        book.charged = ledger.charged(open_transaction, [it for it in draws if book.needs_ledger(it.request_key)])
        if self._old_draws is not None:
            book.meet_old_draws(open_transaction, self._old_draws, draws)
        answers = [book.settle(draw, draw.fingerprint()) for draw in draws]
        self._charged = {}
        for it in book.postings:
            if it.delta < 0:
                charged = self._charged.setdefault(it.request_key, {})
                charged[it.asset_code] = charged.get(it.asset_code, Decimal(0)) - it.delta
        # Those that have just settled in here: another request under their key is a conflict from now on.
        self._seen |= {it.request.request_key: book.known[it.request.request_key] for it in book.finished}
        return answers

    def charged(self, request_key: str | None) -> Mapping[str, Decimal]:
        """What the request would be charged, by asset code, if it is one of the last batch's."""
        return self._charged.get(request_key or "", {})


@dataclass(slots=True)
class _Book:
    """A batch in memory: what was read under the locks, and what is to be written."""

    accounts: dict[int, LockedAccount]
    known: dict[str, RequestRecord]
    wheels: Wheels
    now: datetime
    redelivered: Mapping[str, int] = field(default_factory=dict)
    charged: dict[str, ledger.Charged] = field(default_factory=dict)
    accepted_only: bool = False
    owners: dict[str, str] | None = None  # whose the sessions are, by session, if that is looked after
    postings: list[Posting] = field(default_factory=list)
    moved: dict[int, Decimal] = field(default_factory=dict)
    finished: list[RequestOutcome] = field(default_factory=list)
    locked: Locked = field(init=False)

    def __post_init__(self) -> None:
        self.locked = Locked(self.accounts, self.wheels)

    def needs_ledger(self, request_key: str) -> bool:
        """Whether the ledger must be asked if it has charged this request, and what it wrote."""
        known = self.known.get(request_key)
        return known is None or (known.result is None and known.status in (Status.ACCEPTED, Status.COMPLETED))

    def meet_old_draws(self, open_transaction: Transaction, old_draws: OldDraws, draws: Sequence[Request]) -> None:
        """Draws by old code are charged already, and their sessions are theirs."""
        met = old_draws.meet(open_transaction, [it for it in draws if self.needs_ledger(it.request_key)])
        if met.owners:
            self.owners = (self.owners or {}) | met.owners
            self.charged |= met.charged

    def settle(self, draw: Request, fingerprint: str) -> Answer:
        known = self.known.get(draw.request_key)
        if known is not None:
            if known.fingerprint != fingerprint:
                return Refused(draw, Cause.FINGERPRINT_MISMATCH, "this request key belongs to another request")
            if known.status == Status.DEAD:
                return Refused(draw, Cause.NEVER_SETTLED, f"this request was given up ({known.reason}): replay it")
            if known.is_settled:
                return self._repeat(draw, known)
        operation = operations.operation_of(draw)
        charged = self.charged.get(draw.request_key)
        outcome: Outcome
        if charged is not None:
            if (charged.account_id, charged.lottery_session_id) != (draw.account_id, draw.lottery_session_id):
                return Refused(draw, Cause.FINGERPRINT_MISMATCH, "this request key was charged for another request")
            outcome = charged.rows
        elif known is None and (self.accepted_only or _has_alias(draw)):
            return Refused(draw, Cause.NOT_ACCEPTED, "nobody is on record as having asked for this draw")
        else:
            decision = operation.decide(draw, self.locked)
            if isinstance(decision, Refusal):
                return Refused(draw, decision.cause, decision.error)
            if not self._owns_session(draw):
                return Refused(draw, Cause.FINGERPRINT_MISMATCH, "its lottery session is another request's")
            outcome = decision if isinstance(decision, Rejection) else self._move(draw, decision)
        is_rejected = isinstance(outcome, Rejection)
        status = Status.REJECTED if is_rejected else Status.COMPLETED
        body = operation.result(draw, outcome)
        text = body.decode()
        self.finished.append(
            RequestOutcome(
                draw,
                fingerprint,
                status,
                outcome.reason if isinstance(outcome, Rejection) else None,
                text,
                is_accepted=known is not None,
                deliveries=self.redelivered.get(draw.request_key, 1),
            )
        )
        # A key twice in one batch is the same case as a redelivery.
        self.known[draw.request_key] = RequestRecord(fingerprint, "", status, text, self.now)
        return Settled(
            draw,
            body,
            self.now,
            is_repeat=charged is not None,
            is_rejected=is_rejected,
            accepted_at=None if known is None else known.accepted_at,
        )

    def _owns_session(self, draw: Request) -> bool:
        """Whether the session is this request's, or was nobody's and is its from now on."""
        if self.owners is None:
            return True
        return self.owners.setdefault(draw.lottery_session_id, draw.request_key) == draw.request_key

    def _repeat(self, draw: Request, known: RequestRecord) -> Answer:
        """The first result of a settled draw: as it was kept, or rebuilt if it has been archived."""
        assert known.settled_at is not None
        if known.result is not None:
            return Settled(draw, known.result.encode(), known.settled_at, is_repeat=True)
        outcome: Outcome
        if known.status == Status.REJECTED:
            outcome = Rejection(known.reason or "", known.balance_told)
        elif (charged := self.charged.get(draw.request_key)) is not None:
            outcome = charged.rows
        else:
            return Refused(draw, Cause.FAILED_ALONE, "this request is completed, and the ledger does not know it")
        body = operations.operation_of(draw).result(draw, outcome)
        return Settled(draw, body, known.settled_at, is_repeat=True)

    def _move(self, request: Request, movements: Sequence[Movement]) -> list[Posting]:
        """The ledger rows that these movements come to, each going on from where the last one left its account."""
        postings = []
        for account_id, entry_type, business_type, delta, notes in movements:
            asset_code, before = self.accounts[account_id]
            after = before + delta
            posting = Posting(
                account_id,
                request.lottery_session_id,
                f"{request.request_key}:{entry_type}",
                business_type,
                asset_code,
                delta,
                before,
                after,
                notes,
            )
            postings.append(posting)
            self.accounts[account_id] = LockedAccount(asset_code, after)
            self.moved[account_id] = after
        self.postings += postings
        return postings
