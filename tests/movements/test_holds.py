"""Holds that nobody ends: each is voided once, by whatever number of relays, and a worker settles the void."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import Engine, update

from tests.books import table
from tests.processes import House
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import InvalidKey
from tombola.producers.domain.operations.hold import HoldRequest
from tombola.producers.domain.operations.post import PostRequest
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.entry import Entry
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.schema import account_holds
from tombola.worker.doctor.checks import Facts
from tombola.worker.doctor.holds import look_at_holds
from tombola.worker.movements.holds import OVERDUE_S, count_overdue, void_expired_once, void_request
from tombola.worker.movements.settling import settle
from tombola.worker.relay.lookout import OperatorsLookout
from tombola.worker.relay.relay import Relay
from tombola.worker.settle.consumer import Consumer


@pytest.fixture
def house(database_url: str, redis_url: str) -> Iterator[House]:
    with House(database_url, redis_url, redis_url) as house:
        yield house
        assert house.violations() == []


def hold(engine: Engine, account_id: int, *keys: str, valid_s: int = 60) -> None:
    for key in keys:
        asked = HoldRequest(account_id=account_id, request_key=key, amount="4", valid_s=valid_s)
        settle(engine, asked, operator="ann")


def expire(engine: Engine, *keys: str) -> None:
    """As if the time of these holds were over. The ledger's notes, which say until when, are never changed."""
    with engine.begin() as connection:
        over = update(account_holds).where(account_holds.c.hold_key.in_(keys)).values(expires_at=utc_now())
        connection.execute(over)


def states(engine: Engine) -> dict[str, str]:
    return {row["hold_key"]: row["state"] for row in table(engine, "account_holds")}


def consume(house: House) -> None:
    consumer = Consumer.open(house.settings, house.engine, house.wheels)
    while (report := consumer.consume_once(wait_s=0.2)).settled or report.parked:
        pass
    consumer.deliveries.close()


def test_an_expired_hold_is_voided_by_relay_and_worker(house: House) -> None:
    (account_id,) = house.accounts(1)
    hold(house.engine, account_id, "over", "posted", "open")
    settle(house.engine, PostRequest(account_id=account_id, request_key="p", hold="posted"), operator="ann")
    expire(house.engine, "over", "posted")
    relay = Relay.from_settings(house.settings)
    assert relay.run_once() == 1
    consume(house)
    assert states(house.engine) == {"over": "voided", "posted": "posted", "open": "open"}
    assert relay.run_once() == 0
    relay.close()
    (account,) = table(house.engine, "account_asset_balances")
    assert account["balance"] == 1000_00 - 4_00 - 4_00
    (row,) = (it for it in table(house.engine, "asset_transactions") if it["business_type"] == "hold_void")
    assert (row["idempotency_key"], row["notes"]) == ("over:void", "reason=expired")
    key = void_request("over", account_id).request_key
    assert (len(key), key[:12]) == (44, "expiry-hold-")
    assert row["lottery_session_id"] == key
    assert void_expired_once(house.engine) == 0


def test_many_at_once_accept_each_void_once(house: House) -> None:
    (account_id,) = house.accounts(1)
    names = [f"h{number:02}" for number in range(25)]
    hold(house.engine, account_id, *names)
    expire(house.engine, *names)
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda _: void_expired_once(house.engine, rows_max=7), range(4)))
    assert sum(counts) == 25
    assert void_expired_once(house.engine, rows_max=7) == 0
    Relay.from_settings(house.settings).run_once()
    consume(house)
    assert set(states(house.engine).values()) == {"voided"}


def test_a_hold_whose_account_is_full_stands_in_the_way_of_none(house: House) -> None:
    full, other = house.accounts(2)
    hold(house.engine, full, "stuck")
    hold(house.engine, other, "free")
    room = Decimal("99999999.99") - Decimal("996.00")
    settle(house.engine, RechargeRequest(account_id=full, amount=str(room)), operator="ann")
    expire(house.engine, "stuck")
    relay = Relay.from_settings(house.settings)
    relay.run_once()
    consume(house)
    expire(house.engine, "free")
    assert void_expired_once(house.engine, rows_max=1) == 1
    relay.run_once()
    consume(house)
    relay.close()
    assert states(house.engine) == {"stuck": "open", "free": "voided"}


def test_the_key_of_an_expiry_is_nobody_elses(house: House) -> None:
    (account_id,) = house.accounts(1)
    entry = Entry(house.engine, relay_after_s=10)
    taken = void_request("h", account_id).request_key
    for name in (taken, "expiry-POINT-1-202611"):
        for draw in (
            DrawRequest(account_id=account_id, request_key=name),
            DrawRequest(account_id=account_id, request_key="k", lottery_session_id=name),
        ):
            (answer,) = entry.accept_each([Submission(draw)])
            assert isinstance(answer, InvalidKey)
            assert "the form of an expiry's key" in str(answer)
    entry.accept([Submission(DrawRequest(account_id=account_id, request_key="expiry_1"))])
    entry.close()


def test_overdue_holds_are_counted_shown_and_told(house: House) -> None:
    (account_id,) = house.accounts(1)
    hold(house.engine, account_id, "late", "just", "open")
    expire(house.engine, "just")
    with house.engine.begin() as connection:
        late = update(account_holds).where(account_holds.c.hold_key == "late")
        connection.execute(late.values(expires_at=utc_now() - timedelta(seconds=OVERDUE_S + 1)))
    with house.engine.connect().execution_options(read_only=True) as connection:
        assert count_overdue(connection, count_max=10) == 1
        status, found, cure = look_at_holds(connection, house.settings, Facts())
    assert (status, found) == ("warn", "1 open holds have expired more than 5 minutes ago")
    assert "tombola account void HOLD" in cure
    OperatorsLookout().look(house.engine)
    assert REGISTRY.get_sample_value("tombola_holds_overdue") == 1
    Relay.from_settings(house.settings).run_once()
    before = REGISTRY.get_sample_value("tombola_movements_total", {"kind": "void", "outcome": "settled"})
    consume(house)
    after = REGISTRY.get_sample_value("tombola_movements_total", {"kind": "void", "outcome": "settled"})
    assert before is not None
    assert after == before + 2
    with house.engine.connect().execution_options(read_only=True) as connection:
        assert look_at_holds(connection, house.settings, Facts()) == ("ok", "none is overdue", "")
