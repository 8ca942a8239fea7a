"""The master seeds that this process knows (TOMBOLA_SEED): whose secrets of epochs it can compute."""

from __future__ import annotations

from collections.abc import Sequence

from tombola.producers.domain.draw import Seed, seed_id_of
from tombola.producers.domain.seeds import EpochName, anchor_of, secret_of
from tombola.producers.storage.seeds import Chain


class Masters:
    """Some master seeds, the newest first; none in processes that draw nothing."""

    def __init__(self, seeds: Sequence[bytes] = ()) -> None:
        self.seeds = tuple(seeds)

    def of_chain(self, chain: Chain) -> bytes | None:
        """The master seed of a chain; None where this process does not have it."""
        for master in self.seeds:
            if (seed_id_of(master) == chain.seed_id) if chain.chain == 0 else (anchor_of(master) == chain.anchor):
                return master
        return None

    def secret(self, chain: Chain, epoch: int) -> bytes | None:
        """The secret of an epoch of `chain`, of chain 0 the seed itself; None where this process does not know it."""
        master = self.of_chain(chain)
        if master is None or chain.chain == 0:
            return master
        return secret_of(master, epoch)

    def seed(self, name: EpochName, chain: Chain | None) -> Seed | None:
        """What draws of an epoch of `chain` are drawn under; None where this process does not know it."""
        secret = None if chain is None else self.secret(chain, name.epoch)
        return None if secret is None else Seed.of_epoch(name, secret)
