"""The head of the chain of blocks: one row, whose lock makes a process the leader of sealing.

`seen` are watermarks: at that time, this was the highest transaction_id that was committed. Ids are given in the order
of inserts, and commits come in any order; so all transactions with an id up to a watermark had begun before its time,
and have ended as soon as the longest transaction of all can have ended since. Times are the database's.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final, NamedTuple

import msgspec
from sqlalchemy import Connection, RowMapping, func, insert, select, update

from tombola.producers.domain.books.merkle import Peaks
from tombola.producers.storage.books import HEAD
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.schema import books_head as table

SEEN_EVERY: Final = timedelta(seconds=2)


class Seen(NamedTuple):
    """A watermark: the highest transaction_id at a time."""

    transaction_id: int
    at: datetime


class Head(NamedTuple):
    """The head's row. `checkpoint` is the last signed head, None where no key signs.

    `anchored_at` is when a checkpoint was last written outside; None for never.
    """

    seen: tuple[Seen, ...] = ()
    peaks: Peaks = Peaks()
    checkpoint: str | None = None
    checkpoint_at: datetime | None = None
    anchored_at: datetime | None = None

    def with_watermark(self, highest: int, now: datetime, after: timedelta) -> Head:
        """This head with what is seen now, without the watermarks that a later one of `after` ago makes superfluous.

        A watermark from the future is the work of a clock that was set back: it counts from now on.
        """
        seen = [it if it.at <= now else it._replace(at=now) for it in self.seen]
        ripe = [it for it in seen if it.at <= now - after]
        seen = [*ripe[-1:], *seen[len(ripe) :]]
        if not seen or (highest > seen[-1].transaction_id and now - seen[-1].at >= SEEN_EVERY):
            seen.append(Seen(highest, now))
        return self._replace(seen=tuple(seen))

    def horizon(self, now: datetime, after: timedelta) -> int:
        """The highest transaction_id such that no transaction with an id up to it can still be open; 0 for none."""
        return max((it.transaction_id for it in self.seen if it.at <= now - after), default=0)


def highest_id(connection: Connection) -> int:
    """The highest transaction_id that is committed; 0 in an empty ledger."""
    return connection.execute(select(func.max(transactions.c.transaction_id))).scalar() or 0


def read(connection: Connection) -> Head:
    """The head, without a lock."""
    row = connection.execute(select(table).where(table.c.name == HEAD)).mappings().first()
    return Head() if row is None else _head(row)


def lock(connection: Connection) -> Head | None:
    """The head, locked until the transaction ends; None while another process is the leader."""
    query = select(table).where(table.c.name == HEAD).with_for_update(skip_locked=True)
    row = connection.execute(query).mappings().first()
    if row is not None:
        return _head(row)
    if connection.execute(select(table.c.name).where(table.c.name == HEAD)).first() is not None:
        return None
    head = Head()
    connection.execute(insert(table).values(name=HEAD, **_values(head)))  # a second leader's insert is refused
    return head


def write(connection: Connection, head: Head) -> None:
    """Write the locked head."""
    connection.execute(update(table).where(table.c.name == HEAD).values(**_values(head)))


def _values(head: Head) -> dict[str, object]:
    return {
        "seen": msgspec.json.encode(head.seen).decode(),
        "peaks": msgspec.json.encode((head.peaks.size, [it.hex() for it in head.peaks.hashes])).decode(),
        "checkpoint": head.checkpoint,
        "checkpoint_at": head.checkpoint_at,
        "anchored_at": head.anchored_at,
    }


def _head(row: RowMapping) -> Head:
    size, hashes = msgspec.json.decode(row["peaks"], type=tuple[int, list[str]])
    return Head(
        msgspec.json.decode(row["seen"], type=tuple[Seen, ...]),
        Peaks(size, tuple(map(bytes.fromhex, hashes))),
        row["checkpoint"],
        row["checkpoint_at"],
        row["anchored_at"],
    )
