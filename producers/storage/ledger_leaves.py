"""Ledger rows as their leaves (producers.domain.books.leaves).

On MySQL and MariaDB the server computes the leaves: a block of 16,384 rows arrives as one value of half a megabyte,
where the rows themselves would take Python ten times as long as settling them did. SQLite has no SHA-256: there the
leaves are computed here. Equal rows have equal leaves on all of them.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, TextClause, select, text, type_coerce
from sqlalchemy.types import NullType

from tombola.producers.domain.books import leaves, merkle
from tombola.producers.domain.books.leaves import FIELDS, LEAF_BYTES
from tombola.producers.domain.errors import InternalError
from tombola.producers.storage.schema import asset_transactions as transactions

# At once: their leaves are 512 KiB, which every server's max_allowed_packet lets through.
ROWS_MAX: Final = 16_384
_CONCAT_BYTES: Final = ROWS_MAX * LEAF_BYTES


class Range(NamedTuple):
    """The ledger rows from `first_id` to `last_id`, both included."""

    first_id: int
    last_id: int


class Hashed(NamedTuple):
    """The number of rows in a range, and their leaves by transaction_id, concatenated."""

    row_count: int
    leaves: bytes

    def whole(self) -> bytes:
        """The leaves; raises InternalError where the server has returned less than it hashed."""
        if len(self.leaves) != self.row_count * LEAF_BYTES:
            raise InternalError(
                f"the database returns {len(self.leaves):,} bytes of the leaves of {self.row_count:,} rows: is "
                f"max_allowed_packet less than {_CONCAT_BYTES:,}?"
            )
        return self.leaves

    def split(self) -> list[bytes]:
        """Each leaf by itself; raises as `whole` does."""
        return merkle.split(self.whole())


def read_leaves(connection: Connection, ids: Range, *, is_old: bool = True) -> Hashed:
    """Count and hash the rows in this range. Beyond ROWS_MAX rows the leaves are cut off.

    `is_old` says that old code may have written some, with columns of other types; without, the server is faster.
    """
    if connection.dialect.name == "sqlite":
        found = [leaves.leaf(list(map(_text, FIELDS, row))) for row in connection.execute(_stored_rows(ids))]
        return Hashed(len(found), b"".join(found))
    connection.execute(text(f"SET SESSION group_concat_max_len = {_CONCAT_BYTES}"))
    query = _HASHED_OLD if is_old else _HASHED
    count, hashed = connection.execute(query, {"first": ids.first_id, "last": ids.last_id}).one()
    return Hashed(count, hashed or b"")


def _stored_rows(ids: Range) -> Any:
    """The rows as SQLite has them, whatever they hold."""
    columns = [type_coerce(transactions.c[name], NullType()) for name in FIELDS]
    return select(*columns).where(transactions.c.transaction_id.between(*ids)).order_by(transactions.c.transaction_id)


def _text(field: str, value: Any) -> str | None:
    """The text of a field as MySQL prints it. SQLite has amounts in hundredths."""
    if field in leaves.AMOUNTS and isinstance(value, int):
        return f"{Decimal(value).scaleb(-2):.2f}"
    return None if value is None else str(value)


def _printed(field: str, *, is_old: bool) -> list[str]:
    """The SQL of a field in a leaf, as arguments of CONCAT_WS. Of our columns only notes may be NULL.

    In a ledger of old code, any column may be NULL or of another type.
    """
    value = field
    if is_old and field in leaves.TIMES:
        value = f"CAST({field} AS DATETIME(6))"
    elif is_old and field in leaves.AMOUNTS:
        value = f"CAST({field} AS DECIMAL(20,2))"
    elif is_old and field in leaves.TEXTS:
        value = f"CONVERT({field} USING utf8mb4)"
    has_null = is_old or field == "notes"
    printed = f"IFNULL({value}, '')" if has_null else value
    if field in leaves.NUMBERS:
        return [printed]
    return [f"IFNULL(LENGTH({value}), '-')" if has_null else f"LENGTH({value})", printed]


def _hashing(*, is_old: bool) -> TextClause:
    printed = [it for field in FIELDS for it in _printed(field, is_old=is_old)]
    # The separator and the prefix are binary, so that no argument is converted.
    return text(
        f"SELECT COUNT(*), GROUP_CONCAT(UNHEX(SHA2(CONCAT_WS(X'7c', X'00', {', '.join(printed)}), 256)) "
        "ORDER BY transaction_id SEPARATOR '') "
        "FROM asset_transactions WHERE transaction_id BETWEEN :first AND :last"
    )


_HASHED: Final = _hashing(is_old=False)
_HASHED_OLD: Final = _hashing(is_old=True)
