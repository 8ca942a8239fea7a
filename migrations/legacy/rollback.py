"""rollback: back from every step to the definition before, online, without losing a row.

Rows of new code are an obstacle, since the old definition has no place for their keys. With `keep_new_rows` the rows
stay in the ledger, where old code reads them by `business_id`, and their keys in `legacy_migration_keys`, from which a
later backfill restores them.

A column of the guide that existed before (`tombola legacy adopt`) stays, and is restored (restore.py).
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from tombola import migrations
from tombola.migrations import history
from tombola.migrations.legacy import record, restore, tables
from tombola.migrations.legacy.backfill import DUPLICATE
from tombola.migrations.legacy.session import Say, alter, code_of, each_by_itself, turn
from tombola.migrations.legacy.tables import (
    ACCOUNT_INDEX,
    ACCOUNTS,
    FOREIGN_KEY,
    KEY,
    KEY_INDEX,
    LEDGER,
    SESSION,
    SESSION_INDEX,
    Definition,
)
from tombola.migrations.legacy.verify import definitions_changed
from tombola.producers.domain.errors import ConfigurationError

DROP_HISTORY: Final = f"DROP TABLE IF EXISTS {migrations.VERSION_TABLE}"
# A row of new code has its session in business_id as well.
KEEP_KEYS: Final = (
    f"INSERT IGNORE INTO legacy_migration_keys SELECT transaction_id, {KEY}, business_id FROM {LEDGER} "
    f"WHERE {KEY} <> CONCAT('tx_', transaction_id)"
)


def drop_column(table: str, name: str) -> list[str]:
    """ALTERs that drop a column: INSTANT, or else INPLACE beside the writers."""
    return [
        f"ALTER TABLE {table} DROP COLUMN {tables.quoted(name)}, {how}"
        for how in ("ALGORITHM=INSTANT", "ALGORITHM=INPLACE, LOCK=NONE")
    ]


def _add_back(ledger: Definition, details: dict[str, Any]) -> list[str]:
    """The old indexes that were dropped."""
    return [how for name, how in details["indexes"].items() if name not in ledger.indexes]


def _drop_indexes(ledger: Definition, details: dict[str, Any], *, of: str) -> list[str]:
    """Tombola's indexes on column `of`: the session's, or the others."""
    names = [SESSION_INDEX] if of == SESSION else [KEY_INDEX, ACCOUNT_INDEX]
    ours = [name for name in names if name in ledger.indexes and name not in details["indexes"]]
    return [f"DROP INDEX {tables.quoted(name)}" for name in ours]


def _is_our_foreign_key_there(ledger: Definition, details: dict[str, Any]) -> bool:
    return FOREIGN_KEY in ledger.foreign_keys and FOREIGN_KEY not in details["definitions"][LEDGER]


def _has_begun(connection: Connection) -> bool:
    """Whether a rollback is running: an `alembic_version` that is left then is another application's."""
    return (known := record.steps(connection).get("rollback")) is not None and known.status == record.RUNNING


def statements(engine: Engine) -> list[str]:
    """The statements that are left of this step, to run by hand."""
    with each_by_itself(engine) as connection:
        expanded, ledger = record.recorded(connection), tables.ledger(connection)
        details = expanded.details
        is_former = not _has_begun(connection) and history.former_revision(connection) is not None
        found = [history.RENAME, DROP_HISTORY] if is_former else [DROP_HISTORY]
        found += [f"ALTER TABLE {LEDGER} ADD {it}, ALGORITHM=INPLACE, LOCK=NONE" for it in _add_back(ledger, details)]
        if _is_our_foreign_key_there(ledger, details):
            found.append(f"ALTER TABLE {LEDGER} DROP FOREIGN KEY {FOREIGN_KEY}, ALGORITHM=INPLACE, LOCK=NONE")
        if expanded.shape.has_columns:
            found += restore.statements(connection, ledger, details)
        for column in (SESSION, KEY):
            is_ours = column in ledger.columns and column not in details["columns"]
            if column == KEY and is_ours:
                found.append(KEEP_KEYS)
            if drops := _drop_indexes(ledger, details, of=column):
                found.append(f"ALTER TABLE {LEDGER} {', '.join(drops)}, ALGORITHM=INPLACE, LOCK=NONE")
            if is_ours:
                found.append(drop_column(LEDGER, column)[0])
        there = tables.accounts(connection).columns
        found += [drop_column(ACCOUNTS, name)[0] for name in details["added_to_accounts"] if name in there]
        return found


def rollback(engine: Engine, *, keep_new_rows: bool, say: Say, writers_wait: bool = False) -> None:
    """Do what is left of this step; with `writers_wait` also the changes for which this server blocks writers.

    Raises ConfigurationError when new code has written rows and `keep_new_rows` is off.
    """
    with turn(engine, say) as connection:
        expanded = record.recorded(connection)
        if expanded.status == record.ROLLED_BACK:
            say("nothing to do: it was rolled back")
            return
        details = expanded.details
        if not keep_new_rows:
            _refuse_to_lose(connection, details)
        if expanded.shape.has_columns:
            restore.change_types(connection, details, say, writers_wait=writers_wait, keep_new_rows=keep_new_rows)
        if not _has_begun(connection):
            history.take_over(connection)
        record.begin(connection, "rollback", {})
        # From here on a worker refuses to start, as the database is not migrated.
        alter(connection, [DROP_HISTORY], say)
        kept_out = _put_indexes_back(connection, details, keep_new_rows, say)
        _drop_foreign_key(connection, details, say)
        if expanded.shape.has_columns:
            restore.empty(connection, details)
        _take_columns_away(connection, details, keep_new_rows, say)
        for name in details["added_to_accounts"]:
            if name in tables.accounts(connection).columns:
                alter(connection, drop_column(ACCOUNTS, name), say)
        kept = [name for name in reversed(tables.own_tables()) if not _drop_own(connection, name, details, say)]
        changed = [] if kept_out else definitions_changed(connection, details)
        record.end_all(connection)
    if kept:
        say(f"left as they are, as they hold rows: {', '.join(sorted(kept))}")
    if changed:
        raise ConfigurationError("; ".join(changed) + ": it was changed since expand, and not by these steps")
    say("rolled back: the definitions are those before. `tombola legacy verify` compares the rows")


def _refuse_to_lose(connection: Connection, details: dict[str, Any]) -> None:
    holding = [
        name
        for name in tables.own_tables()
        if name not in details["tables_before"] and tables.has_table(connection, name) and _has_rows(connection, name)
    ]
    new_rows = _new_rows(connection, details)
    if new_rows or holding:
        what = [f"{new_rows:,} rows of the ledger"] if new_rows else []
        raise ConfigurationError(
            f"new code has written: {', '.join(what + holding)}. Stop it, then `tombola legacy rollback "
            "--keep-new-rows`: the rows stay, and so do their keys, aside"
        )


def _new_rows(connection: Connection, details: dict[str, Any]) -> int:
    """The number of rows that would lose their keys: 0 where the column stays."""
    if KEY not in tables.ledger(connection).columns or KEY in details["columns"]:
        return 0
    return int(
        connection.execute(
            text(f"SELECT COUNT(*) FROM {LEDGER} WHERE {KEY} <> CONCAT('tx_', transaction_id)")
        ).scalar_one()
    )


def _put_indexes_back(connection: Connection, details: dict[str, Any], keep_new_rows: bool, say: Say) -> bool:
    """Restore the old indexes that were dropped; return whether one had to be left out."""
    left_out = False
    for index in _add_back(tables.ledger(connection), details):
        try:
            alter(connection, [f"ALTER TABLE {LEDGER} ADD {index}, ALGORITHM=INPLACE, LOCK=NONE"], say)
        except DBAPIError as error:
            if code_of(error) != DUPLICATE or not keep_new_rows:
                raise
            say(f"left out, as rows of new code do not fit it: {index}")
            left_out = True
    return left_out


def _drop_foreign_key(connection: Connection, details: dict[str, Any], say: Say) -> None:
    if _is_our_foreign_key_there(tables.ledger(connection), details):
        alter(connection, [f"ALTER TABLE {LEDGER} DROP FOREIGN KEY {FOREIGN_KEY}, ALGORITHM=INPLACE, LOCK=NONE"], say)


def _take_columns_away(connection: Connection, details: dict[str, Any], keep_new_rows: bool, say: Say) -> None:
    # The session first: from then on new code cannot write, and no further row gets a key.
    for name in (SESSION, KEY):
        ledger = tables.ledger(connection)
        is_ours = name in ledger.columns and name not in details["columns"]
        if name == KEY and is_ours:
            if _new_rows(connection, details) and not keep_new_rows:
                raise ConfigurationError(
                    "new code has written meanwhile: stop it, then `tombola legacy rollback --keep-new-rows` does the "
                    "rest"
                )
            connection.execute(text(KEEP_KEYS))
        if indexes := _drop_indexes(ledger, details, of=name):
            alter(connection, [f"ALTER TABLE {LEDGER} {', '.join(indexes)}, ALGORITHM=INPLACE, LOCK=NONE"], say)
        if is_ours:
            alter(connection, drop_column(LEDGER, name), say)


def _drop_own(connection: Connection, name: str, details: dict[str, Any], say: Say) -> bool:
    """Drop one of tombola's tables if it is empty; return False where it holds rows and stays."""
    if name in details["tables_before"] or not tables.has_table(connection, name):
        return True
    if _has_rows(connection, name):
        return False
    alter(connection, [f"DROP TABLE {tables.quoted(name)}"], say)
    return True


def _has_rows(connection: Connection, name: str) -> bool:
    return connection.execute(text(f"SELECT 1 FROM {tables.quoted(name)} LIMIT 1")).first() is not None
