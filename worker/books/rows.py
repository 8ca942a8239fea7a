"""Ledger rows as their leaves, and as sums for the house's accounts.

On MySQL and MariaDB the server computes the leaves: a block of 16,384 rows arrives as one value of half a megabyte,
where the rows themselves would take Python ten times as long as settling them did. SQLite has no SHA-256: there the
leaves are computed here. Equal rows have equal leaves on all of them (producers.domain.books.leaves).
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    case,
    func,
    literal,
    literal_column,
    not_,
    select,
    text,
    type_coerce,
)
from sqlalchemy.types import NullType

from tombola.producers.domain.books import house, leaves
from tombola.producers.domain.books.house import Group, Rules
from tombola.producers.domain.books.leaves import FIELDS, LEAF_BYTES
from tombola.producers.domain.errors import InternalError
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.ledger.old_rows import OldRows

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


def read_leaves(connection: Connection, ids: Range) -> Hashed:
    """Count and hash the rows in this range. Beyond ROWS_MAX rows the leaves are cut off."""
    if connection.dialect.name == "sqlite":
        found = [leaves.leaf(list(map(_text, FIELDS, row))) for row in connection.execute(_stored_rows(ids))]
        return Hashed(len(found), b"".join(found))
    connection.execute(text(f"SET SESSION group_concat_max_len = {_CONCAT_BYTES}"))
    count, hashed = connection.execute(_HASHED, {"first": ids.first_id, "last": ids.last_id}).one()
    return Hashed(count, hashed or b"")


def read_groups(connection: Connection, ids: Range, rules: Rules, old: OldRows) -> list[Group]:
    """The sums of the rows in this range, by all that their house account depends on."""
    rows = transactions.c
    has_campaign = rows.business_type.in_(house.campaign_types(rules))
    # Only rows whose account depends on it look up their request: that is a read of an index for each row.
    own_request = and_(requests.c.lottery_session_id == rows.lottery_session_id, has_campaign)
    columns = [
        rows.business_type,
        rows.asset_code,
        func.coalesce(requests.c.campaign, "").label("campaign"),
        _channel(rules).label("channel"),
    ]
    is_old: ColumnElement[bool] = literal_column("0").label("is_old")
    if old is not OldRows.NONE:
        is_old = not_(old.new_rows()).label("is_old")
        columns.append(is_old)  # a constant must not stand in GROUP BY: it would be the number of a column
    query = (
        select(*columns[:4])
        .add_columns(is_old, func.sum(rows.delta_amount), func.count())
        .select_from(transactions.outerjoin(requests, own_request))
        .where(rows.transaction_id.between(*ids))
        .group_by(*columns)
    )
    return [
        Group(business_type, asset_code, campaign, channel, bool(is_old), delta or Decimal(0), count)
        for business_type, asset_code, campaign, channel, is_old, delta, count in connection.execute(query)
    ]


def _channel(rules: Rules) -> ColumnElement[str]:
    """house.channel_of in SQL, cut after one character too many."""
    rows, begin = transactions.c, len(house.CHANNEL_PREFIX) + 1
    length = func.instr(rows.notes + " ", " ") - begin
    word = func.substr(func.substr(rows.notes, begin, length), 1, house.CHANNEL_LENGTH_MAX + 1)
    has_channel = and_(
        rows.business_type.in_(house.channel_types(rules)), rows.notes.startswith(house.CHANNEL_PREFIX, autoescape=True)
    )
    return case((has_channel, word), else_=literal(""))


# ---- leaves ----------------------------------------------------------------------------------------------------------


def _stored_rows(ids: Range) -> Any:
    """The rows as SQLite has them, whatever they hold."""
    columns = [type_coerce(transactions.c[name], NullType()) for name in FIELDS]
    return select(*columns).where(transactions.c.transaction_id.between(*ids)).order_by(transactions.c.transaction_id)


def _text(field: str, value: Any) -> str | None:
    """The text of a field as MySQL prints it. SQLite has amounts in hundredths."""
    if field in leaves.AMOUNTS and isinstance(value, int):
        return f"{Decimal(value).scaleb(-2):.2f}"
    return None if value is None else str(value)


def _printed(field: str) -> str:
    """The SQL of a field in a leaf: its length, a colon and its text.

    The casts change nothing in a ledger that tombola has made. A ledger of old code may have other types.
    """
    if field in leaves.TIMES:
        return f"IFNULL(CONCAT('26:', CAST({field} AS DATETIME(6))), '-')"
    value = field
    if field in leaves.AMOUNTS:
        value = f"CAST({field} AS DECIMAL(20,2))"
    elif field not in leaves.INTEGERS:
        value = f"CONVERT({field} USING utf8mb4)"
    return f"IFNULL(CONCAT(LENGTH({value}), ':', {value}), '-')"


_HASHED: Final = text(
    f"SELECT COUNT(*) AS count, GROUP_CONCAT(UNHEX(SHA2(CONCAT(X'00', {', '.join(map(_printed, FIELDS))}), 256)) "
    "ORDER BY transaction_id SEPARATOR '') AS leaves "
    "FROM asset_transactions WHERE transaction_id BETWEEN :first AND :last"
)
