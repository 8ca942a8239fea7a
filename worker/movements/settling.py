"""One movement of an operator, settled at once: no worker need run.

In one transaction the request settles as workers settle it (worker.settle.batch, with the accounts' locks), and the
operator's act goes on record. A repeat under the same key changes nothing and gets the first outcome. A rejection is
rolled back, unlike a worker's: nothing of it remains, and the operator may try again under the same key.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple, NoReturn

from sqlalchemy import Connection, Engine, select

from tombola.producers.domain import keys
from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import MovementResult, Request, parse_movement_result, shown
from tombola.producers.domain.draw import blind_wheels
from tombola.producers.domain.errors import IdempotencyKeyReused, InvalidRequest, MovementRejected
from tombola.producers.domain.money import AMOUNT_MAX
from tombola.producers.domain.operations.recharge import RECHARGE, RechargeRequest
from tombola.producers.storage import clock
from tombola.producers.storage.ledger import posting_of
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.transactions import Transaction, transaction
from tombola.worker.campaigns.desk import Desk
from tombola.worker.ledger.old_rows import OldDraws
from tombola.worker.operators import actions
from tombola.worker.operators.once import explained, once
from tombola.worker.settle import repeats
from tombola.worker.settle.answers import Answer, Settled
from tombola.worker.settle.batch import Handling, settle_in
from tombola.worker.settle.rehearsal import Rehearsal
from tombola.worker.settle.rules import Rules

# What operators may do, by the kind of the request: the name of the act on record.
ACTS: Final[Mapping[str, str]] = MappingProxyType({
    **{it: f"account {it}" for it in ("recharge", "transfer", "adjust", "hold", "post", "void")},
    "refund": "draw refund",
})  # fmt: skip
# Begins `settled_by` of a request that an operator has settled; the operator's name follows.
SETTLED_BY: Final = "operator "
SETTLED_BY_LENGTH_MAX: Final = 100

_WHY: Final[Mapping[str, str]] = MappingProxyType({
    "ACCOUNT_NOT_FOUND": "there is no such account",
    "INSUFFICIENT_BALANCE": "the account holds {balance}, which is too little",
    "BALANCE_LIMIT": f"an account holds at most {AMOUNT_MAX:,}",
    "OTHER_ASSET": "the two accounts hold different assets",
    "DRAW_NOT_FOUND": "the ledger has no draw of this account under this key",
    "ALREADY_REFUNDED": "the draw was refunded before",
    "PRIZE_SPENT": "a prize is spent already: policy charge_only leaves the prizes, write_off collects what is there",
    "HOLD_NOT_FOUND": "there is no such hold of this account",
    "HOLD_ENDED": "the hold has ended before",
    "HOLD_EXPIRED": "the hold has expired: a relay voids it",
    "AMOUNT_ABOVE_HOLD": "the hold is smaller",
})  # fmt: skip


class Moved(NamedTuple):
    """The outcome of a completed movement; `is_repeat`: it was made before, under the same key."""

    request: Request
    result: MovementResult
    is_repeat: bool = False


def settle(engine: Engine, request: Request, *, operator: str, reason: str = "") -> Moved:
    """Settle a movement, and put it on record with the operator and the reason.

    Raises MovementRejected: nothing was changed. IdempotencyKeyReused: the key belongs to another request.
    InvalidRequest for a draw, which only workers settle, and for a request that was given up. ServiceUnavailable or
    ConfigurationError when the database cannot be used: then the same call with the same key finds out what has
    happened.
    """
    if request.kind not in ACTS:
        raise InvalidRequest(f"operators settle {', '.join(ACTS)}, no {request.kind}")
    why = actions.checked_reason(reason) if reason else ""
    rules = movement_rules(engine)

    def act(connection: Connection) -> Moved:
        if (earlier := _of_older_release(connection, request)) is not None:
            return earlier
        answers = settle_in(
            Transaction.joining(connection),
            [request],
            rules,
            clock.now(connection),
            Handling(f"{SETTLED_BY}{operator}"[:SETTLED_BY_LENGTH_MAX]),
            is_careful=True,
        )
        (answer,) = repeats.tell_in(Transaction.joining(connection), answers, rules)
        moved = _moved(request, answer)
        if moved.result.status == "rejected":
            _reject(moved)  # rolls back
        if not moved.is_repeat:
            action, details = ACTS[request.kind], _details(moved)
            actions.record(connection, operator=operator, action=action, reason=why, count=1, details=details)
        return moved

    return once(engine, act)


def foretell(engine: Engine, request: Request) -> Moved:
    """What `settle` would come to now: without locks, and nothing is written. A rejection is in the result.

    `is_repeat`: the request has settled before. Raises as `settle` does, but no MovementRejected.
    """
    with explained():
        rules = movement_rules(engine)
        rehearsal = Rehearsal(rules)
        with transaction(engine, read_only=True) as reading:
            (answer,) = repeats.tell_in(reading, rehearsal.answers(reading, [request]), rules)
        return _moved(request, answer)


def why_rejected(result: MovementResult) -> str:
    """Why a movement was rejected, in words."""
    reason = result.reason or ""
    words = _WHY.get(reason, "").format(balance=result.balance_after)
    return f"{reason}: {words}" if words else reason


def movement_rules(engine: Engine) -> Rules:
    """The rules by which movements settle: without the seed, as nothing is drawn, and without a change of old rows."""
    return Rules(blind_wheels(), old_draws=OldDraws.of(engine, adopts=False), desk=Desk(engine, None))


def _of_older_release(connection: Connection, request: Request) -> Moved | None:
    """The recharge that a release without requests has made under this key; None if there is none.

    Such a row is its own session: `{key}:recharge`, or a standalone key as it is.
    """
    if not isinstance(request, RechargeRequest):
        return None
    key = request.request_key
    rows = connection.execute(
        select(transactions).where(transactions.c.idempotency_key.in_([key, keys.derive(key, RECHARGE)]))
    ).mappings()
    for row in rows:
        if row["lottery_session_id"] != row["idempotency_key"] or row["business_type"] != RECHARGE:
            continue
        if (row["account_id"], row["delta_amount"]) != (request.account_id, request.moved):
            raise _is_reused(key)
        posting = posting_of(dict(row))
        result = MovementResult(
            kind=request.kind,
            request_key=key,
            lottery_session_id=posting.lottery_session_id,
            account_id=posting.account_id,
            status="completed",
            reason=None,
            balance_after=str(posting.after),
            transactions=[shown(posting)],
        )
        return Moved(request, result, is_repeat=True)
    return None


def _moved(request: Request, answer: Answer) -> Moved:
    if isinstance(answer, Settled):
        return Moved(request, parse_movement_result(answer.result), answer.is_repeat)
    if getattr(answer, "cause", None) == Cause.FINGERPRINT_MISMATCH:
        raise _is_reused(request.request_key)
    raise InvalidRequest(f"nothing is changed: {answer.error}")


def _is_reused(key: str) -> IdempotencyKeyReused:
    return IdempotencyKeyReused(f"the key {key} was used for another request: nothing is changed")


def _reject(moved: Moved) -> NoReturn:
    end = "under this key for good: a new try takes a new key" if moved.is_repeat else "nothing is changed"
    raise MovementRejected(f"rejected, {why_rejected(moved.result)}; {end}", moved.result.reason)


def _details(moved: Moved) -> dict[str, Any]:
    """The fields of the request, and what came of it. The reason stands in a column of its own."""
    request, result = moved.request, moved.result
    fields = {name: getattr(request, name) for name in request.__struct_fields__ if name != "reason"}
    if fields["lottery_session_id"] == request.request_key:
        del fields["lottery_session_id"]
    came_of_it = {"balance_after": result.balance_after, "rows": len(result.transactions)}
    return {name: value for name, value in fields.items() if value not in ("", None)} | came_of_it
