"""The database's address leads to another server, and the old one, still connected, takes no writes any more."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest
from sqlalchemy import Engine, create_engine, select, text, update

from tests import proxies, servers
from tombola import migrations
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.domain.errors import DrawError
from tombola.producers.entry import Entry
from tombola.producers.storage import requests
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import RECYCLE_S, open_engine
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.schema import account_asset_balances as balances
from tombola.producers.storage.schema import api_idempotency_requests as table
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.transactions import transaction
from tombola.worker.ledger import accounts
from tombola.worker.relay.overdue import relay_once
from tombola.worker.settle import tries
from tombola.worker.settle.rules import Rules

pytestmark = pytest.mark.process

WHEELS = {DEFAULT_CAMPAIGN.name: Wheel(DEFAULT_CAMPAIGN, b"seed" * 8)}
WITHIN_S = 10.0


class Pair(NamedTuple):
    """Two servers behind one address."""

    url: str
    address: proxies.Forwarder
    old: servers.Server
    new: servers.Server

    def fail_over(self) -> None:
        root(self.old, "SET GLOBAL read_only=1")
        self.address.move(self.new.port)


def root(server: servers.Server, *statements: str) -> None:
    engine = create_engine(server.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


@pytest.fixture(scope="module")
def two_servers() -> Iterator[tuple[servers.Server, servers.Server]]:
    with servers.mariadb(private=True) as old, servers.mariadb(private=True) as new:
        for server in (old, new):
            # root writes whatever read_only says.
            root(
                server,
                "CREATE DATABASE app CHARACTER SET utf8mb4",
                "CREATE USER app@'%' IDENTIFIED BY 'app'",
                "GRANT ALL ON app.* TO app@'%'",
            )
            migrations.upgrade(f"mysql+pymysql://app:app@127.0.0.1:{server.port}/app")
        yield old, new


@pytest.fixture
def pair(two_servers: tuple[servers.Server, servers.Server]) -> Iterator[Pair]:
    old, new = two_servers
    for server in (old, new):
        emptied = [f"TRUNCATE app.{it}" for it in (table.name, balances.name, transactions.name)]
        root(server, "SET GLOBAL read_only=0", "SET foreign_key_checks=0", *emptied)
    with proxies.Forwarder(old.port) as address:
        yield Pair(f"mysql+pymysql://app:app@127.0.0.1:{address.port}/app", address, old, new)


class Takes:
    """A broker that takes everything."""

    def publish(self, bodies: Sequence[bytes], headers: object = None) -> None:
        pass

    def backlog(self) -> int:
        return 0

    def close(self) -> None:
        pass


def fill_pool(engine: Engine, count: int = 4) -> None:
    """So many connections lie in the pool, all to the server that the address leads to now."""
    open_ones = [engine.connect() for _ in range(count)]
    for it in open_ones:
        it.execute(text("SELECT 1"))
    for it in open_ones:
        it.close()


def until_done(act: Callable[[], object]) -> int:
    """Try again as the loops do; how many tries failed."""
    deadline = time.monotonic() + WITHIN_S
    failures = 0
    while True:
        try:
            act()
        except DrawError:
            failures += 1
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return failures


def accept_on(server: servers.Server, key: str) -> None:
    """A request that waits in this server's database, overdue."""
    engine = open_engine(f"mysql+pymysql://app:app@127.0.0.1:{server.port}/app")
    then = utc_now().replace(year=2020)
    with transaction(engine) as open_transaction:
        asked = [Submission(DrawRequest(account_id=1, request_key=key))]
        requests.accept(open_transaction, asked, then, publish_at=then, is_published=False)
    engine.dispose()


def test_every_writer_goes_on_with_the_new_server(pair: Pair) -> None:
    relaying, settling, entering = (open_engine(pair.url) for _ in range(3))
    entry = Entry(entering, relay_after_s=10)
    entry.accept([Submission(DrawRequest(account_id=1, request_key="before"))])
    for engine in (relaying, settling, entering):
        fill_pool(engine)
    for server in (pair.old, pair.new):
        accept_on(server, "waits")
    pair.fail_over()
    published: list[int] = []
    # One answer of the old server is enough for the whole pool: relay and batch fail once at most.
    assert until_done(lambda: published.append(relay_once(relaying, Takes()))) <= 1
    assert published == [1]
    draw = DrawRequest(account_id=1, request_key="settled")
    assert until_done(lambda: tries.settle(settling, [draw], Rules(WHEELS, tries_max=3))) <= 1
    assert until_done(lambda: entry.accept([Submission(DrawRequest(account_id=1, request_key="after"))])) <= 1
    opened = []
    assert until_done(lambda: opened.append(accounts.open_account(entering, user_id=1))) == 0
    for engine in (relaying, settling, entering):
        ports = set()
        with engine.connect() as one, engine.connect() as other:
            for it in (one, other):
                ports.add(it.execute(text("SELECT @@port")).scalar_one())
        assert ports == {pair.new.port}
    new = create_engine(pair.new.url.rstrip("/") + "/app")
    with new.connect() as connection:
        rows = connection.execute(select(table.c.request_key, table.c.status, table.c.publish_attempts)).all()
    assert sorted(map(tuple, rows)) == [("after", "accepted", 1), ("settled", "rejected", 0), ("waits", "accepted", 1)]
    new.dispose()
    entry.close()
    relaying.dispose()
    settling.dispose()


def test_a_server_that_is_read_only_for_a_while_is_used_again(pair: Pair) -> None:
    engine = open_engine(pair.url)
    fill_pool(engine)
    root(pair.old, "SET GLOBAL read_only=1")
    for _ in range(2):
        with pytest.raises(DrawError, match="read-only"):
            accounts.open_account(engine, user_id=1)
    with engine.connect() as connection:  # to read, it will do
        assert connection.execute(select(table.c.request_key)).all() == []
    root(pair.old, "SET GLOBAL read_only=0")
    accounts.open_account(engine, user_id=1)
    engine.dispose()


def test_who_only_reads_finds_the_new_server_before_long(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RECYCLE_S <= 60
    monkeypatch.setattr("tombola.producers.storage.engines.RECYCLE_S", 1)
    engine = open_engine(pair.url)
    fill_pool(engine)
    pair.fail_over()
    deadline = time.monotonic() + WITHIN_S
    while True:
        with engine.connect() as connection:
            port = connection.execute(text("SELECT @@port")).scalar_one()
        if port == pair.new.port:
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    engine.dispose()


def test_an_update_by_sqlalchemy_is_enough(pair: Pair) -> None:
    engine = open_engine(pair.url)
    fill_pool(engine)
    pair.fail_over()
    with pytest.raises(Exception, match="read-only"), engine.begin() as connection:
        connection.execute(update(table).values(reason=None))
    with engine.begin() as connection:
        connection.execute(update(table).values(reason=None))
        assert connection.execute(text("SELECT @@port")).scalar_one() == pair.new.port
    engine.dispose()
