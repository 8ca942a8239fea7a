"""The parts of an audit: short read-only transactions, each of which sees one moment of the books.

No part sees the whole ledger, so none keeps the server from forgetting old versions of rows for long. What belongs
together (a session and its request; an account, its last rows and its balance) is compared within one part.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

from sqlalchemy import Connection, Engine, func, select

from tombola.producers.storage import clock
from tombola.producers.storage.schema import asset_transactions as transactions

# The longest time from the moment that a transaction notes in its rows to its commit; and another transaction that has
# taken a lower id may have begun as long before.
SETTLING_S_MAX: Final = 60.0
HORIZON_S: Final = 2 * SETTLING_S_MAX


class Parts:
    """Opens the parts of one audit; `longest_s` is how long the longest one was open."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.longest_s = 0.0

    @contextmanager
    def part(self) -> Iterator[Connection]:
        """A read-only transaction, whose statements all see the moment of its first one."""
        began = time.monotonic()
        try:
            with self.engine.connect().execution_options(read_only=True) as connection:
                if self.engine.dialect.name != "sqlite":
                    connection = connection.execution_options(isolation_level="REPEATABLE READ")
                yield connection
        finally:
            self.longest_s = max(self.longest_s, time.monotonic() - began)


def newest_id(connection: Connection) -> int:
    """The id of the newest ledger row; 0 if there is none."""
    return int(connection.execute(select(func.max(transactions.c.transaction_id))).scalar_one() or 0)


def settled_id(connection: Connection, horizon_s: float) -> int:
    """The highest id up to which no row can appear any more: rows are not committed in the order of their ids."""
    if connection.dialect.name == "sqlite":  # one writer at a time
        return newest_id(connection)
    until = clock.now(connection) - timedelta(seconds=horizon_s)
    query = (
        select(transactions.c.transaction_id)
        .where(transactions.c.created_at < until)
        .order_by(transactions.c.transaction_id.desc())
        .limit(1)
    )
    return int(connection.execute(query).scalar() or 0)
