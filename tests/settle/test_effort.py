"""What a draw costs the database: statements and bytes, which depend on no machine and which no noise hides.

A bound that fails says that the path of each draw has got longer. Raise it only with a reason that is worth it.
"""

from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine

from tests.ledgers import migrated
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import wheels
from tombola.producers.entry import Entry
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.requests import Submission
from tombola.worker.ledger.accounts import open_account
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Settled
from tombola.worker.settle.batch import Handling
from tombola.worker.settle.rules import Rules

WHEELS = wheels(bytes(range(32)))
DRAWS = 400
ACCOUNTS = 100
BY = Handling("worker@host-4711")


class Effort(NamedTuple):
    """Of one batch: its round trips, and the bytes that a draw sends to the server and gets from it."""

    round_trips: int
    sent: float
    received: float


@pytest.fixture
def engine(mariadb_url: str) -> Iterator[Engine]:
    migrated(mariadb_url)
    engine = open_engine(mariadb_url)
    yield engine
    engine.dispose()


def effort_of(engine: Engine, act: Callable[[], object]) -> Effort:
    """What `act` costs, on the only connection of the pool."""
    before = _counted(engine)
    act()
    after = _counted(engine)
    assert after["id"] == before["id"], "another connection was used"
    trips, sent, received = (after[it] - before[it] for it in ("Questions", "Bytes_received", "Bytes_sent"))
    # Without the look at the counters, and the pool's ROLLBACK after it.
    return Effort(trips - 2, sent / DRAWS, received / DRAWS)


def _counted(engine: Engine) -> dict[str, int]:
    proxy = engine.raw_connection()
    connection: Any = proxy.driver_connection
    with connection.cursor() as cursor:
        names = "'Questions', 'Bytes_received', 'Bytes_sent'"
        cursor.execute(f"SHOW SESSION STATUS WHERE Variable_name IN ({names})")
        counted = {name: int(value) for name, value in cursor.fetchall()} | {"id": connection.thread_id()}
    proxy.close()
    return counted


def draws_of(engine: Engine) -> list[DrawRequest]:
    accounts = [open_account(engine, user_id=user, balance=Decimal(1000)) for user in range(1, ACCOUNTS + 1)]
    # As make_request_key makes them, and always the same: so are the prizes.
    keys = [f"lottery_req_1700000000000_{it:08x}_{it:03d}" for it in range(DRAWS)]
    return [DrawRequest(account_id=accounts[it % ACCOUNTS], request_key=key) for it, key in enumerate(keys)]


def settle(engine: Engine, draws: list[DrawRequest]) -> None:
    answers = tries.settle(engine, draws, Rules(WHEELS, tries_max=1), BY)
    assert all(isinstance(it, Settled) for it in answers)


def test_a_batch_of_new_draws(engine: Engine) -> None:
    draws = draws_of(engine)
    settle(engine, [DrawRequest(account_id=draws[0].account_id)])  # the clock is read, the connection is open
    first = effort_of(engine, lambda: settle(engine, draws))
    again = effort_of(engine, lambda: tries.settle_unread(engine, draws, Rules(WHEELS, tries_max=1), BY))
    told = effort_of(engine, lambda: settle(engine, draws))
    print(first, again, told)
    # BEGIN; accounts, requests, ledger; ledger, balances, requests; COMMIT; and the pool's ROLLBACK.
    assert first.round_trips <= 9
    assert first.sent <= 760
    assert first.received <= 8
    # BEGIN; accounts, requests; COMMIT; ROLLBACK.
    assert again.round_trips <= 5
    assert again.sent <= 50
    assert again.received <= 160
    # The same, without a lock for the rest: BEGIN; ledger; COMMIT; ROLLBACK.
    assert told.round_trips <= 9
    assert told.sent <= 90
    assert told.received <= 460


def test_a_batch_of_accepted_draws(engine: Engine) -> None:
    draws = draws_of(engine)
    entry = Entry(engine, relay_after_s=60)
    settle(engine, [DrawRequest(account_id=draws[0].account_id)])
    entry.accept([Submission(it) for it in draws])
    first = effort_of(engine, lambda: settle(engine, draws))
    print(first)
    assert first.round_trips <= 9
    assert first.sent <= 545
    assert first.received <= 160
    entry.close()
