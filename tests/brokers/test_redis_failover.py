"""Redis fails over by address: the old primary is a replica now and keeps its connections; every client goes on."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import pytest
import redis

from tests import servers
from tests.processes import CELERY, House, environment, wait_for
from tests.proxies import HOST, Forwarder, RedisPair, redis_pair
from tombola.producers.brokers.redis_clients import open_redis
from tombola.producers.brokers.registry import open_broker
from tombola.producers.brokers.streams import QUEUE
from tombola.producers.client import DrawClient
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import ConfigurationError, PublishFailed, ResultNotReady, ServiceUnavailable
from tombola.producers.gateway.results import Results
from tombola.producers.results import ResultStore, StoredResult
from tombola.producers.storage.requests import SessionState
from tombola.producers.telemetry import pulse
from tombola.producers.telemetry.pulse import Pulse
from tombola.worker.deliveries.streams import StreamDeliveries, forget_consumers
from tombola.worker.doctor.checks import Facts
from tombola.worker.doctor.streams import examine_results, examine_stream

pytestmark = pytest.mark.process

ON_WITHIN_S = 10.0
TOMBOLA = [sys.executable, "-m", "tombola.worker"]


def eventually(condition: Callable[[], bool], what: str, *, within_s: float = ON_WITHIN_S) -> None:
    wait_for(condition, within_s=within_s, what=lambda: what)


@pytest.fixture(scope="module")
def servers_pair() -> Iterator[RedisPair]:
    with redis_pair() as pair:
        yield pair


@pytest.fixture
def pair(servers_pair: RedisPair) -> Iterator[RedisPair]:
    servers_pair.reset()
    yield servers_pair
    servers_pair.relink()


@pytest.fixture
def address(pair: RedisPair) -> Iterator[Forwarder]:
    with Forwarder(pair.primary.port) as address:
        yield address


@pytest.fixture(params=[2, 3], ids=["RESP2", "RESP3"])
def url(request: pytest.FixtureRequest, address: Forwarder) -> str:
    return f"redis://{HOST}:{address.port}/0?protocol={request.param}"


def result_of(number: int) -> StoredResult:
    session = f"session_{number}"
    body = msgspec.json.encode(
        {
            "v": 1,
            "request_key": session,
            "lottery_session_id": session,
            "account_id": 6,
            "campaign": "default",
            "status": "completed",
            "reason": None,
            "prize_amount": "0.00",
            "balance_after": "9.00",
            "transactions": [],
        }
    )
    return StoredResult(session, body, datetime(2026, 1, 1, tzinfo=UTC))


def test_publishing_and_consuming_go_on_and_nothing_is_lost(pair: RedisPair, address: Forwarder, url: str) -> None:
    seen: set[bytes] = set()
    is_over = False
    broker, consumer = open_broker(url, publish_timeout_s=5), StreamDeliveries(url, claim_after_s=2)

    def consume() -> None:
        while not is_over:
            with suppress(ServiceUnavailable):
                fetched = consumer.fetch(100, wait_s=1)
                consumer.ack(fetched)
                seen.update(delivery.body for delivery in fetched)
        consumer.close()

    thread = Thread(target=consume, daemon=True)
    thread.start()
    broker.publish([b"before"])
    eventually(lambda: b"before" in seen, "nothing came before")
    time.sleep(0.2)  # it is blocked in XREADGROUP now
    pair.fail_over(address)
    began = time.monotonic()
    published = [b"draw %d" % number for number in range(20)]
    for body in published:
        while time.monotonic() < began + ON_WITHIN_S:
            with suppress(PublishFailed):
                broker.publish([body])
                break
    eventually(lambda: seen >= set(published), f"{len(seen)} of {len(published)} came")
    is_over = True
    thread.join(ON_WITHIN_S)
    with redis.Redis.from_url(pair.primary.url) as client:
        assert client.xlen(QUEUE) == 0
        assert forget_consumers(open_redis(url), idle_s=0) == 0
    broker.close()


def test_results_are_put_and_found_and_waited_for(pair: RedisPair, address: Forwarder, url: str) -> None:
    with closing(ResultStore.open(url, ttl_s=60)) as frontend, closing(ResultStore.open(url, ttl_s=60)) as worker:
        worker.put([result_of(1)])
        assert frontend.wait("session_1", timeout_s=5).lottery_session_id == "session_1"
        pair.fail_over(address, is_linked=False)
        worker.put([result_of(2)])

        def is_found() -> bool:
            with suppress(ResultNotReady, ServiceUnavailable):
                return bool(frontend.get("session_2"))
            return False

        eventually(is_found, "a reader stays with the old primary")
        waiting = ThreadPoolExecutor(1).submit(frontend.wait, "session_3", timeout_s=10)
        time.sleep(0.3)
        worker.put([result_of(3)])
        assert waiting.result(timeout=10).lottery_session_id == "session_3"


@pytest.mark.parametrize("is_linked", [True, False], ids=["linked", "cut off"])
def test_the_gateway_hears_of_results_again(pair: RedisPair, address: Forwarder, url: str, is_linked: bool) -> None:
    """A subscription at the old primary hears what that one replicates, or nothing at all, and no error either."""

    def no_states(session_ids: Any) -> dict[str, SessionState]:
        return {}

    async def run() -> None:
        with ThreadPoolExecutor(1) as readers:
            results = Results(url, no_states, readers)
            results.start()
            store = ResultStore.open(url, ttl_s=60)

            async def is_heard(number: int) -> bool:
                waiting = asyncio.create_task(results.wait(f"session_{number}", timeout_s=1))
                await asyncio.sleep(0.3)
                await asyncio.to_thread(store.put, [result_of(number)])
                return await waiting is not None

            await asyncio.sleep(0.3)
            assert await is_heard(1)
            await asyncio.to_thread(pair.fail_over, address, is_linked=is_linked)
            deadline = time.monotonic() + ON_WITHIN_S
            number = 2
            while not await is_heard(number):
                number += 1
                assert time.monotonic() < deadline, "it hears nothing any more"
            while await results.peek(f"session_{number}") is None:  # from all of its connections
                assert time.monotonic() < deadline, "it finds nothing any more"
                await asyncio.sleep(0.1)
            assert await results.ping()
            await results.close()
            store.close()

    asyncio.run(run())


def test_the_pulse_beats_at_the_new_primary(pair: RedisPair, address: Forwarder, url: str) -> None:
    beating = Pulse(open_redis(url, timeout_s=3), "worker", "here").start()
    reader = open_redis(url)  # the console's, the relay's lookout
    try:
        eventually(lambda: len(pulse.members(reader)) == 1, "no beat before")
        pair.fail_over(address, is_linked=False)
        with redis.Redis.from_url(pair.primary.url) as client:
            client.flushall()
            beating.add("settled", 3)
            eventually(lambda: bool(client.exists("tombola:member:worker:here")), "no beat after")
        eventually(lambda: len(pulse.members(reader)) == 1, "the reader stays with the old primary")
        eventually(lambda: sum(it.settled for it in pulse.minutes(reader, 2)) == 3, "what was counted is not there")
    finally:
        beating.stop()
        reader.close()


def test_doctor_tells_a_replica_in_one_sentence(pair: RedisPair) -> None:
    for examine in (examine_stream, examine_results):
        first, *rest = examine(pair.replica.url, Facts())
        assert first.status == "fail"
        assert first.found.startswith("this Redis is a replica")
        assert {check.status for check in rest} == {"skip"}


def test_doctor_tells_of_entries_too_large_for_a_draw(redis_url: str) -> None:
    with closing(open_broker(redis_url, publish_timeout_s=5)) as broker:
        broker.publish([b"x" * 50] * 3)
        checks = {check.name: check for check in examine_stream(redis_url, Facts())}
        assert (checks["stream"].status, checks["stream"].found) == ("ok", "3 entries, those in hand included")
        broker.publish([b"x" * 100_000] * 3)
        checks = {check.name: check for check in examine_stream(redis_url, Facts())}
        assert (checks["stream"].status, checks["consumer group"].status) == ("warn", "ok")
        assert "KiB each" in checks["stream"].found


@pytest.fixture(scope="module")
def cluster() -> Iterator[servers.Server]:
    with servers.redis(private=True, options=("--cluster-enabled", "yes")) as server:
        yield server


def test_doctor_tells_a_cluster_in_one_sentence(cluster: servers.Server) -> None:
    for examine in (examine_stream, examine_results):
        first, *rest = examine(cluster.url, Facts())
        assert (first.status, "does not support" in first.found) == ("fail", True)
        assert {check.status for check in rest} == {"skip"}


@pytest.mark.parametrize("which", ["BROKER", "RESULT"])
def test_a_cluster_is_refused_at_start(which: str, cluster: servers.Server, redis_url: str, tmp_path: Path) -> None:
    urls = {"BROKER": redis_url, "RESULT": redis_url} | {which: cluster.url}
    with House(f"sqlite:///{tmp_path}/ledger.db", urls["BROKER"], urls["RESULT"]) as house:
        (account,) = house.accounts(1)
        commands = [CELERY, [*TOMBOLA, "gateway", "--port", "0"]]
        if which == "BROKER":
            commands.append([*TOMBOLA, "relay"])
        started = [
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env=environment(house.env) | {"PYTHONWARNINGS": "ignore"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for command in commands
        ]
        for command, process in zip(commands, started, strict=True):
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 1, command
            assert "this is a Redis Cluster, which tombola does not support yet" in " ".join(said.split())
            assert "Traceback" not in said, said
        with DrawClient.from_settings(house.settings) as client, pytest.raises(ConfigurationError, match="Cluster"):  # noqa: PT012
            ticket = client.enqueue(DrawRequest(account_id=account, request_key="one"))
            client.wait(ticket.lottery_session_id, timeout_s=1)
