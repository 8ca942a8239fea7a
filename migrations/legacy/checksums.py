"""Proof that nothing else has changed: checksums of every untouched column, by ranges of the primary key.

A chunk's checksum is the XOR of its rows' MD5s, of all old columns with their id among them. Which rows a chunk has is
settled when it is taken: an ALTER waits until every transaction on the table has ended, so that up to the highest id
that was seen *before* it no row can appear any more. Later rows go into later chunks, after the next ALTER.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from sqlalchemy import Connection, text

from migrations.legacy.session import Tell
from migrations.legacy.tables import LEDGER, quoted

CHUNK_ROWS: Final = 5000


def checksum(connection: Connection, columns: Sequence[str], first_id: int, last_id: int) -> tuple[int, str]:
    """How many rows there are from `first_id` to `last_id`, and their checksum."""
    # QUOTE tells NULL from 'NULL' and one column's end from the next one's beginning, whatever is in them.
    values = ", ".join(f"CAST(QUOTE({quoted(name)}) AS BINARY)" for name in columns)
    halves = [f"COALESCE(BIT_XOR(CAST(CONV({side}(h, 16), 16, 10) AS UNSIGNED)), 0)" for side in ("LEFT", "RIGHT")]
    rows, left, right = connection.execute(
        text(
            f"SELECT COUNT(*), {', '.join(halves)} FROM (SELECT MD5(CONCAT_WS(',', {values})) AS h FROM {LEDGER} "
            "WHERE transaction_id BETWEEN :first AND :last) AS hashed"
        ),
        {"first": first_id, "last": last_id},
    ).one()
    return int(rows), f"{int(left):016x}{int(right):016x}"


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


def take(connection: Connection, columns: Sequence[str], last_id: int, tell: Tell) -> None:
    """Put the checksums up to `last_id` on record, from where an earlier run ended."""
    for first, upto in ranges(connection, taken_to(connection), last_id):
        rows, value = checksum(connection, columns, first, upto)
        connection.execute(
            text("INSERT IGNORE INTO legacy_migration_chunks VALUES (:first, :last, :rows, :checksum)"),
            {"first": first, "last": upto, "rows": rows, "checksum": value},
        )
        tell("checksums", upto, last_id)
