"""The units of stocked prizes in one batch: read, taken and written. worker.campaigns.stock says what stock is.

A prize's units stand in up to SHARDS rows. A batch reads the rows without a lock. Where a row has plenty, the batch
takes its units from that row in its last statement: the row is locked only for the commit, and if it has too few by
then, the whole transaction runs again. Where units are scarce, the batch locks one row that has enough; if none has,
or if that row has too few once it is locked, it locks all rows that have units, and then knows exactly what is left.
Locks are taken in the order of the rows' keys, after the locks on accounts.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tombola.producers.domain.campaigns.odds import SHARDS
from tombola.producers.storage.faults import RowsChanged
from tombola.producers.storage.transactions import Transaction
from tombola.worker.campaigns.stock import stock_key


class PrizeName(NamedTuple):
    """A prize of a campaign."""

    campaign: str
    code: str

    @property
    def keys(self) -> list[str]:
        """The keys of all rows that its stock may have."""
        return [stock_key(self.campaign, self.code, shard) for shard in range(SHARDS)]


@dataclass(slots=True)
class _Shelf:
    """The rows of one prize: their units by key, which of them this transaction has in hand, and what it takes."""

    units: dict[str, int] = field(default_factory=dict)
    left: int = 0  # the sum of `units`
    in_hand: int = 0  # the part of it in the rows of `hand`
    hand: set[str] = field(default_factory=set)  # locked, or with plenty
    taken: dict[str, int] = field(default_factory=dict)

    def see(self, key: str, units: int) -> None:
        """A row holds so many units."""
        units -= self.taken.get(key, 0)
        before = self.units.get(key, 0)
        self.left += units - before
        if key in self.hand:
            self.in_hand += units - before
        self.units[key] = units

    def hold(self, key: str) -> None:
        """A row is in hand from now on."""
        if key not in self.hand:
            self.hand.add(key)
            self.in_hand += self.units[key]

    def take(self, units: int, *, is_locking: bool) -> None:
        """Take units from the rows in hand; for a forecast from any."""
        for key in self.hand if is_locking else self.units:
            some = min(units, self.units[key])
            if some:
                self.units[key] -= some
                self.taken[key] = self.taken.get(key, 0) + some
                units -= some
                self.left -= some
                self.in_hand -= some
            if not units:
                return

    def row_with(self, units: int) -> str | None:
        """One of the rows that have so many units; None if no row has."""
        enough = [key for key, held in self.units.items() if held >= units]
        return random.choice(enough) if enough else None

    @property
    def filled(self) -> list[str]:
        """The rows that have units. An empty row is not locked: draws of what is sold out wait for nobody."""
        return [key for key, units in self.units.items() if units]


PLENTY: Final = 20  # times what a batch wants: so many batches would have to come between its read and its commit
_READ: Final = "SELECT stock_key, units FROM campaign_stock WHERE stock_key IN (??)"
_LOCK: Final = f"{_READ} ORDER BY stock_key"


class Units:
    """The stock that one batch has in hand. Without `is_locking` nothing is locked or written: for forecasts."""

    def __init__(self, *, is_locking: bool) -> None:
        self._is_locking = is_locking
        self._shelves: dict[PrizeName, _Shelf] = {}
        self._locked: set[str] = set()

    def reserve(self, transaction: Transaction, wanted: Mapping[PrizeName, int]) -> None:
        """Get rows with so many units of each prize in hand, as far as there are any: one statement, three at most."""
        new = {prize: units for prize, units in wanted.items() if units and prize not in self._shelves}
        self._read(transaction, new)
        scarce: dict[PrizeName, list[str]] = {}
        for prize, units in new.items():
            shelf = self._shelves[prize]
            if (row := shelf.row_with(PLENTY * units)) is not None:
                shelf.hold(row)
            else:
                row = shelf.row_with(units)
                scarce[prize] = shelf.filled if row is None else [row]
        self._lock(transaction, scarce)
        # Another batch took units between the read and the lock: what is left is known only under all locks.
        self._lock(transaction, {it: self._shelves[it].filled for it in new if self._shelves[it].in_hand < new[it]})

    def left(self, transaction: Transaction, prize: PrizeName) -> int:
        """The units that are left: exact once all rows are locked; else as they were read, which `take` finds out."""
        if prize not in self._shelves:
            self._read(transaction, [prize])
            self._lock(transaction, {prize: self._shelves[prize].filled})
        return self._shelves[prize].left

    def take(self, transaction: Transaction, prize: PrizeName, units: int) -> None:
        """Take units. Raises RowsChanged where other batches took them since they were read."""
        shelf = self._shelves[prize]
        if self._is_locking and shelf.in_hand < units:
            self._lock(transaction, {prize: shelf.filled})
        if shelf.left < units:
            raise RowsChanged(f"units of prize {prize.code} were taken by another batch")
        shelf.take(units, is_locking=self._is_locking)

    def write(self, transaction: Transaction) -> None:
        """Take off what was taken, in one statement. Raises RowsChanged where a row has too few by now."""
        rows = [(key, units) for shelf in self._shelves.values() for key, units in shelf.taken.items()]
        transaction.subtract("campaign_stock", "stock_key", "units", sorted(rows))

    def _read(self, transaction: Transaction, prizes: Iterable[PrizeName]) -> None:
        keys = {key: prize for prize in prizes for key in prize.keys}
        if not keys:
            return
        for prize in keys.values():
            self._shelves[prize] = _Shelf()
        for key, units in transaction.select(_READ, [*keys]):
            self._shelves[keys[key]].see(key, units)

    def _lock(self, transaction: Transaction, rows: Mapping[PrizeName, list[str]]) -> None:
        """Lock these rows, and take over what they hold now."""
        keys = {key: prize for prize, some in rows.items() for key in some if key not in self._locked}
        if not keys or not self._is_locking:
            return
        for key, units in transaction.select(_LOCK, sorted(keys), lock=True):
            shelf = self._shelves[keys[key]]
            shelf.see(key, units)
            shelf.hold(key)
            self._locked.add(key)
