"""expand, adopt: add what tombola needs to the two tables, and make tombola's own tables. Old code goes on writing.

*expand* is for a table without the guide's two columns, *adopt* for a table to which they were added by hand, all or
in part. Both record the state before, and leave the same state, so that all later steps are the same.
"""

from __future__ import annotations

from typing import Any

from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from tombola import migrations
from tombola.migrations import history
from tombola.migrations.legacy import checksums, record, shapes, tables
from tombola.migrations.legacy.inspection import namesakes, obstacles
from tombola.migrations.legacy.session import OnProgress, Say, alter, each_by_itself, turn
from tombola.migrations.legacy.tables import ACCOUNT_COLUMNS_ADDED, ACCOUNTS, KEY, KEY_TYPE, LEDGER, SESSION
from tombola.producers.domain.errors import ConfigurationError


def add_columns(table: str, columns: dict[str, str]) -> list[str]:
    """ALTERs that add `columns`: INSTANT, or else INPLACE beside the writers."""
    added = ", ".join(f"ADD COLUMN {tables.quoted(name)} {kind}" for name, kind in columns.items())
    return [f"ALTER TABLE {table} {added}, {how}" for how in ("ALGORITHM=INSTANT", "ALGORITHM=INPLACE, LOCK=NONE")]


def missing_in_ledger(table: tables.Definition) -> dict[str, str]:
    return {name: f"{KEY_TYPE} NULL" for name in (KEY, SESSION) if name not in table.columns}


def missing_in_accounts(table: tables.Definition) -> dict[str, str]:
    return {name: kind for name, kind in ACCOUNT_COLUMNS_ADDED.items() if name not in table.columns}


def statements(engine: Engine) -> list[str]:
    """The statements that are left of this step, to run by hand."""
    with each_by_itself(engine) as connection:
        found = list(record.STATE_TABLES)
        ledger, accounts = tables.ledger(connection), tables.accounts(connection)
        known = record.steps(connection).get("expand")
        if known is None or known.status == record.ROLLED_BACK:
            # Before the first ALTER: the state that rollback goes back to.
            details = record.as_json(_before(connection, ledger, accounts)).replace("\\", "\\\\").replace("'", "''")
            found.append(
                "REPLACE INTO legacy_migration (step, status, started_at, details) "
                f"VALUES ('expand', '{record.RUNNING}', UTC_TIMESTAMP(6), '{details}')"
            )
        if columns := missing_in_ledger(ledger):
            found.append(add_columns(LEDGER, columns)[0])
        if columns := missing_in_accounts(accounts):
            found.append(add_columns(ACCOUNTS, columns)[0])
        for name in tables.own_tables():
            if not tables.has_table(connection, name):
                found += tables.create_own(name)
        command = shapes.shape_of(connection, ledger).command if known is None else known.shape.command
    return [*found, f"-- then `{command}`: it takes the checksums and puts on record where the database is"]


def expand(engine: Engine, *, say: Say, on_progress: OnProgress) -> None:
    """Do what is left of this step. Raises ConfigurationError for an obstacle."""
    _take_over(engine, say, on_progress, adopts=False)
    say("expanded: both columns are there, nullable, and old code goes on")


def adopt(engine: Engine, *, say: Say, on_progress: OnProgress) -> None:
    """Do what is left of this step. Raises ConfigurationError for an obstacle."""
    _take_over(engine, say, on_progress, adopts=True)
    say("adopted: what was there before is on record, and old code goes on")


def _take_over(engine: Engine, say: Say, on_progress: OnProgress, *, adopts: bool) -> None:
    with turn(engine, say) as connection:
        known = record.steps(connection).get("expand")
        is_begun = known is not None and known.status != record.ROLLED_BACK
        if known is not None and is_begun:
            shape = known.shape
        else:
            _refuse_what_is_ours(connection)
            shape = shapes.shape_of(connection, tables.ledger(connection))
        if shape.has_columns != adopts:
            raise ConfigurationError(f"{LEDGER} is {shape}: run `{shape.command}`")
        if known is None or known.status != record.DONE:
            _run(connection, say, on_progress)


def _run(connection: Connection, say: Say, on_progress: OnProgress) -> None:
    for statement in record.STATE_TABLES:
        connection.execute(text(statement))
    known = record.steps(connection).get("expand")
    if known is None or known.status != record.RUNNING:
        _begin(connection)
    details = record.recorded(connection).details
    columns = missing_in_ledger(tables.ledger(connection))
    if columns or record.recorded(connection).shape.has_columns:
        # An ALTER or a table lock waits for all transactions on the table: afterwards no row appears up to this id.
        details["barrier"] = tables.highest_id(connection)
        record.note(connection, "expand", details)
        if columns:
            alter(connection, add_columns(LEDGER, columns), say)
        else:
            alter(connection, [f"LOCK TABLES {LEDGER} WRITE"], say)
            connection.execute(text("UNLOCK TABLES"))
    if columns := missing_in_accounts(tables.accounts(connection)):
        alter(connection, add_columns(ACCOUNTS, columns), say)
    for name in tables.own_tables():
        _create(connection, name)
    checksums.take(connection, details, details["barrier"], on_progress)
    shapes.take_blanks(connection, record.filled_before(details), details["barrier"])
    stamp(connection)
    record.end(connection, "expand", details)


def _refuse_what_is_ours(connection: Connection) -> None:
    revision = migrations.current_revision(connection) or history.former_revision(connection)
    if revision is not None:
        raise ConfigurationError(f"the database is at revision {revision}: it is migrated, and not a legacy database")


def _begin(connection: Connection) -> None:
    """Check for obstacles, and record the definitions before the step."""
    ledger, accounts = tables.ledger(connection), tables.accounts(connection)
    found = [*obstacles(ledger, accounts), *namesakes(connection)]
    if blocking := [it for it in found if it.is_blocking]:
        raise ConfigurationError("; ".join(f"{it.what}: {it.cure}" for it in blocking))
    connection.execute(text("DELETE FROM legacy_migration WHERE step <> 'expand'"))
    connection.execute(text("DELETE FROM legacy_migration_chunks"))
    record.begin(connection, "expand", _before(connection, ledger, accounts))


def _before(connection: Connection, ledger: tables.Definition, accounts: tables.Definition) -> dict[str, Any]:
    """The state before the first change, and what the step will add."""
    return {
        "shape": shapes.shape_of(connection, ledger).value,
        "definitions": {LEDGER: ledger.plain_sql, ACCOUNTS: accounts.plain_sql},
        "columns": list(ledger.columns),
        "collations": {name: ledger.columns[name].collation for name in (KEY, SESSION) if name in ledger.columns},
        "algorithm": checksums.ALGORITHM,
        "indexes": {it.name: it.definition for it in ledger.indexes.values()},
        "added_to_accounts": list(missing_in_accounts(accounts)),
        "tables_before": [name for name in tables.own_tables() if tables.has_table(connection, name)],
        "barrier": tables.highest_id(connection),
    }


def _create(connection: Connection, name: str) -> None:
    """Make one of tombola's tables, or the missing indexes: the server commits each statement by itself."""
    found = tables.read(connection, name)
    table, *indexes = tables.create_own(name)
    if found is None:
        connection.execute(text(table))
    there = set() if found is None else set(found.indexes)
    for statement in indexes:
        if statement.split(" ON ")[0].split()[-1].strip("`") not in there:
            connection.execute(text(statement))


def stamp(connection: Connection) -> None:
    """Record in Alembic's table that the database is at this release's revision."""
    MigrationContext.configure(connection, opts={"version_table": migrations.VERSION_TABLE}).stamp(
        ScriptDirectory.from_config(migrations.alembic_config()), migrations.head_revision()
    )
