"""A hundred settling lanes on the last units, in processes that are killed: issued is what there was, never more."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import pytest
from sqlalchemy import select

from tests.campaigns.shops import LOCK_WAIT_S, SEED, WHEELS, Shop, open_shop
from tests.campaigns.test_settling import ONE
from tests.kept_results import results_of
from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import DrawRequest, PullsResult, parse_result
from tombola.producers.domain.errors import DrawError
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.requests import DESCRIBED, request_of
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.worker.campaigns.desk import Desk
from tombola.worker.settle import tries
from tombola.worker.settle.rules import Rules

SEEDS = 20
PROCESSES, LANES = 10, 10
UNITS, DRAWS, ACCOUNTS = 30, 300, 40
UNTIL_S = 120.0

pytestmark = pytest.mark.chaos
_fork = multiprocessing.get_context("fork")


def settle_some(url: str, seed: int, lanes: int) -> None:
    """A worker without a broker: `lanes` lanes settle what is accepted, in batches of up to five, until a kill."""
    engine = open_engine(url, lock_wait_s=LOCK_WAIT_S)
    rules = Rules(WHEELS, 5, lock_wait_s=LOCK_WAIT_S, desk=Desk(engine, SEED))

    def lane(number: int) -> None:
        order = random.Random(f"{seed} {number}")
        while draws := open_draws(url):
            order.shuffle(draws)
            for start in range(0, len(draws), 5):
                with suppress(DrawError):  # SQLite is locked for longer than it waits: the draws are there yet
                    tries.settle(engine, draws[start : start + order.randint(1, 5)], rules)

    threads = [threading.Thread(target=lane, args=(number,), daemon=True) for number in range(lanes)]
    for it in threads:
        it.start()
    for it in threads:
        it.join()
    os._exit(0)


def open_draws(url: str) -> list[DrawRequest]:
    """The draws that are accepted and not settled."""
    engine = open_engine(url)
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            rows = connection.execute(select(*DESCRIBED).where(requests.c.status == Status.ACCEPTED)).all()
    finally:
        engine.dispose()
    return [it for it in map(request_of, rows) if isinstance(it, DrawRequest)]


def units_of(shop: Shop) -> Sequence[str]:
    """The prizes of all settled draws."""
    results = [parse_result(body) for body in results_of(shop.engine).values() if body is not None]
    return [prize.code for it in results if isinstance(it, PullsResult) for prize in it.prizes]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_last_units_among_a_hundred_lanes_that_are_killed(database_url: str, seed: int) -> None:
    chance = random.Random(seed)
    with open_shop(database_url) as shop:
        shop.publish(ONE % UNITS)
        accounts = [shop.account(user=user) for user in range(1, ACCOUNTS + 1)]
        draws = [
            DrawRequest(account_id=chance.choice(accounts), campaign="one", pulls=chance.choice((1, 5)))
            for _ in range(DRAWS)
        ]
        shop.accept(*draws)
        shop.engine.dispose()
        is_sqlite = database_url.startswith("sqlite")
        count, lanes = (4, 2) if is_sqlite else (PROCESSES, LANES)
        killed, deadline = 0, time.monotonic() + UNTIL_S
        while open_draws(database_url):
            assert time.monotonic() < deadline, f"{len(open_draws(database_url))} draws are open"
            workers = [
                _fork.Process(target=settle_some, args=(database_url, chance.randrange(10**9), lanes))
                for _ in range(count)
            ]
            for it in workers:
                it.start()
            time.sleep(chance.uniform(0.2, 1.0))
            for it in workers:
                if it.is_alive() and it.pid is not None:
                    os.kill(it.pid, signal.SIGKILL)
                    killed += 1
                it.join()
        print(f"seed {seed}: {killed} killed")
        found = Counter(units_of(shop))
        assert found["last"] == UNITS
        assert sum(found.values()) == sum(it.pulls or 1 for it in draws)
