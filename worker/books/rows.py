"""Ledger rows as their leaves, and as sums for the house's accounts.

On MySQL and MariaDB the server computes the leaves: a block of 16,384 rows arrives as one value of half a megabyte,
where the rows themselves would take Python ten times as long as settling them did. SQLite has no SHA-256: there the
leaves are computed here. Equal rows have equal leaves on all of them (producers.domain.books.leaves).
"""

from __future__ import annotations

from collections.abc import Collection
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    TextClause,
    and_,
    case,
    func,
    literal,
    literal_column,
    not_,
    or_,
    select,
    text,
    type_coerce,
)
from sqlalchemy.types import NullType

from tombola.producers.domain import draw
from tombola.producers.domain.books import house, leaves
from tombola.producers.domain.books.house import Group, Rules
from tombola.producers.domain.books.leaves import FIELDS, LEAF_BYTES
from tombola.producers.domain.errors import InternalError
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.schema import campaign_versions as versions
from tombola.worker.ledger.old_rows import OldRows

# At once: their leaves are 512 KiB, which every server's max_allowed_packet lets through.
ROWS_MAX: Final = 16_384
# Of the hash of a draw's odds, in hexadecimal digits: as many as notes have of the seed's. Short texts group faster.
ODDS_MARK_LENGTH: Final = 16
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


def read_leaves(connection: Connection, ids: Range, old: OldRows) -> Hashed:
    """Count and hash the rows in this range. Beyond ROWS_MAX rows the leaves are cut off."""
    if connection.dialect.name == "sqlite":
        found = [leaves.leaf(list(map(_text, FIELDS, row))) for row in connection.execute(_stored_rows(ids))]
        return Hashed(len(found), b"".join(found))
    connection.execute(text(f"SET SESSION group_concat_max_len = {_CONCAT_BYTES}"))
    query = _HASHED if old is OldRows.NONE else _HASHED_OLD
    count, hashed = connection.execute(query, {"first": ids.first_id, "last": ids.last_id}).one()
    return Hashed(count, hashed or b"")


# ---- sums ------------------------------------------------------------------------------------------------------------


def read_groups(connection: Connection, ids: Range, rules: Rules, old: OldRows) -> list[Group]:
    """The sums of the rows in this range, by all that their house account depends on.

    The rows of a draw name its odds, and so its campaign. Other rows that belong to a campaign, such as refunds, are
    looked up in their requests: that takes three times as long for a row as all the rest of its sum.
    """
    table = transactions.c
    mark = _mark(rules).label("mark")
    is_old = literal_column("0") if old is OldRows.NONE else not_(old.new_rows())
    by: list[ColumnElement[Any]] = [table.business_type, table.asset_code, literal_column("mark")]
    if old is not OldRows.NONE:
        by.append(is_old)  # a constant must not stand in GROUP BY: it would be the number of a column
    query = (
        select(table.business_type, table.asset_code, mark, is_old)
        .add_columns(func.sum(table.delta_amount), func.count())
        .where(table.transaction_id.between(*ids))
        .group_by(*by)
    )
    belong, groups, is_complete = set(house.campaign_types(rules)), [], True
    for business_type, asset_code, marked, was_old, delta, count in connection.execute(query):
        group = Group(business_type, asset_code, "", "", bool(was_old), delta or Decimal(0), count)
        if business_type not in belong:
            groups.append(group._replace(channel=marked))
        elif marked:
            groups.append(group._replace(campaign=_campaign(connection, marked)))
        elif was_old:
            groups.append(group)
        else:
            is_complete = False
    return groups if is_complete else groups + _groups_by_request(connection, ids, belong, old)


def _mark(rules: Rules) -> ColumnElement[str]:
    """The beginning of the odds' hash in the notes of a draw; else the channel, for rows with one; else nothing.

    A channel is cut after one character too many.
    """
    notes, begin = transactions.c.notes, len(house.CHANNEL_PREFIX) + 1
    word = func.substr(notes, begin, func.instr(notes + " ", " ") - begin)
    has_channel = and_(
        transactions.c.business_type.in_(house.channel_types(rules)), notes.like(f"{house.CHANNEL_PREFIX}%")
    )
    return case(
        (notes.like(f"{draw.NOTES_PREFIX}%"), func.substr(notes, len(draw.NOTES_PREFIX) + 1, ODDS_MARK_LENGTH)),
        (has_channel, func.substr(word, 1, house.CHANNEL_LENGTH_MAX + 1)),
        else_=literal(""),
    )


def _campaign(connection: Connection, mark: str) -> str:
    """The campaign whose odds have a hash that begins so; empty for odds that are unknown (I2 says so)."""
    for campaign in draw.CAMPAIGNS.values():
        if campaign.odds_hash.startswith(mark):
            return campaign.name
    query = select(versions.c.campaign).where(versions.c.odds_hash.startswith(mark, autoescape=True)).limit(1)
    return connection.execute(query).scalar() or ""


def _groups_by_request(connection: Connection, ids: Range, types: Collection[str], old: OldRows) -> list[Group]:
    """The sums of the rows of these types that name no odds, by the campaigns of their requests."""
    table = transactions.c
    by = (table.business_type, table.asset_code, func.coalesce(requests.c.campaign, ""))
    query = (
        select(*by)
        .add_columns(func.sum(table.delta_amount), func.count())
        .select_from(transactions.outerjoin(requests, requests.c.lottery_session_id == table.lottery_session_id))
        .where(
            table.transaction_id.between(*ids),
            table.business_type.in_(sorted(types)),
            or_(table.notes.is_(None), not_(table.notes.like(f"{draw.NOTES_PREFIX}%"))),
            old.new_rows(),
        )
        .group_by(*by)
    )
    return [
        Group(business_type, asset_code, campaign, "", False, delta or Decimal(0), count)
        for business_type, asset_code, campaign, delta, count in connection.execute(query)
    ]


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
