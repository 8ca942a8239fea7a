"""Movements of operators: settled at once and once, whole and on record, beside workers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, event, text

from tests.books import table
from tests.ledgers import migrated, recharge
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.domain.errors import IdempotencyKeyReused, InvalidRequest, MovementRejected, SessionNotFound
from tombola.producers.domain.operations.adjust import AdjustRequest
from tombola.producers.domain.operations.hold import HoldRequest
from tombola.producers.domain.operations.post import PostRequest
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.operations.refund import RefundRequest
from tombola.producers.domain.operations.transfer import TransferRequest
from tombola.producers.domain.operations.void import VoidRequest
from tombola.producers.storage import requests
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.transactions import transaction
from tombola.worker.audit import audit
from tombola.worker.ledger.accounts import open_account
from tombola.worker.movements.finding import find_draw, find_hold, holds_of
from tombola.worker.movements.settling import foretell, settle
from tombola.worker.operators import actions
from tombola.worker.operators.actions import Action
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Settled
from tombola.worker.settle.rules import Rules

pytestmark = pytest.mark.slow

WHEELS = {DEFAULT_CAMPAIGN.name: Wheel(DEFAULT_CAMPAIGN, b"seed" * 8)}
RULES = Rules(WHEELS)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = open_engine(database_url)
    migrated(made)
    yield made
    assert audit.audit(made, WHEELS).violations == []
    made.dispose()


def account(engine: Engine, balance: str = "10.00", user: int = 1, asset: str = "POINT") -> int:
    return open_account(engine, user_id=user, asset_code=asset, balance=Decimal(balance))


def recorded(engine: Engine) -> list[Action]:
    with engine.connect().execution_options(read_only=True) as connection:
        return actions.recent(connection, rows_max=100)


def balance_of(engine: Engine, account_id: int) -> Decimal:
    (found,) = (row for row in table(engine, "account_asset_balances") if row["id"] == account_id)
    return Decimal(found["balance"]).scaleb(-2)


def state(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    """All that a movement may change."""
    names = (
        *("account_asset_balances", "asset_transactions", "api_idempotency_requests"),
        *("account_holds", "operator_actions"),
    )
    return {name: table(engine, name) for name in names}


def drawn(engine: Engine, account_id: int, *, wins: bool) -> DrawRequest:
    draws = (DrawRequest(account_id=account_id, request_key=f"d{number}") for number in range(100))
    draw = next(it for it in draws if bool(WHEELS["default"].draw(account_id, it.request_key).amount) is wins)
    (answer,) = tries.settle(engine, [draw], RULES)
    assert isinstance(answer, Settled)
    return draw


def refund(draw: DrawRequest, key: str, policy: str = "refuse") -> RefundRequest:
    return RefundRequest(account_id=draw.account_id, request_key=key, draw=draw.request_key, policy=policy, reason="x")


def test_a_movement_settles_once_and_is_on_record_once(engine: Engine) -> None:
    account_id = account(engine)
    asked = RechargeRequest(
        account_id=account_id, request_key="night", amount="5", reference="order-7", channel="shell"
    )
    first = settle(engine, asked, operator="ann", reason="a gift")
    assert (first.result.status, first.result.balance_after, first.is_repeat) == ("completed", "15.00", False)
    settle(engine, AdjustRequest(account_id=account_id, amount="1.00", reason="a cent"), operator="ann")
    before = state(engine)
    again = settle(engine, asked, operator="bob", reason="again")
    assert (again.result, again.is_repeat) == (first.result, True)
    other = account(engine, user=2)
    before = state(engine)
    for reused in (
        RechargeRequest(account_id=account_id, request_key="night", amount="6"),
        RechargeRequest(account_id=other, request_key="night", amount="5", reference="order-7", channel="shell"),
        TransferRequest(account_id=account_id, request_key="night", amount="5", to=other),
        RechargeRequest(account_id=account_id, request_key="fresh", lottery_session_id="night", amount="5"),
    ):
        with pytest.raises(IdempotencyKeyReused, match="was used for another request"):
            settle(engine, reused, operator="ann")
    assert state(engine) == before
    action = recorded(engine)[-1]
    assert (action.operator, action.action, action.reason, action.count) == ("ann", "account recharge", "a gift", 1)
    assert action.details == {
        **{"account_id": account_id, "request_key": "night", "amount": "5.00", "reference": "order-7"},
        **{"channel": "shell", "balance_after": "15.00", "rows": 1},
    }
    (row,) = (it for it in before["api_idempotency_requests"] if it["request_key"] == "night")
    assert (row["kind"], row["settled_by"], row["accepted_at"]) == ("recharge", "operator ann", None)


def test_a_rejection_is_told_and_leaves_nothing_behind(engine: Engine) -> None:
    poor, coins = account(engine, "1.00"), account(engine, "1.00", asset="COIN")
    full = account(engine, "99999999.99", user=2)
    draw = drawn(engine, account(engine, user=3), wins=False)
    before = state(engine)
    cases: list[tuple[Request, str]] = [
        (RechargeRequest(account_id=4711, request_key="k", amount="1"), "ACCOUNT_NOT_FOUND: there is no such account"),
        (TransferRequest(account_id=poor, request_key="k", amount="2", to=full), "INSUFFICIENT_BALANCE: .* holds 1.00"),
        (TransferRequest(account_id=poor, request_key="k", amount="1", to=full), "BALANCE_LIMIT: .* 99,999,999.99"),
        (TransferRequest(account_id=poor, request_key="k", amount="1", to=coins), "OTHER_ASSET: .* different assets"),
        (AdjustRequest(account_id=poor, request_key="k", amount="-1.01", reason="x"), "INSUFFICIENT_BALANCE"),
        (VoidRequest(account_id=poor, request_key="k", hold="none"), "HOLD_NOT_FOUND"),
        (RefundRequest(account_id=poor, request_key="k", draw=draw.request_key), "DRAW_NOT_FOUND"),
    ]
    for request, why in cases:
        with pytest.raises(MovementRejected, match=f"rejected, {why}.*nothing is changed"):
            settle(engine, request, operator="ann")
    assert state(engine) == before
    # Under the same key it is tried again, and goes through.
    settle(engine, RechargeRequest(account_id=poor, request_key="more", amount="1"), operator="ann")
    moved = settle(
        engine, TransferRequest(account_id=poor, request_key="k", amount="2", to=draw.account_id), operator="a"
    )
    assert moved.result.balance_after == "0.00"


def test_a_rejection_that_a_worker_has_recorded_is_final(engine: Engine) -> None:
    poor, other = account(engine, "1.00"), account(engine, user=2)
    asked = TransferRequest(account_id=poor, request_key="k", amount="5", to=other)
    tries.settle(engine, [asked], RULES)
    settle(engine, RechargeRequest(account_id=poor, request_key="more", amount="9"), operator="ann")
    with pytest.raises(MovementRejected, match=r"INSUFFICIENT_BALANCE.*takes a new key"):
        settle(engine, asked, operator="ann")
    assert [it.action for it in recorded(engine)] == ["account recharge"]


def test_what_was_accepted_or_given_up(engine: Engine) -> None:
    account_id = account(engine)
    asked = [RechargeRequest(account_id=account_id, request_key=key, amount="5") for key in ("waits", "dead")]
    with transaction(engine) as open_transaction:
        now = utc_now()
        requests.accept(
            open_transaction, [Submission(it, "shop") for it in asked], now, publish_at=now, is_published=True
        )
    with engine.begin() as connection:
        requests.give_up(connection, "dead", asked[1].fingerprint(), "PARKED")
    assert settle(engine, asked[0], operator="ann").result.balance_after == "15.00"
    (answer,) = tries.settle(engine, [asked[0]], RULES)  # its message arrives after all
    assert isinstance(answer, Settled)
    assert answer.is_repeat
    with pytest.raises(InvalidRequest, match=r"given up .*PARKED.*replay"):
        settle(engine, asked[1], operator="ann")
    with pytest.raises(InvalidRequest, match="no draw"):
        settle(engine, DrawRequest(account_id=account_id), operator="ann")


@pytest.mark.parametrize("key", ["night", "recharge_1_1795424054123_1c80fe"])
def test_what_an_older_release_has_recharged_is_a_repeat(engine: Engine, key: str) -> None:
    account_id = account(engine)
    row_key = key if key.startswith("recharge_") else f"{key}:recharge"
    recharge(engine, account_id, Decimal(5), row_key=row_key, by="ann")
    before = state(engine)
    asked = RechargeRequest(account_id=account_id, request_key=key, amount="5", channel="shell")
    moved = settle(engine, asked, operator="ann")
    assert (moved.is_repeat, moved.result.balance_after) == (True, "15.00")
    assert [it.idempotency_key for it in moved.result.transactions] == [row_key]
    with pytest.raises(IdempotencyKeyReused):
        settle(engine, RechargeRequest(account_id=account_id, request_key=key, amount="6"), operator="ann")
    assert state(engine) == before


def test_it_is_whole_or_not_at_all(engine: Engine) -> None:
    account_id = account(engine)

    @event.listens_for(engine, "before_cursor_execute")
    def fail(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        if "INSERT INTO operator_actions" in statement:
            raise KeyboardInterrupt

    before = state(engine)
    asked = RechargeRequest(account_id=account_id, request_key="k", amount="5")
    with pytest.raises(KeyboardInterrupt):
        settle(engine, asked, operator="ann")
    assert state(engine) == before
    event.remove(engine, "before_cursor_execute", fail)
    assert not settle(engine, asked, operator="ann").is_repeat


def test_one_key_by_many_at_once(engine: Engine) -> None:
    ids = [account(engine, user=number) for number in (1, 2)]

    def act(number: int) -> str:
        asked = RechargeRequest(account_id=ids[number % 2], request_key="one", amount="3")
        try:
            return "again" if settle(engine, asked, operator="ann").is_repeat else "done"
        except IdempotencyKeyReused:
            return "refused"

    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(act, range(12)))
    assert (said.count("done"), said.count("again"), said.count("refused")) == (1, 5, 6)
    assert len(recorded(engine)) == 1


def test_ten_keys_refund_a_draw_once(engine: Engine) -> None:
    draw = drawn(engine, account(engine), wins=True)

    def act(number: int) -> str:
        try:
            settle(engine, refund(draw, f"r{number}"), operator="ann")
        except MovementRejected as error:
            return str(error.reason)
        return "done"

    with ThreadPoolExecutor(5) as pool:
        said = sorted(pool.map(act, range(10)))
    assert said == ["ALREADY_REFUNDED"] * 9 + ["done"]
    assert balance_of(engine, draw.account_id) == 10
    assert [it.action for it in recorded(engine)] == ["draw refund"]


def test_beside_workers(engine: Engine) -> None:
    """Transfers in both directions while draws settle on the same accounts: none is lost, and none waits for ever."""
    ids = [account(engine, "1000.00", user=number) for number in (1, 2)]
    draws = [DrawRequest(account_id=ids[number % 2], request_key=f"d{number:03}") for number in range(200)]

    def work(start: int) -> None:
        for at in range(start, len(draws), 40):
            tries.settle(engine, draws[at : at + 20], RULES)

    def move(number: int) -> None:
        payer, to = ids if number % 2 else ids[::-1]
        settle(engine, TransferRequest(account_id=payer, request_key=f"t{number}", amount="1", to=to), operator="ann")

    with ThreadPoolExecutor(6) as pool:
        working = [pool.submit(work, start) for start in (0, 20)]
        moving = [pool.submit(move, number) for number in range(24)]
        for it in (*working, *moving):
            it.result()
    assert len(recorded(engine)) == 24
    settled = [row for row in table(engine, "api_idempotency_requests") if row["status"] == "completed"]
    assert len(settled) == 224


def test_what_is_foretold_comes_true_and_writes_nothing(engine: Engine) -> None:
    account_id = account(engine, "1.00")
    draw = drawn(engine, account_id, wins=True)  # 5.00 now
    other = account(engine, "0.00", user=2)
    settle(engine, TransferRequest(account_id=account_id, request_key="t", amount="3", to=other), operator="ann")
    before = state(engine)
    said = {it: foretell(engine, refund(draw, "r", it)).result for it in ("refuse", "charge_only", "write_off")}
    assert {policy: (it.status, it.reason, it.balance_after) for policy, it in said.items()} == {
        "refuse": ("rejected", "PRIZE_SPENT", "2.00"),
        "charge_only": ("completed", None, "3.00"),
        "write_off": ("completed", None, "0.00"),
    }
    with pytest.raises(IdempotencyKeyReused):
        foretell(engine, refund(draw, "t"))
    assert state(engine) == before
    done = settle(engine, refund(draw, "r", "write_off"), operator="ann")
    assert done.result == said["write_off"]
    assert foretell(engine, refund(draw, "r", "write_off")).is_repeat
    assert foretell(engine, refund(draw, "r2", "refuse")).result.reason == "ALREADY_REFUNDED"


def test_holds_are_found_and_end_once(engine: Engine) -> None:
    account_id, other = account(engine), account(engine, user=2)
    for key in ("a", "b"):
        settle(engine, HoldRequest(account_id=account_id, request_key=key, amount="4", valid_s=60), operator="ann")
    with engine.connect().execution_options(read_only=True) as connection:
        assert [
            (it.hold_key, str(it.state), str(it.amount)) for it in holds_of(connection, account_id, rows_max=9)
        ] == [
            ("a", "open", "4.00"),
            ("b", "open", "4.00"),
        ]
        assert find_hold(connection, "a").account_id == account_id
        for unknown in ("c", "é"):
            with pytest.raises(InvalidRequest, match="there is no hold"):
                find_hold(connection, unknown)
    post = PostRequest(account_id=account_id, request_key="p", hold="a", amount="3", to=other)
    assert settle(engine, post, operator="ann").result.balance_after == "3.00"  # 4.00 back, and 3.00 paid
    with pytest.raises(MovementRejected, match="HOLD_ENDED"):
        settle(engine, VoidRequest(account_id=account_id, request_key="v", hold="a"), operator="ann")
    settle(engine, VoidRequest(account_id=account_id, request_key="v", hold="b"), operator="ann")
    with engine.connect().execution_options(read_only=True) as connection:
        assert holds_of(connection, account_id, rows_max=9) == []
        found = holds_of(connection, account_id, rows_max=9, open_only=False)
    assert {it.hold_key: str(it.state) for it in found} == {"a": "posted", "b": "voided"}
    assert balance_of(engine, account_id) == 7


def test_a_draw_is_found_by_session_and_by_key(engine: Engine) -> None:
    account_id = account(engine)
    tries.settle(engine, [DrawRequest(account_id=account_id, request_key="k", lottery_session_id="s")], RULES)
    settle(engine, RechargeRequest(account_id=account_id, request_key="r", amount="1"), operator="ann")
    with engine.connect().execution_options(read_only=True) as connection:
        assert find_draw(connection, "k") == find_draw(connection, "s")
        with pytest.raises(InvalidRequest, match="kind recharge"):
            find_draw(connection, "r")
        for unknown in ("x", "é"):
            with pytest.raises(SessionNotFound):
                find_draw(connection, unknown)


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("DELETE FROM operator_actions WHERE action = 'account recharge'", "recharge k: an operator has settled it"),
        (
            "UPDATE operator_actions SET details = REPLACE(details, '\"account_id\":1', '\"account_id\":2')",
            "recharge k: is completed on account 1, on record is account recharge of account 2",
        ),
        ("UPDATE operator_actions SET details = '['", "action 1: its details cannot be read"),
        ("UPDATE api_idempotency_requests SET settled_by = 'w1'", "account recharge k: of account 1 is on record"),
    ],
)
def test_the_audit_compares_the_record(database_url: str, statement: str, found: str) -> None:
    engine = open_engine(database_url)
    migrated(engine)
    settle(engine, RechargeRequest(account_id=account(engine), request_key="k", amount="1"), operator="ann")
    assert audit.audit(engine, WHEELS).violations == []
    with engine.begin() as connection:
        assert connection.execute(text(statement.replace(":", r"\:"))).rowcount
    assert any(str(it).startswith(f"I12 {found}") for it in audit.audit(engine, WHEELS).violations)
    engine.dispose()
