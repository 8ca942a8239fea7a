"""How the sealed books stand: for gauges, the doctor and the console."""

from __future__ import annotations

from datetime import datetime
from typing import Final, NamedTuple

from sqlalchemy import Connection, select

from tombola.producers.domain.books import checkpoints
from tombola.producers.storage import books, clock
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.books import head as heads
from tombola.worker.books.sealing import FIRST_ID
from tombola.worker.ledger.old_rows import may_still_change

# A row waits for a minute by default (TOMBOLA_SEAL_AFTER_S), and for the next blocks.
LAG_S_MAX: Final = 300.0


class Standing(NamedTuple):
    """`blocks` is the number of the last block. `lag_s` is the age of the oldest row that is not sealed, 0 for none.

    In a legacy ledger nothing lags before the contract step.

    `signed` is the number of blocks in the last checkpoint, 0 for none; `anchored_at` is when one was last written
    outside.
    """

    blocks: int = 0
    sealed_at: datetime | None = None
    lag_s: float = 0.0
    signed: int = 0
    signed_at: datetime | None = None
    anchored_at: datetime | None = None


def standing(connection: Connection) -> Standing:
    """How the books stand now."""
    last, head = books.last_sealed(connection), heads.read(connection)
    last_id = FIRST_ID - 1 if last is None else last.block.last_id
    query = (
        select(transactions.c.created_at)
        .where(transactions.c.transaction_id > last_id)
        .order_by(transactions.c.transaction_id)
        .limit(1)
    )
    oldest = None if may_still_change(connection) else connection.execute(query).scalar()
    return Standing(
        blocks=0 if last is None else last.block.number,
        sealed_at=None if last is None else last.sealed_at,
        lag_s=0.0 if oldest is None else max(0.0, (clock.now(connection) - oldest).total_seconds()),
        signed=0 if head.checkpoint is None else checkpoints.read_unverified(head.checkpoint).size,
        signed_at=head.checkpoint_at,
        anchored_at=head.anchored_at,
    )
