"""What tells of fulfilments: the doctor's check, the gauges, the story of a draw, the relay that delivers them."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

from sqlalchemy import Engine, update

from tests import processes
from tests.fulfilments.books import add_webhook, coupons, grant, grants, rows_of, settings_for, settle, states
from tests.receivers import Receiver
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.schema import fulfilments
from tombola.worker import metrics
from tombola.worker.console import story
from tombola.worker.doctor.checks import Facts
from tombola.worker.doctor.fulfilments import look_at_fulfilments
from tombola.worker.host import tasks
from tombola.worker.relay.lookout import OperatorsLookout
from tombola.worker.relay.relay import Relay

URL = "https://shop.example/hook"


def change(engine: Engine, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(update(fulfilments).values(**values))


def examined(engine: Engine) -> tuple[str, str]:
    with engine.connect() as connection:
        status, found, cure = look_at_fulfilments(connection, settings_for(engine), Facts())
    assert bool(cure) == (status != "ok")
    return status, found


def gauges(engine: Engine) -> tuple[float, ...]:
    OperatorsLookout().look(engine)
    looked_up = (
        metrics.FULFILMENTS_PENDING,
        metrics.FULFILMENTS_WITHOUT_WEBHOOK,
        metrics.FULFILMENTS_DEAD,
        metrics.FULFILMENTS_OLDEST,
    )
    return tuple(it._value.get() for it in looked_up)


def test_doctor_and_gauges_tell_what_waits_and_what_is_dead(engine: Engine, account: int) -> None:
    assert examined(engine) == ("ok", "none waits")
    assert gauges(engine) == (0, 0, 0, 0)
    grants(engine, grant(account, "n", "notice", notify="coupon-won"))
    assert examined(engine) == ("warn", "1 notifications wait for a webhook")
    assert gauges(engine) == (0, 1, 0, 0)
    add_webhook(engine, "shop", URL, "grant.coupon")
    coupons(engine, account, 3)
    pending, without, dead, oldest_s = gauges(engine)
    assert (pending, without, dead) == (3, 1, 0)
    assert 0 <= oldest_s < 60
    change(engine, created_at=utc_now() - timedelta(hours=2), webhook="shop")
    status, found = examined(engine)
    assert (status, found.partition(" s")[0][:30]) == ("warn", "4 pending, the oldest for 7,20")
    assert 7190 < gauges(engine)[3] < 7300
    change(engine, state="dead")
    assert examined(engine) == ("warn", "4 are dead, 0 pending")
    assert gauges(engine) == (0, 0, 4, 0)
    change(engine, state="delivered", ended_at=utc_now())
    assert examined(engine) == ("ok", "none waits")


def test_the_story_of_a_draw_tells_what_became_of_its_fulfilments(engine: Engine, account: int) -> None:
    add_webhook(engine, "shop", URL, "draw.settled")
    settle(engine, DrawRequest(account_id=account, request_key="k"))

    def told() -> tuple[str, str, str]:
        with engine.connect() as connection:
            found = story.find(connection, "k")
        (one,) = [it for it in found.events if it.what.startswith("draw.settled")]
        assert [it.idempotency_key for it in found.fulfilments] == ["k"]
        assert one.link == "/fulfilments?session=k"
        return one.what, one.text, one.tone

    assert told() == ("draw.settled pending", "to webhook shop", "busy")
    change(engine, attempts=2, error="answered 500")
    assert told() == ("draw.settled pending", "to webhook shop, 2 failed so far: answered 500", "busy")
    change(engine, state="dead", attempts=24, ended_at=utc_now())
    assert told() == ("draw.settled dead", "to webhook shop after 24 attempts: answered 500", "bad")
    change(engine, state="delivered", attempts=1)
    assert told() == ("draw.settled delivered", "to webhook shop at the first attempt", "good")


class NoBroker:
    """A broker without messages."""

    def publish(self, bodies: object, headers: object = None) -> None:
        raise AssertionError("nothing is overdue")

    def backlog(self) -> int:
        return 0

    def close(self) -> None:
        pass


def test_a_relay_delivers_beside_its_passes(engine: Engine, account: int) -> None:
    with Receiver() as receiver:
        add_webhook(engine, "shop", receiver.url, "*")
        keys = coupons(engine, account, 3)
        relay = Relay(engine, NoBroker(), settings_for(engine))
        assert relay.run_once() == 0
        assert receiver.received == []  # a pass does not wait for receivers
        assert relay.deliver_once() == 3
        stopping = threading.Event()
        thread = threading.Thread(target=relay.run, args=(stopping,))
        thread.start()
        try:
            keys += coupons(engine, account, 2, prefix="more")
            processes.wait_for(lambda: len(receiver.received) == 5, within_s=20, what=lambda: str(receiver.keys))
            processes.wait_for(
                lambda: set(states(engine).values()) == {"delivered"}, within_s=5, what=lambda: str(rows_of(engine))
            )
        finally:
            stopping.set()
            thread.join(20)
        assert not thread.is_alive()
    assert sorted(receiver.keys) == sorted(keys)


def test_the_task_delivers_in_a_thread_and_only_one_at_a_time(engine: Engine, account: int) -> None:
    with Receiver() as receiver:
        release = threading.Event()
        receiver.answer = lambda _: 204 if release.wait(10) else 500
        add_webhook(engine, "shop", receiver.url, "*")
        coupons(engine, account, 2)
        settings = settings_for(engine, webhook_timeout_s="10")
        for _ in range(3):
            tasks._deliver_beside(settings)
        assert sum(it.name == "fulfilments" for it in threading.enumerate()) == 1
        release.set()
        processes.wait_for(
            lambda: set(states(engine).values()) == {"delivered"}, within_s=10, what=lambda: str(rows_of(engine))
        )
        processes.wait_for(lambda: not tasks._delivering.locked(), within_s=10, what=lambda: "the thread goes on")
    assert len(receiver.received) == 2
