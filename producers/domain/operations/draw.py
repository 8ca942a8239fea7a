"""A draw: one charge in the asset of its campaign, and the prizes, if any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from types import MappingProxyType
from typing import Final

from tombola.producers.domain.campaigns import pulls, settling
from tombola.producers.domain.campaigns.record import read_draw_notes
from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import (
    ACCOUNT_NOT_FOUND,
    INSUFFICIENT_BALANCE,
    DrawRequest,
    DrawResult,
    PullsResult,
    Row,
    shown,
)
from tombola.producers.domain.draw import DrawKey, Wheel, Wheels, seed_id_of, seed_of
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.operations import movements
from tombola.producers.domain.operations.operation import (
    Decision,
    Findings,
    Locked,
    Movement,
    Needs,
    Outcome,
    Refusal,
    Rejection,
    Written,
)

FIELDS: Final = DrawRequest
CONSUME_TYPE: Final = "consume"
REWARD_TYPE: Final = "reward"
CONSUME: Final = "lottery_consume"
REWARD: Final = "lottery_reward"
TYPES: Final = MappingProxyType(
    {CONSUME_TYPE: CONSUME, **{str(entry): business_type for entry, business_type in pulls.BUSINESS_TYPES.items()}}
)
HOUSE: Final = MappingProxyType(
    {
        CONSUME: "house/{campaign}/sales",
        **{
            business_type: "" if entry == "notice" else "house/{campaign}/prizes"
            for entry, business_type in pulls.BUSINESS_TYPES.items()
        },
    }
)
NO_PRIZE: Final = Decimal("0.00")


def needs(request: DrawRequest, wheels: Wheels) -> Needs:
    """The account that pays the charge, and receives prizes in its asset."""
    return Needs((request.account_id,), "" if request.campaign in wheels else request.campaign)


def decide(request: DrawRequest, locked: Locked) -> Decision:
    """The charge and the prizes, if any; or a rejection or refusal."""
    wheel = locked.wheels.get(request.campaign)
    if wheel is None:
        return settling.decide(request, locked)
    if request.pulls is not None:
        return Refusal(Cause.INVALID, f"campaign {request.campaign} sells single draws, without `pulls`")
    campaign = wheel.campaign
    account = locked.accounts.get(request.account_id)
    if account is None or account.asset_code != campaign.asset_code:
        return Rejection(ACCOUNT_NOT_FOUND, None)
    if account.balance < campaign.cost:
        return Rejection(INSUFFICIENT_BALANCE, account.balance)
    seeds = locked.seeds
    seed = seeds.others.get(request.request_key, seeds.of_now)
    return _movements(request, wheel if seed is None else seed.wheels[request.campaign])


def _movements(request: DrawRequest, wheel: Wheel) -> Sequence[Movement]:
    """The movements of a draw whose charge the account can pay."""
    prize = wheel.draw(request.account_id, request.request_key, request.client_nonce.encode())
    charge = Movement(request.account_id, CONSUME_TYPE, CONSUME, -wheel.campaign.cost, wheel.notes)
    if not prize.amount:
        return (charge,)
    return charge, Movement(request.account_id, REWARD_TYPE, REWARD, prize.amount, wheel.notes)


def result(request: DrawRequest, outcome: Outcome) -> bytes:
    """The draw's result. `prize_amount` and `balance_after` are of the account that paid, and so of one asset.

    Raises ValueError for a completed draw without a row of that account.
    """
    paid, transactions = NO_PRIZE, []
    reason, balance = outcome if isinstance(outcome, Rejection) else (None, None)
    if not isinstance(outcome, Rejection):
        for row in outcome:
            transactions.append(shown(row))
            if row.account_id == request.account_id:
                balance = row.after
                if row.business_type == REWARD:
                    paid += row.delta
        if balance is None:
            raise ValueError(f"the ledger has no row of draw {request.request_key}")
    if request.pulls is not None:
        odds_hash, prizes = settling.prizes_won(() if isinstance(outcome, Rejection) else outcome)
        return PullsResult(
            request_key=request.request_key,
            lottery_session_id=request.lottery_session_id,
            account_id=request.account_id,
            campaign=request.campaign,
            status="completed" if reason is None else "rejected",
            reason=reason,
            prize_amount=str(paid),
            balance_after=None if balance is None else str(balance),
            transactions=transactions,
            odds_hash=odds_hash,
            prizes=prizes,
        ).encode()
    return DrawResult(
        request_key=request.request_key,
        lottery_session_id=request.lottery_session_id,
        account_id=request.account_id,
        campaign=request.campaign,
        status="completed" if reason is None else "rejected",
        reason=reason,
        prize_amount=str(paid),
        balance_after=None if balance is None else str(balance),
        transactions=transactions,
    ).encode()


def check(request: DrawRequest, written: Written) -> Findings:
    """One charge (I1); the prizes that were drawn (I2); the number of rows (I11), and what each of them says (I14)."""
    if request.campaign not in written.wheels:
        return {"I1": _charged(written), "I2": _drawn_by_campaign(request, written)}
    return {
        "I1": _charged(written),
        "I2": _drawn(request, written),
        "I11": _whole(request, written),
        "I14": _as_drawn(request, written),
    }


def _charged(written: Written) -> Iterator[str]:
    charges = sum(row.business_type == CONSUME for row in written.rows)
    if charges != (1 if written.is_completed else 0):
        yield f"is {written.status} and has {charges} charges"


def _drawn(request: DrawRequest, written: Written) -> Iterator[str]:
    paid = _paid(written.rows)
    if not written.is_completed:
        if paid:
            yield f"is {written.status} and was paid {paid}"
    elif not written.is_provable:
        return
    elif (drawn := _recomputed(request, written)) is None:
        yield "was drawn with other odds or another seed, and cannot be recomputed"
    elif paid != (says := _paid(drawn)):
        yield f"was paid {paid}, its draw says {says}"


def _drawn_by_campaign(request: DrawRequest, written: Written) -> Iterator[str]:
    """Each ledger row is the one that the seed, the odds and the recorded counters say (I2 and I11)."""
    if not (written.is_completed and written.is_provable):
        return
    key, versions = _key(request, written), written.versions
    charge = next((row for row in written.rows if row.business_type == CONSUME), None)
    try:
        notes = None if charge is None else read_draw_notes(charge.notes)
    except InvalidRequest:
        notes = None
    if notes is None or key is None or versions is None:
        yield f"campaign {request.campaign} is unknown here, or its notes are: the draw cannot be recomputed"
        return
    odds = versions.version(notes.odds_hash)
    if odds is None or odds.name != request.campaign:
        yield f"was drawn by odds that campaign {request.campaign} never had: {notes.odds_hash}"
    elif notes.seed_name != key.seed_name:
        yield "was drawn with another seed, and cannot be recomputed"
    else:
        expected = settling.expected_rows(request, written.rows, odds, key)
        found = [settling.as_expected(row) for row in written.rows]
        for it in found:
            if it not in expected:
                yield f"has a ledger row {it.idempotency_key} that its draw does not say"
        for it in expected:
            if it not in found:
                yield f"lacks the ledger row {it.idempotency_key} of its draw: {it.delta} {it.asset_code}"


def _key(request: DrawRequest, written: Written) -> DrawKey | None:
    if written.seed is not None:
        return written.seed.key_of(request.campaign)
    master = seed_of(written.wheels)
    return None if master is None else DrawKey(master, seed_id_of(master))


def _paid(rows: Sequence[Row] | Sequence[Movement]) -> Decimal:
    return sum((row.delta for row in rows if row.business_type == REWARD), Decimal(0))


def _whole(request: DrawRequest, written: Written) -> Iterator[str]:
    if not written.is_completed:
        return
    drawn = _recomputed(request, written)
    count = len(written.rows)
    if count != len(drawn) if drawn is not None else not 1 <= count <= 2:
        yield f"has {count} ledger rows"


def _as_drawn(request: DrawRequest, written: Written) -> Iterator[str]:
    drawn = _recomputed(request, written)
    if drawn is not None:
        yield from movements.differences(request, written, drawn)


def _recomputed(request: DrawRequest, written: Written) -> Sequence[Movement] | None:
    """The movements that the draw must have written; None where its campaign, odds or seed are not known."""
    wheel = (written.wheels if written.seed is None else written.seed.wheels).get(request.campaign)
    if (
        wheel is None
        or not written.is_provable
        or any(row.notes != wheel.notes for row in written.rows if row.business_type == CONSUME)
    ):
        return None
    return _movements(request, wheel)
