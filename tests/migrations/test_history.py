"""Whose tables are in a database: ours, a shop's beside them, an earlier release's, foreign ones with names of ours."""

import itertools
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from alembic.migration import MigrationContext
from sqlalchemy import Engine, event, inspect, text

from tests import legacy as old_code
from tests.migrations.test_migrations import TABLES, definitions
from tombola import migrations
from tombola.migrations import history
from tombola.migrations.legacy import status as legacy
from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import metadata

pytestmark = pytest.mark.slow

SHOPS = "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def mariadb(mariadb_url: str) -> Iterator[Engine]:
    engine = open_engine(mariadb_url)
    yield engine
    engine.dispose()


def execute(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def revision_of(engine: Engine) -> str | None:
    with engine.connect() as connection:
        return migrations.current_revision(connection)


def shops_rows(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.execute(text("SELECT version_num FROM alembic_version ORDER BY 1")).scalars())


def tables_in(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names())


def as_an_earlier_release_left_it(engine: Engine, revision: str) -> None:
    """At `revision` of ours, which alembic_version names."""
    migrations.upgrade(engine, revision)
    execute(engine, f"ALTER TABLE {migrations.VERSION_TABLE} RENAME TO alembic_version")


# ---- beside a shop's own Alembic -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shops", [["a1b2c3d4"], ["0003"], ["0002", "0003"], []])
def test_a_shops_own_history_stays_as_it_is(engine: Engine, shops: list[str]) -> None:
    """Also one whose revisions are called like ours."""
    execute(engine, SHOPS, "CREATE TABLE customers (id INTEGER PRIMARY KEY)")
    execute(engine, *(f"INSERT INTO alembic_version VALUES ('{it}')" for it in shops))
    migrations.upgrade(engine)
    assert revision_of(engine) == migrations.head_revision()
    assert shops_rows(engine) == shops
    migrations.downgrade(engine, "0001")
    migrations.upgrade(engine)
    migrations.downgrade(engine, "base")
    assert shops_rows(engine) == shops
    assert tables_in(engine) == {"alembic_version", "customers", migrations.VERSION_TABLE}


def test_old_codes_ledger_in_a_shops_database_goes_there_and_back(mariadb: Engine) -> None:
    execute(mariadb, SHOPS, "INSERT INTO alembic_version VALUES ('0004')")
    old_code.create(mariadb)
    before = definitions(mariadb)
    with mariadb.connect() as connection:
        assert legacy.is_legacy(connection)
    with pytest.raises(ConfigurationError, match="tombola legacy inspect"):
        migrations.upgrade(mariadb)
    old_code.run_step(mariadb, "expand")
    assert revision_of(mariadb) == migrations.head_revision()
    migrations.upgrade(mariadb)
    old_code.run_step(mariadb, "rollback")
    assert revision_of(mariadb) is None
    assert shops_rows(mariadb) == ["0004"]
    # As a rollback leaves it that was killed after its first statement.
    old_code.run_step(mariadb, "expand")
    execute(
        mariadb,
        f"DROP TABLE {migrations.VERSION_TABLE}",
        "INSERT INTO legacy_migration VALUES ('rollback', 'running', NOW(6), NULL, '{}')",
    )
    with pytest.raises(ConfigurationError, match="`tombola legacy` is half-way"):
        migrations.upgrade(mariadb)
    old_code.run_step(mariadb, "rollback")
    assert shops_rows(mariadb) == ["0004"]
    after = definitions(mariadb)
    assert {name: after[name] for name in before} == before


# ---- from an earlier release -----------------------------------------------------------------------------------------


def test_an_earlier_releases_history_is_taken_over(engine: Engine) -> None:
    for revision in ("0001", migrations.head_revision()):
        as_an_earlier_release_left_it(engine, revision)
        with engine.connect() as connection:
            assert history.former_revision(connection) == revision
            assert not legacy.is_legacy(connection)
        said: list[str] = []
        migrations.upgrade(engine, say=said.append)
        assert said[0] == f"alembic_version, at {revision}, was tombola's: it is tombola_version now"
        assert len(said) == 1 + int(migrations.head_revision()) - int(revision)
        assert tables_in(engine) == TABLES | {migrations.VERSION_TABLE}
        migrations.downgrade(engine, "base")


@pytest.mark.parametrize(
    ("meddling", "words"),
    [
        (["DROP TABLE dead_letters"], "there is no dead_letters"),
        (["ALTER TABLE api_idempotency_requests DROP COLUMN publish_error"], "requests lacks publish_error"),
        (["INSERT INTO alembic_version VALUES ('a1b2c3d4')"], "more than one row"),
        (["UPDATE alembic_version SET version_num = '0001'"], "operators is there, which a later revision makes"),
        (["UPDATE alembic_version SET version_num = '0002'"], "accounts, .*user_prefix, which a later revision makes"),
        (
            [
                "CREATE TABLE legacy_migration (step VARCHAR(32), status VARCHAR(16))",
                "INSERT INTO legacy_migration VALUES ('expand', 'running')",
            ],
            "`tombola legacy` is half-way",
        ),
    ],
)
def test_a_history_of_doubtful_owner_is_left_alone(engine: Engine, meddling: list[str], words: str) -> None:
    as_an_earlier_release_left_it(engine, migrations.head_revision())
    execute(engine, *meddling)
    before, rows = definitions(engine), shops_rows(engine)
    with pytest.raises(ConfigurationError, match=f"tombola's history or another application's: .*{words}"):
        migrations.upgrade(engine)
    assert (definitions(engine), shops_rows(engine)) == (before, rows)


def test_steps_of_legacy_know_an_earlier_releases_history(mariadb: Engine) -> None:
    old_code.create(mariadb)
    old_code.run_step(mariadb, "expand")
    execute(mariadb, f"ALTER TABLE {migrations.VERSION_TABLE} RENAME TO alembic_version")
    old_code.run_step(mariadb, "rollback")
    assert not {"alembic_version", migrations.VERSION_TABLE} & tables_in(mariadb)


# ---- tables of our names ---------------------------------------------------------------------------------------------


def test_another_applications_tables_are_named_before_the_first_statement(engine: Engine) -> None:
    execute(
        engine,
        # The names of our columns, too, but not their types.
        "CREATE TABLE operators (name VARCHAR(64) PRIMARY KEY, role INTEGER NOT NULL, password_hash VARCHAR(255), "
        "created_at INTEGER)",
        "CREATE TABLE replays (id INTEGER PRIMARY KEY)",
        "CREATE TABLE customers (id INTEGER PRIMARY KEY)",
        "CREATE VIEW api_keys AS SELECT id FROM customers",
    )
    theirs = tables_in(engine)
    with pytest.raises(ConfigurationError, match=r"did not make: api_keys, operators, replays\. Nothing has changed\."):
        migrations.upgrade(engine)
    assert tables_in(engine) == theirs


def test_a_table_that_a_later_revision_makes_is_not_theirs_either(engine: Engine) -> None:
    migrations.upgrade(engine, "0002")
    execute(engine, "CREATE TABLE operators (id INTEGER PRIMARY KEY)")
    with pytest.raises(ConfigurationError, match="did not make: operators"):
        migrations.upgrade(engine)
    assert revision_of(engine) == "0002"
    execute(engine, "ALTER TABLE operators RENAME TO staff")
    migrations.upgrade(engine)
    assert revision_of(engine) == migrations.head_revision()


def test_a_newer_releases_database_is_left_alone(engine: Engine) -> None:
    migrations.upgrade(engine)
    execute(engine, f"UPDATE {migrations.VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(ConfigurationError, match="at 9999, which a newer release made"):
        migrations.upgrade(engine)


# ---- broken off half-way ---------------------------------------------------------------------------------------------


Change = Callable[[], None]


@contextmanager
def each_change(engine: Engine, then: Change) -> Iterator[None]:
    """Call `then` right after each statement that changes something."""

    def after(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.split(maxsplit=1)[0].upper() in ("CREATE", "ALTER", "DROP", "INSERT", "UPDATE", "DELETE"):
            then()

    event.listen(engine, "after_cursor_execute", after)
    yield
    event.remove(engine, "after_cursor_execute", after)


def is_cut_short(url: str, count: int, go: Callable[[Engine], None]) -> bool:
    """Whether `go`, in a process of its own, came to its `count`th change: there it ends, nothing tidied up."""
    child = os.fork()
    if child == 0:
        try:
            engine, left = open_engine(url), itertools.count(count - 1, -1)
            with each_change(engine, lambda: None if next(left) else os._exit(9)):
                go(engine)
            os._exit(0)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def state_of(engine: Engine) -> tuple[str, ...]:
    """All tables in the server's words, and the revision."""
    with engine.connect() as connection:
        names = connection.exec_driver_sql("SHOW TABLES").scalars().all()
        made = [str(connection.exec_driver_sql(f"SHOW CREATE TABLE {name}").one()[1]) for name in names]
        return (*made, str(migrations.current_revision(connection)))


def test_a_first_upgrade_that_broke_off_takes_no_shops_history(mariadb: Engine, mariadb_url: str) -> None:
    """Its tables are all there, not yet on record; and the shop's revision is called like ours."""
    execute(mariadb, SHOPS, "INSERT INTO alembic_version VALUES ('0001')")
    mariadb.dispose()
    assert is_cut_short(mariadb_url, 9, migrations.upgrade)
    assert tables_in(mariadb) >= set(history.made_by_revision()["0001"])
    assert revision_of(mariadb) is None
    migrations.upgrade(mariadb)
    assert revision_of(mariadb) == migrations.head_revision()
    assert shops_rows(mariadb) == ["0001"]


@pytest.mark.parametrize(
    "go",
    [
        pytest.param(migrations.upgrade, id="up"),
        pytest.param(lambda engine: migrations.downgrade(engine, "base"), id="down"),
    ],
)
def test_what_broke_off_after_any_statement_is_run_again(
    mariadb: Engine, mariadb_url: str, go: Callable[[Engine], None]
) -> None:
    """MariaDB commits each change of a table by itself: every moment in between is one that a kill leaves behind.

    One database, one run after another, each killed at the first state that no run before it was killed in.
    """
    if go is not migrations.upgrade:
        migrations.upgrade(mariadb)
    undisturbed: list[tuple[str, ...]] = []
    looking = open_engine(mariadb_url)
    with each_change(mariadb, lambda: undisturbed.append(state_of(looking))):
        go(mariadb)
    expected = state_of(mariadb)
    if go is migrations.upgrade:
        migrations.downgrade(mariadb, "base")
        execute(mariadb, f"DROP TABLE {migrations.VERSION_TABLE}")
    else:
        migrations.upgrade(mariadb)

    seen: set[tuple[str, ...]] = set()
    count = 1
    for engine in (mariadb, looking):
        engine.dispose()  # no connection is shared with the children
    while is_cut_short(mariadb_url, count, go):
        state = state_of(looking)
        looking.dispose()
        count = count + 1 if state in seen else 1
        seen.add(state)
    assert state_of(mariadb) == expected
    assert len(set(undisturbed)) > 40
    assert set(undisturbed) - {expected} <= seen


@pytest.mark.slow
def test_on_sqlite_a_broken_off_upgrade_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = open_engine(f"sqlite:///{tmp_path_factory.mktemp('whole')}/x.db")
    changes: list[None] = []
    with each_change(whole, lambda: changes.append(None)):
        migrations.upgrade(whole)
    for number in range(1, len(changes), 7):
        url = f"sqlite:///{tmp_path_factory.mktemp('half')}/x.db"
        assert is_cut_short(url, number, migrations.upgrade)
        half = open_engine(url)
        assert tables_in(half) == set(), number
        migrations.upgrade(half)
        assert definitions(half) == definitions(whole)
        half.dispose()
    whole.dispose()


def test_what_is_left_without_a_history_is_ours_if_we_made_it(mariadb: Engine) -> None:
    """A first upgrade of an earlier release that broke off, or a dump without its last table."""
    migrations.upgrade(mariadb)
    expected = definitions(mariadb)
    execute(mariadb, f"DROP TABLE {migrations.VERSION_TABLE}", "DROP TABLE operator_actions")
    assert tables_in(mariadb) == TABLES - {"operator_actions"}
    with pytest.raises(ConfigurationError, match="tombola legacy inspect"):
        migrations.upgrade(mariadb)  # nothing tells this ledger from old code's
    execute(mariadb, f"CREATE TABLE {migrations.VERSION_TABLE} (version_num VARCHAR(32) NOT NULL PRIMARY KEY)")
    migrations.upgrade(mariadb)
    assert definitions(mariadb) == expected


def test_the_tables_by_revision_are_those_of_the_code() -> None:
    made = history.made_by_revision()
    newest = {table.name: {column.name for column in table.columns} for table in metadata.tables.values()}
    assert {name: set(columns) for name, columns in made[migrations.head_revision()].items()} == newest


def test_no_version_table_of_another_name_is_made(engine: Engine) -> None:
    migrations.upgrade(engine)
    assert tables_in(engine) == TABLES | {migrations.VERSION_TABLE}
    with engine.connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() is None
