"""Proof that nothing else has changed: checksums of every untouched column, by ranges of the primary key.

A chunk's checksum is the XOR of its rows' hashes, of all old columns with their id among them. Which rows a chunk has
is settled when it is taken: an ALTER waits until every transaction on the table has ended, so that up to the highest id
that was seen *before* it no row can appear any more. Later rows go into later chunks, after the next ALTER.

Where a table had one of our two columns before, the steps only fill what was missing in it. So a value that the guide's
rules give counts as missing: whatever else stands there is under the checksum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import xor
from typing import Any, Final

from sqlalchemy import Connection, text

from tombola.migrations.legacy.session import Tell
from tombola.migrations.legacy.tables import KEY, LEDGER, SESSION, quoted

CHUNK_ROWS: Final = 5000
ALGORITHM: Final = "sha256"
MD5: Final = "md5"  # of the first release, whose records do not name it
HASH_HEX_DIGITS: Final = 32

_TX: Final = "CONCAT('tx_', transaction_id)"
_BY_RULE: Final = {KEY: (_TX,), SESSION: ("business_id", _TX)}  # the latter for `backfill --own-session`


@dataclass(frozen=True, slots=True)
class Recipe:
    """What goes into a row's hash, and by which algorithm: as expand put it on record."""

    columns: tuple[str, ...]
    algorithm: str

    @classmethod
    def of(cls, details: Mapping[str, Any]) -> Recipe:
        """That of the checksums on record, from expand's details."""
        return cls(tuple(details["columns"]), details.get("algorithm", MD5))

    @property
    def row(self) -> str:
        """SQL for a row as bytes."""
        # QUOTE tells NULL from 'NULL' and one column's end from the next one's beginning, whatever is in them.
        return f"CONCAT_WS(',', {', '.join(f'CAST(QUOTE({_value(name)}) AS BINARY)' for name in self.columns)})"


def _value(column: str) -> str:
    """SQL for a column's value; of one of our two, NULL also where it is what the guide's rules give."""
    if column not in _BY_RULE:
        return quoted(column)
    is_missing = is_by_rule(column)
    if column == KEY:  # or what a rollback has put aside: it comes back
        is_missing += (
            f" OR EXISTS (SELECT 1 FROM legacy_migration_keys AS kept WHERE kept.transaction_id = "
            f"{LEDGER}.transaction_id AND CAST(kept.{KEY} AS BINARY) = CAST(CONVERT({LEDGER}.{KEY} USING utf8mb4) "
            "AS BINARY))"
        )
    # In UTF-8, as contract may give the column another character set.
    return f"IF({is_missing}, NULL, CONVERT({quoted(column)} USING utf8mb4))"


def is_by_rule(column: str) -> str:
    """SQL for whether one of our two columns holds what the guide's rules give, byte by byte."""
    value, *given = [f"CAST(CONVERT({it} USING utf8mb4) AS BINARY)" for it in (quoted(column), *_BY_RULE[column])]
    return f"({' OR '.join(f'{value} = {it}' for it in given)})"


def checksum(connection: Connection, recipe: Recipe, first_id: int, last_id: int) -> tuple[int, str]:
    """How many rows there are from `first_id` to `last_id`, and their checksum."""
    of_rows = f"FROM {LEDGER} WHERE transaction_id BETWEEN :first AND :last"
    here = {"first": first_id, "last": last_id}
    if recipe.algorithm == MD5:
        # Not every server has it any more: what the first release put on record is compared here.
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
    """The primary key from after `after_id` to `last_id` in ranges of `size` rows that are there."""
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
    """Up to which id the checksums before are on record."""
    return int(connection.execute(text("SELECT COALESCE(MAX(last_id), 0) FROM legacy_migration_chunks")).scalar_one())


def take(connection: Connection, details: Mapping[str, Any], last_id: int, tell: Tell) -> None:
    """Put the checksums up to `last_id` on record, from where an earlier run ended."""
    recipe = Recipe.of(details)
    for first, upto in ranges(connection, taken_to(connection), last_id):
        rows, value = checksum(connection, recipe, first, upto)
        connection.execute(
            text("INSERT IGNORE INTO legacy_migration_chunks VALUES (:first, :last, :rows, :checksum)"),
            {"first": first, "last": upto, "rows": rows, "checksum": value},
        )
        tell("checksums", upto, last_id)
