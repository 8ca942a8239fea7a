"""SQL text of ours is right in every sql_mode: in sessions of our own, and in a transaction of somebody else's."""

import io
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest
from alembic import command
from pydantic import SecretStr
from sqlalchemy import Engine, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from tests.books import assert_books, table
from tests.processes import House
from tombola import migrations
from tombola.producers import DrawClient, DrawRequest, IdempotencyKeyReused
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.settings import Settings
from tombola.producers.storage.engines import SQL_MODE, open_engine
from tombola.producers.storage.transactions import Transaction, transaction
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Settled
from tombola.worker.settle.rules import Rules

MODES = [
    "",
    "NO_BACKSLASH_ESCAPES",
    "ANSI_QUOTES",
    "PIPES_AS_CONCAT",
    "ANSI,NO_BACKSLASH_ESCAPES",
    "TRADITIONAL",
    "ORACLE",
    "EMPTY_STRING_IS_NULL",
    "MSSQL,NO_BACKSLASH_ESCAPES,STRICT_ALL_TABLES",
]
ODD = [
    "",
    "'",
    "''",
    "\\",
    "\\'",
    "'\\",
    "\\\\",
    "\\0",
    '"',
    "a'b\"c\\d`e",
    "%s",
    "\n\r\t\0",
    "' OR 1=1 -- ",
    "ü🎲",
    "|| 'x'",
]

ALL = "SELECT value FROM odd WHERE number IN (??) ORDER BY number"
NUMBERS = list(range(len(ODD)))


@pytest.fixture
def house(mariadb_url: str, redis_url: str) -> Iterator[House]:
    with House(mariadb_url, redis_url, redis_url) as house:
        yield house
        assert_books(house.engine)


@contextmanager
def shop_in(mode: str, url: str) -> Iterator[Engine]:
    """A shop's own engine, in a mode of its own."""
    engine = create_engine(
        url,
        isolation_level="READ COMMITTED",
        connect_args={"init_command": f"SET SESSION sql_mode='{mode}'"},
    )
    yield engine
    engine.dispose()


def modes_of(url: str, *modes: str) -> list[str]:
    """Those of these modes, by default of MODES, that this server knows: some are MariaDB's alone."""
    server = create_engine(url, poolclass=NullPool)
    known = []
    for mode in modes or MODES:
        with suppress(DBAPIError), server.connect() as connection:
            connection.exec_driver_sql(f"SET SESSION sql_mode='{mode}'")
            known.append(mode)
    return known


def test_literals_arrive_as_they_are(mariadb_url: str) -> None:
    for mode in modes_of(mariadb_url):
        with shop_in(mode, mariadb_url) as theirs, theirs.begin() as connection:
            connection.execute(
                text("CREATE TEMPORARY TABLE odd (number INT PRIMARY KEY, value TEXT CHARACTER SET utf8mb4)")
            )
            joined = Transaction(connection.connection.driver_connection, is_sqlite=False)
            joined.insert("odd", ("number", "value"), list(enumerate(ODD)))
            assert [value for (value,) in joined.select(ALL, NUMBERS)] == ODD, mode
            for number, value in enumerate(ODD):
                assert (number,) in joined.select("SELECT number FROM odd WHERE value IN (??)", [value]), mode
            joined.update("odd", "number", ("value",), [(number, value + "'\\") for number, value in enumerate(ODD)])
            assert [value for (value,) in joined.select(ALL, NUMBERS)] == [f"{value}'\\" for value in ODD], mode


def test_the_mode_may_change_in_between(house: House) -> None:
    with closing(house.engine.raw_connection()) as proxy:
        connection: Any = proxy.driver_connection
        joined = Transaction(connection, is_sqlite=False)
        for mode in ("NO_BACKSLASH_ESCAPES", "", "NO_BACKSLASH_ESCAPES"):
            connection.query(f"SET SESSION sql_mode='{mode}'")
            assert joined.select("SELECT ??", ["a\\'b"]) == (("a\\'b",),)
        proxy.invalidate()


def test_a_draw_is_accepted_in_a_transaction_of_any_mode(house: House) -> None:
    (account_id,) = house.accounts(1)
    names = ("", "shop")
    clients = [DrawClient.from_settings(house.settings, caller=caller) for caller in names]
    draws = []
    for number, mode in enumerate(modes_of(house.settings.need("database_url"))):
        draw = DrawRequest(account_id=account_id, request_key=f"k{number}")
        other = DrawRequest(account_id=account_id + 1, request_key=f"k{number}")
        with shop_in(mode, house.settings.need("database_url")) as theirs:
            for client in clients:
                with theirs.begin() as connection:
                    assert client.enqueue(draw, connection=connection).request_key == draw.request_key
            with theirs.begin() as connection, pytest.raises(IdempotencyKeyReused):
                clients[1].enqueue(other, connection=connection)
            (answer,) = tries.settle(house.engine, [draw], Rules(house.wheels))
            assert isinstance(answer, Settled)
            with theirs.begin() as connection:
                assert clients[1].enqueue(draw, connection=connection).result is not None
        draws.append(draw)
    # Nobody's requests have become the shop's: it asked for the same.
    assert {(row["request_key"], row["caller"]) for row in table(house.engine, "api_idempotency_requests")} == {
        (draw.request_key, "shop") for draw in draws
    }
    for client in clients:
        client.close()


@pytest.mark.parametrize("caller", ["\\", "' OR 1=1 -- ", "a b", "ü", "c" * 65, "shop\n", "\x1f", "a:b"])
def test_a_callers_name_is_checked(caller: str) -> None:
    """It is text of an application, and stands in every accept."""
    settings = Settings(database_url=SecretStr("sqlite:////x"), broker_url=SecretStr("redis://x"))
    with pytest.raises(InvalidRequest, match="a caller's name is"):
        DrawClient.from_settings(settings, caller=caller)


def test_our_own_sessions_have_our_mode_whatever_the_servers_is(mariadb_url: str) -> None:
    """A database may come with the URL's own idea of a mode as well."""
    for url in (mariadb_url, f"{mariadb_url}?sql_mode=NO_BACKSLASH_ESCAPES,ANSI_QUOTES"):
        engine = open_engine(url)
        with transaction(engine) as ours:
            ((mode,),) = ours.select("SELECT @@SESSION.sql_mode WHERE 1 IN (??)", [1])
            assert set(mode.split(",")) == set(SQL_MODE.split(","))
            assert ours.select("SELECT ??", ["a\\'b"]) == (("a\\'b",),)
        engine.dispose()


@pytest.mark.parametrize("mode", ["NO_BACKSLASH_ESCAPES", "ORACLE,EMPTY_STRING_IS_NULL"])
def test_the_script_of_the_migrations_runs_in_any_mode(mariadb_url: str, mode: str) -> None:
    """Somebody else runs it, in a session of their own."""
    if not modes_of(mariadb_url, mode):
        return  # not a mode of this server
    written = io.StringIO()
    config = migrations.alembic_config("mysql+pymysql://nobody@127.0.0.1:1/nothing")
    config.output_buffer = written
    command.upgrade(config, "head", sql=True)
    with shop_in(mode, mariadb_url) as theirs, theirs.begin() as connection:
        for statement in written.getvalue().split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
    engine = open_engine(mariadb_url)
    with engine.connect() as connection:
        assert migrations.current_revision(connection) == migrations.head_revision()
    engine.dispose()
