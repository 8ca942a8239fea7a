"""A result store that is full, hung or away holds up no settling, and gets its results later."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from tests import servers
from tests.processes import House, draws, wait_for
from tombola.producers.results import KEY_PREFIX, ResultStore, StoredResult
from tombola.worker import metrics
from tombola.worker.settle import putting
from tombola.worker.settle.consumer import Consumer
from tombola.worker.settle.putting import Putting

AT = datetime(2026, 11, 26, tzinfo=UTC)


@pytest.fixture
def store_server() -> Iterator[servers.Server]:
    with servers.redis(private=True) as server:
        yield server


@pytest.fixture
def house(tmp_path: Path, redis_url: str, store_server: servers.Server) -> Iterator[House]:
    with House(f"sqlite:///{tmp_path}/ledger.db", redis_url, store_server.url) as house:
        yield house


@pytest.fixture
def consumer(house: House) -> Iterator[Consumer]:
    consumer = Consumer.open(house.settings, house.engine, house.wheels)
    yield consumer
    consumer.results.close()
    consumer.deliveries.close()


def settle_all(house: House, consumer: Consumer, count: int) -> None:
    deadline = time.monotonic() + 30
    while house.settled() < count:
        assert time.monotonic() < deadline
        consumer.consume_once(wait_s=0.1)


def fill(url: str) -> None:
    """No room for another byte."""
    with Redis.from_url(url) as client:
        used: Any = client.info("memory")
        client.config_set("maxmemory", used["used_memory"] // 2)


@pytest.mark.parametrize("trouble", ["killed", "frozen", "full"])
def test_draws_settle_while_the_result_store_is_in_trouble(
    house: House, consumer: Consumer, store_server: servers.Server, trouble: str
) -> None:
    queued = draws(house.accounts(5), 60)
    house.enqueue(queued[:20])
    settle_all(house, consumer, 20)
    if trouble == "killed":
        store_server.kill()
    elif trouble == "frozen":
        assert store_server.pid is not None
        os.kill(store_server.pid, signal.SIGSTOP)
    else:
        fill(store_server.url)
    try:
        for start in (20, 40):
            house.enqueue(queued[start : start + 20])
            began = time.monotonic()
            settle_all(house, consumer, start + 20)
            took_s = time.monotonic() - began
        # The first of these batches may have found out; the second one knows.
        assert took_s < 2
        assert metrics.RESULTS_OWED._value.get() > 0
    finally:
        if trouble == "killed":
            store_server.restart()
        elif trouble == "frozen":
            assert store_server.pid is not None
            os.kill(store_server.pid, signal.SIGCONT)
        else:
            with Redis.from_url(store_server.url) as client:
                client.config_set("maxmemory", 0)
    with Redis.from_url(store_server.url) as client:
        late = [KEY_PREFIX + draw.lottery_session_id for draw in queued[20:]]
        wait_for(lambda: client.exists(*late) == 40, within_s=30, what=lambda: "results are still owed")
    wait_for(lambda: metrics.RESULTS_OWED._value.get() == 0, within_s=10, what=lambda: "some are owed")


@pytest.mark.process
def test_a_full_store_still_tells_those_who_wait(store_server: servers.Server) -> None:
    store = ResultStore.open(store_server.url, ttl_s=60)
    putter = Putting(store)
    fill(store_server.url)
    with Redis.from_url(store_server.url) as client, client.pubsub(ignore_subscribe_messages=True) as listening:
        listening.subscribe(KEY_PREFIX + "s")
        listening.get_message(timeout=5)
        putter.put([StoredResult("s", b"{}", AT)])
        message = listening.get_message(timeout=5)
        assert message is not None
        assert b'"result":{}' in message["data"]
        assert client.get(KEY_PREFIX + "s") is None
    putter.close()
    store.close()


def test_what_is_owed_is_bounded_and_the_oldest_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(putting, "OWED_MAX", 10)
    with socket.socket() as holder:  # nobody listens
        holder.bind((servers.HOST, 0))
        putter = Putting(ResultStore.open(f"redis://{servers.HOST}:{holder.getsockname()[1]}/0", ttl_s=60))
        before = metrics.RESULTS_DROPPED._value.get()
        for number in range(25):
            putter.put([StoredResult(f"s{number}", b"{}", AT)])
        # What the thread has in its hand comes back, and counts then.
        wait_for(
            lambda: metrics.RESULTS_DROPPED._value.get() - before >= 15,
            within_s=20,
            what=lambda: f"{metrics.RESULTS_DROPPED._value.get() - before} dropped",
        )
        putter.close()
        assert len(putter._owed) <= 10
        assert putter._owed[-1].task_id == "s24"
