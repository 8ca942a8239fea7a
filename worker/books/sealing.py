"""Sealing: ledger rows below the horizon become a block, which names its rows' Merkle root and the block before.

    lock the head ─► find the range ─► the server hashes its rows ─► root, sums ─► insert block ─► commit

A row below the horizon can neither appear nor change any more: its transaction has ended, and the ledger's rows are
never changed. So sealing takes no lock that a draw needs, and nothing is added to a draw's path. Any number of
processes may seal at once: the lock of the head makes one of them the leader, and the others go on without waiting.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final, NamedTuple

from sqlalchemy import Connection, Engine, insert, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain import operations
from tombola.producers.domain.books import house as house_side
from tombola.producers.domain.books import merkle
from tombola.producers.domain.books.blocks import NO_BLOCK, Block, read_sums, written_sums
from tombola.producers.domain.books.house import Rules
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN
from tombola.producers.domain.errors import DrawError
from tombola.producers.storage import books, clock
from tombola.producers.storage.books import Sealed
from tombola.producers.storage.faults import Fault, explain, fault_of
from tombola.producers.storage.ledger_leaves import ROWS_MAX, Range
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.schema import books_blocks, books_house
from tombola.worker.books import head as heads
from tombola.worker.books import rows
from tombola.worker.books.head import Head
from tombola.worker.ledger.old_rows import OldRows, may_still_change

log = logging.getLogger(__name__)

# One file holds an SQLite ledger, with one writer at a time: while a block is sealed, draws wait.
SQLITE_ROWS_MAX: Final = 4096
# A block ends between two sessions, so that all rows of a request are in one block: it is looked for in so many rows.
SESSION_ROWS_MAX: Final = 64
FIRST_ID: Final = 1


class Step(NamedTuple):
    """What one transaction of sealing did: the block that it sealed, None for none; whether there is more to seal."""

    block: Block | None = None
    is_more: bool = False


IDLE: Final = Step()


class ChainBroken(DrawError):
    """The blocks are not the ones that the head has seen."""


def seal(
    engine: Engine,
    *,
    after_s: float,
    time_s_max: float | None = None,
    rules: Rules | None = None,
    on_block: Callable[[Block], None] = lambda _block: None,
) -> int:
    """Seal blocks until nothing is left below the horizon, or `time_s_max` is over; return how many rows were sealed.

    `after_s` is how long the longest transaction that writes to the ledger can last. Does nothing while another process
    is the leader, and in a legacy ledger before its contract step: until then its rows may change. Raises ChainBroken,
    ServiceUnavailable, ConfigurationError or InternalError.
    """
    began, sealed = time.monotonic(), 0
    while True:
        step = seal_once(engine, after_s=after_s, rules=rules)
        if step.block is not None:
            sealed += step.block.row_count
            on_block(step.block)
        if not step.is_more or (time_s_max is not None and time.monotonic() - began >= time_s_max):
            return sealed


def seal_once(engine: Engine, *, after_s: float, rules: Rules | None = None, rows_max: int = ROWS_MAX) -> Step:
    """Seal at most one block, in a transaction of its own. Raises as `seal` does."""
    rules = operations.house_accounts() if rules is None else rules
    after = timedelta(seconds=after_s)
    if engine.dialect.name == "sqlite":
        rows_max = min(rows_max, SQLITE_ROWS_MAX)
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            if not _is_due(connection, after):
                return IDLE
        with engine.begin() as connection:
            head = heads.lock(connection)
            if head is None or may_still_change(connection):
                return IDLE
            return _seal_next(connection, head, after, rules, rows_max)
    except SQLAlchemyError as error:
        if fault_of(error) is Fault.CONFLICT:  # another leader was faster
            return IDLE
        raise explain(error) from error


def _is_due(connection: Connection, after: timedelta) -> bool:
    """Whether there is a block to seal, or a watermark to write: an idle ledger costs three reads, and no write."""
    head, now, highest = heads.read(connection), clock.now(connection), heads.highest_id(connection)
    seen = head.with_watermark(highest, now, after)
    if highest and seen.seen[-1:] != head.seen[-1:]:
        return True
    return _horizon(connection, head, after, highest) >= _next_id(books.last_sealed(connection))


def _horizon(connection: Connection, head: Head, after: timedelta, highest: int) -> int:
    # SQLite has one writer at a time: a row that is committed has no open transaction before it.
    return highest if connection.dialect.name == "sqlite" else head.horizon(clock.now(connection), after)


def _next_id(last: Sealed | None) -> int:
    return FIRST_ID if last is None else last.block.last_id + 1


def _seal_next(connection: Connection, head: Head, after: timedelta, rules: Rules, rows_max: int) -> Step:
    last, now, highest = books.last_sealed(connection), clock.now(connection), heads.highest_id(connection)
    if (number := 0 if last is None else last.block.number) != head.peaks.size:
        raise ChainBroken(
            f"the last block is {number:,}, and {head.peaks.size:,} were sealed: nothing is sealed before "
            "`tombola books verify` tells what happened"
        )
    head = head.with_watermark(highest, now, after)
    horizon = _horizon(connection, head, after, highest)
    ids = _next_range(connection, Range(_next_id(last), horizon), rows_max)
    block = None if ids.last_id < ids.first_id else _block_of(connection, ids, last, rules)
    if block is not None:
        _write(connection, block)
        head = head._replace(peaks=head.peaks.append(bytes.fromhex(block.hash)))
    heads.write(connection, head)
    return Step(block, is_more=block is not None and ids.last_id < horizon)


def _next_range(connection: Connection, ripe: Range, rows_max: int) -> Range:
    """The beginning of this range that has at most `rows_max` rows, and ends between two sessions where it can."""
    if ripe.last_id - ripe.first_id < rows_max:
        return ripe
    tail = min(SESSION_ROWS_MAX, rows_max)
    query = (
        select(transactions.c.transaction_id, transactions.c.lottery_session_id)
        .where(transactions.c.transaction_id.between(*ripe))
        .order_by(transactions.c.transaction_id)
        .offset(rows_max - tail)
        .limit(tail + 1)
    )
    found = connection.execute(query).all()
    if len(found) <= tail:
        return ripe
    cut = next((at for at in range(tail, 0, -1) if found[at][1] != found[at - 1][1]), tail)
    return Range(ripe.first_id, found[cut - 1][0])


def _block_of(connection: Connection, ids: Range, last: Sealed | None, rules: Rules) -> Block | None:
    """The block of these rows; None for a range of gaps alone, which becomes part of the next block."""
    old = OldRows.of(connection)
    leaves = rows.read_leaves(connection, ids, old).whole()
    if not leaves:
        return None
    groups = rows.read_groups(connection, ids, rules, old)
    return Block(
        number=1 if last is None else last.block.number + 1,
        first_id=ids.first_id,
        last_id=ids.last_id,
        row_count=len(leaves) // merkle.HASH_BYTES,
        root=merkle.root(leaves).hex(),
        sums=written_sums(house_side.sums(groups, rules, DEFAULT_CAMPAIGN.name)),
        previous=NO_BLOCK if last is None else last.hash,
    )


def _write(connection: Connection, block: Block) -> None:
    """Insert the block, and the house accounts that it moves."""
    values = block._asdict() | {"hash": block.hash, "sealed_at": clock.now(connection)}
    connection.execute(insert(books_blocks).values(values))
    moved = read_sums(block.sums)
    if not moved:
        return
    before = books.house_balances(connection)
    connection.execute(
        insert(books_house),
        [
            {
                "block": block.number,
                "account": account,
                "asset_code": asset_code,
                "delta": delta,
                "balance": before.get((account, asset_code), 0) + delta,
            }
            for (account, asset_code), delta in moved.items()
        ],
    )
