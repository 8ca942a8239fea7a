"""What a database answers is told as what it is, in one sentence; only silence is told as silence."""

from __future__ import annotations

import secrets
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pymysql
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner

from tombola.producers.domain.errors import ConfigurationError, ServiceUnavailable
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.faults import Fault, explain, fault_of
from tombola.producers.storage.mysql_connections import SoonOpened
from tombola.producers.storage.transactions import transaction
from tombola.worker.cli import app


@pytest.fixture
def engine(mariadb_url: str) -> Iterator[Engine]:
    engine = open_engine(mariadb_url)
    yield engine
    engine.dispose()


def refused(engine: Engine, statement: str) -> DBAPIError:
    with pytest.raises(DBAPIError) as raised, engine.connect() as connection:
        connection.execute(text(statement))
    return raised.value


def test_a_function_that_the_server_lacks_is_no_silence(engine: Engine) -> None:
    error = refused(engine, "SELECT NO_SUCH_FUNCTION('x')")
    said = explain(error)
    assert isinstance(said, ConfigurationError)
    assert "NO_SUCH_FUNCTION does not exist" in str(said)
    assert "does not answer" not in str(said)
    assert fault_of(error) is Fault.OUTAGE  # and no draw is parked for it


def test_what_a_user_may_not_do_is_no_silence(engine: Engine, mariadb_url: str) -> None:
    name = f"few_{secrets.token_hex(4)}"
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE closed (id INT)"))
        connection.execute(text(f"CREATE USER {name}@'%' IDENTIFIED BY 'x'"))
        connection.execute(text(f"GRANT CREATE ON {make_url(mariadb_url).database}.* TO {name}@'%'"))
    few = open_engine(make_url(mariadb_url).set(username=name, password="x").render_as_string(hide_password=False))
    said = explain(refused(few, "SELECT * FROM closed"))
    few.dispose()
    with engine.begin() as connection:
        connection.execute(text(f"DROP USER {name}@'%'"))
    assert isinstance(said, ConfigurationError)
    assert "lacks a privilege" in str(said)


def test_a_column_that_somebody_added_without_a_default_is_no_silence(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE narrow (id INT PRIMARY KEY, more INT NOT NULL)"))
    said = explain(refused(engine, "INSERT INTO narrow (id) VALUES (1)"))
    assert isinstance(said, ConfigurationError)
    assert "'more' doesn't have a default value" in str(said)


def test_nobody_at_that_port_is_silence() -> None:
    nobody = open_engine("mysql+pymysql://me@127.0.0.1:1/x")
    said = explain(refused(nobody, "SELECT 1"))
    assert isinstance(said, ServiceUnavailable)
    assert "the database does not answer" in str(said)


# ---- MySQL's default login, without TLS ------------------------------------------------------------------------------

NEEDS = "'cryptography' package is required for sha256_password or caching_sha2_password auth methods"


def test_what_mysql_needs_to_log_in_comes_with_the_base() -> None:
    assert find_spec("cryptography")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert any(it.startswith("pymysql[rsa]") for it in project["dependencies"])


def test_a_login_that_needs_a_missing_package_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_arguments: object, **_keywords: object) -> None:
        raise RuntimeError(NEEDS)  # as the driver does where `cryptography` is not there

    monkeypatch.setattr(SoonOpened, "connect", connect)
    engine = open_engine("mysql+pymysql://me:hidden@127.0.0.1:1/x")
    with pytest.raises(DBAPIError) as raised, engine.connect():
        pass
    with pytest.raises(pymysql.MySQLError) as in_transaction, transaction(engine):
        pass
    for error in (raised.value, in_transaction.value):
        said = explain(error)
        assert isinstance(said, ConfigurationError)
        assert NEEDS in str(said)
        assert fault_of(error) is Fault.OUTAGE
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", "mysql+pymysql://me:hidden@127.0.0.1:1/x")
    for command in (["legacy", "inspect"], ["api-key", "list"]):
        done = CliRunner().invoke(app, command)
        assert NEEDS in str(explain(done.exception) if isinstance(done.exception, DBAPIError) else done.exception)
        assert "hidden" not in done.output
