"""Which draws' secrets are known: those that are revealed, and those of the master seeds in TOMBOLA_SEED, if any."""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.draw import Seed, seed_id_of
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.seeds import commitment_of, parse_epoch_name
from tombola.producers.settings import Settings
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import seed_epochs
from tombola.producers.storage.seeds import BEFORE_EPOCHS_ID, by_id, find_chain, id_of
from tombola.worker.conformity.tickets import KeyOf
from tombola.worker.seeds.masters import Masters


class Secrets(NamedTuple):
    """How tickets are drawn again. Draws from `until` on are not provable yet; None: no such time is known."""

    key_of: KeyOf
    until: datetime | None = None


def secrets_of(engine: Engine, settings: Settings) -> Secrets:
    """The secrets that this process knows. Raises ServiceUnavailable or ConfigurationError without a database."""
    masters = Masters(settings.seeds)
    seeds: Any = lru_cache(maxsize=4096)(lambda name: _seed(engine, masters, name))

    def key_of(seed_name: str, campaign: str) -> bytes | None:
        seed: Seed | None = seeds(seed_name)
        return None if seed is None else seed.key_of(campaign).key

    return Secrets(key_of, None if masters.seeds else _revealed_until(engine))


def _seed(engine: Engine, masters: Masters, name: str) -> Seed | None:
    """What draws were drawn under whose notes say this name; None while it is not known."""
    with engine.connect().execution_options(read_only=True) as connection:
        return _of_epoch(connection, masters, name) if "." in name else _of_master(connection, masters, name)


def _of_epoch(connection: Connection, masters: Masters, text: str) -> Seed | None:
    try:
        name = parse_epoch_name(text)
    except InvalidRequest:
        return None
    epoch = by_id(connection, id_of(name))
    if epoch is None:
        return None
    known = masters.seed(name, find_chain(connection, name.chain))
    if known is not None:
        return known
    # A secret that does not fit its commitment proves nothing: the audit says so.
    is_whole = epoch.revealed is not None and commitment_of(epoch.revealed) == epoch.commitment
    return Seed.of_epoch(name, epoch.revealed) if is_whole else None


def _of_master(connection: Connection, masters: Masters, name: str) -> Seed | None:
    """Of draws of before the epochs, whose notes name the master seed itself."""
    before = by_id(connection, BEFORE_EPOCHS_ID)
    revealed = () if before is None or before.revealed is None else (before.revealed,)
    return next((Seed.of_master(it) for it in (*masters.seeds, *revealed) if seed_id_of(it) == name), None)


def _revealed_until(engine: Engine) -> datetime | None:
    query = select(func.max(seed_epochs.c.closes_at)).where(seed_epochs.c.revealed.is_not(None))
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            until: datetime | None = connection.execute(query).scalar()
    except SQLAlchemyError as error:
        raise explain(error) from error
    return until
