"""The seed is rotated again and again while draws are accepted and settled: nothing is lost, and all of it verifies."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest

from tests.seeds.shops import LENGTH, PRIZES, SEED, SeededShop, open_seeded_shop
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.storage import seeds as storage
from tombola.worker.seeds import chains
from tombola.worker.seeds.binding import EpochSeeds
from tombola.worker.seeds.masters import Masters
from tombola.worker.settle.answers import Refused, Settled

pytestmark = pytest.mark.slow

SEEDS = [bytes([number]) * 32 for number in (4, 3, 2)]  # the newest first
ROTATIONS = 3
BATCH = 20
DELIVERIES_MAX = 50


class Load:
    """A door that accepts batches, and a worker that settles them, each in a thread."""

    def __init__(self, shop: SeededShop) -> None:
        self._shop = shop
        self._accounts = [shop.account("100000.00", user=user) for user in range(1, 9)]
        self._queue: queue.Queue[list[DrawRequest] | None] = queue.Queue(10)
        self._stopping = threading.Event()
        self.accepted: list[str] = []
        self.settled: list[str] = []
        self.errors: list[BaseException] = []

    def _accept(self) -> None:
        while not self._stopping.is_set():
            start = len(self.accepted)
            some = [
                DrawRequest(
                    account_id=self._accounts[number % len(self._accounts)],
                    request_key=f"k{number:06}",
                    campaign="autumn" if number % 2 else "default",
                    pulls=3 if number % 10 == 1 else None,
                )
                for number in range(start, start + BATCH)
            ]
            self._shop.accept(*some)
            self.accepted += [it.request_key for it in some]
            self._queue.put(some)
            self._stopping.wait(0.02)  # a load, and time for those who rotate
        self._queue.put(None)

    def _settle(self) -> None:
        while (some := self._queue.get()) is not None:
            left: list[Request] = list(some)
            for _ in range(DELIVERIES_MAX):
                answers = self._shop.settle(*left)
                self.settled += [it.request.request_key for it in answers if isinstance(it, Settled)]
                left = [it.request for it in answers if not isinstance(it, Settled)]
                assert not [it for it in answers if isinstance(it, Refused)], answers
                if not left:
                    break
                time.sleep(0.1)  # deferred until the worker knows the new chain, too: a broker delivers it again
            assert not left, left

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._run, args=(it,)) for it in (self._accept, self._settle)]
        for it in threads:
            it.start()
        try:
            yield
        finally:
            self._stopping.set()
            for it in threads:
                it.join(60)
        assert self.errors == []

    def _run(self, act: object) -> None:
        assert callable(act)
        try:
            act()
        except BaseException as error:
            self.errors.append(error)
            self._stopping.set()


def test_rotated_three_times_under_load(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "REFRESH_S", 0.1)
    monkeypatch.setattr(storage, "STALE_S", 0.2)
    monkeypatch.setattr(chains, "ANNOUNCED", timedelta(seconds=0.5))
    with open_seeded_shop(database_url) as shop:
        shop.publish(PRIZES.replace("stock = 5", "stock = 50"))
        shop.masters = Masters([*SEEDS, SEED])  # all workers have a new seed before its chain begins
        shop.rules = shop.rules._replace(seeds=EpochSeeds(shop.engine, shop.masters))
        load = Load(shop)
        with load.running():
            for number in range(ROTATIONS):
                time.sleep(0.3)
                with shop.engine.begin() as connection:
                    begun = chains.rotate(
                        connection, Masters([*SEEDS, SEED][ROTATIONS - 1 - number :]), by="ann", reason="a leak"
                    )
                assert begun.chain == number + 2
                time.sleep(0.8)
        assert sorted(load.settled) == sorted(load.accepted)
        assert {it.partition(".")[0] for it in shop.noted().values()} == {"1", "2", "3", "4"}
        assert shop.audit(*shop.masters.seeds).violations == []
        shop.pass_time(LENGTH)
        assert {"1.1", "2.1", "3.1", "4.1"} <= set(shop.reveal())
        report = shop.audit()
        assert (report.violations, report.unproven) == ([], 0), "anybody can verify all of them"
