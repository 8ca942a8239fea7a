"""Reveal the secrets of epochs that are over: from then on everybody can verify their draws.

An epoch is revealed some time after its end (TOMBOLA_SEED_REVEAL_AFTER_S), when no accepted request is bound to it. Its
secret hashes down to those of all epochs before it, so the epochs of a chain are revealed in their order: one that has
a request left holds up the later ones. A draw whose row is committed after all this is bound anew when it settles
(worker.seeds.binding). Dead requests hold nothing up: a replay binds them anew.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Connection, Engine, select, update
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.causes import Status
from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.domain.seeds import EpochName, commitment_of
from tombola.producers.storage import clock
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import seed_epochs as table
from tombola.producers.storage.seeds import BEFORE_EPOCHS_ID, Chain, Epoch, all_chains, by_id, next_unrevealed
from tombola.worker.seeds.masters import Masters


def reveal_due(engine: Engine, masters: Masters, *, after_s: float) -> list[EpochName]:
    """Reveal every epoch that is due, of the chains whose seeds are among `masters`; return their names.

    Raises ConfigurationError where a commitment is not the one of its secret: then nothing more is revealed. Raises
    ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    revealed: list[EpochName] = []
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            chains = all_chains(connection)
        for chain in sorted(chains, reverse=True):  # chain 0 last: it waits for the chain of the same seed
            if masters.of_chain(chain) is not None:
                while (name := _reveal_next(engine, masters, chain, after_s)) is not None:
                    revealed.append(name)
    except SQLAlchemyError as error:
        raise explain(error) from error
    return revealed


def _reveal_next(engine: Engine, masters: Masters, chain: Chain, after_s: float) -> EpochName | None:
    """Reveal the next epoch of a chain; None where it is not due."""
    with engine.connect().execution_options(read_only=True) as connection:
        epoch = _due(connection, chain, after_s)
    if epoch is None:
        return None
    secret = masters.secret(chain, epoch.name.epoch)
    assert secret is not None
    commitment = chain.anchor.hex() if chain.chain == 0 else commitment_of(secret)
    if commitment != epoch.commitment:
        raise ConfigurationError(f"epoch {epoch.name} has another commitment than its secret: run `tombola audit`")
    with engine.begin() as connection:
        # Whoever draws in the epoch now holds this row.
        connection.execute(select(table.c.id).where(table.c.id == epoch.id).with_for_update()).all()
        found = by_id(connection, epoch.id)
        if found is None or found.revealed is not None or _has_accepted(connection, epoch.id):
            return None
        connection.execute(
            update(table).where(table.c.id == epoch.id).values(revealed=secret.hex(), revealed_at=clock.now(connection))
        )
    return epoch.name


def _due(connection: Connection, chain: Chain, after_s: float) -> Epoch | None:
    """The next epoch of a chain, if nothing keeps it from being revealed."""
    if chain.chain == 0:
        epoch = by_id(connection, BEFORE_EPOCHS_ID)
        if epoch is None or epoch.revealed is not None or _is_secret_elsewhere(connection, chain):
            return None
    else:
        epoch = next_unrevealed(connection, chain.chain)
    if epoch is None or epoch.closes_at is None:
        return None
    is_over = epoch.closes_at + timedelta(seconds=after_s) <= clock.now(connection)
    return epoch if is_over and not _has_accepted(connection, epoch.id) else None


def _is_secret_elsewhere(connection: Connection, before: Chain) -> bool:
    """Whether a chain of the same seed has a secret left: the seed says it."""
    return any(
        chain.chain and chain.seed_id == before.seed_id and next_unrevealed(connection, chain.chain) is not None
        for chain in all_chains(connection)
    )


def _has_accepted(connection: Connection, epoch_id: int) -> bool:
    query = select(requests.c.request_key).where(
        requests.c.status == Status.ACCEPTED, requests.c.seed_epoch == epoch_id
    )
    return connection.execute(query.limit(1)).first() is not None
