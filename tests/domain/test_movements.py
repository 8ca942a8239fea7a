"""The operations beside the draw, as pure functions: what they refuse on the wire, and what their checks find."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec
import pytest

from tombola.producers.domain import operations
from tombola.producers.domain.contract import Request, Row, parse_movement_result
from tombola.producers.domain.draw import blind_wheels
from tombola.producers.domain.errors import DrawError, InvalidRequest
from tombola.producers.domain.money import AMOUNT_MAX, parse_amount
from tombola.producers.domain.operations import operation_of
from tombola.producers.domain.operations.adjust import AdjustRequest
from tombola.producers.domain.operations.expire import ExpireRequest
from tombola.producers.domain.operations.hold import HoldRequest
from tombola.producers.domain.operations.operation import (
    Lifetime,
    Locked,
    LockedAccount,
    Movement,
    Moves,
    Play,
    Refusal,
    Rejection,
    Written,
)
from tombola.producers.domain.operations.post import PostRequest
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.operations.refund import RefundRequest
from tombola.producers.domain.operations.transfer import TransferRequest
from tombola.producers.domain.operations.void import VoidRequest

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
UNTIL = "2026-01-01T00:00:00+00:00"
ODDS = blind_wheels()["default"].campaign.odds_hash


class Line(NamedTuple):
    """A ledger row as a test writes it."""

    idempotency_key: str
    business_type: str
    delta: Decimal
    before: Decimal
    after: Decimal
    account_id: int = 6
    asset_code: str = "POINT"
    notes: str = ""


def line(key: str, business_type: str, delta: str, before: str = "20.00", notes: str = "") -> Line:
    return Line(key, business_type, Decimal(delta), Decimal(before), Decimal(before) + Decimal(delta), notes=notes)


DRAWN = [
    line("d:consume", "lottery_consume", "-1.00", notes=f"odds={ODDS} seed=0123456789abcdef"),
    line("d:reward", "lottery_reward", "5.00", "19.00", notes=f"odds={ODDS} seed=0123456789abcdef"),
]
HELD = [line("h:hold", "hold", "-8.00", notes="until=2026-11-27T12:15:00+00:00")]
ROWS: dict[str, Sequence[Row]] = {"d": DRAWN, "h": HELD}

COMPLETED: list[Request] = [
    RechargeRequest(account_id=6, request_key="k", amount="5", channel="bank", reference="pay_1"),
    TransferRequest(account_id=6, request_key="k", amount="5", to=7, reference="x"),
    AdjustRequest(account_id=6, request_key="k", amount="-5", reason="paid twice, see #12"),
    HoldRequest(account_id=6, request_key="k", amount="5.5", valid_s=60),
    PostRequest(account_id=6, request_key="k", hold="h", amount="3", to=7),
    PostRequest(account_id=6, request_key="k", hold="h"),
    VoidRequest(account_id=6, request_key="k", hold="h", reason="cancelled"),
    RefundRequest(account_id=6, request_key="k", draw="d"),
    RefundRequest(account_id=6, request_key="k", draw="d", policy="charge_only", reason="by mistake"),
    RefundRequest(account_id=6, request_key="k", draw="d", policy="write_off"),
    ExpireRequest(account_id=6, request_key="k", until=UNTIL),
]


def locked(balance: str = "20.00", rows: dict[str, Sequence[Row]] = ROWS) -> Locked:
    accounts = {6: LockedAccount("POINT", Decimal(balance)), 7: LockedAccount("POINT", Decimal(1))}
    lifetimes = {(6, ExpireRequest(account_id=6, until=UNTIL).stored_until): Lifetime(Decimal(30), Decimal(14))}
    return Locked(accounts | {8: LockedAccount("COIN", Decimal(1))}, blind_wheels(), None, rows, lifetimes, None, NOW)


def written(request: Request, where: Locked) -> list[Line]:
    """The ledger rows that the decision writes."""
    decision = operation_of(request).decide(request, where)
    assert not isinstance(decision, Rejection | Refusal | Play), decision
    movements: Sequence[Movement] = decision.movements if isinstance(decision, Moves) else decision
    balances = {account_id: it.balance for account_id, it in where.accounts.items()}
    lines = []
    for it in movements:
        before = balances[it.account_id]
        balances[it.account_id] = after = before + it.delta
        key = f"{request.ledger_key}:{it.entry_type}"
        lines.append(Line(key, it.business_type, it.delta, before, after, it.account_id, "POINT", it.notes))
    return lines


def found(request: Request, rows: Sequence[Row], earlier: Mapping[str, Sequence[Row]] = ROWS) -> list[str]:
    """What the audit's check of the request finds."""
    said = Written("completed", rows, blind_wheels(), None, lambda key: earlier.get(key, ()))
    return [what for wrong in operation_of(request).check(request, said).values() for what in wrong]


@pytest.mark.parametrize("request_", COMPLETED, ids=lambda it: f"{it.kind}-{it.terms}"[:40])
def test_a_request_survives_the_wire_and_its_row(request_: Request) -> None:
    assert operations.parse_request(request_.encode()) == request_
    assert operations.parse_request(request_.encode()).encode() == request_.encode()
    campaign = getattr(request_, "campaign", "")
    assert operations.restore("k", "k", 6, campaign, request_.kind, request_.terms) == request_


@pytest.mark.parametrize("request_", COMPLETED, ids=lambda it: f"{it.kind}-{it.terms}"[:40])
def test_the_check_accepts_what_was_decided_and_nothing_else(request_: Request) -> None:
    rows = written(request_, locked())
    assert found(request_, rows) == []
    assert all(row.after >= 0 for row in rows)
    body = operation_of(request_).result(request_, rows)
    result = parse_movement_result(body)
    own = [row for row in rows if row.account_id == 6]
    assert (result.kind, result.status, result.balance_after) == (request_.kind, "completed", str(own[-1].after))
    for number, row in enumerate(rows):
        for forged in (
            row._replace(delta=row.delta + Decimal("0.01")),
            row._replace(business_type="lottery_reward"),
            row._replace(account_id=9),
            row._replace(notes="policy=none until=2000-01-01T00:00:00+00:00"),
            row._replace(idempotency_key=f"{row.idempotency_key}_2"),
        ):
            assert found(request_, [*rows[:number], forged, *rows[number + 1 :]]), forged
        assert found(request_, [*rows[:number], *rows[number + 1 :]]) or len(rows) == 1
        assert found(request_, [*rows, row._replace(idempotency_key="k:twice")])


def test_what_refers_to_another_request_must_have_it() -> None:
    for request in COMPLETED:
        if request.ledger_key != request.request_key:
            assert found(request, written(request, locked()), {})
    void, post = COMPLETED[6], COMPLETED[5]
    ended = {"h": [*HELD, line("h:post", "hold_post", "8.00")]}
    assert found(void, written(void, locked()), ended) == ["voids the hold h, which was posted"]
    ended = {"h": [*HELD, line("h:void", "hold_void", "8.00")]}
    assert found(post, written(post, locked()), ended) == ["posts the hold h, which was voided"]


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (RechargeRequest(account_id=9, amount="1"), "ACCOUNT_NOT_FOUND"),
        (RechargeRequest(account_id=6, amount=str(AMOUNT_MAX)), "BALANCE_LIMIT"),
        (TransferRequest(account_id=6, to=7, amount="20.01"), "INSUFFICIENT_BALANCE"),
        (TransferRequest(account_id=6, to=8, amount="1"), "OTHER_ASSET"),
        (TransferRequest(account_id=6, to=9, amount="1"), "ACCOUNT_NOT_FOUND"),
        (TransferRequest(account_id=9, to=6, amount="1"), "ACCOUNT_NOT_FOUND"),
        (AdjustRequest(account_id=6, amount="-20.01", reason="r"), "INSUFFICIENT_BALANCE"),
        (HoldRequest(account_id=6, amount="20.01"), "INSUFFICIENT_BALANCE"),
        (PostRequest(account_id=6, hold="h", amount="8.01"), "AMOUNT_ABOVE_HOLD"),
        (PostRequest(account_id=6, hold="h", to=8), "OTHER_ASSET"),
        (PostRequest(account_id=6, hold="nix"), "HOLD_NOT_FOUND"),
        (VoidRequest(account_id=7, hold="h"), "HOLD_NOT_FOUND"),
        (RefundRequest(account_id=7, draw="d"), "DRAW_NOT_FOUND"),
        (RefundRequest(account_id=6, draw="nix"), "DRAW_NOT_FOUND"),
        (RefundRequest(account_id=6, draw="d", campaign="winter"), "DRAW_NOT_FOUND"),
    ],
    ids=lambda it: f"{it.kind}-{it.terms}"[:30] if isinstance(it, Request) else it,
)
def test_rejections(request_: Request, reason: str) -> None:
    decision = operation_of(request_).decide(request_, locked())
    assert isinstance(decision, Rejection)
    assert decision.reason == reason
    result = parse_movement_result(operation_of(request_).result(request_, decision))
    assert (result.status, result.reason, result.transactions) == ("rejected", reason, [])


def test_a_hold_cannot_be_posted_after_its_time() -> None:
    post = PostRequest(account_id=6, hold="h")
    late = locked()._replace(now=datetime(2026, 11, 27, 12, 15, tzinfo=UTC))
    assert operation_of(post).decide(post, late) == Rejection("HOLD_EXPIRED", Decimal("20.00"))
    void = VoidRequest(account_id=6, hold="h")
    assert isinstance(operation_of(void).decide(void, late), Moves)


def test_what_a_refund_does_where_the_prize_is_gone() -> None:
    def refund(policy: str, balance: str) -> Any:
        request = RefundRequest(account_id=6, draw="d", policy=policy)
        return operation_of(request).decide(request, locked(balance))

    assert refund("refuse", "3.99") == Rejection("PRIZE_SPENT", Decimal("3.99"))
    # It takes the net: with the cost back, 4.00 are enough to return a prize of 5.00.
    assert [it.delta for it in refund("refuse", "4.00").movements] == [Decimal("1.00"), Decimal("-5.00")]
    assert [it.delta for it in refund("write_off", "1.50").movements] == [Decimal("1.00"), Decimal("-2.50")]
    assert [it.delta for it in refund("charge_only", "0.00").movements] == [Decimal("1.00")]


def test_what_expires_is_what_was_earned_before_and_not_taken_since() -> None:
    request = ExpireRequest(account_id=6, until=UNTIL)
    decide = operation_of(request).decide

    def due(earned: int, taken: int, balance: str = "20.00") -> Any:
        lifetimes = {(6, request.stored_until): Lifetime(Decimal(earned), Decimal(taken))}
        decision = decide(request, locked(balance)._replace(lifetimes=lifetimes))
        return decision.reason if isinstance(decision, Rejection) else [it.delta for it in decision]  # type: ignore[union-attr]

    assert due(30, 14) == [Decimal(-16)]
    assert due(30, 30) == due(30, 99) == "NOTHING_DUE"
    assert due(30, 0, "12.00") == [Decimal("-12.00")]  # an account of older days, whose rows do not say it all


@pytest.mark.parametrize(
    "given",
    ["", "0", "0.00", "-1", "1.001", "1e3", "NaN", "Infinity", "1,00", " 1", "１", "100000000", 1, 1.5, None, True],
)
def test_what_is_no_amount(given: object) -> None:
    with pytest.raises(InvalidRequest, match="an amount is text"):
        parse_amount(given)
    assert parse_amount("5") == parse_amount(Decimal(5)) == parse_amount("5.00")
    assert parse_amount("-5.5", is_signed=True) == Decimal("-5.50")


def body(kind: str, **fields: Any) -> bytes:
    return json.dumps({"v": 2, "kind": kind, "account_id": 6, "request_key": "k"} | fields).encode()


@pytest.mark.parametrize(
    "given",
    [
        body("recharge"),
        body("recharge", amount=5),
        body("recharge", amount=5.0),
        body("recharge", amount="-5"),
        body("recharge", amount="5", to=7),
        body("recharge", amount="5", reference="two words"),
        body("recharge", amount="5", reference="x" * 101),
        body("recharge", amount="5", channel="Bank!"),
        body("transfer", amount="5"),
        body("transfer", amount="5", to=6),
        body("transfer", amount="5", to=True),
        body("transfer", amount="5", to="7"),
        body("transfer", amount="5", to=2**63),
        body("adjust", amount="5"),
        body("adjust", amount="5", reason=" "),
        body("adjust", amount="5", reason="line\nbreak"),
        body("adjust", amount="5", reason="🎲" * 50),  # does not fit into the row as JSON
        body("hold", amount="5", valid_s=0),
        body("hold", amount="5", valid_s=10**9),
        body("hold", amount="5", valid_s=True),
        body("post", hold="a:b"),
        body("post"),
        body("post", hold="h", amount="0"),
        body("post", hold="h", to=6),
        body("void", hold=""),
        body("void", hold="h", reason="\x00"),
        body("refund"),
        body("refund", draw="d", policy="all"),
        body("refund", draw="d", policy=None),
        body("refund", draw="d", campaign="a b"),
        body("expire", until="2026-01-01"),
        body("expire", until="yesterday"),
        body("expire", until=1),
        body("mint", amount="5"),
    ],
)
def test_garbage_is_refused_in_one_message(given: bytes) -> None:
    with pytest.raises(DrawError) as caught:
        operations.parse_request(given)
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    assert msgspec.json.decode(given)["kind"]  # it is JSON: nothing else was wrong with it


def test_every_business_type_has_a_house_side_and_one_writer() -> None:
    types = [it for operation in operations.OPERATIONS.values() for it in operation.TYPES.values()]
    assert set(types) <= operations.house_accounts().keys()
    sides = [set(it.HOUSE) for it in operations.OPERATIONS.values()]
    assert sum(map(len, sides)) == len(operations.house_accounts())
    assert "recharge" not in operations.business_types()
