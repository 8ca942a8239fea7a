"""Snapshots: the balances of the accounts that moved, at a block. Taken of the blocks of past days, in UTC.

A statement about an account begins at its last snapshot, and need not add up its rows from the first one on. A night's
snapshot is taken in parts of up to ROWS_MAX ledger rows, each a transaction, and each true by itself: a row says what
the account's balance was after the last block of its part.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final, NamedTuple

from sqlalchemy import Connection, Engine, Insert, func, insert, literal, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.storage import books, clock
from tombola.producers.storage.faults import Fault, explain, fault_of
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.schema import books_snapshots as table
from tombola.worker.books import head as heads

ROWS_MAX: Final = 200_000
BLOCKS_AT_ONCE: Final = 500


class _Part(NamedTuple):
    """Blocks whose rows become one part of a snapshot; `block` is the last one."""

    first_id: int
    last_id: int
    block: int


def take_once(engine: Engine) -> bool:
    """Take the next part of a snapshot, if blocks of past days have none; whether one was taken.

    Does nothing while another process seals or takes one. Raises ServiceUnavailable or ConfigurationError when the
    database cannot be used.
    """
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            if _next_part(connection) is None:
                return False
        with engine.begin() as connection:
            if heads.lock(connection) is None or (part := _next_part(connection)) is None:
                return False
            connection.execute(_insert(part))
            return True
    except SQLAlchemyError as error:
        if fault_of(error) is Fault.CONFLICT:
            return False
        raise explain(error) from error


def _next_part(connection: Connection) -> _Part | None:
    midnight: datetime = clock.now(connection).replace(hour=0, minute=0, second=0, microsecond=0)
    last: int = connection.execute(select(func.max(table.c.block))).scalar() or 0
    some = [it for it in books.sealed_from(connection, last + 1, rows_max=BLOCKS_AT_ONCE) if it.sealed_at < midnight]
    if not some:
        return None
    count, end = 0, 0
    for end, it in enumerate(some, 1):  # noqa: B007 - the number of blocks that are taken
        count += it.block.row_count
        if count >= ROWS_MAX:
            break
    return _Part(some[0].block.first_id, some[end - 1].block.last_id, some[end - 1].block.number)


def _insert(part: _Part) -> Insert:
    last = (
        select(func.max(transactions.c.transaction_id).label("transaction_id"))
        .where(transactions.c.transaction_id.between(part.first_id, part.last_id))
        .group_by(transactions.c.account_id)
        .subquery()
    )
    rows = select(
        transactions.c.account_id, literal(part.block), transactions.c.transaction_id, transactions.c.balance_after
    ).join(last, last.c.transaction_id == transactions.c.transaction_id)
    return insert(table).from_select(["account_id", "block", "transaction_id", "balance"], rows)
