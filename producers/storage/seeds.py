"""Seed epochs as they are read: which one is open, and what is published of each (producers.domain.seeds).

Every process that accepts or settles draws holds an Epochs, which reads the table at most once in REFRESH_S. So a new
chain is announced a minute before it opens (worker.seeds.chains). Only worker.seeds writes these tables.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from cachetools import LRUCache
from sqlalchemy import Connection, Engine, Select, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.seeds import BEFORE_EPOCHS, EpochName
from tombola.producers.forks import in_child
from tombola.producers.storage import clock
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import seed_chains as chains
from tombola.producers.storage.schema import seed_epochs as table

REFRESH_S: Final = 20.0
STALE_S: Final = 2 * REFRESH_S  # no thread goes on with older knowledge
AROUND: Final = timedelta(days=2)  # kept in memory, before and after now
REMEMBERED_MAX: Final = 1_000
EPOCHS_PER_CHAIN_MAX: Final = 10_000


def id_of(name: EpochName) -> int:
    """The number of an epoch in `seed_epoch` of a request: 10,000 for each chain, and the epoch."""
    return name.chain * EPOCHS_PER_CHAIN_MAX + name.epoch


BEFORE_EPOCHS_ID: Final = id_of(BEFORE_EPOCHS)


class Epoch(NamedTuple):
    """An epoch: draws that are accepted from `opens_at` on, and before `closes_at`, bind to it.

    An epoch whose two times are the same never opens: its chain ended before. `revealed` is the secret, None as long as
    draws may be bound to the epoch. Draws of before the epochs have an epoch without an end while there is no chain.
    """

    id: int
    name: EpochName
    opens_at: datetime
    closes_at: datetime | None
    commitment: str
    revealed: bytes | None = None
    revealed_at: datetime | None = None

    def is_open_at(self, moment: datetime) -> bool:
        """Whether draws that are accepted at `moment` bind to this epoch."""
        return self.opens_at <= moment and (self.closes_at is None or moment < self.closes_at)


class Chain(NamedTuple):
    """A chain of epochs; `anchor` is what all of its secrets hash down to, `seed_id` names its master seed.

    Chain 0 stands for draws of before the epochs: its anchor is the SHA-256 of the seed.
    """

    chain: int
    anchor: bytes
    epochs: int
    seed_id: str
    begun_at: datetime


class _Known(NamedTuple):
    read_at: float  # monotonic
    chains: Mapping[int, Chain]
    around: Sequence[Epoch]


class Epochs:
    """The epochs in a database. Safe to share between threads.

    Every method raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: _Known | None = None
        self._read: LRUCache[int, tuple[float, Epoch]] = LRUCache(REMEMBERED_MAX)
        self._make_lock()
        in_child(self, Epochs._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    def at(self, moment: datetime) -> Epoch | None:
        """The epoch that draws of `moment`, a moment of now, bind to; None where none is open."""
        for epoch in self._fresh().around:
            if epoch.is_open_at(moment):
                return epoch
        return None

    def by_id(self, id: int) -> Epoch | None:
        """The epoch with that number as it stood at most REFRESH_S ago; None for an unknown one."""
        for epoch in self._fresh().around:
            if epoch.id == id:
                return epoch
        with self._lock:
            read_at, found = self._read.get(id, (0.0, None))
        if found is not None and (found.revealed is not None or time.monotonic() < read_at + REFRESH_S):
            return found
        try:
            with self._engine.connect().execution_options(read_only=True) as connection:
                found = by_id(connection, id)
        except SQLAlchemyError as error:
            raise explain(error) from error
        if found is not None:
            with self._lock:
                self._read[id] = (time.monotonic(), found)
        return found

    def chain(self, number: int) -> Chain | None:
        """The chain with that number; None for an unknown one."""
        return self._fresh().chains.get(number)

    @property
    def has_begun(self) -> bool:
        """Whether there is any chain: draws are no longer drawn under the master seed itself."""
        return bool(self._fresh().chains)

    def refresh_now(self) -> None:
        """Read anew at the next call."""
        self._known = None

    def _fresh(self) -> _Known:
        known = self._known
        age_s = STALE_S if known is None else time.monotonic() - known.read_at
        if known is not None and age_s < REFRESH_S:
            return known
        # One thread reads; the others go on with what is known, as long as that is not too old.
        if not self._lock.acquire(blocking=age_s >= STALE_S):
            assert known is not None
            return known
        try:
            found = self._known
            if found is None or found is known:
                found = self._known = self._look()
            return found
        except SQLAlchemyError as error:
            raise explain(error) from error
        finally:
            self._lock.release()

    def _look(self) -> _Known:
        read_at = time.monotonic()
        with self._engine.connect().execution_options(read_only=True) as connection:
            return _Known(
                read_at,
                {it.chain: it for it in all_chains(connection)},
                _around(connection, clock.now(connection)),
            )


def _around(connection: Connection, now: datetime) -> list[Epoch]:
    c = table.c
    query = _EPOCHS.where(c.chain > 0, c.opens_at < now + AROUND, c.closes_at > now - AROUND)
    return [_epoch(row) for row in connection.execute(query.order_by(c.opens_at.desc()))]


# ---- reading ---------------------------------------------------------------------------------------------------------

_EPOCHS: Final[Select[Any]] = select(table)


def _epoch(row: Any) -> Epoch:
    revealed = None if row.revealed is None else bytes.fromhex(row.revealed)
    name = EpochName(row.chain, row.epoch)
    return Epoch(row.id, name, row.opens_at, row.closes_at, row.commitment, revealed, row.revealed_at)


def by_id(connection: Connection, id: int) -> Epoch | None:
    """The epoch with that number; None for an unknown one."""
    row = connection.execute(_EPOCHS.where(table.c.id == id)).first()
    return None if row is None else _epoch(row)


def open_at(connection: Connection, moment: datetime) -> Epoch | None:
    """The epoch that draws of `moment` bind to; None where none is open."""
    c = table.c
    query = _EPOCHS.where(c.chain > 0, c.opens_at <= moment, c.closes_at > moment)
    row = connection.execute(query.order_by(c.opens_at.desc()).limit(1)).first()
    return None if row is None else _epoch(row)


def all_chains(connection: Connection) -> list[Chain]:
    """All chains in their order, chain 0 among them."""
    return [_chain(row) for row in connection.execute(select(chains).order_by(chains.c.chain))]


def find_chain(connection: Connection, number: int) -> Chain | None:
    """The chain with that number; None for an unknown one."""
    row = connection.execute(select(chains).where(chains.c.chain == number)).first()
    return None if row is None else _chain(row)


def _chain(row: Any) -> Chain:
    return Chain(row.chain, bytes.fromhex(row.anchor), row.epochs, row.seed_id, row.begun_at)


def all_epochs(connection: Connection) -> list[Epoch]:
    """All epochs in their order: 3,650 of each chain."""
    return [_epoch(row) for row in connection.execute(_EPOCHS.order_by(table.c.id))]


def epochs_from(connection: Connection, id: int, *, rows_max: int) -> list[Epoch]:
    """Up to `rows_max` epochs in their order, from the number `id` on."""
    return [_epoch(r) for r in connection.execute(_EPOCHS.where(table.c.id >= id).order_by(table.c.id).limit(rows_max))]


def next_unrevealed(connection: Connection, chain: int) -> Epoch | None:
    """The first epoch of a chain that opens or has opened, and is not revealed; None where all are."""
    c = table.c
    query = _EPOCHS.where(c.chain == chain, c.revealed.is_(None), c.closes_at > c.opens_at)
    row = connection.execute(query.order_by(c.id).limit(1)).first()
    return None if row is None else _epoch(row)
