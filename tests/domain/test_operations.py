"""The operations, as the pure functions that they are: no database, no broker."""

import json
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import pytest
from msgspec import structs

from tombola.producers.domain import keys, operations
from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import DrawRequest, parse_result
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.domain.operations import draw
from tombola.producers.domain.operations.operation import (
    Locked,
    LockedAccount,
    Movement,
    Moves,
    Play,
    Refusal,
    Rejection,
    Written,
)

WHEELS = {DEFAULT_CAMPAIGN.name: Wheel(DEFAULT_CAMPAIGN, b"0" * 32)}
RESULTS = json.loads((Path(__file__).parent / "golden" / "results.json").read_bytes())


class Line(NamedTuple):
    """A ledger row as a test writes it."""

    idempotency_key: str
    business_type: str
    delta: Decimal
    before: Decimal
    after: Decimal
    account_id: int = 6
    asset_code: str = "POINT"
    notes: str = WHEELS["default"].notes


def lines(*rows: tuple[str, str, str], account_id: int = 6, asset_code: str = "POINT") -> list[Line]:
    """Of request `k`: the type in its key, delta, balance before."""
    return [
        Line(
            f"k:{entry_type}",
            f"lottery_{entry_type.partition('_')[0]}",
            Decimal(delta),
            Decimal(before),
            Decimal(before) + Decimal(delta),
            account_id,
            asset_code,
        )
        for entry_type, delta, before in rows
    ]


def request_that(wins: bool) -> DrawRequest:
    candidates = (DrawRequest(account_id=6, request_key=f"k{number}") for number in range(100))
    return next(it for it in candidates if bool(WHEELS["default"].draw(6, it.request_key).amount) is wins)


@pytest.mark.parametrize("case", RESULTS, ids=lambda case: case["name"])
def test_a_result_is_made_of_request_and_rows_alone(case: dict[str, str]) -> None:
    """Byte for byte what the release before has answered."""
    said = parse_result(case["body"].encode())
    request = DrawRequest(
        account_id=said.account_id,
        request_key=said.request_key,
        lottery_session_id=said.lottery_session_id,
        campaign=said.campaign,
    )
    rows = [
        Line(
            it.idempotency_key,
            it.business_type,
            Decimal(it.delta_amount),
            Decimal(it.balance_before),
            Decimal(it.balance_after),
            said.account_id,
            it.asset_code,
        )
        for it in said.transactions
    ]
    balance = None if said.balance_after is None else Decimal(said.balance_after)
    outcome = rows if said.reason is None else Rejection(said.reason, balance)
    assert draw.result(request, outcome) == case["body"].encode()


def test_unlike_assets_are_not_added_up() -> None:
    request = DrawRequest(account_id=6, request_key="k")
    points = lines(("consume", "-1.00", "10.00"), ("reward", "5.00", "9.00"))
    coins = lines(("reward_2", "3.00", "40.00"), account_id=7, asset_code="COIN")
    said = parse_result(draw.result(request, [*points, *coins]))
    assert (said.prize_amount, said.balance_after, said.won) == ("5.00", "14.00", True)
    assert [(it.asset_code, it.delta_amount) for it in said.transactions] == [
        ("POINT", "-1.00"),
        ("POINT", "5.00"),
        ("COIN", "3.00"),
    ]
    # Nothing but coins is a prize as well, and a notice alone is none.
    only_coins = parse_result(draw.result(request, [points[0], *coins]))
    assert (only_coins.prize_amount, only_coins.balance_after, only_coins.won) == ("0.00", "9.00", True)
    notice = lines(("consume", "-1.00", "10.00"), ("notice", "0.00", "9.00"))
    assert parse_result(draw.result(request, notice)).won is False


def test_no_result_is_made_up_where_the_rows_are_gone() -> None:
    for rows in ([], lines(("reward", "5.00", "9.00"), account_id=7)):
        with pytest.raises(ValueError, match="no row of draw k"):
            draw.result(DrawRequest(account_id=6, request_key="k"), rows)


def test_a_draw_says_what_it_needs_and_what_it_writes() -> None:
    winner, loser = request_that(wins=True), request_that(wins=False)
    locked = Locked({6: LockedAccount("POINT", Decimal("1.00")), 7: LockedAccount("COIN", Decimal(9))}, WHEELS)
    notes = WHEELS["default"].notes
    charge = Movement(6, "consume", "lottery_consume", Decimal("-1.00"), notes)
    assert list(decided(winner, locked)) == [charge, Movement(6, "reward", "lottery_reward", Decimal("5.00"), notes)]
    assert list(decided(loser, locked)) == [charge]
    for request in (winner, loser):
        assert {it.account_id for it in decided(request, locked)} <= set(draw.needs(request, WHEELS).accounts)
    poor = locked._replace(accounts={6: LockedAccount("POINT", Decimal("0.99"))})
    assert draw.decide(winner, poor) == Rejection("INSUFFICIENT_BALANCE", Decimal("0.99"))
    assert draw.decide(DrawRequest(account_id=7), locked) == Rejection("ACCOUNT_NOT_FOUND", None)  # COIN
    assert draw.decide(DrawRequest(account_id=8), locked) == Rejection("ACCOUNT_NOT_FOUND", None)
    unknown = draw.decide(DrawRequest(account_id=6, campaign="winter"), locked)
    assert isinstance(unknown, Refusal)
    assert unknown.cause == Cause.UNKNOWN_CAMPAIGN


def test_what_a_draw_writes_depends_on_its_nonce() -> None:
    locked = Locked({6: LockedAccount("POINT", Decimal("1.00"))}, WHEELS)

    def rows(nonce: str) -> int:
        return len(decided(DrawRequest(account_id=6, request_key="k", client_nonce=nonce), locked))

    nonces = [f"nonce-{number:010}" for number in range(100)]
    wins = sum(rows(it) == 2 for it in nonces)
    assert 10 < wins < 50  # of one key, which without a nonce has one outcome for ever
    assert wins == sum(rows(it) == 2 for it in nonces)


def test_the_audit_of_a_draw_looks_at_its_nonce() -> None:
    won = next(
        it
        for it in (
            DrawRequest(account_id=6, request_key="k", client_nonce=f"nonce-{number:010}") for number in range(99)
        )
        if WHEELS["default"].draw(6, "k", it.client_nonce.encode()).amount
    )
    rows = lines(CHARGE, PRIZE)
    assert [*draw.check(won, Written("completed", rows, WHEELS))["I2"]] == []
    losers = (structs.replace(won, client_nonce=f"other-{number:010}") for number in range(99))
    lost = next(it for it in losers if not WHEELS["default"].draw(6, "k", it.client_nonce.encode()).amount)
    assert [*draw.check(lost, Written("completed", rows, WHEELS))["I2"]] == ["was paid 5.00, its draw says 0"]


def decided(request: DrawRequest, locked: Locked) -> Sequence[Movement]:
    decision = draw.decide(request, locked)
    assert not isinstance(decision, Rejection | Refusal | Play | Moves)
    return decision


CHARGE, PRIZE = ("consume", "-1.00", "10.00"), ("reward", "5.00", "9.00")


@pytest.mark.parametrize(
    ("wins", "status", "rows", "wrong"),
    [
        (True, "completed", lines(CHARGE, PRIZE), {}),
        (False, "completed", lines(CHARGE), {}),
        (False, "rejected", [], {}),
        (True, "completed", lines(PRIZE), {"I1": "is completed and has 0 charges", "I11": "has 1 ledger rows"}),
        (True, "completed", lines(CHARGE), {"I2": "was paid 0, its draw says 5.00", "I11": "has 1 ledger rows"}),
        (True, "completed", lines(CHARGE, ("reward", "6.00", "9.00")), {"I2": "was paid 6.00, its draw says 5.00"}),
        (
            False,
            "completed",
            lines(CHARGE, PRIZE),
            {"I2": "was paid 5.00, its draw says 0", "I11": "has 2 ledger rows"},
        ),
        (False, "rejected", lines(CHARGE), {"I1": "is rejected and has 1 charges"}),
        (False, "accepted", lines(PRIZE), {"I2": "is accepted and was paid 5.00"}),
        (
            True,
            "completed",
            [it._replace(notes="odds=other") for it in lines(CHARGE, PRIZE, ("reward_2", "5.00", "14.00"))],
            {
                "I2": "was drawn with other odds or another seed, and cannot be recomputed",
                "I11": "has 3 ledger rows",
            },
        ),
    ],
)
def test_the_check_of_a_draw(wins: bool, status: str, rows: Sequence[Line], wrong: dict[str, str]) -> None:
    request = request_that(wins)
    rows = [it._replace(idempotency_key=it.idempotency_key.replace("k:", f"{request.request_key}:")) for it in rows]
    found = draw.check(request, Written(status, rows, WHEELS))
    # Whatever is wrong with a draw, its rows are not what it says either.
    right = found.keys() - wrong.keys() - ({"I14"} if wrong else set())
    assert {invariant: list(found[invariant]) for invariant in right} == {invariant: [] for invariant in right}
    again = draw.check(request, Written(status, rows, WHEELS))
    assert {invariant: list(again[invariant]) for invariant in wrong} == {it: [said] for it, said in wrong.items()}


def test_a_draw_is_known_by_its_row() -> None:
    single = DrawRequest(account_id=6, request_key="k", lottery_session_id="s", campaign="winter.2026")
    assert single.terms is None
    assert operations.restore("k", "s", 6, "winter.2026", None, None) == single
    ten = DrawRequest(account_id=6, request_key="k", lottery_session_id="s", campaign="winter.2026", pulls=10)
    assert ten.terms == '["winter.2026",10]'
    assert operations.restore("k", "s", 6, "winter.2026", "draw", ten.terms) == ten


def test_the_names_of_ledger_rows_fit_and_are_one_operations_own() -> None:
    # A post pays by a transfer's rows; the other side of each type is still said by one operation.
    business_types = [it for operation in operations.OPERATIONS.values() for it in operation.HOUSE]
    assert len(business_types) == len(set(business_types))
    for kind, operation in operations.OPERATIONS.items():
        assert operation.FIELDS.kind == kind
        for entry_type in operation.TYPES:
            keys.derive("k" * keys.REQUEST_KEY_LENGTH_MAX, entry_type)  # raises for one that does not fit
