"""Accepted means it will happen: whatever dies or forgets, every 202 that a client holds ends in one outcome.

Each test judges by the receipts: what the client was told, not what the database thinks it was asked.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from redis import Redis
from sqlalchemy import select

from tests import processes, servers
from tests.processes import House, Worker, draws, wait_for
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.storage.schema import api_idempotency_requests as requests

GATEWAY = [sys.executable, "-m", "tombola.worker", "gateway"]
DYING_GATEWAY = [sys.executable, "-m", "tests.chaos.dying_gateway"]
RELAY = [sys.executable, "-m", "tombola.worker", "relay"]
UP = "Application startup complete"
TERMINAL_WITHIN_S = 60.0
ACCEPTED = 10_000
CHUNK = 50
CLIENTS = 6


class Receipts:
    """A client that keeps every key until it holds a 202 for it, however often it has to ask."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.held: dict[str, DrawRequest] = {}
        self._stopping = threading.Event()

    def post_all(self, asked: list[DrawRequest]) -> None:
        """Post in chunks from several threads; returns when there is a receipt for every one."""
        chunks = [asked[start : start + CHUNK] for start in range(0, len(asked), CHUNK)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(self._post, chunks))

    def _post(self, chunk: list[DrawRequest]) -> None:
        body = {"draws": [{"account_id": it.account_id, "request_key": it.request_key} for it in chunk]}
        while not self._stopping.is_set():
            try:
                answer = httpx.post(f"{self.url}/v1/draws/batch", json=body, timeout=30)
            except httpx.TransportError:
                self._stopping.wait(0.1)  # it is away: the same keys again
                continue
            if answer.status_code == 207:
                for it, told in zip(chunk, answer.json()["answers"], strict=True):
                    assert told["status"] == 202, told
                    self.held[it.request_key] = it
                return
            assert answer.status_code in (429, 503), answer.text
            self._stopping.wait(0.2)


@contextmanager
def gateway(house: House, *, command: list[str] = GATEWAY, port: int = 0, **env: str) -> Iterator[tuple[str, Worker]]:
    port = port or servers._free_port()
    open_to_all = {"TOMBOLA_GATEWAY_AUTH": "none", "TOMBOLA_GATEWAY_RATE_MAX": "1000000"}
    with processes.worker(house.env | open_to_all | env, command=[*command, "--port", str(port)], until=UP) as process:
        yield f"http://127.0.0.1:{port}", process


def relay(house: House) -> Any:
    return processes.worker(house.env, command=RELAY, until="relaying")


def statuses(house: House) -> dict[str, str]:
    with house.engine.connect().execution_options(read_only=True) as connection:
        rows = connection.execute(select(requests.c.request_key, requests.c.status)).all()
    return {row.request_key: row.status for row in rows}


def assert_kept(house: House, receipts: Receipts, log: Callable[[], str] = str, *, count: int = ACCEPTED) -> None:
    """Every receipt is terminal in time, its result is there to be fetched, nobody was charged twice."""

    def open_ones() -> list[str]:
        known = statuses(house)
        return [key for key in receipts.held if known.get(key) not in ("completed", "rejected")]

    wait_for(
        lambda: not open_ones(),
        within_s=TERMINAL_WITHIN_S,
        what=lambda: f"{len(open_ones())} of {len(receipts.held)} accepted draws are not settled\n{log()[-3000:]}",
    )
    assert len(receipts.held) == count
    assert house.violations() == []
    assert house.causes() == []


@contextmanager
def accepted(broker: str, mariadb_url: str, redis_url: str) -> Iterator[tuple[House, Any, ExitStack]]:
    """A house on a broker of its own, which may be killed."""
    with ExitStack() as stack:
        if broker == "redis":
            server: Any = stack.enter_context(servers.redis(private=True, appendonly=True))
            house = House(mariadb_url, server.url, server.url)
        else:
            server = stack.enter_context(servers.rabbitmq(private=True))
            house = House(mariadb_url, server.url, redis_url)
        yield stack.enter_context(house), server, stack


def post_under_a_halted_worker(house: House, stack: ExitStack) -> tuple[Receipts, Worker]:
    """10,000 receipts for draws of which hardly any is settled: the worker is stopped meanwhile."""
    worker = stack.enter_context(processes.worker(house.env))
    worker.process.send_signal(signal.SIGSTOP)
    url, _ = stack.enter_context(gateway(house))
    receipts = Receipts(url)
    receipts.post_all(draws(house.accounts(50, balance=10_000), ACCEPTED))
    return receipts, worker


@pytest.mark.chaos
def test_redis_forgets_everything(mariadb_url: str, redis_url: str) -> None:
    with accepted("redis", mariadb_url, redis_url) as (house, server, stack):
        stack.enter_context(relay(house))
        receipts, worker = post_under_a_halted_worker(house, stack)
        with Redis.from_url(server.url) as client:
            assert client.xlen("draws") > ACCEPTED * 0.9
            client.flushall()
        worker.process.send_signal(signal.SIGCONT)
        assert_kept(house, receipts, worker.log)


@pytest.mark.chaos
@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_the_broker_is_killed(mariadb_url: str, redis_url: str, broker: str) -> None:
    with accepted(broker, mariadb_url, redis_url) as (house, server, stack):
        stack.enter_context(relay(house))
        receipts, worker = post_under_a_halted_worker(house, stack)
        server.kill()
        worker.process.send_signal(signal.SIGCONT)
        server.restart()
        assert_kept(house, receipts, worker.log)


@pytest.mark.chaos
@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_the_gateway_is_killed_again_and_again(mariadb_url: str, redis_url: str, broker: str) -> None:
    with accepted(broker, mariadb_url, redis_url) as (house, _server, stack):
        worker = stack.enter_context(processes.worker(house.env))
        stack.enter_context(relay(house))
        port = servers._free_port()
        receipts = Receipts(f"http://127.0.0.1:{port}")
        asked = draws(house.accounts(50, balance=10_000), ACCEPTED)
        posting = threading.Thread(target=receipts.post_all, args=(asked,))
        posting.start()
        deaths = 0
        while posting.is_alive():
            with gateway(house, port=port) as (_, process):
                before = len(receipts.held)
                wait_for(
                    lambda before=before: len(receipts.held) > before + ACCEPTED // 5 or not posting.is_alive(),  # type: ignore[misc]
                    within_s=60,
                    what=lambda: f"{len(receipts.held)} receipts",
                )
                if posting.is_alive():
                    process.kill()
                    deaths += 1
        posting.join()
        assert deaths >= 2
        assert_kept(house, receipts, worker.log)


@pytest.mark.chaos
def test_the_relay_is_killed_again_and_again(mariadb_url: str, redis_url: str) -> None:
    """While it republishes what Redis forgot: each time another one goes on where it was."""
    with accepted("redis", mariadb_url, redis_url) as (house, server, stack):
        receipts, worker = post_under_a_halted_worker(house, stack)
        with Redis.from_url(server.url) as client:
            client.flushall()
            worker.process.send_signal(signal.SIGCONT)
            for _ in range(3):
                settled = house.settled()
                with relay(house) as relaying:
                    wait_for(
                        lambda settled=settled: bool(client.xlen("draws")) or house.settled() > settled,  # type: ignore[misc]
                        within_s=30,
                        what=relaying.log,
                    )
                    relaying.kill()
        stack.enter_context(relay(house))
        assert_kept(house, receipts, worker.log)


@pytest.mark.parametrize(
    "gap",
    [
        pytest.param("before_accept", marks=pytest.mark.chaos),
        "after_accept",
        pytest.param("after_publish", marks=pytest.mark.chaos),
    ],
)
def test_a_gateway_dies_in_a_gap_of_an_accept(mariadb_url: str, redis_url: str, gap: str) -> None:
    with House(mariadb_url, redis_url, redis_url, TOMBOLA_RELAY_AFTER_S="1") as house, ExitStack() as stack:
        worker = stack.enter_context(processes.worker(house.env))
        (account_id,) = house.accounts(1)
        headers = {"Idempotency-Key": "k"}
        with gateway(house, command=DYING_GATEWAY, DIE_AT=gap) as (url, process):
            try:
                answer = httpx.post(f"{url}/v1/draws", json={"account_id": account_id}, headers=headers, timeout=20)
                assert gap == "after_publish", "it was answered before it was accepted"
                assert answer.status_code == 202
            except httpx.TransportError:
                pass
            assert process.wait() == -signal.SIGKILL, process.log()
        if gap == "before_accept":
            assert statuses(house) == {}
        else:
            # Nobody asks again: the promise stands all the same.
            stack.enter_context(relay(house))
            house.wait_settled(1, within_s=TERMINAL_WITHIN_S, log=worker.log)
        with gateway(house) as (url, _):
            again = httpx.post(f"{url}/v1/draws", json={"account_id": account_id}, headers=headers, timeout=20)
            assert again.status_code == 202
            assert again.headers.get("Idempotency-Replayed") == (None if gap == "before_accept" else "true")
            found = httpx.get(f"{url}/v1/draws/k", params={"wait": "30"}, timeout=40)
            assert (found.status_code, found.json()["status"]) == (200, "completed")
        assert len(house.results()) == 1
        assert house.violations() == []
