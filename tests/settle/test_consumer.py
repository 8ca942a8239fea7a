"""The consumer's loop: fetch, settle, put, ack in this order, and what becomes of messages when a step fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from sqlalchemy import Engine

from tests.settle.memory import House, settled_in
from tombola.producers.domain.contract import DrawRequest, Request, parse_result
from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.storage import requests
from tombola.worker.dead_letters import parking
from tombola.worker.dead_letters.parking import Unparkable
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Deferred
from tombola.worker.settle.outages import Stopping

AWAY = ServiceUnavailable("the database does not answer")
WITHIN_S = 20
BATCH_SIZE = 5


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    made = House(f"sqlite:///{tmp_path}/ledger.db", batch_size=BATCH_SIZE)
    settle = tries.settle_unread

    def recorded(engine: Engine, draws: Sequence[Request], *how: Any, **more: Any) -> Any:
        if draws:
            made.events.append("settle")
        return settle(engine, draws, *how, **more)

    monkeypatch.setattr(tries, "settle_unread", recorded)
    yield made
    made.engine.dispose()


def consume_all_in_hand(house: House) -> None:
    """Rounds until what is set aside has been tried again, and acked."""
    deadline = time.monotonic() + WITHIN_S
    while house.source.in_hand:
        assert time.monotonic() < deadline, house.source.in_hand
        house.consumer.consume_once(wait_s=0)
        time.sleep(0.01)


def fail(*errors: Exception, instead: Any) -> Callable[..., Any]:
    """`instead`, after calls that raise `errors`."""
    left = list(errors)

    def act(*arguments: Any, **options: Any) -> Any:
        if left:
            raise left.pop(0)
        return instead(*arguments, **options)

    return act


# ---- the order is the guarantee --------------------------------------------------------------------------------------


def test_it_fetches_settles_puts_and_acks_in_this_order(house: House) -> None:
    bodies = house.publish(3)
    done = house.consumer.consume_once(wait_s=0)
    assert (done.settled, done.parked, done.deferred) == (3, 0, 0)
    assert house.events == ["fetch", "settle", "put", "ack"]
    assert house.source.acked == bodies
    assert house.store.settled_before_put == [3], "the commit comes before the results"
    answers = {session: parse_result(body) for session, body in house.store.put_results.items()}
    assert {it.request_key for it in answers.values()} == {f"k0_{number}" for number in range(3)}
    assert all(session == answer.lottery_session_id for session, answer in answers.items())


def test_a_repeat_is_acked_with_its_first_result(house: House) -> None:
    house.publish(2)
    house.consumer.consume_once(wait_s=0)
    first = dict(house.store.put_results)
    house.store.put_results.clear()
    house.publish(2)
    done = house.consumer.consume_once(wait_s=0)
    assert (done.settled, done.repeats) == (2, 2)
    assert house.store.put_results == first
    assert (len(house.source.acked), settled_in(house.engine)) == (4, 2)


def test_a_round_takes_no_more_than_a_batch(house: House) -> None:
    house.publish(BATCH_SIZE + 2)
    assert house.consumer.consume_once(wait_s=0).settled == BATCH_SIZE
    assert house.consumer.consume_once(wait_s=0).settled == 2
    assert house.consumer.consume_once(wait_s=0).settled == 0
    assert house.events == 2 * ["fetch", "settle", "put", "ack"]


def test_a_result_store_that_is_away_keeps_no_draw_from_its_ack(house: House) -> None:
    house.store.is_away = True
    bodies = house.publish(2)
    house.consumer.consume_once(wait_s=0)
    assert house.source.acked == bodies
    assert settled_in(house.engine) == 2
    house.store.is_away = False
    house.consumer.results.close()
    assert len(house.store.put_results) == 2, "the results are put later"


# ---- outages ---------------------------------------------------------------------------------------------------------


def test_a_short_outage_of_the_database_is_waited_for(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "settle_unread", fail(AWAY, AWAY, instead=tries.settle_unread))
    bodies = house.publish(2)
    assert house.consumer.consume_once(wait_s=0).settled == 2
    assert house.source.acked == bodies
    assert "release" not in house.events


def test_a_long_outage_gives_back_and_fetches_no_more_until_it_is_over(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = house.publish(2)
    with monkeypatch.context() as away:
        away.setattr(tries, "settle_unread", fail(*3 * [AWAY], instead=tries.settle_unread))
        house.consumer.consume_once(wait_s=0)
    assert house.events == ["fetch", "release"]
    assert (house.source.acked, house.source.in_hand) == ([], [])
    assert [it.body for it in house.source.waiting] == bodies

    tried = 0

    def try_writing(_engine: Engine) -> None:
        nonlocal tried
        tried += 1
        assert house.source.asked == [BATCH_SIZE], "it fetched while the database was away"
        if tried < 3:
            raise AWAY

    monkeypatch.setattr(requests, "try_writing", try_writing)
    assert house.consumer.consume_once(wait_s=0).settled == 1
    assert tried == 3
    assert house.source.asked == [BATCH_SIZE, 1], "the first message alone shows that the database is back"
    assert house.consumer.consume_once(wait_s=0).settled == 1
    assert house.source.asked == [BATCH_SIZE, 1, BATCH_SIZE]
    assert house.source.acked == bodies


def test_an_outage_that_goes_on_counts_no_delivery_against_the_message_that_it_is_tried_with(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    (body,) = house.publish(1)
    with monkeypatch.context() as away:
        away.setattr(tries, "settle_unread", fail(*6 * [AWAY], instead=tries.settle_unread))
        house.consumer.consume_once(wait_s=0)
        assert house.source.requeued == [], "given back, and counted"
        house.consumer.consume_once(wait_s=0)
        assert house.source.requeued == [body]
    assert house.consumer.consume_once(wait_s=0).settled == 1
    assert house.source.acked == [body]


def test_a_broker_that_is_away_is_tried_again(house: House) -> None:
    bodies = house.publish(1)
    house.source.failures += 2 * [ServiceUnavailable("the Stream cannot be read")]
    run_until(house, lambda: len(house.source.acked) == 1)
    assert house.source.acked == bodies
    assert len(house.source.asked) >= 3


def test_an_unexpected_error_gives_back_and_the_loop_goes_on(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = house.publish(2)
    monkeypatch.setattr(tries, "settle_unread", fail(ZeroDivisionError("our own mistake"), instead=tries.settle_unread))
    run_until(house, lambda: len(house.source.acked) == 2)
    assert house.source.acked == bodies
    assert house.events == ["fetch", "release", "fetch", "settle", "put", "ack"]


# ---- stop ------------------------------------------------------------------------------------------------------------


def run_until(house: House, condition: Callable[[], bool]) -> None:
    """Run the loop until `condition` holds before a fetch, then stop it."""
    over = threading.Event()

    def look() -> None:
        if condition():
            over.set()
            house.consumer._stopping.set()

    house.source.before_fetch = look
    house.consumer.start()
    assert over.wait(WITHIN_S), house.events
    assert house.consumer.stop(timeout_s=WITHIN_S)
    assert house.source.is_closed


def test_stop_acks_what_is_settled_and_takes_no_further_deliveries(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = house.publish(BATCH_SIZE + 2)
    began, may_go_on = threading.Event(), threading.Event()
    settle = tries.settle_unread

    def slowly(*arguments: Any, **options: Any) -> Any:
        began.set()
        assert may_go_on.wait(WITHIN_S)
        return settle(*arguments, **options)

    monkeypatch.setattr(tries, "settle_unread", slowly)
    house.consumer.start()
    assert began.wait(WITHIN_S)
    assert not house.consumer.stop(timeout_s=0.05), "the batch is still under way"
    assert (house.source.acked, house.source.is_closed) == ([], False)
    may_go_on.set()
    assert house.consumer.stop(timeout_s=WITHIN_S)
    assert house.events == ["fetch", "settle", "put", "ack"]
    assert house.source.acked == bodies[:BATCH_SIZE]
    assert [it.body for it in house.source.waiting] == bodies[BATCH_SIZE:]
    assert house.source.is_closed


def test_stop_during_an_outage_leaves_the_batch_unacked(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.publish(2)

    def away(*_arguments: Any, **_options: Any) -> NoReturn:
        house.consumer._stopping.set()
        raise AWAY

    monkeypatch.setattr(tries, "settle_unread", away)
    with pytest.raises(Stopping):
        house.consumer.consume_once(wait_s=0)
    assert (house.source.acked, len(house.source.in_hand)) == ([], 2)
    assert house.causes() == []


# ---- poison, and draws that have to wait -----------------------------------------------------------------------------


def test_poison_is_parked_and_the_others_flow(house: House) -> None:
    good = [draw.encode() for draw in house.draws(3)]
    poison = [b"\xff no JSON", b'{"v":9,"request_key":"future"}']
    house.source.add(good[0], poison[0], good[1], poison[1], good[2])
    done = house.consumer.consume_once(wait_s=0)
    assert (done.settled, done.parked) == (3, 2)
    assert sorted(house.source.acked) == sorted(good + poison)
    assert house.causes() == ["unknown version", "unparsable"]
    assert len(house.store.put_results) == 3
    assert house.events[-1] == "ack", "no message is acked before its dead letter is committed"


def test_a_message_that_cannot_be_parked_stays_in_hand_and_the_others_are_acked(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    (good,) = house.publish(1)
    house.source.add(b"\xff no JSON")

    def refuse(_engine: Engine, parkings: Sequence[Any], *, worker: str) -> NoReturn:
        raise Unparkable(parkings, ValueError("refused"))

    with monkeypatch.context() as refusing:
        refusing.setattr(parking, "park", refuse)
        assert house.consumer.consume_once(wait_s=0).parked == 0
    assert house.source.acked == [good]
    assert [it.body for it in house.source.in_hand] == [b"\xff no JSON"]
    consume_all_in_hand(house)
    assert house.causes() == ["unparsable"]


def test_a_message_that_was_delivered_too_often_is_handled_alone(house: House) -> None:
    (good,) = house.publish(1)
    (suspect,) = (draw.encode() for draw in house.draws(1, account=1))
    house.source.add(suspect, count=house.settings.deliveries_max + 1)
    house.consumer.consume_once(wait_s=0)
    assert house.events.count("settle") == 2
    assert sorted(house.source.acked) == sorted([good, suspect])
    assert house.causes() == [], "it settled after all: its row is taken back"


def test_a_draw_whose_account_is_held_is_set_aside_and_the_others_flow(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = house.account_ids[0]
    settle, tried = tries.settle_unread, []

    def settle_others(engine: Engine, draws: Sequence[Request], *how: Any, **more: Any) -> list[Any]:
        tried.append([draw.request_key for draw in draws])
        free = settle(engine, [draw for draw in draws if draw.account_id != held], *how, **more)
        answers = iter(free)
        return [
            Deferred(draw, "another transaction holds its account", is_account_held=True)
            if draw.account_id == held
            else next(answers)
            for draw in draws
        ]

    with monkeypatch.context() as holding:
        holding.setattr(tries, "settle_unread", settle_others)
        waiting = house.publish(1)
        others = house.publish(2, account=1)
        done = house.consumer.consume_once(wait_s=0)
        assert (done.settled, done.deferred) == (2, 1)
        assert house.source.acked == others
        assert [it.body for it in house.source.in_hand] == waiting
        # A later draw of the same account is not even tried.
        later = DrawRequest(account_id=held, request_key="later").encode()
        house.source.add(later)
        tried.clear()
        assert house.consumer.consume_once(wait_s=0).deferred == 1
        assert not any("later" in keys for keys in tried)
    assert "keep" in house.events, "no other consumer may claim what is set aside"
    consume_all_in_hand(house)
    assert sorted(house.source.acked) == sorted([*others, *waiting, later])
    assert settled_in(house.engine) == 4
