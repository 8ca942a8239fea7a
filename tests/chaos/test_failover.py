"""Redis, or MariaDB, fails over by address under 500 draws a second: every process goes on, and nothing is lost."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy import create_engine, text

from tests import processes, servers
from tests.chaos.test_accepted import CHUNK, CLIENTS, Receipts, assert_kept, gateway, relay
from tests.processes import CELERY, House, draws, wait_for
from tests.proxies import HOST, Forwarder, redis_pair
from tests.storage.test_database_failover import root
from tombola.producers.domain.contract import DrawRequest

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


def assert_goes_on(house: House, fail_over: Callable[[], None]) -> None:
    """Every process goes on by itself within ON_WITHIN_S of the new primary, and every draw has its one outcome."""
    asked = draws(house.accounts(100, balance=100_000), DRAWS_PER_S * LOAD_S)
    with (
        processes.worker(house.env, command=[*CELERY, "--pool=solo"]) as worker,
        relay(house) as relaying,
        gateway(house) as (gateway_url, serving),
    ):
        receipts = Receipts(gateway_url)
        posting = threading.Thread(target=post_steadily, args=(receipts, asked), daemon=True)
        posting.start()
        time.sleep(FAIL_OVER_AFTER_S)
        fail_over()
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


@pytest.mark.chaos
def test_redis_fails_over_under_load(mariadb_url: str) -> None:
    with redis_pair() as pair, Forwarder(pair.primary.port) as address:
        url = f"redis://{HOST}:{address.port}/0"
        with House(mariadb_url, url, url, TOMBOLA_RELAY_AFTER_S="3") as house:
            assert_goes_on(house, lambda: pair.fail_over(address))


@contextmanager
def mariadb_pair() -> Iterator[tuple[servers.Server, servers.Server]]:
    """Two private servers, the second a replica of the first, with a user who cannot write to a read-only one."""
    logged = ("--log-bin=binlog", "--binlog-format=ROW")
    with (
        servers.mariadb(private=True, options=(*logged, "--server-id=1")) as first,
        servers.mariadb(private=True, options=(*logged, "--server-id=2", "--read-only")) as second,
    ):
        root(
            second,
            f"CHANGE MASTER TO MASTER_HOST='{HOST}', MASTER_PORT={first.port}, MASTER_USER='replica', "
            "MASTER_PASSWORD='replica', MASTER_USE_GTID=slave_pos, MASTER_CONNECT_RETRY=1",
        )
        root(
            first,
            "CREATE USER replica@'%' IDENTIFIED BY 'replica'",
            "GRANT REPLICATION SLAVE ON *.* TO replica@'%'",
            "CREATE DATABASE app CHARACTER SET utf8mb4",
            "CREATE USER app@'%' IDENTIFIED BY 'app'",
            "GRANT ALL ON app.* TO app@'%'",
        )
        root(second, "START SLAVE")
        yield first, second


def promote(old: servers.Server, new: servers.Server) -> None:
    """Nothing is written any more, the replica has it all, and is the primary."""
    root(old, "SET GLOBAL read_only=1")
    engine = create_engine(old.url)
    with engine.connect() as connection:
        position = connection.execute(text("SELECT @@gtid_binlog_pos")).scalar_one()
    engine.dispose()
    root(new, f"SELECT MASTER_GTID_WAIT('{position}', 20)", "STOP SLAVE", "RESET SLAVE ALL", "SET GLOBAL read_only=0")


@pytest.mark.chaos
def test_mariadb_fails_over_under_load(redis_url: str) -> None:
    with mariadb_pair() as (old, new), Forwarder(old.port) as address:
        url = f"mysql+pymysql://app:app@{HOST}:{address.port}/app"

        with House(url, redis_url, redis_url, TOMBOLA_RELAY_AFTER_S="3") as house:

            def fail_over() -> None:
                promote(old, new)
                address.move(new.port)
                house.engine.dispose()  # readers follow within a minute: these look now

            assert_goes_on(house, fail_over)
