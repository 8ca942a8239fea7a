"""The outbox: what was accepted is published until it is settled or given up, whatever becomes of its messages."""

import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import Connection, Engine, case, select, text, update

from tests import servers
from tests.books import Row, assert_books, table
from tests.kept_results import keep_results, results_of
from tests.processes import PROJECT, House, draws, environment, wait_for
from tombola.producers import DrawClient, DrawRequest, IdempotencyKeyReused, PublishFailed, TransactionOutdated
from tombola.producers.brokers.rabbitmq import open_amqp
from tombola.producers.brokers.registry import Broker, open_broker
from tombola.producers.brokers.streams import QUEUE
from tombola.producers.domain.causes import DeadReason, Status
from tombola.producers.domain.contract import parse_request
from tombola.producers.entry import Entry
from tombola.producers.settings import Settings
from tombola.producers.storage import requests
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.schema import api_idempotency_requests
from tombola.worker.relay import relay as loop
from tombola.worker.relay.given_up import time_out_once
from tombola.worker.relay.overdue import DELAY_S_MAX, relay_once
from tombola.worker.relay.relay import Relay
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Refused, Settled
from tombola.worker.settle.rules import Rules

AFTER_S = 10.0
HOUR = timedelta(hours=1)
COMBINATIONS = ["sqlite-redis", "mariadb-redis", "mariadb-rabbitmq"]


@pytest.fixture(params=COMBINATIONS)
def house(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str) -> Iterator[House]:
    database, broker = request.param.split("-")
    url = request.getfixturevalue("mariadb_url") if database == "mariadb" else f"sqlite:///{tmp_path}/ledger.db"
    with House(url, redis_url if broker == "redis" else request.getfixturevalue("rabbitmq_url"), redis_url) as house:
        yield house
        assert_books(house.engine)


@pytest.fixture
def broker(house: House) -> Iterator[Broker]:
    broker = open_broker(house.settings.need("broker_url"), publish_timeout_s=20)
    yield broker
    broker.close()


@pytest.fixture
def client(house: House) -> Iterator[DrawClient]:
    with DrawClient.from_settings(house.settings) as client:
        yield client


on_redis = pytest.mark.parametrize("house", COMBINATIONS[:2], indirect=True)
on_mariadb = pytest.mark.parametrize("house", ["mariadb-redis"], indirect=True)
on_sqlite = pytest.mark.parametrize("house", ["sqlite-redis"], indirect=True)


class Loses:
    """A broker that takes everything and has nothing afterwards."""

    def __init__(self) -> None:
        self.published: list[str] = []
        self.failures = 0

    def publish(self, bodies: Sequence[bytes], headers: object = None) -> None:
        if self.failures:
            self.failures -= 1
            raise PublishFailed("down")
        self.published += [parse_request(body).request_key for body in bodies]

    def backlog(self) -> int:
        return 0

    def close(self) -> None:
        pass


def accept(engine: Engine, *asked: DrawRequest, is_published: bool = True) -> None:
    """What a frontend does before it publishes, or instead of it."""
    entry = Entry(engine, relay_after_s=AFTER_S)
    for start in range(0, len(asked), 800):
        some = [Submission(draw) for draw in asked[start : start + 800]]
        if is_published:
            entry.accept(some)
        else:
            with engine.begin() as connection:
                for it in some:
                    entry.accept_with(connection, it)


def relay(house: House, broker: Broker, *, tries_max: int = 10, rows_max: int = 800) -> int:
    return relay_once(house.engine, broker, after_s=AFTER_S, tries_max=tries_max, rows_max=rows_max)


def age(engine: Engine, *keys: str, by: timedelta = HOUR) -> None:
    """Let time pass for these requests, or for all: they were published longer ago, and are overdue."""
    columns, then = api_idempotency_requests.c, utc_now() - by
    was_published = case((columns.published_at.is_not(None), then), else_=None)
    with engine.begin() as connection:
        connection.execute(
            update(api_idempotency_requests)
            .where(columns.request_key.in_(keys) if keys else columns.status == Status.ACCEPTED)
            .values(publish_at=then, published_at=was_published, accepted_at=then)
        )


def lose_all(house: House) -> None:
    """FLUSHALL, or a queue that somebody deletes and the next one declares again."""
    url = house.env["TOMBOLA_BROKER_URL"]
    if url.startswith("redis"):
        with Redis.from_url(url) as redis:
            redis.delete(QUEUE)
    else:
        with open_amqp(url) as connection:
            connection.default_channel.queue_purge(QUEUE)


def rows(engine: Engine) -> dict[str, Row]:
    return {row["request_key"]: row for row in table(engine, "api_idempotency_requests")}


def statuses(engine: Engine) -> dict[str, str]:
    return {key: row["status"] for key, row in rows(engine).items()}


def attempts(engine: Engine) -> dict[str, int]:
    return {key: row["publish_attempts"] for key, row in rows(engine).items()}


def moment(stored: Any) -> datetime:
    """A time as a plain SELECT gives it."""
    return datetime.fromisoformat(stored) if isinstance(stored, str) else stored


def settle(house: House, *asked: DrawRequest) -> None:
    answers = tries.settle(house.engine, asked, Rules(house.wheels, tries_max=2))
    assert all(isinstance(answer, Settled) for answer in answers), answers


# ---- lost, and published again ---------------------------------------------------------------------------------------


def test_what_was_lost_is_published_when_it_is_overdue_and_not_before(
    house: House, client: DrawClient, broker: Broker
) -> None:
    asked = draws(house.accounts(2), 5)
    client.enqueue_many(asked)
    assert broker.backlog() == 5
    lose_all(house)
    assert (relay(house, broker), broker.backlog()) == (0, 0)
    age(house.engine)
    assert (relay(house, broker), broker.backlog()) == (5, 5)
    assert (relay(house, broker), broker.backlog()) == (0, 5)
    assert set(attempts(house.engine).values()) == {2}
    assert set(statuses(house.engine).values()) == {Status.ACCEPTED}


def test_what_was_never_published_is_so_at_once_beside_all_that_waits(house: House, broker: Broker) -> None:
    """A frontend died between its two writes: others have filled the queue since."""
    waiting, left = draws(house.accounts(1), 6)[:4], draws([1], 6)[4:]
    accept(house.engine, *waiting)
    house.enqueue(waiting)
    accept(house.engine, *left, is_published=False)
    assert (relay(house, broker), broker.backlog()) == (2, 6)
    assert attempts(house.engine) == {draw.request_key: 1 for draw in (*waiting, *left)}


def test_what_waits_in_the_queue_is_not_doubled_and_not_given_up(house: House, broker: Broker) -> None:
    """Nobody consumes: more and more is overdue, and nothing is lost."""
    asked = draws(house.accounts(1), 20)
    accept(house.engine, *asked)
    house.enqueue(asked)
    age(house.engine)
    before = table(house.engine, "api_idempotency_requests")
    for tries_max in (10, 1):
        assert (relay(house, broker, tries_max=tries_max), broker.backlog()) == (0, 20)
    assert table(house.engine, "api_idempotency_requests") == before


@on_redis
@pytest.mark.parametrize("outcome", ["completed", "rejected"])
def test_what_others_have_overtaken_is_published_while_the_queue_holds_more(
    house: House, broker: Broker, outcome: str
) -> None:
    (account_id,) = house.accounts(1, balance=100 if outcome == "completed" else 0)
    lost, just_before, waiting, overtaker = asked = draws([account_id], 4)
    accept(house.engine, *asked)
    house.enqueue([just_before, waiting])
    age(house.engine)
    age(house.engine, overtaker.request_key, by=HOUR / 2)
    age(house.engine, just_before.request_key, by=HOUR / 2 + timedelta(seconds=AFTER_S / 2))
    age(house.engine, waiting.request_key, by=HOUR / 4)
    assert relay(house, broker) == 0
    settle(house, overtaker)
    assert (relay(house, broker), broker.backlog()) == (1, 3)
    assert attempts(house.engine) == {draw.request_key: 2 if draw is lost else 1 for draw in asked}


@on_sqlite
def test_what_was_published_again_overtakes_nobody(house: House, broker: Broker) -> None:
    """Its last publish is no measure of what the workers are at: a first copy may have been the one that settled."""
    (account_id,) = house.accounts(1)
    waiting, again = draws([account_id], 2)
    accept(house.engine, waiting, again)
    house.enqueue([waiting])
    age(house.engine)
    with house.engine.begin() as connection:
        connection.execute(
            update(api_idempotency_requests)
            .where(api_idempotency_requests.c.request_key == again.request_key)
            .values(publish_attempts=2, published_at=utc_now())
        )
    settle(house, again)
    assert relay(house, broker) == 0


def test_all_that_was_lost_is_published_in_one_round(house: House, broker: Broker) -> None:
    """Also more than fits one step: what the first step has queued says nothing of the rest."""
    asked = draws([1], 2000)
    accept(house.engine, *asked)
    age(house.engine)
    relay = Relay(house.engine, broker, house.settings)
    assert (relay.run_once(), broker.backlog()) == (2000, 2000)
    assert (relay.run_once(), broker.backlog()) == (0, 2000)


# ---- attempts --------------------------------------------------------------------------------------------------------


@on_redis
def test_the_wait_doubles_with_each_attempt_until_it_is_given_up(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    (draw,) = draws(house.accounts(1), 1)
    accept(house.engine, draw)
    loses, waits = Loses(), []
    for attempt in range(2, 9):
        age(house.engine)
        assert relay(house, loses, tries_max=8) == 1
        (row,) = rows(house.engine).values()
        assert row["publish_attempts"] == attempt
        waits.append((moment(row["publish_at"]) - moment(row["published_at"])).total_seconds())
        assert relay(house, loses, tries_max=8) == 0
    assert waits == [20, 40, 80, 160, DELAY_S_MAX, DELAY_S_MAX, DELAY_S_MAX]
    assert loses.published == [draw.request_key] * 7
    age(house.engine)
    with caplog.at_level(logging.ERROR):
        assert relay(house, loses, tries_max=8) == 0
    assert f"request {draw.request_key} is dead: published 8 times" in caplog.text
    (row,) = rows(house.engine).values()
    assert (row["status"], row["reason"], row["result"], row["settled_at"]) == (
        Status.DEAD,
        DeadReason.NEVER_SETTLED,
        None,
        None,
    )
    age(house.engine, draw.request_key)
    assert relay(house, loses, tries_max=8) == 0

    (late,) = tries.settle(house.engine, [draw], Rules(house.wheels, tries_max=1))
    assert isinstance(late, Refused)
    with house.engine.begin() as connection:
        assert requests.revive(connection, [draw.request_key], utc_now()) == 1
    assert relay(house, loses, tries_max=8) == 1
    assert attempts(house.engine) == {draw.request_key: 1}
    settle(house, draw)


@on_sqlite
def test_what_is_revived_is_published_beside_all_that_waits(house: House, broker: Broker) -> None:
    waiting, dead = draws(house.accounts(1), 2)
    accept(house.engine, waiting, dead)
    house.enqueue([waiting])
    with house.engine.begin() as connection:
        assert requests.give_up(connection, dead.request_key, dead.fingerprint(), DeadReason.PARKED)
        assert requests.revive(connection, [dead.request_key], utc_now()) == 1
    assert (relay(house, broker), broker.backlog()) == (1, 2)


@on_sqlite
def test_a_relay_that_dies_before_it_has_published_costs_only_time(
    house: House, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    def die(_bodies: Sequence[bytes]) -> None:
        raise Died

    (draw,) = draws(house.accounts(1), 1)
    accept(house.engine, draw, is_published=False)
    with monkeypatch.context() as dying:
        dying.setattr(broker, "publish", die)
        with pytest.raises(Died):
            relay(house, broker)
    assert relay(house, broker) == 0
    age(house.engine)
    assert (relay(house, broker), broker.backlog()) == (1, 1)
    assert attempts(house.engine) == {draw.request_key: 2}


@on_mariadb
def test_two_relays_never_publish_the_same(house: House, redis_url: str) -> None:
    asked = draws([1], 2000)
    accept(house.engine, *asked, is_published=False)
    barrier = threading.Barrier(2, timeout=60)

    def run(_: int) -> list[int]:
        broker = open_broker(redis_url, publish_timeout_s=20)
        counts: list[int] = []
        barrier.wait()
        while counts[-3:] != [0] * 3:
            counts.append(relay(house, broker, rows_max=25))
        broker.close()
        return counts

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert min(sum(first), sum(second)) > 0
    with Redis.from_url(redis_url) as redis:
        published: Any = redis.xrange(QUEUE)
    keys = [parse_request(fields[b"body"]).request_key for _, fields in published]
    assert sorted(keys) == [draw.request_key for draw in asked]
    assert set(attempts(house.engine).values()) == {1}


@on_mariadb
def test_a_relay_leaves_out_what_another_has_in_hand(house: House) -> None:
    held, free = draws([1], 2)
    accept(house.engine, held, free, is_published=False)
    loses = Loses()
    with house.engine.begin() as other:
        lease = requests.lease(
            other,
            utc_now(),
            rows_max=1,
            tries_max=9,
            delay_after=lambda _: HOUR,
            published_before=None,
        )
        assert relay(house, loses) == 1
    assert sorted([*loses.published, *[draw.request_key for draw in lease.due]]) == [held.request_key, free.request_key]


# ---- the broker is away ----------------------------------------------------------------------------------------------


@on_sqlite
@pytest.mark.parametrize("scheme", ["redis://{}/0", "amqp://guest:secret@{}//"])
def test_a_broker_that_is_away_is_no_attempt(house: House, scheme: str) -> None:
    accept(house.engine, *draws([1], 3))
    age(house.engine)
    before = table(house.engine, "api_idempotency_requests")
    with socket.socket() as holder:
        holder.bind((servers.HOST, 0))  # bound, and nobody listens
        away = open_broker(scheme.format(f"{servers.HOST}:{holder.getsockname()[1]}"), publish_timeout_s=2)
        with pytest.raises(PublishFailed) as failed:
            relay(house, away, tries_max=1)
        away.close()
    assert "secret" not in str(failed.value)
    assert table(house.engine, "api_idempotency_requests") == before


def test_a_broker_that_takes_nothing_is_no_attempt_and_its_words_are_kept(tmp_path: Path, redis_url: str) -> None:
    """Redis out of memory answers everything but what adds to it."""
    asked = draws([1], 3)
    with (
        servers.redis(private=True) as server,
        Redis.from_url(server.url) as redis,
        House(f"sqlite:///{tmp_path}/ledger.db", server.url, redis_url) as house,
    ):
        broker = open_broker(server.url, publish_timeout_s=20)
        accept(house.engine, *asked)
        age(house.engine)
        redis.config_set("maxmemory", 1)
        with pytest.raises(PublishFailed, match="maxmemory"):
            relay(house, broker)
        for row in rows(house.engine).values():
            assert (row["status"], row["publish_attempts"], row["published_at"]) == (Status.ACCEPTED, 1, None)
            assert "maxmemory" in row["publish_error"]
            assert moment(row["publish_at"]) > utc_now().replace(tzinfo=None)
        redis.config_set("maxmemory", 0)
        assert relay(house, broker) == 0
        age(house.engine)
        assert (relay(house, broker), broker.backlog()) == (3, 3)
        for row in rows(house.engine).values():
            assert (row["publish_attempts"], row["publish_error"]) == (2, None)
        server.kill()
        age(house.engine)
        with pytest.raises(PublishFailed):
            relay(house, broker)
        server.restart()  # without a disk: all is lost
        assert (relay(house, broker), broker.backlog()) == (3, 3)
        broker.close()


@pytest.mark.parametrize("house", ["mariadb-rabbitmq"], indirect=True)
def test_a_queue_that_is_gone_is_declared_again(house: House, broker: Broker) -> None:
    asked = draws([1], 3)
    accept(house.engine, *asked)
    house.enqueue(asked)
    age(house.engine)
    assert relay(house, broker) == 0
    with open_amqp(house.env["TOMBOLA_BROKER_URL"]) as connection:
        connection.default_channel.queue_delete(QUEUE)
    with pytest.raises(PublishFailed):
        relay(house, broker)
    assert (relay(house, broker), broker.backlog()) == (3, 3)
    assert set(attempts(house.engine).values()) == {2}


# ---- in the caller's own transaction ---------------------------------------------------------------------------------


def order(connection: Connection, key: str) -> None:
    """What else the caller writes."""
    connection.execute(text("INSERT INTO orders (request_key) VALUES (:key)"), {"key": key})


def orders(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.execute(text("SELECT request_key FROM orders ORDER BY request_key")).scalars())


@pytest.fixture
def shop(house: House) -> House:
    with house.engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (request_key VARCHAR(64))"))
    return house


def test_a_draw_in_the_callers_transaction_happens_if_that_commits(
    shop: House, client: DrawClient, broker: Broker
) -> None:
    undone, done, also_done = draws(shop.accounts(1), 3)
    shop.enqueue(draws([1], 2, prefix="other"))
    with shop.engine.connect() as connection:
        order(connection, undone.request_key)
        client.enqueue(undone, connection=connection)
        connection.rollback()
    assert (relay(shop, broker), orders(shop.engine), rows(shop.engine)) == (0, [], {})
    with shop.engine.begin() as connection:
        order(connection, done.request_key)
        ticket = client.enqueue(done, connection=connection)
    with shop.engine.connect() as connection:  # which has not begun yet
        client.enqueue(also_done, connection=connection)
        order(connection, also_done.request_key)
        connection.commit()
    assert (ticket.request_key, ticket.result) == (done.request_key, None)
    assert orders(shop.engine) == sorted(rows(shop.engine)) == [done.request_key, also_done.request_key]
    assert broker.backlog() == 2  # nothing was published before the commit, nor at it
    assert (relay(shop, broker), broker.backlog()) == (2, 4)


@on_redis
def test_a_repeat_in_the_callers_transaction_gets_its_first_result(shop: House, client: DrawClient) -> None:
    (draw,) = draws(shop.accounts(1), 1)
    for _ in range(2):
        with shop.engine.begin() as connection:
            assert client.enqueue(draw, connection=connection).result is None
    settle(shop, draw)
    with shop.engine.begin() as connection:
        order(connection, "repeat")
        ticket = client.enqueue(draw, connection=connection)
    assert ticket.reason == "DUPLICATE_REQUEST_IDEMPOTENT"
    assert ticket.result is not None
    assert ticket.result.encode() == results_of(shop.engine)[draw.request_key]
    assert orders(shop.engine) == ["repeat"]


@on_redis
def test_after_a_conflict_the_callers_transaction_goes_on(shop: House, client: DrawClient) -> None:
    mine, free = draws(shop.accounts(1), 2)
    client.enqueue(mine)
    with shop.engine.begin() as connection:
        order(connection, "before")
        with pytest.raises(IdempotencyKeyReused):
            client.enqueue(DrawRequest(account_id=9, request_key=mine.request_key), connection=connection)
        with pytest.raises(IdempotencyKeyReused):
            client.enqueue(
                DrawRequest(account_id=1, request_key="new", lottery_session_id=mine.lottery_session_id),
                connection=connection,
            )
        client.enqueue(free, connection=connection)
        order(connection, "later")
    assert orders(shop.engine) == ["before", "later"]
    assert set(rows(shop.engine)) == {mine.request_key, free.request_key}


@on_mariadb
@pytest.mark.parametrize("change", ["none", "account", "session", "settled"])
def test_what_the_callers_snapshot_cannot_see_is_seen(shop: House, client: DrawClient, change: str) -> None:
    (draw, another) = draws(shop.accounts(1), 2)
    with shop.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        order(connection, "snapshot")
        assert connection.execute(select(api_idempotency_requests)).all() == []
        # Meanwhile, on another connection:
        client.enqueue(draw)
        if change == "settled":
            settle(shop, draw)
        assert connection.execute(select(api_idempotency_requests)).all() == []
        if change == "account":
            with pytest.raises(IdempotencyKeyReused):
                client.enqueue(DrawRequest(account_id=9, request_key=draw.request_key), connection=connection)
        elif change == "session":
            new = DrawRequest(account_id=1, request_key="new", lottery_session_id=draw.lottery_session_id)
            try:
                with pytest.raises(IdempotencyKeyReused):
                    client.enqueue(new, connection=connection)
            except TransactionOutdated:  # MariaDB from 11.6.2 on: the whole of it again
                connection.rollback()
                order(connection, "snapshot")
                with pytest.raises(IdempotencyKeyReused):
                    client.enqueue(new, connection=connection)
        else:
            ticket = client.enqueue(draw, connection=connection)
            assert (ticket.result is not None) == (change == "settled")
        client.enqueue(another, connection=connection)
        connection.commit()
    assert orders(shop.engine) == ["snapshot"]
    assert set(rows(shop.engine)) == {draw.request_key, another.request_key}
    assert attempts(shop.engine) == {draw.request_key: 1, another.request_key: 0}


# ---- too long ago ----------------------------------------------------------------------------------------------------


@on_redis
def test_what_was_accepted_too_long_ago_is_given_up_in_steps(house: House, caplog: pytest.LogCaptureFixture) -> None:
    asked = draws(house.accounts(1), 8)
    accept(house.engine, *asked)
    settle(house, asked[0])
    young, *old = asked[1:]
    age(house.engine, *[draw.request_key for draw in (asked[0], *old)])
    with caplog.at_level(logging.ERROR):
        assert [time_out_once(house.engine, rows_max=4, timeout_s=1800) for _ in range(3)] == [4, 2, 0]
    assert caplog.text.count("not settled within 1800 s") == 6
    assert statuses(house.engine) == {
        asked[0].request_key: Status.COMPLETED,
        young.request_key: Status.ACCEPTED,
        **{draw.request_key: Status.DEAD for draw in old},
    }
    assert {row["reason"] for row in rows(house.engine).values()} == {None, DeadReason.TIMED_OUT}
    with house.engine.begin() as connection:
        assert requests.revive(connection, [draw.request_key for draw in old], utc_now()) == 6
    assert time_out_once(house.engine, timeout_s=1800) == 0


# ---- who runs it -----------------------------------------------------------------------------------------------------


@on_sqlite
def test_the_loop_outlives_an_outage_and_ends_when_told(
    house: House, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "IDLE_WAIT_S", 0.01)
    monkeypatch.setattr(loop, "BACKOFF_S_MAX", 0.01)
    monkeypatch.setattr(loop, "TIME_OUT_EVERY_S", 0.0)
    first, second, old = draws(house.accounts(1), 3)
    accept(house.engine, first)
    accept(house.engine, old)
    age(house.engine, old.request_key, by=timedelta(days=2))
    with house.engine.begin() as connection:  # far from overdue
        connection.execute(
            update(api_idempotency_requests)
            .where(api_idempotency_requests.c.request_key == old.request_key)
            .values(publish_at=utc_now() + HOUR)
        )
    age(house.engine, first.request_key)
    loses, stopping = Loses(), threading.Event()
    loses.failures = 1
    thread = threading.Thread(target=Relay(house.engine, loses, house.settings).run, args=[stopping])
    with caplog.at_level(logging.WARNING):
        thread.start()
        try:
            wait_for(lambda: "the relay tries again (1)" in caplog.text, within_s=20, what=lambda: caplog.text)
            age(house.engine, first.request_key)
            wait_for(lambda: first.request_key in loses.published, within_s=20, what=lambda: caplog.text)
            accept(house.engine, second, is_published=False)
            wait_for(lambda: second.request_key in loses.published, within_s=20, what=lambda: caplog.text)
            wait_for(
                lambda: statuses(house.engine)[old.request_key] == Status.DEAD, within_s=20, what=lambda: caplog.text
            )
        finally:
            stopping.set()
            thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("house", ["mariadb-rabbitmq"], indirect=True)
def test_the_command_says_how_many_it_has_published(house: House, broker: Broker) -> None:
    accept(house.engine, *draws([1], 3), is_published=False)
    done = subprocess.run(
        [sys.executable, "-c", "from tombola.worker.cli import main; main()", "relay", "--once"],
        cwd=PROJECT,
        env=environment(house.env),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 overdue requests published\n", "")
    assert (relay(house, broker), broker.backlog()) == (0, 3)


@on_sqlite
def test_workers_relay_and_archive_by_their_own_clock(house: House, broker: Broker, monkeypatch: Any) -> None:
    for name, value in house.env.items():
        monkeypatch.setenv(name, value)
    from tombola.worker.celery import make_app

    app = make_app(house.settings)
    scheduled = {it["task"] for it in app.conf.beat_schedule.values()}
    assert {"tombola.relay", "tombola.archive"} <= scheduled <= set(app.tasks)
    lost, *old = draws(house.accounts(1), 4)
    accept(house.engine, *old)
    settle(house, *old)
    keep_results(house.engine)
    accept(house.engine, lost, is_published=False)
    relaying, archiving = app.tasks["tombola.relay"], app.tasks["tombola.archive"]
    assert [relaying.apply().get() for _ in range(2)] == [1, 0]
    assert broker.backlog() == 1
    assert archiving.apply().get() == 0
    long_ago = utc_now() - timedelta(days=100)
    with house.engine.begin() as connection:
        connection.execute(
            update(api_idempotency_requests)
            .where(api_idempotency_requests.c.status == Status.COMPLETED)
            .values(settled_at=long_ago, publish_at=long_ago)
        )
    assert [archiving.apply().get() for _ in range(2)] == [3, 0]
    for_ever = make_app(house.settings.model_copy(update={"retention_days": 0.0})).tasks["tombola.archive"]
    settle(house, lost)
    assert for_ever.apply().get() == 0
    assert house.violations() == []


# ---- a time-out comes when it is due ---------------------------------------------------------------------------------


def hasty(house: House, timeout_s: float) -> Settings:
    return house.settings.model_copy(update={"request_timeout_s": timeout_s})


@on_redis
def test_a_time_out_is_not_a_minute_late(house: House, broker: Broker) -> None:
    """A relay that has just looked looks again when the next one is due, not when a minute is over."""
    running = Relay(house.engine, broker, hasty(house, 3.0))
    running.run_once()
    (late,) = draws(house.accounts(1), 1)
    accept(house.engine, late)
    assert statuses(house.engine)[late.request_key] == Status.ACCEPTED

    def is_dead() -> bool:
        running.run_once()
        return statuses(house.engine)[late.request_key] == Status.DEAD

    running.run_once()
    assert statuses(house.engine)[late.request_key] == Status.ACCEPTED
    wait_for(is_dead, within_s=20, what=lambda: "not given up")
    assert rows(house.engine)[late.request_key]["reason"] == DeadReason.TIMED_OUT


@on_redis
def test_a_time_out_needs_no_broker(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """TOMBOLA_REQUEST_TIMEOUT_S says `whatever the reason`: a broker that is away is one."""
    old, overdue = draws(house.accounts(1), 2)
    accept(house.engine, old, overdue)
    age(house.engine, old.request_key, by=timedelta(days=2))
    age(house.engine, overdue.request_key)
    away = Loses()
    away.failures = 1
    with pytest.raises(PublishFailed):
        Relay(house.engine, away, house.settings).run_once()
    assert statuses(house.engine) == {old.request_key: Status.DEAD, overdue.request_key: Status.ACCEPTED}


@on_mariadb
def test_one_that_another_transaction_holds_is_timed_out_when_it_is_let_go(house: House, broker: Broker) -> None:
    held, free = draws(house.accounts(1), 2)
    accept(house.engine, held, free)
    age(house.engine, held.request_key, free.request_key, by=timedelta(days=2))
    running, table = Relay(house.engine, broker, house.settings), api_idempotency_requests
    with house.engine.begin() as connection:
        mine = select(table.c.request_key).where(table.c.request_key == held.request_key)
        connection.execute(mine.with_for_update())
        running.run_once()
        assert statuses(house.engine) == {held.request_key: Status.ACCEPTED, free.request_key: Status.DEAD}
    running.run_once()
    assert statuses(house.engine) == {held.request_key: Status.DEAD, free.request_key: Status.DEAD}
