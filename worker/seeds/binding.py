"""Which epoch each draw of a batch is drawn in: the one that it was bound to when it was accepted.

A draw that is not bound yet, as its message came by the broker alone, binds to the epoch of now. A draw is bound anew
if the secret of its epoch is public: it was committed hours after it was accepted, by a frontend that might have waited
for the secret. Whoever reveals a secret holds the lock of the epoch's row; a batch that meets a draw of an epoch that
is long over asks under that lock. Nearly all draws are of the epoch of now, and nothing is asked for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence, Set
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Final, NamedTuple

from cachetools import LRUCache
from sqlalchemy import Engine

from tombola.producers.domain.contract import DrawRequest, Request, Row
from tombola.producers.domain.draw import NO_SEEDS, Seed, Seeds
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.operations.draw import CONSUME
from tombola.producers.domain.seeds import parse_epoch_name
from tombola.producers.storage.requests import RequestRecord
from tombola.producers.storage.seeds import Epoch, Epochs, id_of
from tombola.producers.storage.transactions import Transaction
from tombola.worker.seeds.masters import Masters

log = logging.getLogger(__name__)

# After this long an epoch may be revealed soon: well below the least TOMBOLA_SEED_REVEAL_AFTER_S, in spite of clocks.
LONG_OVER: Final = timedelta(seconds=30)
SEEDS_KEPT_MAX: Final = 64
WARN_EVERY_S: Final = 60.0
NO_SEED: Final = "TOMBOLA_SEED of this worker lacks the seed of its epoch"


NOTHING: Final[Mapping[str, int]] = MappingProxyType({})


class Bound(NamedTuple):
    """The seeds of the draws of a batch. `binds` are the numbers of epochs to write into requests, by request key.

    Draws in `seedless` cannot be drawn here: this worker lacks the seed of their epoch.
    """

    seeds: Seeds = NO_SEEDS
    binds: Mapping[str, int] = NOTHING
    seedless: Set[str] = frozenset()


UNBOUND: Final = Bound()


class EpochSeeds:
    """The seeds of epochs, for all lanes of a worker."""

    def __init__(self, engine: Engine, masters: Masters) -> None:
        self.epochs = Epochs(engine)
        self._masters = masters
        self._seeds: LRUCache[int, Seed] = LRUCache(SEEDS_KEPT_MAX)
        self._warned_at = -WARN_EVERY_S

    def bind(
        self,
        open_transaction: Transaction,
        draws: Sequence[Request],
        known: Mapping[str, RequestRecord],
        now: datetime,
    ) -> Bound:
        """The seeds of `draws`; `known` are their rows, read under the locks of their accounts.

        Raises ServiceUnavailable or ConfigurationError when the epochs cannot be read.
        """
        epoch = self.epochs.at(now)
        if epoch is None and not self.epochs.has_begun:
            return UNBOUND
        id_of_now = None if epoch is None else epoch.id
        others = [
            draw for draw in draws if (record := known.get(draw.request_key)) is None or record.seed_epoch != id_of_now
        ]
        of_now = None if epoch is None else self._seed(epoch)
        if not others and of_now is not None:
            return Bound(Seeds(of_now))
        if of_now is None:
            others = list(draws)
        return self._bind_others(open_transaction, others, known, now, None if of_now is None else epoch)

    def _bind_others(
        self,
        open_transaction: Transaction,
        draws: Sequence[Request],
        known: Mapping[str, RequestRecord],
        now: datetime,
        epoch: Epoch | None,
    ) -> Bound:
        """`bind` for draws of other epochs than the one of now, `epoch`; None: this worker cannot draw in that one."""
        seeds: dict[str, Seed] = {}
        seedless: set[str] = set()
        anew: list[str] = []
        late: list[tuple[str, Epoch]] = []
        for draw in draws:
            record = known.get(draw.request_key)
            if not isinstance(draw, DrawRequest) or (record is not None and record.is_settled):
                continue
            id = None if record is None else record.seed_epoch
            bound = None if id is None else self.epochs.by_id(id)
            if bound is None or bound.closes_at is None:
                anew.append(draw.request_key)
            elif now >= bound.closes_at + LONG_OVER:
                late.append((draw.request_key, bound))
            elif (seed := self._seed(bound)) is not None:
                seeds[draw.request_key] = seed
            else:
                seedless.add(draw.request_key)
        revealed = _revealed(open_transaction, {it.id for _, it in late})
        for key, bound in late:
            if bound.id in revealed:
                anew.append(key)
            elif (seed := self._seed(bound)) is not None:
                seeds[key] = seed
            else:
                seedless.add(key)
        if epoch is None:
            seedless.update(anew)
            anew = []
        if seedless:
            self._warn(len(seedless))
        of_now = None if epoch is None else self._seed(epoch)
        return Bound(Seeds(of_now, seeds), {} if epoch is None else dict.fromkeys(anew, epoch.id), seedless)

    def _seed(self, epoch: Epoch) -> Seed | None:
        found: Seed | None = self._seeds.get(epoch.id)
        if found is None and (found := self._masters.seed(epoch.name, self.epochs.chain(epoch.name.chain))) is not None:
            self._seeds[epoch.id] = found
        return found

    def _warn(self, count: int) -> None:
        if time.monotonic() >= self._warned_at + WARN_EVERY_S:
            self._warned_at = time.monotonic()
            log.error("%d draws wait: %s, or no epoch is open (tombola seed status)", count, NO_SEED)


def _revealed(open_transaction: Transaction, ids: Set[int]) -> set[int]:
    """Those of these epochs whose secrets are public. The others are not revealed before the transaction has ended."""
    if not ids:
        return set()
    lock = "" if open_transaction.is_sqlite else " LOCK IN SHARE MODE"
    query = f"SELECT id, revealed IS NOT NULL FROM seed_epochs WHERE id IN (??) ORDER BY id{lock}"
    return {id for id, is_revealed in open_transaction.select(query, sorted(ids)) if is_revealed}


def epoch_noted(rows: Sequence[Row]) -> int | None:
    """The number of the epoch that a draw with these ledger rows was drawn in; None for a draw of before the epochs."""
    for row in rows:
        if row.business_type == CONSUME:
            name = seed_noted(row.notes)
            try:
                return id_of(parse_epoch_name(name))
            except InvalidRequest:
                return None
    return None


def seed_noted(notes: str | None) -> str:
    """What the notes of a draw call its seed; empty where they name none."""
    _, _, rest = (notes or "").partition(" seed=")
    return rest.partition(" ")[0]
