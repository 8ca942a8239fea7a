"""Ledger rows as their leaves (producers.storage.ledger_leaves), and as sums for the house's accounts."""

from __future__ import annotations

from collections.abc import Collection
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    case,
    func,
    literal,
    literal_column,
    not_,
    or_,
    select,
)

from tombola.producers.domain import draw
from tombola.producers.domain.books import house
from tombola.producers.domain.books.house import Group, Rules
from tombola.producers.storage import ledger_leaves
from tombola.producers.storage.ledger_leaves import Hashed, Range
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.schema import campaign_versions as versions
from tombola.worker.ledger.old_rows import OldRows

# Of the hash of a draw's odds, in hexadecimal digits: as many as notes have of the seed's. Short texts group faster.
ODDS_MARK_LENGTH: Final = 16


def read_leaves(connection: Connection, ids: Range, old: OldRows) -> Hashed:
    """Count and hash the rows in this range (producers.storage.ledger_leaves)."""
    return ledger_leaves.read_leaves(connection, ids, is_old=old is not OldRows.NONE)


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
