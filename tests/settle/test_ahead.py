"""Under load the lanes settle a full batch while the results of the last one are put; the order stays the guarantee."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy import Engine, text

from tests.settle.memory import House, settled_in
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.storage import requests
from tombola.worker.settle import tries
from tombola.worker.settle.lanes import SPLIT_SIZE_MIN

AWAY = ServiceUnavailable("the database does not answer")
SIZE = SPLIT_SIZE_MIN
ACCOUNTS = 20
WITHIN_S = 20


@pytest.fixture
def house(mariadb_url: str) -> Iterator[House]:
    made = House(mariadb_url, batch_size=SIZE, accounts=ACCOUNTS)
    yield made
    made.engine.dispose()


def queued(house: House, count: int) -> list[bytes]:
    ids = house.account_ids
    draws = [DrawRequest(account_id=ids[it % ACCOUNTS], request_key=f"k_{it:04}") for it in range(count)]
    bodies = [draw.encode() for draw in draws]
    house.source.add(*bodies)
    return bodies


def consume_all(house: House) -> None:
    deadline = time.monotonic() + WITHIN_S
    while house.source.waiting or house.source.in_hand:
        assert time.monotonic() < deadline, house.events
        house.consumer.consume_once(wait_s=0)


def failing(calls: Callable[[int], Exception | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the calls of settle_unread fail for which `calls` has an error, by their number from 0."""
    settle, lock, count = tries.settle_unread, threading.Lock(), 0

    def act(engine: Engine, draws: Sequence[Request], *how: Any, **more: Any) -> Any:
        nonlocal count
        with lock:
            error = calls(count)
            count += 1
        if error is not None:
            raise error
        return settle(engine, draws, *how, **more)

    monkeypatch.setattr(tries, "settle_unread", act)


def run_until_acked(house: House, count: int) -> None:
    house.source.before_fetch = lambda: house.consumer._stopping.set() if len(house.source.acked) == count else None
    house.consumer.start()
    house.consumer._thread.join(WITHIN_S)
    assert house.source.is_closed, house.events


def assert_all_done(house: House, bodies: list[bytes]) -> None:
    assert sorted(house.source.acked) == sorted(bodies)
    assert settled_in(house.engine) == len(house.store.put_results) == len(bodies)
    assert house.causes() == []


def test_a_full_batch_begins_before_the_last_one_is_acked(house: House) -> None:
    bodies = queued(house, 2 * SIZE + 3)
    assert house.consumer.consume_once(wait_s=0).settled == 0, "it has only begun"
    assert house.source.acked == []
    assert house.consumer.consume_once(wait_s=0).settled == SIZE
    assert house.events == ["fetch", "fetch", "put", "ack"]
    assert house.source.acked == bodies[:SIZE]
    # The rest is no full batch: then nothing is left under way.
    assert house.consumer.consume_once(wait_s=0).settled == SIZE + 3
    assert house.events[4:] == ["fetch", "put", "ack", "put", "ack"]
    assert_all_done(house, bodies)
    assert house.consumer.consume_once(wait_s=0).settled == 0


def test_what_has_begun_is_finished_when_nothing_more_is_queued(house: House) -> None:
    bodies = queued(house, SIZE)
    house.consumer.consume_once(wait_s=0)
    began = time.monotonic()
    assert house.consumer.consume_once(wait_s=5).settled == SIZE
    assert time.monotonic() - began < 5, "it waited for further messages first"
    assert_all_done(house, bodies)


@pytest.mark.parametrize("waits", [False, True], ids=["between batches", "while it settles"])
def test_stop_finishes_what_has_begun(house: House, monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    bodies = queued(house, 4 * SIZE)
    began, may_go_on = threading.Event(), threading.Event()
    settle = tries.settle_unread

    def slowly(*arguments: Any, **options: Any) -> Any:
        began.set()
        assert may_go_on.wait(WITHIN_S)
        return settle(*arguments, **options)

    if waits:
        monkeypatch.setattr(tries, "settle_unread", slowly)
    else:
        house.source.before_fetch = lambda: house.consumer._stopping.set() if house.source.acked else None
    house.consumer.start()
    assert not waits or began.wait(WITHIN_S)
    house.consumer.stop(timeout_s=0.05 if waits else WITHIN_S)
    may_go_on.set()
    assert house.consumer.stop(timeout_s=WITHIN_S)
    done = len(house.source.acked)
    assert done % SIZE == 0
    assert SIZE <= done < 4 * SIZE
    assert (settled_in(house.engine), house.source.in_hand) == (done, [])
    assert sorted([*house.source.acked, *(it.body for it in house.source.waiting)]) == sorted(bodies)


def test_a_short_outage_is_waited_for(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = queued(house, 4 * SIZE)
    failing(lambda call: AWAY if call in (2, 3) else None, monkeypatch)
    consume_all(house)
    assert "release" not in house.events
    assert_all_done(house, bodies)


def test_a_long_outage_gives_back_both_batches(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = queued(house, 4 * SIZE)
    away = [True]
    failing(lambda call: AWAY if away and call >= 2 else None, monkeypatch)
    tried: list[int] = []

    def try_writing(_engine: Engine) -> None:
        assert house.source.in_hand == [], "it keeps from others what it cannot settle"
        tried.append(len(house.source.acked))
        away.clear()

    monkeypatch.setattr(requests, "try_writing", try_writing)
    consume_all(house)
    assert tried == [SIZE]
    assert house.events.count("release") == 1
    assert_all_done(house, bodies)


def test_a_broker_that_is_away_keeps_no_result_back(house: House) -> None:
    bodies = queued(house, SIZE + 1)
    house.consumer.consume_once(wait_s=0)
    house.source.failures.append(ServiceUnavailable("the Stream cannot be read"))
    with pytest.raises(ServiceUnavailable):
        house.consumer.consume_once(wait_s=0)
    assert len(house.store.put_results) == SIZE
    consume_all(house)
    assert_all_done(house, bodies)


def test_an_unexpected_error_gives_back_both_batches(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = queued(house, 3 * SIZE)
    failing(lambda call: ZeroDivisionError("our own mistake") if call == 0 else None, monkeypatch)
    run_until_acked(house, len(bodies))
    assert house.events.count("release") == 1
    assert_all_done(house, bodies)


def test_an_unexpected_error_in_the_last_batch_ends_the_worker_in_order(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = queued(house, 2 * SIZE)
    failing(lambda call: ZeroDivisionError("our own mistake") if call >= 2 else None, monkeypatch)
    house.source.before_fetch = lambda: house.consumer._stopping.set() if house.source.asked else None
    house.consumer.start()
    house.consumer._thread.join(WITHIN_S)
    assert house.source.is_closed
    assert house.source.acked == bodies[:SIZE]
    assert [it.body for it in house.source.in_hand] == bodies[SIZE:], "the broker delivers them again"


def test_nothing_runs_ahead_of_a_message_that_may_be_to_blame(house: House) -> None:
    bodies = queued(house, SIZE)
    house.source.waiting[0] = replace(house.source.waiting[0], count=house.settings.deliveries_max + 1)
    assert house.consumer.consume_once(wait_s=0).settled >= SIZE - 1
    assert_all_done(house, bodies)


def test_draws_on_a_locked_account_wait_apart_and_nothing_runs_ahead_meanwhile(house: House) -> None:
    bodies = queued(house, 6 * SIZE)
    with house.engine.begin() as holding:
        lock = text("SELECT id FROM account_asset_balances WHERE id = :id FOR UPDATE")
        holding.execute(lock, {"id": house.account_ids[0]})
        while house.source.waiting:
            house.consumer.consume_once(wait_s=0)
        house.consumer.consume_once(wait_s=0)
        held = [it for it in bodies if f'"account_id":{house.account_ids[0]},'.encode() in it]
        assert sorted(house.source.acked) == sorted(set(bodies) - set(held))
        assert sorted(it.body for it in house.source.in_hand) == sorted(held)
    deadline = time.monotonic() + WITHIN_S
    while house.source.in_hand and time.monotonic() < deadline:
        house.consumer.consume_once(wait_s=0.1)
        time.sleep(0.01)
    assert_all_done(house, bodies)


def test_a_request_in_two_batches_is_charged_once(house: House) -> None:
    bodies = queued(house, SIZE)
    house.source.add(*bodies, *bodies)
    consume_all(house)
    assert len(house.source.acked) == 3 * SIZE
    assert settled_in(house.engine) == SIZE
