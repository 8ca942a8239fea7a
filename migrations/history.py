"""Who made the tables: tombola by its history, tombola by an earlier release's history, or another application.

A shop may keep tombola's tables in its own database. There `alembic_version` is the shop's history, and a table may
have the name of one of tombola's and be the shop's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Final

from sqlalchemy import Connection, Inspector, create_engine, inspect, text

from tombola import migrations
from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.storage.schema import metadata

# The history's table in earlier releases; a shop's own Alembic has a table of this name, too.
FORMER_VERSION_TABLE: Final = "alembic_version"
# Old code has tables of these two names as well (`tombola legacy`): they prove nothing.
OLD_CODES: Final = frozenset({"account_asset_balances", "asset_transactions"})

RENAME: Final = f"ALTER TABLE {FORMER_VERSION_TABLE} RENAME TO {migrations.VERSION_TABLE}"

Columns = dict[str, frozenset[str]]  # by table


def former_revision(connection: Connection) -> str | None:
    """Tombola's revision in `alembic_version`; None where that table is missing, or is another application's.

    It is another application's where tombola_version exists, even empty (an interrupted first upgrade), and where no
    table is tombola's alone: other applications may have revisions of the same names.
    """
    tables = set(inspect(connection).get_table_names())
    if migrations.VERSION_TABLE in tables or FORMER_VERSION_TABLE not in tables:
        return None
    if not tables & (metadata.tables.keys() - OLD_CODES):
        return None
    return next((it for it in _former_rows(connection) if migrations.knows(it)), None)


def take_over(connection: Connection) -> str | None:
    """Rename `alembic_version` to tombola_version where it is tombola's; return its revision, or None.

    Raises ConfigurationError where the tables do not match that revision.
    """
    revision = former_revision(connection)
    if revision is None:
        return None
    refuse_doubtful(connection, revision)
    # One statement: at any moment exactly one of the two tables exists.
    connection.execute(text(RENAME))
    connection.commit()
    return revision


def refuse_doubtful(connection: Connection, revision: str) -> None:
    """Raise ConfigurationError where the tables do not match `revision`, the revision in `alembic_version`."""
    if doubts := list(_doubts(connection, revision)):
        raise ConfigurationError(
            f"{FORMER_VERSION_TABLE} is at {revision}, which may be tombola's history or another application's: "
            f"{'; '.join(doubts)}. If it is another's, rename the tables that have names of tombola's, or give "
            "tombola a database of its own; if it is tombola's, restore what is missing"
        )


def refuse_namesakes(connection: Connection) -> None:
    """Raise ConfigurationError where a table that a pending revision makes exists, and no revision made it."""
    at = migrations.current_revision(connection)
    if at == migrations.head_revision() or (at is not None and not migrations.knows(at)):
        return  # no revision is pending
    tables = inspect(connection)
    views = set(tables.get_view_names())
    there = metadata.tables.keys() & {*tables.get_table_names(), *views}
    if not there:
        return
    made = made_by_revision()
    foreign = sorted(
        name
        for name in there - (made[at].keys() if at else set())
        if name in views or not _is_half_made(connection, tables, name, made)
    )
    if foreign:
        raise ConfigurationError(
            f"there are tables with names of tombola's that tombola did not make: {', '.join(foreign)}. Nothing has "
            "changed. Rename them, or give tombola a database of its own; if they are from a backup of tombola's, "
            f"restore its {migrations.VERSION_TABLE} as well"
        )


@cache
def made_by_revision() -> dict[str, Columns]:
    """The tables and columns that each revision leaves, by revision, from a run of all on a database in memory."""
    from alembic.migration import MigrationContext
    from alembic.operations import Operations
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory.from_config(migrations.alembic_config())
    made: dict[str, Columns] = {}
    engine = create_engine("sqlite://")
    with engine.connect() as connection, Operations.context(MigrationContext.configure(connection)):
        for script in reversed(list(scripts.walk_revisions())):
            script.module.upgrade()
            tables = inspect(connection)
            made[script.revision] = {name: _columns(tables, name) for name in tables.get_table_names()}
    engine.dispose()
    return made


def _former_rows(connection: Connection) -> list[str]:
    return [str(it) for it in connection.execute(text(f"SELECT version_num FROM {FORMER_VERSION_TABLE}")).scalars()]


def _columns(tables: Inspector, name: str) -> frozenset[str]:
    return frozenset(str(column["name"]) for column in tables.get_columns(name))


def _doubts(connection: Connection, revision: str) -> Iterator[str]:
    """The reasons against this database being at tombola's `revision`, or half-way to the next one."""
    made, tables = made_by_revision(), inspect(connection)
    order = list(made)
    now, newest = made[revision], made[order[-1]]
    following = made[order[min(order.index(revision) + 1, len(order) - 1)]]
    there = {name: _columns(tables, name) for name in tables.get_table_names() if name in newest}
    if len(_former_rows(connection)) > 1:
        yield "it has more than one row"
    for name, columns in now.items():
        if missing := columns - there.get(name, frozenset()):
            yield f"{name} lacks {', '.join(sorted(missing))}" if name in there else f"there is no {name}"
    for name, columns in there.items():
        if name not in following:
            yield f"{name} is there, which a later revision makes"
        elif later := columns & (newest[name] - following[name]):
            yield f"{name} has {', '.join(sorted(later))}, which a later revision makes"
    if tables.has_table("legacy_migration"):
        steps = {str(it[0]): it[1] for it in connection.execute(text("SELECT step, status FROM legacy_migration"))}
        if steps.get("expand") != "done" or "rollback" in steps:
            yield "`tombola legacy` is half-way"


def _is_half_made(connection: Connection, tables: Inspector, name: str, made: dict[str, Columns]) -> bool:
    """Whether a revision of tombola made this table, and was interrupted before it was recorded."""
    from alembic.migration import MigrationContext

    if connection.dialect.name == "sqlite":
        return False  # on SQLite a revision is atomic
    found = {str(column["name"]): column for column in tables.get_columns(name)}
    first = next(columns[name] for columns in made.values() if name in columns)
    newest = list(made.values())[-1]
    if not first <= found.keys() <= newest[name]:
        return False
    ours, impl = metadata.tables[name], MigrationContext.configure(connection).impl
    for column in ours.columns:
        if column.name in found:
            there = found[column.name]
            reflected = column._copy()
            reflected.type = there["type"]
            if impl.compare_type(reflected, column):
                return False
    return True
