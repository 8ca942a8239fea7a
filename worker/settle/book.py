"""A batch in memory: what was read under the locks, the answers that follow from it, and the rows to write.

The forecast reads the same book without locks (worker.settle.rehearsal).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

from tombola.producers.domain import keys, operations
from tombola.producers.domain.causes import Cause, Status
from tombola.producers.domain.contract import Request
from tombola.producers.domain.operations import expire
from tombola.producers.domain.operations.operation import (
    Change,
    Lifetime,
    Locked,
    LockedAccount,
    Movement,
    Moves,
    Needs,
    Outcome,
    Play,
    Refusal,
    Rejection,
)
from tombola.producers.storage.ledger import Posting
from tombola.producers.storage.requests import RequestOutcome, RequestRecord
from tombola.producers.storage.transactions import Transaction, time_text
from tombola.worker.campaigns.scene import BatchScene
from tombola.worker.fulfilments.subscriptions import Row, Subscriptions
from tombola.worker.ledger import earlier
from tombola.worker.ledger import post as ledger
from tombola.worker.seeds.binding import NO_SEED, UNBOUND, Bound, epoch_noted
from tombola.worker.settle.answers import Answer, Deferred, Refused, Repeat, Settled
from tombola.worker.settle.rules import Rules


@dataclass(slots=True)
class Book:
    """`accounts` and `known` are the locked accounts and the requests on record; `postings`, `moved` and `finished`
    are the rows to write. All of them change as draws are answered.

    `redelivered` are delivery counts above 1, by request key. `owners` names the request of each lottery session, None
    where the unique constraint alone checks this. `scene` is for draws by operators' campaigns. `bound` says which
    epoch each draw is drawn in. `subscriptions` are
    None where no webhook can want to hear of a draw; `fulfilments` are what webhooks hear of draws that settle now.
    `rows` and `lifetimes` are what requests read of earlier ones (`read_earlier`); `changes` is what they change.
    """

    accounts: dict[int, LockedAccount]
    known: dict[str, RequestRecord]
    rules: Rules
    now: datetime
    redelivered: Mapping[str, int] = field(default_factory=dict)
    owners: dict[str, str] | None = None
    scene: BatchScene | None = None
    bound: Bound = UNBOUND
    subscriptions: Subscriptions | None = None
    charged: dict[str, ledger.Charged] = field(default_factory=dict)
    postings: list[Posting] = field(default_factory=list)
    moved: dict[int, Decimal] = field(default_factory=dict)
    finished: list[RequestOutcome] = field(default_factory=list)
    fulfilments: list[Row] = field(default_factory=list)
    rows: dict[str, list[Posting]] = field(default_factory=dict)
    lifetimes: dict[tuple[int, str], Lifetime] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    locked: Locked = field(init=False)

    def __post_init__(self) -> None:
        versions = None if self.rules.desk is None else self.rules.desk.campaigns
        self.locked = Locked(
            self.accounts,
            self.rules.wheels,
            self.scene,
            self.rows,
            self.lifetimes,
            versions,
            self.now,
            self.bound.seeds,
        )

    def read_ledger(self, open_transaction: Transaction, draws: Sequence[Request]) -> None:
        """Read which of `draws` are charged though no row says so; draws of old code, and their sessions, as well.

        The ledger's keys never expire: a request whose own row is gone is not charged again.
        """
        asking = [
            it for it in draws if (known := self.known.get(it.request_key)) is None or known.status == Status.ACCEPTED
        ]
        self.charged = ledger.charged(open_transaction, asking)
        if self.rules.old_draws is not None:
            met = self.rules.old_draws.meet(open_transaction, asking)
            if met.owners:
                self.owners = (self.owners or {}) | met.owners
                self.charged |= met.charged

    def read_earlier(self, open_transaction: Transaction, needs: Sequence[Needs]) -> None:
        """Read the rows of earlier requests that these needs name. Raises RowsChanged if accounts are not locked."""
        found = earlier.rows_of(open_transaction, (key for need in needs for key in need.rows_of))
        earlier.must_be_locked(found, needs)
        self.rows.update(found)
        self.lifetimes.update(earlier.lifetimes(open_transaction, needs))

    def answer(self, draw: Request, fingerprint: str) -> Answer | Repeat:
        """The answer for `draw`; a draw that settles now is in the rows to write."""
        known = self.known.get(draw.request_key)
        if known is not None:
            if known.fingerprint != fingerprint:
                return Refused(draw, Cause.FINGERPRINT_MISMATCH, "this request key belongs to another request")
            if known.status == Status.DEAD:
                return Refused(draw, Cause.NEVER_SETTLED, f"this request was given up ({known.reason}): replay it")
            if known.is_settled:
                return _repeat(draw, known)
        operation = operations.operation_of(draw)
        charged = self.charged.get(draw.request_key)
        outcome: Outcome
        if charged is not None:
            if (charged.account_id, charged.lottery_session_id) != (draw.account_id, draw.lottery_session_id):
                return Refused(draw, Cause.FINGERPRINT_MISMATCH, "this request key was charged for another request")
            outcome = charged.rows
        elif known is None and (self.rules.accepted_only or _has_alias(draw)):
            return Refused(draw, Cause.NOT_ACCEPTED, "no accepted request is on record for this draw")
        elif self.bound.seedless and draw.request_key in self.bound.seedless:
            return Deferred(draw, NO_SEED)
        else:
            decision = operation.decide(draw, self.locked)
            if isinstance(decision, Refusal):
                return Refused(draw, decision.cause, decision.error)
            if not self._owns_session(draw):
                return Refused(draw, Cause.FINGERPRINT_MISMATCH, "its lottery session belongs to another request")
            outcome = decision if isinstance(decision, Rejection) else self._move(draw, decision)
            if self.subscriptions is not None:
                self.fulfilments += self._told(draw, outcome, self.subscriptions)
        is_rejected = isinstance(outcome, Rejection)
        status = Status.REJECTED if is_rejected else Status.COMPLETED
        body = operation.result(draw, outcome)
        self.finished.append(
            RequestOutcome(
                draw,
                fingerprint,
                status,
                outcome.reason if isinstance(outcome, Rejection) else None,
                outcome.balance if isinstance(outcome, Rejection) else None,
                is_accepted=known is not None,
                deliveries=self.redelivered.get(draw.request_key, 1),
                seed_epoch=self.bound.binds.get(draw.request_key) if charged is None else epoch_noted(charged.rows),
            )
        )
        # A key twice in one batch is the same case as a redelivery.
        self.known[draw.request_key] = RequestRecord(fingerprint, "", status, body, self.now)
        return Settled(
            draw,
            body,
            self.now,
            is_repeat=charged is not None,
            is_rejected=is_rejected,
            accepted_at=None if known is None else known.accepted_at,
        )

    def _told(self, draw: Request, outcome: Rejection | Sequence[Posting], to: Subscriptions) -> list[Row]:
        """What webhooks hear of a draw that settles now."""
        if isinstance(outcome, Rejection):
            return to.rows(draw, Status.REJECTED, ())
        return to.rows(draw, Status.COMPLETED, outcome)

    def _owns_session(self, draw: Request) -> bool:
        """Whether the lottery session belongs to this request; a free session belongs to it from now on."""
        if self.owners is None:
            return True
        return self.owners.setdefault(draw.lottery_session_id, draw.request_key) == draw.request_key

    def _move(self, request: Request, decision: Sequence[Movement] | Play | Moves) -> list[Posting]:
        """The ledger rows of a decision, each continuing the balance that the last row left its account with."""
        movements: Sequence[Movement]
        if isinstance(decision, Play):
            assert self.scene is not None
            self.scene.keep(request, decision)
            movements = decision.movements
        elif isinstance(decision, Moves):
            self.changes += decision.changes
            movements = decision.movements
        else:
            movements = decision
        postings = []
        ledger_key = request.ledger_key
        for account_id, entry_type, business_type, delta, notes in movements:
            asset_code, before = self.accounts[account_id]
            after = before + delta
            posting = Posting(
                account_id,
                request.lottery_session_id,
                f"{ledger_key}:{entry_type}",
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
        if self.rows or self.lifetimes:
            self._tell_later(postings)
        return postings

    def _tell_later(self, postings: Sequence[Posting]) -> None:
        """Let later requests of the batch read these rows."""
        for it in postings:
            if it.ledger_key in self.rows:
                self.rows[it.ledger_key].append(it)
            for asked in [asked for asked in self.lifetimes if asked[0] == it.account_id]:
                is_earned = time_text(self.now) < asked[1]
                self.lifetimes[asked] = expire.after(
                    self.lifetimes[asked], it.business_type, it.delta, is_earned=is_earned
                )


def _repeat(draw: Request, known: RequestRecord) -> Settled | Repeat:
    if known.result is None:
        return Repeat(draw, known)
    assert known.settled_at is not None
    return Settled(draw, known.result, known.settled_at, is_repeat=True)


def _has_alias(draw: Request) -> bool:
    """Whether the draw has a name that only accepting a request gives."""
    return keys.is_alias(draw.request_key) or keys.is_alias(draw.lottery_session_id)
