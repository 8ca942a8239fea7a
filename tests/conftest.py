"""Servers for the tests that need them, and an environment without the developer's own settings.

Servers start at first use and serve the whole run; databases, key spaces and virtual hosts are per test.
A test that ends a server starts its own: `with servers.redis(private=True) as server`. A test in which
`Unavailable` is raised, also by a fixture, is skipped with the reason, but fails where CI=true: a CI job
without servers must not look like one that passed.

A test that uses a server or starts a process has the mark `process`, and `make check` leaves it to
`make test`. The fixtures below bring the mark; other tests set it. A test without the mark that starts a
process fails.
"""

import itertools
import os
import secrets
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
from redis import Redis
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from tests import servers
from tombola.producers.storage.mysql_connections import connect_by

_redis_databases = itertools.cycle(range(16))

# Commands fit their tables to COLUMNS. No test depends on the terminal that it runs in.
os.environ.pop("COLUMNS", None)


# All test processes share named servers: two at once would empty each other's databases.
NAMED = ("TEST_MARIADB_URL", "TEST_REDIS_URL", "TEST_RABBITMQ_URL")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two test processes, each with its own servers: most tests wait for processes and disks."""
    return 0 if any(os.environ.get(name) for name in NAMED) else min(2, os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    """List skips with their reasons, asked (-rs) or not."""
    if not set("sAa") & set(config.option.reportchars):
        config.option.reportchars += "s"


# Fixtures that start a server. A test has the mark `process` if it asks for one of them, also by way of others.
SERVERS = {"mariadb_server", "redis_server", "rabbitmq_server", "own_server"}
KINDS = ("mariadb", "redis", "rabbitmq")  # marks of the tests that use such a server, for tests/matrix
UNMARKED = "starts a process or uses a server: set pytest.mark.process"

_unmarked: list[str] = []  # the test that runs, if it may start nothing


def pytest_itemcollected(item: pytest.Item) -> None:
    if SERVERS.intersection(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.process)
    for kind in KINDS:
        if f"{kind}_server" in getattr(item, "fixturenames", ()) or kind in item.name.partition("[")[2]:
            item.add_marker(getattr(pytest.mark, kind))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if item.get_closest_marker("process") is None:
        _unmarked.append(item.nodeid)
    try:
        return (yield)
    finally:
        _unmarked.clear()


def _refuse_processes(event: str, _arguments: object) -> None:
    if _unmarked and event == "subprocess.Popen":
        pytest.fail(f"{_unmarked[0]} {UNMARKED}", pytrace=False)


sys.addaudithook(_refuse_processes)


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """Refuse a server that runs already to an unmarked test that asks for it by getfixturevalue."""
    if _unmarked and fixturedef.argname in ("mariadb_url", "redis_url", "rabbitmq_url"):
        pytest.fail(f"{_unmarked[0]} {UNMARKED}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    return (yield from _skip_unavailable())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    return (yield from _skip_unavailable())


def _skip_unavailable() -> Generator[None, object, object]:
    try:
        return (yield)
    except servers.Unavailable as unavailable:
        reason = str(unavailable)
    # Outside the except clause: within it, the report would show the whole chain of errors.
    if os.environ.get("CI") == "true":
        pytest.fail(f"would be skipped, but CI=true: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def no_tombola_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the TOMBOLA_* variables of the shell: no test passes or fails by them."""
    for variable in [name for name in os.environ if name.startswith("TOMBOLA_")]:
        monkeypatch.delenv(variable)


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[servers.Server]:
    with servers.mariadb(options=servers.UNSYNCED) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[servers.Server]:
    with servers.redis() as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_server() -> Iterator[servers.RabbitMQ]:
    with servers.rabbitmq() as server:
        yield server


@pytest.fixture
def mariadb_url(mariadb_server: servers.Server) -> Iterator[str]:
    """A new database in latin1: the application must name its character set and not rely on the server's."""
    name = f"test_{secrets.token_hex(6)}"
    engine = create_engine(mariadb_server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    connect_by(engine)
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} CHARACTER SET latin1"))
    yield _with_path(mariadb_server.url, name)
    with engine.connect() as connection:
        # A transaction that a failed test left open would make DROP DATABASE wait for a day.
        left = text("SELECT id FROM information_schema.processlist WHERE db = :name")
        for thread_id in connection.execute(left, {"name": name}).scalars().all():
            with suppress(DBAPIError):  # it may have ended meanwhile
                connection.execute(text(f"KILL {thread_id}"))
        connection.execute(text(f"DROP DATABASE {name}"))


@pytest.fixture(params=["sqlite", pytest.param("mariadb", marks=pytest.mark.process)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, SQLite and MariaDB in turn: the ledger's tests must hold on both."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.db"
    url: str = request.getfixturevalue("mariadb_url")
    return url


@pytest.fixture
def redis_url(redis_server: servers.Server) -> Iterator[str]:
    """An empty logical database, another one for each test: processes that an earlier test left running write
    elsewhere. Pub/sub is common to the server. A server that TEST_REDIS_URL names is emptied as well."""
    url = _with_path(redis_server.url, str(next(_redis_databases)))
    with Redis.from_url(url) as client:
        client.flushdb()
        yield url
        client.flushdb()


@pytest.fixture
def rabbitmq_url(rabbitmq_server: servers.RabbitMQ) -> Iterator[str]:
    """A new virtual host; on a server that TEST_RABBITMQ_URL names, the virtual host of that URL, for all tests."""
    if rabbitmq_server.launch is None:
        yield rabbitmq_server.url
        return
    name = f"test_{secrets.token_hex(6)}"
    yield rabbitmq_server.add_vhost(name)
    rabbitmq_server.delete_vhost(name)


def _with_path(url: str, path: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{path}"))
