"""Chains of epochs: the first one is begun by the first worker, each later one by an operator (`tombola seed rotate`).

A chain is written as a whole, so that the commitments of all its epochs are public before the epochs open. An epoch is
a day of UTC. The last chain ends where the next one begins; its epochs that have not opened never will.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, Engine, insert, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from tombola.producers.domain.draw import seed_id_of
from tombola.producers.domain.errors import ConfigurationError, InvalidRequest
from tombola.producers.domain.operations.draw import CONSUME
from tombola.producers.domain.seeds import BEFORE_EPOCHS, EPOCHS, EpochName, commitment_of, hashed_down, secret_of
from tombola.producers.storage import clock
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.schema import seed_chains as chains
from tombola.producers.storage.schema import seed_epochs as epochs
from tombola.producers.storage.seeds import STALE_S, Chain, all_chains, id_of
from tombola.worker.operators import actions
from tombola.worker.seeds.binding import seed_noted
from tombola.worker.seeds.masters import Masters

log = logging.getLogger(__name__)

ROTATE: Final = "seed rotate"  # the act on record; worker.audit.seeds compares it with the chains
EPOCH_LENGTH: Final = timedelta(days=1)
# All processes know a chain before it opens.
ANNOUNCED: Final = timedelta(seconds=STALE_S + 20)
# Nothing was bound before the first chain: it is open at once, also for a clock that is a little behind.
OPENED_BEFORE: Final = timedelta(minutes=1)
LAST_ROWS: Final = 1_000
_EPOCH_0: Final = datetime(1970, 1, 1, tzinfo=UTC)


def begin_first(engine: Engine, masters: Masters, *, epoch_length: timedelta = EPOCH_LENGTH) -> bool:
    """Begin the first chain with the newest seed, unless there is a chain; return whether it was begun.

    Any number of workers may do so at once: one of them begins it. Chain 0 gets its rows as well: it stands for draws
    of before. Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    try:
        with engine.begin() as connection:
            if all_chains(connection):
                return False
            opens_at = clock.now(connection) - OPENED_BEFORE
            _insert_before(connection, _seed_of_before(connection, masters), opens_at)
            _insert(connection, 1, masters.seeds[0], opens_at, epoch_length)
    except IntegrityError:  # another worker was faster
        return False
    except SQLAlchemyError as error:
        raise explain(error) from error
    log.info("chain 1 of seed epochs has begun")
    return True


def check_seeds(engine: Engine, masters: Masters) -> None:
    """Check that these seeds can draw in the newest chain; raises ConfigurationError with the cure."""
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            last = all_chains(connection)[-1]
    except SQLAlchemyError as error:
        raise explain(error) from error
    if masters.of_chain(last) is None:
        raise ConfigurationError(
            f"TOMBOLA_SEED lacks the seed of chain {last.chain}, in which draws are drawn: give this worker the value "
            "that the other workers have; a new seed comes first, and begins the next chain by `tombola seed rotate`"
        )


def rotate(
    connection: Connection, masters: Masters, *, by: str, reason: str, epoch_length: timedelta = EPOCH_LENGTH
) -> Chain:
    """Begin a new chain with the newest seed, a minute ahead, in the caller's transaction; the last one ends then.

    The act goes on record with the operator `by` and the reason.

    Raises InvalidRequest where the seed was used before, no chain has begun, or the last one has not opened yet; and
    ConfigurationError without the seed of the last chain, which its draws still need.
    """
    connection.execute(select(chains.c.chain).with_for_update()).all()
    known = all_chains(connection)
    if not known:
        raise InvalidRequest("no chain has begun: start a worker, it begins the first one")
    last, now = known[-1], clock.now(connection)
    if not masters.seeds:
        raise ConfigurationError("TOMBOLA_SEED is not set here: NEW,OLD, as the workers have it")
    master = masters.seeds[0]
    if used := next((it for it in known if it.seed_id == seed_id_of(master)), None):
        raise InvalidRequest(
            f"the first seed of TOMBOLA_SEED was used for chain {used.chain}: make one with `openssl rand -hex 32`, "
            "and set TOMBOLA_SEED=NEW,OLD for all workers first"
        )
    if masters.of_chain(last) is None:
        raise ConfigurationError(
            f"TOMBOLA_SEED lacks the seed of chain {last.chain}, whose draws still need it: set NEW,OLD for all workers"
        )
    if last.begun_at > now:
        raise InvalidRequest(f"chain {last.chain} opens at {last.begun_at:%H:%M:%S} UTC: nothing was changed")
    begins_at = now + ANNOUNCED
    of_last = epochs.c.chain == last.chain
    connection.execute(
        update(epochs).where(of_last, epochs.c.opens_at >= begins_at).values(closes_at=epochs.c.opens_at)
    )
    connection.execute(
        update(epochs)
        .where(of_last, epochs.c.opens_at < begins_at, epochs.c.closes_at > begins_at)
        .values(closes_at=begins_at)
    )
    begun = _insert(connection, last.chain + 1, master, begins_at, epoch_length)
    details = {"chain": begun.chain, "anchor": begun.anchor.hex(), "begun_at": begun.begun_at}
    actions.record(connection, operator=by, action=ROTATE, reason=reason, count=1, details=details)
    return begun


def _seed_of_before(connection: Connection, masters: Masters) -> bytes:
    """The seed of draws of before: the one that the last draw names, else the oldest."""
    newest = select(transactions).order_by(transactions.c.transaction_id.desc()).limit(LAST_ROWS).subquery()
    query = select(newest.c.notes).where(newest.c.business_type == CONSUME)
    notes = connection.execute(query.order_by(newest.c.transaction_id.desc()).limit(1)).scalar()
    return next((it for it in masters.seeds if seed_id_of(it) == seed_noted(notes)), masters.seeds[-1])


def _insert_before(connection: Connection, master: bytes, closes_at: datetime) -> None:
    row = _chain_row(Chain(0, hashed_down(master, 1), 0, seed_id_of(master), _EPOCH_0))
    connection.execute(insert(chains).values(row))
    commitment = hashed_down(master, 1).hex()  # as it was published before there were epochs
    connection.execute(insert(epochs).values(_epoch_row(BEFORE_EPOCHS, _EPOCH_0, closes_at, commitment)))


def _insert(connection: Connection, number: int, master: bytes, begins_at: datetime, length: timedelta) -> Chain:
    chain = Chain(number, secret_of(master, 0), EPOCHS, seed_id_of(master), begins_at)
    connection.execute(insert(chains).values(_chain_row(chain)))
    first_closes_at = _EPOCH_0 + ((begins_at - _EPOCH_0) // length + 1) * length
    rows = []
    secret = secret_of(master, EPOCHS)
    for epoch in range(EPOCHS, 0, -1):
        closes_at = first_closes_at + (epoch - 1) * length
        opens_at = begins_at if epoch == 1 else closes_at - length
        rows.append(_epoch_row(EpochName(number, epoch), opens_at, closes_at, commitment_of(secret)))
        secret = hashed_down(secret, 1)
    connection.execute(insert(epochs), rows[::-1])
    return chain


def _chain_row(chain: Chain) -> dict[str, Any]:
    return chain._asdict() | {"anchor": chain.anchor.hex()}


def _epoch_row(name: EpochName, opens_at: datetime, closes_at: datetime, commitment: str) -> dict[str, Any]:
    return {
        "id": id_of(name),
        "chain": name.chain,
        "epoch": name.epoch,
        "opens_at": opens_at,
        "closes_at": closes_at,
        "commitment": commitment,
    }
