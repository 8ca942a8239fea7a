"""The result store: Celery finds our results, Redis may forget them, and nobody can put words into our mouth."""

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from tests import servers
from tests.processes import House, wait_for
from tombola.producers.domain.contract import DrawRequest, DrawResult, parse_result
from tombola.producers.domain.errors import DrawDead, ResultNotReady, ServiceUnavailable
from tombola.producers.entry import Entry
from tombola.producers.results import KEY_PREFIX, ResultStore, StoredResult, _dead_envelope, unwrap
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.ledger import get_lottery_session_transactions
from tombola.producers.storage.requests import Submission
from tombola.worker.relay.given_up import time_out_once
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Settled
from tombola.worker.settle.rules import Rules

SESSION = "lottery_tx_1700000000000_abcdef_001"


@pytest.fixture
def house(tmp_path: Path, redis_url: str) -> Iterator[House]:
    with House(f"sqlite:///{tmp_path}/ledger.db", redis_url, redis_url) as house:
        yield house


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def store(house: House) -> Iterator[ResultStore]:
    store = ResultStore.open(house.settings.need("result_url"), ttl_s=600, engine=house.engine)
    yield store
    store.close()


def settle(house: House, *, session_id: str = SESSION, balance: int = 10, key: str = "request_1") -> StoredResult:
    (account_id,) = house.accounts(1, balance=balance)
    draw = DrawRequest(account_id=account_id, request_key=key, lottery_session_id=session_id)
    (answer,) = tries.settle(house.engine, [draw], Rules(house.wheels, tries_max=1))
    assert isinstance(answer, Settled)
    return StoredResult(session_id, answer.result, answer.settled_at)


def plain_celery(redis_url: str) -> Any:
    """Somebody else's app: it knows nothing of ours but the address of the result store."""
    return Celery("frontend", backend=redis_url, set_as_current=False)


def test_a_plain_celery_app_finds_the_result(house: House, store: ResultStore, redis_url: str) -> None:
    settled = settle(house)
    store.put([settled])
    found = plain_celery(redis_url).AsyncResult(SESSION)
    assert found.get(timeout=2) == json.loads(settled.body)
    assert found.status == "SUCCESS"
    assert found.date_done == settled.settled_at


def test_a_plain_celery_app_that_waits_already_is_woken(house: House, store: ResultStore, redis_url: str) -> None:
    settled = settle(house)
    timer = Timer(0.3, lambda: store.put([settled]))
    timer.start()
    began = time.monotonic()
    assert plain_celery(redis_url).AsyncResult(SESSION).get(timeout=10) == json.loads(settled.body)
    assert 0.25 < time.monotonic() - began < 5
    timer.join()


def test_a_rejection_is_a_result_like_any_other(house: House, store: ResultStore, redis_url: str) -> None:
    settled = settle(house, balance=0)
    store.put([settled])
    found = plain_celery(redis_url).AsyncResult(SESSION).get(timeout=2)
    assert (found["status"], found["reason"]) == ("rejected", "INSUFFICIENT_BALANCE")


def test_what_redis_forgets_is_rebuilt_to_the_same_bytes(house: House, store: ResultStore, client: Redis) -> None:
    settled = settle(house)
    store.put([settled])
    before: Any = client.get(KEY_PREFIX + SESSION)
    assert json.loads(before)["result"] == json.loads(settled.body)
    client.flushdb()
    assert store.get(SESSION) == settled.body
    assert client.get(KEY_PREFIX + SESSION) == before
    assert 0 < int(client.ttl(KEY_PREFIX + SESSION)) <= 600


def test_a_result_expires_in_redis_and_not_for_the_client(house: House, store: ResultStore, client: Redis) -> None:
    settled = settle(house)
    store.put([settled])
    client.pexpire(KEY_PREFIX + SESSION, 1)
    assert store.get(SESSION) == settled.body


def test_wait_wakes_when_the_result_is_put(house: House, store: ResultStore) -> None:
    settled = settle(house)
    # Without an engine: what wakes it can only be Redis.
    waiting = ResultStore.open(house.settings.need("result_url"), ttl_s=600)
    timer = Timer(0.3, lambda: store.put([settled]))
    timer.start()
    began = time.monotonic()
    result = waiting.wait(SESSION, timeout_s=20)
    elapsed_s = time.monotonic() - began
    assert result == parse_result(settled.body)
    assert 0.25 < elapsed_s < 5
    timer.join()
    waiting.close()


def test_wait_returns_what_is_there_already(house: House, store: ResultStore) -> None:
    settled = settle(house)
    store.put([settled])
    began = time.monotonic()
    assert store.wait(SESSION, timeout_s=20) == parse_result(settled.body)
    assert time.monotonic() - began < 5


def test_wait_sees_what_only_the_database_knows(house: House, store: ResultStore) -> None:
    settled = settle(house)
    assert store.wait(SESSION, timeout_s=0.2) == parse_result(settled.body)


def test_a_result_that_never_comes_is_not_ready(store: ResultStore) -> None:
    began = time.monotonic()
    with pytest.raises(ResultNotReady, match="nothing_of_the_kind"):
        store.wait("nothing_of_the_kind", timeout_s=0.3)
    assert 0.25 < time.monotonic() - began < 5
    with pytest.raises(ResultNotReady):
        store.get("nothing_of_the_kind")


FORGERIES = {
    "garbage": b"\x00\xff\xfe",
    "empty": b"",
    "no envelope": b"[1,2,3]",
    "no result": b'{"status":"SUCCESS"}',
    "another task's result": b'{"status":"SUCCESS","result":42,"traceback":null,"children":[],"task_id":"x"}',
    "a failed task": b'{"status":"FAILURE","result":{"exc_type":"KeyError","exc_message":["x"]},"task_id":"x"}',
    "pending": b'{"status":"PENDING","result":null}',
    "unknown fields": b'{"status":"SUCCESS","result":{"v":1,"request_key":"r","prize_amount":"9999.00","more":1}}',
    "deep": b'{"status":"SUCCESS","result":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_what_is_no_result_of_ours_is_as_if_it_were_not_there(
    house: House, store: ResultStore, client: Redis, forgery: bytes
) -> None:
    settled = settle(house)
    client.set(KEY_PREFIX + SESSION, forgery)
    assert store.peek(SESSION) is None
    assert store.wait(SESSION, timeout_s=0.3) == parse_result(settled.body)
    # And it is mended.
    assert client.get(KEY_PREFIX + SESSION) == settled.envelope()


def test_a_forgery_alone_is_not_ready(store: ResultStore, client: Redis) -> None:
    client.set(KEY_PREFIX + "unknown", FORGERIES["another task's result"])
    with pytest.raises(ResultNotReady):
        store.wait("unknown", timeout_s=0.2)


def test_a_value_of_another_type_does_no_harm(house: House, store: ResultStore, client: Redis) -> None:
    settled = settle(house)
    client.rpush(KEY_PREFIX + SESSION, "a list")
    assert store.peek(SESSION) is None
    assert store.get(SESSION) == settled.body


def test_a_forged_announcement_does_not_wake_with_its_words(store: ResultStore, client: Redis) -> None:
    def forge() -> None:
        client.publish(KEY_PREFIX + "wanted", FORGERIES["another task's result"])

    timer = Timer(0.2, forge)
    timer.start()
    with pytest.raises(ResultNotReady):
        store.wait("wanted", timeout_s=0.6)
    timer.join()


class TestWithoutRedis:
    """The result store is down: what is settled is still to be had."""

    @pytest.fixture
    def down(self) -> Iterator[str]:
        with servers.redis(private=True) as server:
            server.stop()
            yield server.url

    def test_the_database_answers(self, house: House, down: str) -> None:
        settled = settle(house)
        store = ResultStore.open(down, ttl_s=600, engine=house.engine)
        assert store.get(SESSION) == settled.body
        assert store.wait(SESSION, timeout_s=2) == parse_result(settled.body)
        assert store.peek(SESSION) is None

    def test_a_result_that_settles_meanwhile_is_found(self, house: House, down: str) -> None:
        store = ResultStore.open(down, ttl_s=600, engine=house.engine)
        timer = Timer(0.4, lambda: settle(house))
        timer.start()
        result: DrawResult = store.wait(SESSION, timeout_s=10)
        timer.join()
        assert result.lottery_session_id == SESSION

    def test_an_unknown_session_is_an_outage_not_an_answer(self, house: House, down: str) -> None:
        store = ResultStore.open(down, ttl_s=600, engine=house.engine)
        with pytest.raises(ServiceUnavailable):
            store.get("unknown")

    def test_to_put_is_an_outage(self, house: House, down: str) -> None:
        with pytest.raises(ServiceUnavailable):
            ResultStore.open(down, ttl_s=600).put([settle(house)])


def test_the_rows_of_a_session_by_transaction_id(house: House) -> None:
    # A draw that wins has two rows: try keys until one does.
    (account_id,) = house.accounts(1, balance=100)
    for number in range(100):
        draw = DrawRequest(account_id=account_id, request_key=f"try_{number}", lottery_session_id=f"session_{number}")
        (answer,) = tries.settle(house.engine, [draw], Rules(house.wheels, tries_max=1))
        assert isinstance(answer, Settled)
        if parse_result(answer.result).won:
            break
    rows = get_lottery_session_transactions(draw.lottery_session_id, engine=house.engine)
    assert [row["business_type"] for row in rows] == ["lottery_consume", "lottery_reward"]
    assert [row["idempotency_key"] for row in rows] == [f"{draw.request_key}:consume", f"{draw.request_key}:reward"]
    assert rows[0]["transaction_id"] < rows[1]["transaction_id"]
    assert rows[0]["balance_after"] == rows[1]["balance_before"]
    assert {row["lottery_session_id"] for row in rows} == {draw.lottery_session_id}
    assert get_lottery_session_transactions("no such session", engine=house.engine) == []


@pytest.mark.parametrize("secret", [b"", b"another one", b"the right one"])
def test_what_is_sealed_opens_only_with_its_secret(house: House, client: Redis, redis_url: str, secret: bytes) -> None:
    """Whoever can write to Redis cannot make up a result: what the database says is answered instead."""
    settled = settle(house)
    client.set(KEY_PREFIX + SESSION, settled.envelope(secret))
    is_right = secret == b"the right one"
    store = ResultStore.open(redis_url, ttl_s=600, engine=house.engine, secret=b"the right one")
    assert store.peek(SESSION) == (settled.body if is_right else None)
    forged = settled.envelope(secret).replace(b'"prize_amount":"', b'"prize_amount":"1')
    assert forged != settled.envelope(secret)
    client.set(KEY_PREFIX + SESSION, forged)
    assert store.get(SESSION) == settled.body
    assert client.get(KEY_PREFIX + SESSION) == settled.envelope(b"the right one")  # and it is mended
    store.close()


def test_a_plain_celery_app_does_not_mind_the_seal(house: House, redis_url: str) -> None:
    settled = settle(house)
    store = ResultStore.open(redis_url, ttl_s=600, secret=b"the right one")
    store.put([settled])
    store.close()
    assert plain_celery(redis_url).AsyncResult(SESSION).get(timeout=2) == json.loads(settled.body)


# ---- the dead --------------------------------------------------------------------------------------------------------


def accepted(house: House, session_id: str = SESSION) -> DrawRequest:
    draw = DrawRequest(account_id=1, request_key=f"of-{session_id}", lottery_session_id=session_id)
    Entry(house.engine, relay_after_s=60).accept([Submission(draw)])
    return draw


@pytest.mark.parametrize("has_package", [True, False])
def test_a_plain_celery_app_is_told_of_a_dead_draw(
    house: House, redis_url: str, has_package: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = ResultStore.open(redis_url, ttl_s=600, engine=house.engine, secret=b"s" * 32)
    accepted(house)
    timer = Timer(0.3, lambda: time_out_once(house.engine, timeout_s=0, results=sealed))
    timer.start()
    if not has_package:
        monkeypatch.delitem(sys.modules, DrawDead.__module__)
    with pytest.raises(Exception, match="operator can replay it") as told:
        plain_celery(redis_url).AsyncResult(SESSION).get(timeout=10)
    timer.join()
    assert isinstance(told.value, DrawDead) is has_package
    assert type(told.value).__name__ == "DrawDead"
    assert "TIMED_OUT" in str(told.value)
    assert plain_celery(redis_url).AsyncResult(SESSION).status == "FAILURE"
    sealed.close()


def test_a_wait_ends_when_the_draw_dies(house: House, store: ResultStore, client: Redis) -> None:
    accepted(house)
    accepted(house, "other")
    timer = Timer(0.3, lambda: time_out_once(house.engine, rows_max=1, timeout_s=0, results=store))
    timer.start()
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(store.wait, session_id, timeout_s=20) for session_id in (SESSION, "other")]
        began = time.monotonic()
        wait_for(lambda: any(it.done() for it in waits), within_s=15, what=lambda: "nobody was told")
        assert time.monotonic() - began < 15
        (dead,) = (it for it in waits if it.done())
        (other,) = (it for it in waits if it is not dead)
        with pytest.raises(DrawDead) as told:
            dead.result()
        assert (told.value.reason, "TIMED_OUT" in str(told.value)) == ("TIMED_OUT", True)
        # A stranger's word for it is not enough: the database is asked.
        session_id = SESSION if other is waits[0] else "other"
        client.publish(KEY_PREFIX + session_id, _dead_envelope(session_id, "PARKED", utc_now(), b""))
        time.sleep(0.3)
        assert not other.done()
        time_out_once(house.engine, timeout_s=0, results=store)
        with pytest.raises(DrawDead):
            other.result()
    with pytest.raises(DrawDead):  # at once: it lies there
        store.wait(SESSION, timeout_s=20)


def kept(client: Redis) -> bytes:
    found: Any = client.get(KEY_PREFIX + SESSION)
    return bytes(found)


def test_a_dead_draw_never_hides_a_result(house: House, store: ResultStore, client: Redis) -> None:
    settled = settle(house)
    draw = DrawRequest(account_id=1, request_key="request_1", lottery_session_id=SESSION)
    store.put([settled])
    store.put_dead([draw], "PARKED")
    assert store.get(SESSION) == settled.body
    client.delete(KEY_PREFIX + SESSION)
    store.put_dead([draw], "PARKED")
    assert store.get(SESSION) == settled.body  # from the database, and put in its place
    assert unwrap(kept(client), SESSION) == settled.body
    store.forget_dead([draw])
    assert unwrap(kept(client), SESSION) == settled.body
    client.delete(KEY_PREFIX + SESSION)
    store.put_dead([draw], "PARKED")
    store.forget_dead([draw])
    assert client.get(KEY_PREFIX + SESSION) is None
    client.rpush(KEY_PREFIX + SESSION, "a list")
    store.put_dead([draw], "PARKED")
    store.forget_dead([draw])
    assert client.type(KEY_PREFIX + SESSION) == b"list"


def test_a_result_store_that_is_away_is_not_told(house: House, caplog: pytest.LogCaptureFixture) -> None:
    with servers.redis(private=True) as server:
        server.stop()
        away = ResultStore.open(server.url, ttl_s=600, engine=house.engine)
        draw = accepted(house)
        assert time_out_once(house.engine, timeout_s=0, results=away) == 1
        away.forget_dead([draw])
    assert "did not take 1 dead draws" in caplog.text
