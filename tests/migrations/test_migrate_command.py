"""`tombola migrate`: what it prints, what it refuses, and with which exit code."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, inspect, text
from typer.testing import CliRunner, Result

from tests.migrations.test_migrations import TABLES, definitions
from tombola import migrations
from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.storage.engines import open_engine
from tombola.worker.cli import app

pytestmark = pytest.mark.slow

NOWHERE = "mysql+pymysql://nobody@127.0.0.1:1/nothing"


@pytest.fixture
def engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", database_url)
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


def migrate(*arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["migrate", *arguments])
    assert done.exit_code == code, done.output
    return done


def refused(*arguments: str) -> str:
    """The one line that `tombola` prints for an error of ours."""
    done = migrate(*arguments, code=1)
    assert isinstance(done.exception, ConfigurationError)
    return str(done.exception)


def status(*, code: int) -> dict[str, object]:
    found: dict[str, object] = json.loads(migrate("status", "--json", code=code).output)
    return found


def test_it_goes_to_the_newest_revision_and_says_each(engine: Engine) -> None:
    with engine.connect():  # SQLite makes its file
        pass
    assert status(code=1)["revision"] is None
    assert [line.split(":")[0] for line in migrate().output.splitlines()] == [
        f"upgraded to {it}" for it in ("0001", "0002", "0003", "0004", "0005", "0006", "0007")
    ]
    assert set(inspect(engine).get_table_names()) == TABLES | {migrations.VERSION_TABLE}
    assert migrate().output == "at 0007, the newest: nothing to do\n"
    assert status(code=0) == {"revision": "0007", "newest": "0007", "pending": [], "first": None}

    migrations.downgrade(engine, "0002")
    found = status(code=1)
    assert [it["revision"] for it in found["pending"]] == ["0003", "0004", "0005", "0006", "0007"]  # type: ignore[attr-defined]
    assert migrate("status", code=1).output.splitlines()[:2] == ["revision  0002", "newest    0007"]
    assert "pending   0003: Dead letters that can be replayed" in migrate("status", code=1).output


def test_status_says_what_comes_first(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE operators (id INTEGER PRIMARY KEY)"))
    assert "tombola did not make: operators" in str(status(code=1)["first"])
    assert "did not make: operators" in refused()
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE operators"))
    migrations.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {migrations.VERSION_TABLE} RENAME TO alembic_version"))
    assert "`tombola migrate` takes it over" in migrate("status", code=1).output
    migrate()
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {migrations.VERSION_TABLE} SET version_num = '9999'"))
    # Workers start beside a newer release's schema.
    assert "upgrade tombola on this machine, too" in migrate("status", code=0).output
    assert "newer release" in refused()


def test_it_goes_back_when_asked_twice(engine: Engine) -> None:
    migrations.upgrade(engine, "0002")
    before = definitions(engine)
    migrations.upgrade(engine)
    migrate("downgrade", "0002", code=1)  # nobody answers the question
    assert status(code=0)["revision"] == "0007"
    assert [line.split(":")[0] for line in migrate("downgrade", "0002", "--yes").output.splitlines()] == [
        "downgraded from 0007",
        "downgraded from 0006",
        "downgraded from 0005",
        "downgraded from 0004",
        "downgraded from 0003",
    ]
    assert definitions(engine) == before
    assert migrate("downgrade", "0002", "--yes").output == "at 0002 already: nothing to do\n"
    assert refused("downgrade", "0003", "--yes") == "the database is at a revision before 0003, or at none"
    for unknown in ("9999", "head", "0002:0001", "'"):
        assert refused("downgrade", unknown, "--yes").startswith(f"there is no revision {unknown}: this release has")
    migrate("downgrade", "base", "--yes")
    assert set(inspect(engine).get_table_names()) == {migrations.VERSION_TABLE}


@pytest.mark.process
def test_nobody_imports_alembic_before_it_is_needed() -> None:
    """It takes longer than all of ours; workers and the doctor only ask for the revision."""
    rooms = ("migrations.legacy.status", "worker.doctor.database", "worker.cli.migrate", "worker.embedded.running")
    script = "import sys\n" + "".join(f"import tombola.{room}\n" for room in rooms) + "print('alembic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_scripts_are_written_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", NOWHERE)
    whole = migrate("--sql", "--from", "base").output
    assert whole == migrations.upgrade_script(NOWHERE)
    assert whole.index("CREATE TABLE tombola_version") < whole.index("CREATE TABLE account_asset_balances")
    assert "alembic_version" not in whole
    rest = migrate("--sql", "--from", "0003").output
    assert "ALTER TABLE api_keys ADD COLUMN accounts" in rest
    assert "CREATE TABLE replays" not in rest
    assert "DROP TABLE api_keys" in migrate("downgrade", "0001", "--sql", "--from", "0005").output
    assert migrate("downgrade", "0002", "--sql", "--from", "0002").output.count("DROP") == 0
    assert refused("--sql", "--from", "0009").startswith("there is no revision 0009")


def test_a_script_is_what_would_be_run(engine: Engine, database_url: str) -> None:
    with engine.connect():  # SQLite makes its file
        pass
    assert migrate("--sql").output == migrations.upgrade_script(database_url)
    assert inspect(engine).get_table_names() == []
    migrations.upgrade(engine, "0003")
    assert migrate("--sql").output == migrations.upgrade_script(database_url, start="0003")
    back = migrations.downgrade_script(database_url, "0002", start="0003")
    assert migrate("downgrade", "0002", "--sql").output == back
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {migrations.VERSION_TABLE} RENAME TO alembic_version"))
    taken_over = "ALTER TABLE alembic_version RENAME TO tombola_version;\n\n"
    assert migrate("--sql").output == taken_over + migrations.upgrade_script(database_url, start="0003")
    migrate()
    migrations.downgrade(engine, "base")
    assert "run `tombola migrate` without --sql" in refused("--sql")
    with engine.begin() as connection:
        connection.execute(text(f"DROP TABLE {migrations.VERSION_TABLE}"))
        connection.execute(text("CREATE TABLE operators (id INTEGER PRIMARY KEY)"))
    assert "did not make: operators" in refused("--sql")


@pytest.mark.parametrize(
    "arguments",
    [["bogus"], ["downgrade"], ["--from", "0001"], ["--sql", "status"], ["downgrade", "0001", "--from", "0002"]],
)
def test_a_slip_of_the_keyboard_changes_nothing(tmp_path: Path, arguments: list[str]) -> None:
    done = CliRunner(env={"TOMBOLA_DATABASE_URL": f"sqlite:///{tmp_path}/x.db"}).invoke(app, ["migrate", *arguments])
    assert done.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["status"], ["downgrade", "0001", "--yes"], ["--sql"]])
def test_without_a_database_url_it_refuses_instead_of_taking_an_embedded_one(arguments: list[str]) -> None:
    assert refused(*arguments).startswith("TOMBOLA_DATABASE_URL is not set")


@pytest.mark.process
@pytest.mark.parametrize("arguments", [[], ["status"], ["downgrade", "0001", "--yes"]])
def test_a_database_that_is_away_is_told_in_one_line(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from tombola.worker.cli import main; main()", "migrate", *arguments],
        env={**os.environ, "TOMBOLA_DATABASE_URL": NOWHERE},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the database does not answer: Can't connect")
