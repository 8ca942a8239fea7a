"""Ids that run out: an INT ends at 2,147,483,647; the rate of new rows tells on which day."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, text

from tombola.migrations.legacy.tables import ACCOUNTS, LEDGER, Definition
from tombola.producers.storage.clock import utc_now

BITS: Final = {"tinyint": 8, "smallint": 16, "mediumint": 24, "int": 32, "integer": 32}  # a BIGINT lasts
IDS: Final = {LEDGER: "transaction_id", ACCOUNTS: "id"}
YEARS_MAX: Final = 25
SHARE_MAX: Final = 0.8
CURE: Final = (
    "make it a BIGINT before that, with all columns that refer to it: the server copies the table, so begin in time. "
    "After the last number no row can be inserted"
)


def warnings(connection: Connection, table: Definition) -> Iterator[tuple[str, int]]:
    """A warning about a table's id, with the highest id, if it runs out within YEARS_MAX or is above SHARE_MAX."""
    column = table.columns.get(IDS[table.name])
    if column is None or column.kind not in BITS:
        return
    last = 2 ** (BITS[column.kind] - ("unsigned" not in column.type)) - 1
    counter = re.search(r" AUTO_INCREMENT=(\d+)", table.sql)
    highest = max(_highest(connection, table), int(counter[1]) - 1 if counter else 0)
    per_day = _per_day(connection, table)
    days = (last - highest) / per_day if per_day else None
    if days is not None and days <= YEARS_MAX * 365:
        when = f"at {per_day:,.0f} a day the last one is taken on {utc_now() + timedelta(days=days):%Y-%m-%d}"
    elif highest > SHARE_MAX * last:
        when = "their times do not say when it ends" if days is None else f"some {days / 365:,.0f} years are left"
    else:
        return
    yield f"{table.name}.{column.name} is {column.type}: {highest:,} of {last:,} numbers are taken, {when}", highest


def _highest(connection: Connection, table: Definition) -> int:
    found = connection.execute(text(f"SELECT COALESCE(MAX({IDS[table.name]}), 0) FROM {table.name}"))
    return int(found.scalar_one())


def _per_day(connection: Connection, table: Definition) -> float | None:
    """New ids per day, over all rows or over their last tenth, whichever is more; None without usable times."""
    if "created_at" not in table.columns:
        return None
    highest, column = _highest(connection, table), IDS[table.name]
    lowest = connection.execute(text(f"SELECT COALESCE(MIN({column}), 0) FROM {table.name}")).scalar_one()
    marks = [
        connection.execute(
            text(f"SELECT {column}, created_at FROM {table.name} WHERE {column} <= :at ORDER BY {column} DESC LIMIT 1"),
            {"at": at},
        ).first()
        for at in (lowest, highest - (highest - lowest) // 10, highest)
    ]
    timed = [(int(it[0]), it[1]) for it in marks if it is not None and isinstance(it[1], datetime)]
    # The rate of the first nine tenths alone is out of date.
    spans = [(timed[0], timed[-1]), (timed[-2], timed[-1])] if len(timed) > 1 else []
    rates = [
        (upper - lower) / ((until - since) / timedelta(days=1))
        for (lower, since), (upper, until) in spans
        if upper > lower and until > since
    ]
    return max(rates, default=None)
