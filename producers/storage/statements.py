"""An account's history in pages, and the statement of a period.

An account's rows are read in the order in which they were posted. Under the account's lock `transaction_id` rises in
the order of the chain of balances, and a row with a lower id never comes later: a page stays as it was read. The time
of a row is not in that order to the second, as a batch reads the clock before it waits for locks. So a period is a
stretch of the chain: from the first row at or after its beginning, until before the first row at or after its end.
Statements of adjoining periods meet at one row, and add up whatever is posted meanwhile.

The index on (account_id, created_at) also holds transaction_id: ids are found in it alone, without reading a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, func, null, select

from tombola.producers.storage import clock
from tombola.producers.storage.ledger import with_key
from tombola.producers.storage.schema import asset_transactions as table

# A row may be posted so long after the time that it bears: the longest that a transaction of tombola can last.
LATE_MAX: Final = timedelta(seconds=60)


class Statement(NamedTuple):
    """What an account held before and after a period, and where the period's rows are: in [first_id, end_id).

    `is_final` says that the period is so long over that no row can join it.
    """

    opening: Decimal
    closing: Decimal
    first_id: int
    end_id: int
    is_final: bool


def statement(connection: Connection, account_id: int, since: datetime, until: datetime | None) -> Statement:
    """The statement of an account from `since` until before `until`, by default up to now."""
    begin, end = _boundaries(connection, account_id, since, until)
    is_final = until is not None and clock.now(connection) > until + LATE_MAX
    return Statement(begin.balance, end.balance, begin.row_id, end.row_id, is_final)


def rows(
    connection: Connection, account_id: int, *, after_id: int = 0, end_id: int | None = None, rows_max: int
) -> list[dict[str, Any]]:
    """Up to `rows_max` of an account's ledger rows behind `after_id`, in their order, by column name."""
    conditions = [table.c.transaction_id > after_id]
    if end_id is not None:
        conditions.append(table.c.transaction_id < end_id)
    return _rows(connection, account_id, conditions, rows_max, newest_first=False)


def newest_rows(
    connection: Connection, account_id: int, *, before_id: int | None = None, rows_max: int
) -> list[dict[str, Any]]:
    """Up to `rows_max` of an account's ledger rows, the newest first; with `before_id` those before it."""
    conditions = [] if before_id is None else [table.c.transaction_id < before_id]
    return _rows(connection, account_id, conditions, rows_max, newest_first=True)


def _rows(
    connection: Connection, account_id: int, conditions: list[ColumnElement[bool]], rows_max: int, *, newest_first: bool
) -> list[dict[str, Any]]:
    # The sum keeps the database from walking the primary key, in search of the few rows of this account.
    order = table.c.transaction_id + 0
    ids = (
        select(table.c.transaction_id)
        .where(table.c.account_id == account_id, *conditions)
        .order_by(order.desc() if newest_first else order)
        .limit(rows_max)
        .subquery()
    )
    found = connection.execute(select(table).join(ids, ids.c.transaction_id == table.c.transaction_id)).mappings()
    return sorted((with_key(dict(it)) for it in found), key=lambda it: it["transaction_id"], reverse=newest_first)


class _Boundary(NamedTuple):
    """Where a period begins or ends: the id of its first row, or of the first row after it; the balance before it."""

    row_id: int
    balance: Decimal


def _boundaries(
    connection: Connection, account_id: int, since: datetime, until: datetime | None
) -> tuple[_Boundary, _Boundary]:
    """The rows at or after these moments; without such a row, or without a moment, what is behind the last row.

    One statement finds all ids: each statement sees the rows of its own moment, and rows are posted meanwhile.
    """
    mine, row_id = table.c.account_id == account_id, table.c.transaction_id

    def first(moment: datetime | None) -> ColumnElement[Any]:
        if moment is None:
            return null()
        return select(func.min(row_id)).where(mine, table.c.created_at >= moment).scalar_subquery()

    last_of_all = select(func.max(row_id)).where(mine).scalar_subquery()
    begin_id, end_id, last_id = connection.execute(select(first(since), first(until), last_of_all)).one()
    query = select(row_id, table.c.balance_before, table.c.balance_after)
    found = {it.transaction_id: it for it in connection.execute(query.where(row_id.in_({begin_id, end_id, last_id})))}

    def boundary(id: int | None) -> _Boundary:
        if id is not None:
            return _Boundary(id, found[id].balance_before)
        if last_id is None:
            return _Boundary(1, Decimal("0.00"))
        return _Boundary(last_id + 1, found[last_id].balance_after)

    return boundary(begin_id), boundary(end_id)


def session_of(row: Mapping[str, Any]) -> str:
    """The lottery session of a ledger row; in a legacy ledger that the backfill has not reached, its business id."""
    return str(row["lottery_session_id"] or row["business_id"])
