"""Processes die at each gap of each movement: nothing is lost, and nothing happens twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from redis import Redis
from sqlalchemy import text, update

from tests import processes
from tests.books import table
from tests.processes import PROJECT, QUICK_CLAIM, House, Worker, environment, wait_for
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.operations.adjust import AdjustRequest
from tombola.producers.domain.operations.expire import ExpireRequest
from tombola.producers.domain.operations.hold import HoldRequest
from tombola.producers.domain.operations.post import PostRequest
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.operations.refund import RefundRequest
from tombola.producers.domain.operations.transfer import TransferRequest
from tombola.producers.domain.operations.void import VoidRequest
from tombola.producers.results import KEY_PREFIX
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.schema import account_holds
from tombola.worker.movements.holds import void_expired_once, void_request
from tombola.worker.relay.relay import Relay
from tombola.worker.settle import tries
from tombola.worker.settle.rules import Rules

DYING = [sys.executable, "-m", "tests.chaos.dying_worker"]
DYING_SHELL = [sys.executable, "-m", "tests.chaos.dying_shell"]
SETTLED_WITHIN_S = 60.0
# One lane, and room for all of them: one batch, one transaction.
TOGETHER = QUICK_CLAIM | {"TOMBOLA_BATCH_SIZE_MAX": "50", "TOMBOLA_LANES": "1"}
CHAOS = pytest.mark.chaos


@pytest.fixture(params=["redis", "rabbitmq"])
def house(request: pytest.FixtureRequest, mariadb_url: str, redis_url: str) -> Iterator[House]:
    broker_url = redis_url if request.param == "redis" else request.getfixturevalue("rabbitmq_url")
    with House(mariadb_url, broker_url, redis_url, **TOGETHER) as house:
        yield house
        assert house.violations() == []
        assert house.causes() == []


@dataclass
class Shop:
    """One request of each kind, none of which has settled, and the balances once all have."""

    asked: list[Request]
    after: dict[int, int]


def shop_of(house: House) -> Shop:
    """Accounts of 1,000.00, a draw to refund, a hold to post and one to void, and points that were earned long ago."""
    first, second, old = house.accounts(3)
    draws = (DrawRequest(account_id=first, request_key=f"d{number}") for number in range(99))
    draw = next(it for it in draws if house.wheels["default"].draw(first, it.request_key).amount)
    holds = [HoldRequest(account_id=first, request_key=key, amount="10") for key in ("to_post", "to_void")]
    tries.settle(house.engine, [draw, *holds], Rules(house.wheels))  # 1000 - 1 + 5 - 20
    with house.engine.begin() as connection:
        connection.execute(text(f"UPDATE asset_transactions SET created_at = '2024-01-01' WHERE account_id = {old}"))
    until = datetime(2025, 1, 1, tzinfo=UTC).isoformat()
    asked: list[Request] = [
        RechargeRequest(account_id=first, request_key="recharge", amount="5"),
        TransferRequest(account_id=first, request_key="transfer", amount="7", to=second),
        RefundRequest(account_id=first, request_key="refund", draw=draw.request_key),
        AdjustRequest(account_id=second, request_key="adjust", amount="-2", reason="a mistake"),
        HoldRequest(account_id=second, request_key="hold", amount="3"),
        PostRequest(account_id=first, request_key="post", hold="to_post", amount="4", to=second),
        VoidRequest(account_id=first, request_key="void", hold="to_void"),
        ExpireRequest(account_id=old, request_key="expire", until=until),
    ]
    return Shop(asked, {first: 1000_00 + 5_00 - 7_00 - 4_00, second: 1000_00 + 7_00 - 2_00 - 3_00 + 4_00, old: 0})


def balances(house: House) -> dict[int, int]:
    return {row["id"]: row["balance"] for row in table(house.engine, "account_asset_balances")}


def answered(house: House, asked: Sequence[Request]) -> set[str]:
    with Redis.from_url(house.env["TOMBOLA_RESULT_URL"]) as client:
        return {it.kind for it in asked if client.exists(KEY_PREFIX + it.lottery_session_id)}


def assert_killed(worker: Worker) -> None:
    assert worker.wait() == -signal.SIGKILL, worker.log()


@pytest.mark.parametrize(
    ("house", "place"),
    [
        ("redis", "before_commit"),
        ("redis", "after_commit"),
        ("rabbitmq", "after_commit"),
        pytest.param("redis", "after_results", marks=CHAOS),
        pytest.param("rabbitmq", "before_commit", marks=CHAOS),
        pytest.param("rabbitmq", "after_results", marks=CHAOS),
    ],
    indirect=["house"],
)
def test_a_worker_dies_with_a_movement_of_each_kind_in_hand(house: House, place: str) -> None:
    shop = shop_of(house)
    before, settled_before = balances(house), house.settled()
    house.publish(*[it.encode() for it in shop.asked])
    dying = house.env | {"DIE_AT": place, "DIE_ON": "1", "TOGETHER": str(len(shop.asked))}
    with processes.worker(dying, command=DYING, until="") as worker:
        assert_killed(worker)
    is_settled = place != "before_commit"
    assert house.settled() == settled_before + len(shop.asked) * is_settled
    assert balances(house) == (shop.after if is_settled else before)
    assert answered(house, shop.asked) == ({it.kind for it in shop.asked} if place == "after_results" else set())
    first = house.results()
    house.publish(*[it.encode() for it in shop.asked])  # and their callers ask again
    with processes.worker(house.env) as worker:
        house.wait_settled(settled_before + len(shop.asked), within_s=SETTLED_WITHIN_S, log=worker.log)
        wait_for(
            lambda: len(answered(house, shop.asked)) == len(shop.asked),
            within_s=SETTLED_WITHIN_S,
            what=lambda: f"answered: {answered(house, shop.asked)}\n{worker.log()[-4000:]}",
        )
        assert worker.stop() == 0
    assert_settled_once(house, shop, first)


def assert_settled_once(house: House, shop: Shop, first: dict[str, str]) -> None:
    results = house.results()
    assert {key: results[key] for key in first} == first
    said = {it.kind: json.loads(results[it.request_key]) for it in shop.asked}
    assert {kind: (it["status"], it["reason"]) for kind, it in said.items()} == {
        it.kind: ("completed", None) for it in shop.asked
    }
    assert balances(house) == shop.after


@CHAOS
def test_workers_die_again_and_again(house: House) -> None:
    """Each settles some more of three hundred movements on six accounts before it dies."""
    ids = house.accounts(6)
    asked: list[Request] = []
    for number in range(100):
        payer, to = ids[number % 6], ids[(number + 1 + number // 6 % 5) % 6]
        asked += [
            RechargeRequest(account_id=payer, request_key=f"r{number:03}", amount="2"),
            TransferRequest(account_id=payer, request_key=f"t{number:03}", amount="1", to=to),
            HoldRequest(account_id=to, request_key=f"h{number:03}", amount="1"),
        ]
    asked += [VoidRequest(account_id=it.account_id, hold=it.request_key) for it in asked if it.kind == "hold"]
    house.env["TOMBOLA_BATCH_SIZE_MAX"] = "7"
    house.publish(*[it.encode() for it in asked])
    for place in ("before_commit", "after_commit", "after_results", "after_commit"):
        dying = house.env | {"DIE_AT": place, "DIE_ON": "6"}
        with processes.worker(dying, command=DYING, until="") as worker:
            assert_killed(worker)
    with processes.worker(house.env) as worker:
        house.wait_settled(len(asked), within_s=SETTLED_WITHIN_S, log=worker.log)
        assert worker.stop() == 0
    # A void that overtook its hold was rejected: its amount is held still.
    held = sum(row["amount"] for row in table(house.engine, "account_holds") if row["state"] == "open")
    assert sum(balances(house).values()) == 6 * 1000_00 + 200_00 - held * 100


@pytest.mark.parametrize("house", ["redis"], indirect=True)
def test_a_relay_dies_between_the_accept_of_a_void_and_its_message(house: House) -> None:
    (account_id,) = house.accounts(1)
    hold = HoldRequest(account_id=account_id, request_key="h", amount="10")
    tries.settle(house.engine, [hold], Rules(house.wheels))
    with house.engine.begin() as connection:
        connection.execute(update(account_holds).values(expires_at=utc_now()))
    assert void_expired_once(house.engine) == 1  # and it is gone
    relay = Relay.from_settings(house.settings)
    assert relay.run_once() == 1
    relay.close()
    with processes.worker(house.env) as worker:
        house.wait_settled(2, within_s=SETTLED_WITHIN_S, log=worker.log)
        assert worker.stop() == 0
    assert balances(house) == {account_id: 1000_00}
    assert json.loads(house.results()[void_request("h", account_id).request_key])["status"] == "completed"


@pytest.mark.parametrize("house", ["redis"], indirect=True)
@pytest.mark.parametrize("place", ["before_commit", "after_commit"])
def test_a_shell_dies(house: House, place: str) -> None:
    first, second = house.accounts(2)
    words = ["account", "transfer", str(first), str(second), "7.00", "--key", "t", "--yes"]
    env = environment(house.env | {"DIE_AT": place})
    died = subprocess.run([*DYING_SHELL, *words], cwd=PROJECT, env=env, capture_output=True, timeout=60)
    assert died.returncode == -signal.SIGKILL, died.stderr
    moved = 7_00 if place == "after_commit" else 0
    assert balances(house) == {first: 1000_00 - moved, second: 1000_00 + moved}
    again = [sys.executable, "-m", "tombola.worker", *words]
    done = subprocess.run(again, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ("nothing was done now" in done.stdout) == (place == "after_commit")
    assert balances(house) == {first: 1000_00 - 7_00, second: 1000_00 + 7_00}
    assert len(table(house.engine, "operator_actions")) == 1
