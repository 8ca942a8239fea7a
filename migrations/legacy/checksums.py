"""Proof that nothing else has changed: checksums of every untouched column, by ranges of the primary key.

A chunk's checksum is the XOR of its rows' hashes, over all old columns with the id. The rows of a chunk are final when
the checksum is taken: an ALTER waits until every transaction on the table has ended, so afterwards no row appears up to
the highest id that was read *before* it. Later rows go into later chunks, after the next ALTER.

Where a table had one of the two columns before, the steps fill only its missing values. So a value that the guide's
rules give counts as missing, and any other value is part of the checksum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import xor
from typing import Any, Final

from sqlalchemy import Connection, text

from tombola.migrations.legacy.session import OnProgress
from tombola.migrations.legacy.tables import KEY, LEDGER, SESSION, quoted

CHUNK_ROWS: Final = 5000
ALGORITHM: Final = "sha256"
MD5: Final = "md5"  # of the first release, whose records do not name it
HASH_HEX_DIGITS: Final = 32

_TX: Final = "CONCAT('tx_', transaction_id)"
_BY_RULE: Final = {KEY: (_TX,), SESSION: ("business_id", _TX)}  # the latter for `backfill --own-session`


@dataclass(frozen=True, slots=True)
class Recipe:
    """The columns of a row's hash, and the algorithm, as expand recorded them."""

    columns: tuple[str, ...]
    algorithm: str

    @classmethod
    def of(cls, details: Mapping[str, Any]) -> Recipe:
        """The recipe of the recorded checksums, from expand's details."""
        return cls(tuple(details["columns"]), details.get("algorithm", MD5))

    @property
    def row(self) -> str:
        """SQL for a row as bytes."""
        # QUOTE tells NULL from 'NULL', and marks where a column ends, whatever the columns hold.
        return f"CONCAT_WS(',', {', '.join(f'CAST(QUOTE({_value(name)}) AS BINARY)' for name in self.columns)})"


def _value(column: str) -> str:
    """SQL for a column's value; in the two new columns NULL also where the value is the one of the guide's rules."""
    if column not in _BY_RULE:
        return quoted(column)
    is_missing = is_by_rule(column)
    if column == KEY:  # or a key that a rollback has put aside, and a backfill restores
        is_missing += (
            f" OR EXISTS (SELECT 1 FROM legacy_migration_keys AS kept WHERE kept.transaction_id = "
            f"{LEDGER}.transaction_id AND CAST(kept.{KEY} AS BINARY) = CAST(CONVERT({LEDGER}.{KEY} USING utf8mb4) "
            "AS BINARY))"
        )
    # In UTF-8, as contract may give the column another character set.
    return f"IF({is_missing}, NULL, CONVERT({quoted(column)} USING utf8mb4))"


def is_by_rule(column: str) -> str:
    """SQL for whether one of the two new columns holds the value of the guide's rules, byte by byte."""
    value, *given = [f"CAST(CONVERT({it} USING utf8mb4) AS BINARY)" for it in (quoted(column), *_BY_RULE[column])]
    return f"({' OR '.join(f'{value} = {it}' for it in given)})"


def checksum(connection: Connection, recipe: Recipe, first_id: int, last_id: int) -> tuple[int, str]:
    """The number of rows from `first_id` to `last_id`, and their checksum."""
    of_rows = f"FROM {LEDGER} WHERE transaction_id BETWEEN :first AND :last"
    here = {"first": first_id, "last": last_id}
    if recipe.algorithm == MD5:
        # Not every server has MD5 any more: the first release's checksums are recomputed in Python.
        rows = [bytes(it) for it in connection.execute(text(f"SELECT {recipe.row} {of_rows}"), here).scalars()]
        hashes = (int.from_bytes(hashlib.md5(row, usedforsecurity=False).digest()) for row in rows)
        return len(rows), f"{reduce(xor, hashes, 0):0{HASH_HEX_DIGITS}x}"
    halves = [f"COALESCE(BIT_XOR(CAST(CONV(SUBSTRING(h, {start}, 16), 16, 10) AS UNSIGNED)), 0)" for start in (1, 17)]
    count, left, right = connection.execute(
        text(f"SELECT COUNT(*), {', '.join(halves)} FROM (SELECT SHA2({recipe.row}, 256) AS h {of_rows}) AS hashed"),
        here,
    ).one()
    return int(count), f"{int(left):016x}{int(right):016x}"


def ranges(connection: Connection, after_id: int, last_id: int, size: int = CHUNK_ROWS) -> Iterator[tuple[int, int]]:
    """The primary key after `after_id` up to `last_id`, in ranges that hold `size` existing rows each."""
    first = after_id + 1
    while first <= last_id:
        end = connection.execute(
            text(
                f"SELECT transaction_id FROM {LEDGER} WHERE transaction_id BETWEEN :first AND :last "
                f"ORDER BY transaction_id LIMIT 1 OFFSET {size - 1}"
            ),
            {"first": first, "last": last_id},
        ).scalar()
        upto = last_id if end is None else int(end)
        yield first, upto
        first = upto + 1


def taken_to(connection: Connection) -> int:
    """The highest id up to which checksums are recorded."""
    return int(connection.execute(text("SELECT COALESCE(MAX(last_id), 0) FROM legacy_migration_chunks")).scalar_one())


def take(connection: Connection, details: Mapping[str, Any], last_id: int, on_progress: OnProgress) -> None:
    """Record the checksums up to `last_id`, from where an earlier run ended."""
    recipe = Recipe.of(details)
    for first, upto in ranges(connection, taken_to(connection), last_id):
        rows, value = checksum(connection, recipe, first, upto)
        connection.execute(
            text("INSERT IGNORE INTO legacy_migration_chunks VALUES (:first, :last, :rows, :checksum)"),
            {"first": first, "last": upto, "rows": rows, "checksum": value},
        )
        on_progress("checksums", upto, last_id)
