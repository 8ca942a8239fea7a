"""The way back for a column of the guide's that was there before (`tombola legacy adopt`): it stays, and is as it was.

It gets back its type, and is emptied where it was empty; what new code has written into it stays. Only a key that the
column's old collation holds for equal to an earlier one goes aside, as its unique index would not take it.
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
    """What is left of it, for somebody who runs it by hand."""
    found = [variants[-1].replace(r"\:", ":") for variants in _change_back(ledger, details, writers_wait=True)]
    for first, last, statement in _emptying(connection, details):
        found.append(statement.replace(":first", str(first)).replace(":last", str(last)))
    return found


def change_types(
    connection: Connection, details: dict[str, Any], say: Say, *, writers_wait: bool, keep_new_rows: bool
) -> None:
    """Give each column the type that it had.

    Raises ConfigurationError where this server would make writers wait, or keys would have to go aside, and nobody said
    that they may.
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
                    "there are keys now that differ in case alone, which the column's old collation holds for equal; "
                    "nothing has changed. With --keep-new-rows the later ones go aside"
                ) from None
            say(f"{_set_aside(connection, details['collations'][KEY]):,} keys go aside: others differ in case alone")
            alter(connection, variants, say)


def _set_aside(connection: Connection, collation: str) -> int:
    """Of keys that `collation` holds for equal all but the first are kept elsewhere; how many those are."""
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
    """Empty what the backfill has filled."""
    for first, last, statement in _emptying(connection, details):
        for begin, end in checksums.ranges(connection, first - 1, last):
            connection.execute(text(statement), {"first": begin, "last": end})


def _change_back(ledger: Definition, details: dict[str, Any], *, writers_wait: bool) -> list[list[str]]:
    """For each column that is another now: ALTERs, the first that the server can do."""
    found = []
    for name in record.filled_before(details):
        before = tables.column_sql(details["definitions"][LEDGER], name)
        if not tables.is_same_column(ledger.sql_of(name), before, ledger.collation):
            before = before.replace(":", r"\:")  # in a comment: it begins no parameter
            ways = ["ALGORITHM=INPLACE, LOCK=NONE", *ways_to_convert(writers_wait=writers_wait)]
            found.append([f"ALTER TABLE {LEDGER} MODIFY {name} {before}, {way}" for way in ways])
    return found


def _emptying(connection: Connection, details: dict[str, Any]) -> Iterator[tuple[int, int, str]]:
    """What the backfill has filled: from which id to which one, and the statement that empties it again."""
    ledger = tables.ledger(connection)
    for name in reversed(record.filled_before(details)):  # the key last: it tells which later rows are old code's
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
