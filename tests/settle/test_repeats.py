"""A redelivery is answered with the first result, and reads no more for it than the result store lacks."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from tests.processes import House, draws
from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.results import KEY_PREFIX
from tombola.producers.storage.engines import open_engine
from tombola.worker.ledger.accounts import open_account
from tombola.worker.settle import repeats, tries
from tombola.worker.settle.answers import Refused, Repeat, Settled
from tombola.worker.settle.consumer import Consumer
from tombola.worker.settle.handler import Round
from tombola.worker.settle.rules import Rules

COUNT = 40


@pytest.fixture
def house(mariadb_url: str, redis_url: str) -> Iterator[House]:
    with House(mariadb_url, redis_url, redis_url) as house:
        yield house


@pytest.fixture
def consumer(house: House) -> Iterator[Consumer]:
    consumer = Consumer.open(house.settings, house.engine, house.wheels)
    yield consumer
    consumer.results.close()
    consumer.deliveries.close()


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url) as client:
        yield client


def accounts_of(house: House) -> list[int]:
    """Some can pay all their draws, one can pay none."""
    return [*house.accounts(3), open_account(house.engine, user_id=9, balance=Decimal(0))]


def settled(house: House, consumer: Consumer, queued: list[DrawRequest]) -> Round:
    house.enqueue(queued)
    done = consumer.consume_once(wait_s=5)
    assert done.settled + done.parked == len(queued)
    return done


def stored(redis: Any, queued: list[DrawRequest]) -> list[bytes]:
    return list(redis.mget([KEY_PREFIX + it.lottery_session_id for it in queued]))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the repeats whose results are read."""
    keys: list[str] = []
    tell = repeats.tell

    def recorded(engine: Any, answers: Any, rules: Any) -> Any:
        keys.extend(it.request.request_key for it in answers if isinstance(it, Repeat))
        return tell(engine, answers, rules)

    monkeypatch.setattr(repeats, "tell", recorded)
    return keys


def test_only_what_the_store_lacks_is_read(house: House, consumer: Consumer, redis: Any, told: list[str]) -> None:
    queued = draws(accounts_of(house), COUNT)
    assert settled(house, consumer, queued).repeats == 0
    first = stored(redis, queued)
    assert {b"completed", b"rejected"} <= {word for it in first for word in it.split(b'"')}
    names = [KEY_PREFIX + it.lottery_session_id for it in queued]
    for name in names:
        redis.expire(name, 5)

    assert settled(house, consumer, queued).repeats == COUNT
    assert told == []
    assert all(redis.ttl(name) > 5 for name in names), "a result that is asked for again stays as long as a new one"

    # Lost; another program's; of another type; dead, as Celery shops read it.
    redis.delete(*names[:8])
    redis.set(names[8], b"\xffgarbage")
    redis.delete(names[9])
    redis.hset(names[9], "a", "b")
    redis.set(names[10], b'{"status":"FAILURE","result":{}}')
    assert settled(house, consumer, queued).repeats == COUNT
    assert sorted(told) == sorted(it.request_key for it in queued[:11])
    assert stored(redis, queued) == first
    assert house.dead() == 0


def test_a_key_twice_in_one_batch_is_a_repeat_at_once(house: House, consumer: Consumer, redis: Any) -> None:
    queued = draws(accounts_of(house), COUNT)
    done = settled(house, consumer, [*queued, *queued])
    assert (done.settled, done.repeats) == (2 * COUNT, COUNT)
    assert len(set(stored(redis, queued))) == COUNT


def test_rows_that_somebody_changed_stop_no_other_request(house: House, consumer: Consumer, redis: Any) -> None:
    queued = draws(house.accounts(3), COUNT)
    settled(house, consumer, queued)
    first = stored(redis, queued)
    with house.engine.begin() as connection:
        delete = text("DELETE FROM asset_transactions WHERE lottery_session_id = :session")
        connection.execute(delete, {"session": queued[0].lottery_session_id})
        change = text("UPDATE asset_transactions SET account_id = account_id + 1 WHERE lottery_session_id = :session")
        connection.execute(change, {"session": queued[1].lottery_session_id})
    redis.flushdb()
    done = settled(house, consumer, queued)
    assert (done.settled, done.parked) == (COUNT - 2, 2)
    assert house.causes() == [Cause.FAILED_ALONE, Cause.FAILED_ALONE]
    assert stored(redis, queued)[2:] == first[2:]


def test_an_outage_while_results_are_read_is_waited_for(
    house: House, consumer: Consumer, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued = draws(house.accounts(3), COUNT)
    settled(house, consumer, queued)
    first = stored(redis, queued)
    redis.flushdb()
    tell, failures = repeats._told, [OperationalError("SELECT", {}, ConnectionResetError())] * 2

    def fail_twice(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return tell(*arguments)

    monkeypatch.setattr(repeats, "_told", fail_twice)
    done = settled(house, consumer, queued)
    assert (done.settled, done.repeats, failures) == (COUNT, COUNT, [])
    assert stored(redis, queued) == first


def test_settling_tells_all_results_and_unread_tells_new_ones(house: House, mariadb_url: str) -> None:
    queued = draws(accounts_of(house), COUNT)
    rules = Rules(house.wheels)
    first = tries.settle(house.engine, queued[:30], rules)
    unread = tries.settle_unread(house.engine, queued, rules)
    assert [type(it) for it in unread] == [Repeat] * 30 + [Settled] * 10
    read_only = open_engine(mariadb_url)  # what tells results takes no lock and needs no right to write
    with house.engine.begin() as holding:
        holding.execute(text("SELECT id FROM account_asset_balances FOR UPDATE"))
        again = repeats.tell(read_only, unread, rules)
    read_only.dispose()
    assert not any(isinstance(it, Refused) for it in again)
    results = [it.result for it in again if isinstance(it, Settled)]
    assert results[:30] == [it.result for it in first if isinstance(it, Settled)]
