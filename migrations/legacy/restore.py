"""Rollback of a column of the guide that existed before (`tombola legacy adopt`): it stays, and is restored.

The column gets its old type back, and values that were missing are NULL again; values of new code stay. Only a key that
equals an earlier key in the column's old collation is put aside, as the unique index would refuse it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from tombola.migrations.legacy import backfill, checksums, record, shapes, tables
from tombola.migrations.legacy.backfill import DUPLICATE
from tombola.migrations.legacy.contract import must_wait, ways_to_convert
from tombola.migrations.legacy.session import CANNOT, Say, alter, code_of
from tombola.migrations.legacy.tables import KEY, LEDGER, SESSION, Definition
from tombola.producers.domain.errors import ConfigurationError


def statements(connection: Connection, ledger: Definition, details: dict[str, Any]) -> list[str]:
    """The statements that are left, to run by hand."""
    found = [variants[-1].replace(r"\:", ":") for variants in _change_back(ledger, details, writers_wait=True)]
    for first, last, statement in _emptying(connection, details):
        found.append(statement.replace(":first", str(first)).replace(":last", str(last)))
    return found


def change_types(
    connection: Connection, details: dict[str, Any], say: Say, *, writers_wait: bool, keep_new_rows: bool
) -> None:
    """Give each column its old type back.

    Raises ConfigurationError where this server would block writers without `writers_wait`, or keys would be put aside
    without `keep_new_rows`.
    """
    for variants in _change_back(tables.ledger(connection), details, writers_wait=writers_wait):
        try:
            alter(connection, variants, say)
        except DBAPIError as error:
            if code_of(error) in CANNOT:
                raise must_wait(tables.ledger(connection), "the columns get back their collation") from None
            if code_of(error) != DUPLICATE:
                raise
            if not keep_new_rows:
                raise ConfigurationError(
                    "there are keys now that differ in case alone, which are equal in the column's old collation; "
                    "nothing has changed. With --keep-new-rows the later keys are put aside"
                ) from None
            say(f"{_set_aside(connection, details['collations'][KEY]):,} keys go aside: others differ in case alone")
            alter(connection, variants, say)


def _set_aside(connection: Connection, collation: str) -> int:
    """Put aside all but the first of keys that are equal in `collation`; return how many."""
    folded = f"CONVERT({KEY} USING {collation.partition('_')[0]}) COLLATE {collation}"
    later = connection.execute(
        text(
            "SELECT transaction_id FROM (SELECT transaction_id, ROW_NUMBER() OVER "
            f"(PARTITION BY {folded} ORDER BY transaction_id) AS number FROM {LEDGER}) AS numbered WHERE number > 1"
        )
    ).scalars()
    ids = [int(it) for it in later]
    values = ", ".join([f"{KEY} = CONCAT('tx_', transaction_id)", *backfill.kept(tables.ledger(connection))])
    for transaction_id in ids:
        here = {"id": transaction_id}
        connection.execute(
            text(
                f"INSERT IGNORE INTO legacy_migration_keys SELECT transaction_id, {KEY}, {SESSION} FROM {LEDGER} "
                "WHERE transaction_id = :id"
            ),
            here,
        )
        connection.execute(text(f"UPDATE {LEDGER} SET {values} WHERE transaction_id = :id"), here)
    return len(ids)


def empty(connection: Connection, details: dict[str, Any]) -> None:
    """Make the values that the backfill has filled NULL again."""
    for first, last, statement in _emptying(connection, details):
        for begin, end in checksums.ranges(connection, first - 1, last):
            connection.execute(text(statement), {"first": begin, "last": end})


def _change_back(ledger: Definition, details: dict[str, Any], *, writers_wait: bool) -> list[list[str]]:
    """For each column whose definition has changed: variants of the ALTER that restores it."""
    found = []
    for name in record.filled_before(details):
        before = tables.column_sql(details["definitions"][LEDGER], name)
        if not tables.is_same_column(ledger.sql_of(name), before, ledger.collation):
            before = before.replace(":", r"\:")  # a colon in a comment begins no parameter
            ways = ["ALGORITHM=INPLACE, LOCK=NONE", *ways_to_convert(writers_wait=writers_wait)]
            found.append([f"ALTER TABLE {LEDGER} MODIFY {name} {before}, {way}" for way in ways])
    return found


def _emptying(connection: Connection, details: dict[str, Any]) -> Iterator[tuple[int, int, str]]:
    """The ranges that the backfill has filled: first id, last id, and the statement that makes them NULL again."""
    ledger = tables.ledger(connection)
    for name in reversed(record.filled_before(details)):  # the key last: it shows which later rows are old code's
        update = (
            f"UPDATE {LEDGER} SET {', '.join([f'{name} = NULL', *backfill.kept(ledger)])} "
            f"WHERE transaction_id BETWEEN :first AND :last AND {checksums.is_by_rule(name)}"
        )
        for first, last in shapes.blanks(connection, name):
            yield first, last, update
        before, _, _ = tables.column_sql(details["definitions"][LEDGER], name).partition(" COMMENT ")
        is_nullable = " NOT NULL" not in before
        if is_nullable and KEY in ledger.columns:
            later = f"{update} AND {KEY} = CONCAT('tx_', transaction_id)"
            yield details["barrier"] + 1, tables.highest_id(connection), later
