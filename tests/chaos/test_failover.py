"""Redis fails over by address under 500 draws a second: every process goes on by itself, and nothing is lost."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from producers.contract import DrawRequest
from tests import processes
from tests.chaos.test_accepted import CHUNK, CLIENTS, Receipts, assert_kept, gateway, relay
from tests.processes import CELERY, House, draws, wait_for
from tests.proxies import HOST, Forwarder, redis_pair

DRAWS_PER_S = 500
LOAD_S = 30
FAIL_OVER_AFTER_S = 8
ON_WITHIN_S = 10.0


def post_steadily(receipts: Receipts, asked: list[DrawRequest]) -> None:
    """Post DRAWS_PER_S; returns when there is a receipt for every one."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        began = time.monotonic()
        for start in range(0, len(asked), CHUNK):
            time.sleep(max(0.0, began + start / DRAWS_PER_S - time.monotonic()))
            pool.submit(receipts._post, asked[start : start + CHUNK])


@pytest.mark.chaos
def test_redis_fails_over_under_load(mariadb_url: str) -> None:
    with ExitStack() as stack:
        pair = stack.enter_context(redis_pair())
        address = stack.enter_context(Forwarder(pair.primary.port))
        url = f"redis://{HOST}:{address.port}/0"
        house = stack.enter_context(House(mariadb_url, url, url, TOMBOLA_RELAY_AFTER_S="3"))
        asked = draws(house.accounts(100, balance=100_000), DRAWS_PER_S * LOAD_S)
        worker = stack.enter_context(processes.worker(house.env, command=[*CELERY, "--pool=solo"]))
        relaying = stack.enter_context(relay(house))
        gateway_url, serving = stack.enter_context(gateway(house))
        receipts = Receipts(gateway_url)
        posting = threading.Thread(target=post_steadily, args=(receipts, asked), daemon=True)
        posting.start()
        time.sleep(FAIL_OVER_AFTER_S)
        pair.fail_over(address)
        at = time.monotonic()
        before = house.settled()
        # What was queued may be settled yet: a second's worth of draws was asked for since.
        wait_for(
            lambda: house.settled() > before + DRAWS_PER_S,
            within_s=ON_WITHIN_S,
            what=lambda: f"{house.settled() - before} settled since\n{worker.log()[-6000:]}",
        )
        print(f"settling again {time.monotonic() - at:.1f} s after the failover", file=sys.stderr)
        posting.join(LOAD_S + 60)
        assert_kept(house, receipts, worker.log, count=len(asked))
        for process in (worker, relaying, serving):
            assert process.is_alive, process.log()[-6000:]
