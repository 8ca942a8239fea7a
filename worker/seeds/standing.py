"""How chains and epochs stand, for operators: `tombola seed status`, the doctor."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection

from tombola.producers.storage.seeds import Chain, Epoch, all_chains, all_epochs


class ChainStanding(NamedTuple):
    """A chain at some moment: how many of its epochs are revealed; the open one; those that are over and secret, with
    the first of them; and when the last one ends."""

    chain: Chain
    revealed: int
    open: Epoch | None
    secret: int
    oldest_secret: Epoch | None
    ends_at: datetime | None


def standings(connection: Connection, now: datetime) -> list[ChainStanding]:
    """All chains in their order, without chain 0."""
    epochs: dict[int, list[Epoch]] = {}
    for epoch in all_epochs(connection):
        epochs.setdefault(epoch.name.chain, []).append(epoch)
    return [_standing(it, epochs.get(it.chain, []), now) for it in all_chains(connection) if it.chain]


def _standing(chain: Chain, epochs: list[Epoch], now: datetime) -> ChainStanding:
    opening = [it for it in epochs if it.closes_at is not None and it.closes_at > it.opens_at]
    secret = [it for it in opening if it.closes_at is not None and it.closes_at <= now and it.revealed is None]
    return ChainStanding(
        chain,
        sum(it.revealed is not None for it in opening),
        next((it for it in opening if it.is_open_at(now)), None),
        len(secret),
        secret[0] if secret else None,
        opening[-1].closes_at if opening else None,
    )
