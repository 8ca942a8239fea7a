"""Processes die at the worst moments, and the books still balance.

Every test ends the same way: all draws have an outcome, none has two, what was answered once is answered the same, and
the audit finds nothing.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from threading import Event, Thread

import pytest
from redis import Redis
from sqlalchemy import create_engine, text

from tests import processes, servers
from tests.processes import QUICK_CLAIM, House, Worker, draws, wait_for
from tombola.producers.brokers.rabbitmq import open_amqp
from tombola.producers.brokers.streams import QUEUE
from tombola.producers.domain.contract import DrawRequest, parse_result
from tombola.producers.domain.errors import PublishFailed
from tombola.producers.results import KEY_PREFIX, ResultStore

DYING = [sys.executable, "-m", "tests.chaos.dying_worker"]
SETTLED_WITHIN_S = 60.0


@pytest.fixture(params=["redis", "rabbitmq"])
def house(request: pytest.FixtureRequest, mariadb_url: str, redis_url: str) -> Iterator[House]:
    broker_url = redis_url if request.param == "redis" else request.getfixturevalue("rabbitmq_url")
    with House(mariadb_url, broker_url, redis_url, **QUICK_CLAIM) as house:
        yield house


only_redis = pytest.mark.parametrize("house", ["redis"], indirect=True)


def dying(house: House, at: str, on: str) -> dict[str, str]:
    return house.env | {"DIE_AT": at, "DIE_ON": on}


def assert_killed(worker: Worker) -> None:
    assert worker.wait() == -signal.SIGKILL, worker.log()


def assert_all_settled_once(house: House, queued: list[DrawRequest], first: dict[str, str]) -> None:
    """`first` is what was on record at some earlier time: it must not have changed."""
    results = house.results()
    assert results.keys() == {draw.request_key for draw in queued}
    assert {key: results[key] for key in first} == first
    assert house.causes() == []
    assert house.violations() == []


def assert_answered(house: House, queued: list[DrawRequest]) -> None:
    """Every result is in the store, put there by a worker (this store cannot rebuild), and says what is on record."""
    on_record = house.results()
    store = ResultStore.open(house.settings.need("result_url"), ttl_s=60)

    def missing() -> list[str]:
        return [draw.request_key for draw in queued if store.peek(draw.lottery_session_id) is None]

    wait_for(lambda: not missing(), within_s=20, what=lambda: f"not answered: {missing()[:10]}")
    for draw in queued:
        assert store.get(draw.lottery_session_id).decode() == on_record[draw.request_key]
    store.close()


@pytest.mark.parametrize(
    ("house", "place"),
    [
        ("redis", "before_commit"),
        ("redis", "after_commit"),
        ("redis", "after_results"),
        ("rabbitmq", "after_commit"),
        pytest.param("rabbitmq", "before_commit", marks=pytest.mark.chaos),
        pytest.param("rabbitmq", "after_results", marks=pytest.mark.chaos),
    ],
    indirect=["house"],
)
def test_a_worker_that_is_killed_half_way(house: House, place: str) -> None:
    queued = draws(house.accounts(10), 300)
    house.enqueue(queued)
    with processes.worker(dying(house, place, on="4"), command=DYING, until="") as worker:
        assert_killed(worker)
    first = house.results()
    # Three batches of 7 came through before; the fourth one's fate depends on the place.
    assert 0 < len(first) < 100
    with Redis.from_url(house.env["TOMBOLA_RESULT_URL"]) as client:
        answered = [draw for draw in queued if client.exists(KEY_PREFIX + draw.lottery_session_id)]
    unanswered = first.keys() - {draw.request_key for draw in answered}
    if place == "after_commit":
        assert unanswered, "it died too late"
    if place == "after_results":
        assert not unanswered, "it died too early"
    with processes.worker(house.env) as worker:
        house.wait_settled(len(queued), within_s=SETTLED_WITHIN_S, log=worker.log)
        assert_answered(house, queued)
        if place != "before_commit":
            wait_for(lambda: "were repeats" in worker.log(), within_s=20, what=lambda: "nothing was delivered again")
    assert_all_settled_once(house, queued, first)


@pytest.mark.chaos
def test_a_message_that_kills_its_worker_is_parked_and_takes_nobody_along(house: House) -> None:
    queued = draws(house.accounts(5), 40)
    poison = queued[20]
    house.env["TOMBOLA_DELIVERIES_MAX"] = "2"
    house.enqueue(queued)

    def is_over() -> bool:
        return house.settled() == len(queued) - 1 and house.causes() == ["too many deliveries"] and left(house) == 0

    deaths = 0
    # Twice in a batch, once alone after it was parked; then it is not tried again.
    while deaths < 10:
        with processes.worker(dying(house, "on_key", on=poison.request_key), command=DYING, until="") as worker:
            wait_for(
                lambda worker=worker: not worker.is_alive or is_over(),  # type: ignore[misc]
                within_s=SETTLED_WITHIN_S,
                what=lambda worker=worker: f"{house.settled()} settled, {house.causes()}\n{worker.log()[-3000:]}",  # type: ignore[misc]
            )
            # What it held in hand would be back on the queue now.
            if worker.is_alive and worker.stop() == 0 and is_over():
                break
        deaths += 1
    assert 3 <= deaths <= 5, deaths
    assert house.results().keys() == {draw.request_key for draw in queued} - {poison.request_key}
    assert is_over()
    assert house.violations() == []


def left(house: House) -> int:
    """How many messages wait on the queue: on a Stream also those in somebody's hands."""
    url = house.settings.need("broker_url")
    if url.startswith("redis"):
        with Redis.from_url(url) as client:
            return int(client.xlen(QUEUE))
    with open_amqp(url) as connection:
        return int(connection.channel().queue_declare(QUEUE, passive=True).message_count)


@pytest.mark.chaos
@only_redis
def test_two_workers_on_one_hot_account(house: House) -> None:
    house.env |= {"TOMBOLA_BATCH_SIZE_MAX": "50", "TOMBOLA_CLAIM_AFTER_S": "10"}
    total = 1000
    (account_id,) = house.accounts(1, balance=120)
    queued = draws([account_id], total)
    with ExitStack() as stack:
        workers = [stack.enter_context(processes.worker(house.env)) for _ in range(2)]
        for start in range(0, total, 100):
            house.enqueue(queued[start : start + 100])
        house.wait_settled(total, within_s=SETTLED_WITHIN_S, log=workers[0].log)
        assert_answered(house, queued)
    results = [parse_result(result.encode()) for result in house.results().values()]
    completed = [result for result in results if result.status == "completed"]
    rejected = [result for result in results if result.status == "rejected"]
    # 1 a draw, 5 for each win: the account is empty when the last one is told no, and each no is explained.
    wins = sum(result.won for result in completed)
    balance = 120 + 5 * wins - len(completed)
    assert {result.reason for result in rejected} <= {"INSUFFICIENT_BALANCE"}
    assert {result.balance_after for result in rejected} <= {"0.00"}
    assert len(completed) + len(rejected) == total
    assert balance >= 0
    assert_all_settled_once(house, queued, {})


@only_redis
def test_a_hot_account_that_runs_dry(house: House) -> None:
    """Every second draw is for an account that cannot win enough: it runs out half-way, exactly."""
    house.env |= {"TOMBOLA_BATCH_SIZE_MAX": "50", "TOMBOLA_CLAIM_AFTER_S": "10"}
    (account_id,) = house.accounts(1, balance=50)
    # Known in advance: draws do not roll fresh dice. Losing draws only, so that the balance lasts for 50 of them.
    wheel = house.first_wheel
    queued = [draw for draw in draws([account_id], 1000) if not wheel.draw(account_id, draw.request_key).amount][:600]
    assert len(queued) == 600
    with ExitStack() as stack:
        workers = [stack.enter_context(processes.worker(house.env)) for _ in range(2)]
        house.enqueue(queued)
        house.wait_settled(len(queued), within_s=SETTLED_WITHIN_S, log=workers[0].log)
        assert_answered(house, queued)
    results = [parse_result(result.encode()) for result in house.results().values()]
    assert sum(result.status == "completed" for result in results) == 50
    no = [result for result in results if result.status == "rejected"]
    assert {(result.reason, result.balance_after) for result in no} == {("INSUFFICIENT_BALANCE", "0.00")}
    assert_all_settled_once(house, queued, {})


def under_load(house: House, queued: list[DrawRequest], *, chunk: int = 20) -> tuple[Thread, Event]:
    """Publish `queued` in the background, again and again until it is confirmed, as a frontend would."""
    done = Event()

    def publish() -> None:
        for start in range(0, len(queued), chunk):
            while not done.is_set():
                try:
                    house.enqueue(queued[start : start + chunk])
                    break
                except PublishFailed:
                    time.sleep(0.1)
            done.wait(0.02)

    thread = Thread(target=publish, daemon=True)
    thread.start()
    return thread, done


def through_outages(house: House, queued: list[DrawRequest], outage: Callable[[], None], *, times: int) -> None:
    with ExitStack() as stack:
        workers = [stack.enter_context(processes.worker(house.env)) for _ in range(2)]
        thread, done = under_load(house, queued)
        stack.callback(done.set)
        try:
            for number in range(1, times + 1):
                house.wait_settled(number * len(queued) // (2 * times), within_s=SETTLED_WITHIN_S, log=workers[0].log)
                before = house.results()
                outage()
                after = house.results()
                assert {key: after.get(key) for key in before} == before
            thread.join(SETTLED_WITHIN_S)
            assert not thread.is_alive()
            house.wait_settled(len(queued), within_s=SETTLED_WITHIN_S, log=workers[0].log)
            assert all(worker.is_alive for worker in workers)
            assert_answered(house, queued)
            assert [worker.stop() for worker in workers] == [0, 0]
        finally:
            done.set()
    assert_all_settled_once(house, queued, {})


@pytest.mark.chaos
def test_mariadb_is_killed_under_load(redis_url: str) -> None:
    with servers.mariadb(private=True) as server:
        with create_engine(server.url, isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text("CREATE DATABASE ledger"))

        def outage() -> None:
            server.kill()
            server.restart()

        with House(server.url + "ledger", redis_url, redis_url, **QUICK_CLAIM) as house:
            through_outages(house, draws(house.accounts(20), 3000), outage, times=2)


@pytest.mark.chaos
def test_redis_is_killed_under_load(mariadb_url: str) -> None:
    """Broker and result store at once; what Redis confirmed it keeps, as it syncs always."""
    with servers.redis(private=True, appendonly=True, appendfsync="always") as server:

        def outage() -> None:
            server.kill()
            server.restart()

        with House(mariadb_url, server.url, server.url, **QUICK_CLAIM) as house:
            through_outages(house, draws(house.accounts(20), 3000), outage, times=3)


@pytest.mark.chaos
@only_redis
def test_a_worker_that_sleeps_past_its_claim_wakes_to_find_it_done(house: House) -> None:
    house.env["TOMBOLA_LANES"] = "1"
    queued = draws(house.accounts(10), 2000)
    house.enqueue(queued)
    with processes.worker(house.env) as sleeper:
        house.wait_settled(50, within_s=SETTLED_WITHIN_S, log=sleeper.log)
        sleeper.signal(signal.SIGSTOP)
        first = house.results()
        with processes.worker(house.env) as heir:
            house.wait_settled(len(queued), within_s=SETTLED_WITHIN_S, log=heir.log)
            sleeper.signal(signal.SIGCONT)
            assert_answered(house, queued)
            assert sleeper.is_alive
            assert heir.stop() == 0
        assert sleeper.stop() == 0
    assert_all_settled_once(house, queued, first)
