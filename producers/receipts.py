"""Making the receipts of requests, from their rows: what gateway, DrawClient and commands share.

    receipts = Receipts.from_settings(settings, engine)
    if receipts:
        receipts.learn(state.seed_epoch)             # reads the database, unless `knows` says that it needs not
        jws = receipts.sign(state)

A receipt is made of the database's row alone, never of what the result store says: whoever can write to Redis must not
get a signature under a result of his own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.causes import Status
from tombola.producers.domain.errors import ConfigurationError, InvalidRequest, ReceiptNotFound
from tombola.producers.domain.receipt_keys import SigningKey, signing_keys
from tombola.producers.domain.receipts import EpochShown, Facts, Outcome, Signer, receipt_of
from tombola.producers.settings import Settings
from tombola.producers.storage import receipt_keys, seeds
from tombola.producers.storage.faults import explain
from tombola.producers.storage.requests import Acceptance, SessionState


class Receipts:
    """Signs receipts with the keys of this process; false without keys. Safe to share between threads."""

    def __init__(self, engine: Engine, keys: Sequence[SigningKey]) -> None:
        self._engine = engine
        self._keys = tuple(keys)
        self._signer: Signer | None = None
        self._epochs: dict[int | None, EpochShown | None] = {None: None}  # by number; they do not change

    @classmethod
    def from_settings(cls, settings: Settings, engine: Engine) -> Self:
        """With the keys in TOMBOLA_RECEIPT_KEY; raises ConfigurationError where one is no key."""
        return cls(engine, keys_in(settings))

    def __bool__(self) -> bool:
        return bool(self._keys)

    def knows(self, seed_epoch: int | None) -> bool:
        """Whether `sign` can sign for a request of this epoch without reading the database."""
        return self._signer is not None and seed_epoch in self._epochs

    def learn(self, seed_epoch: int | None = None) -> None:
        """Read what `sign` needs: list the keys, which may be new, and find the epoch.

        Raises ReceiptNotFound without keys, ServiceUnavailable or ConfigurationError when the database cannot be used.
        """
        if not self._keys:
            raise ReceiptNotFound
        try:
            if self._signer is None:
                self._signer = receipt_keys.open_signer(self._engine, self._keys)
            if seed_epoch not in self._epochs:
                self._epochs[seed_epoch] = epoch_of(self._engine, seed_epoch)
        except SQLAlchemyError as error:
            raise explain(error) from error

    def sign(self, state: SessionState) -> str:
        """The receipt of a request, as it stands: settled, or accepted (a dead request was accepted, too).

        The epoch must be known (`learn`).
        """
        assert self._signer is not None
        facts = Facts(state.accepted_at, state.odds_hash, self._epochs[state.seed_epoch])
        outcome = None
        if state.status in (Status.COMPLETED, Status.REJECTED):
            assert state.result is not None
            assert state.settled_at is not None
            outcome = Outcome(state.result, state.settled_at)
        return self._signer.sign(receipt_of(state.request, facts, outcome))


def keys_in(settings: Settings) -> tuple[SigningKey, ...]:
    """The keys in TOMBOLA_RECEIPT_KEY, the newest first; none where it is not set. Raises ConfigurationError."""
    try:
        return signing_keys(settings.receipt_key.get_secret_value())
    except InvalidRequest as error:
        raise ConfigurationError(f"TOMBOLA_RECEIPT_KEY: {error}") from None


def epoch_of(engine: Engine, seed_epoch: int | None) -> EpochShown | None:
    """The seed epoch with that number as receipts show it; None without one. Raises SQLAlchemy's errors."""
    if seed_epoch is None:
        return None
    with engine.connect().execution_options(read_only=True) as connection:
        found = seeds.by_id(connection, seed_epoch)
    return None if found is None else EpochShown(str(found.name), found.commitment)


def state_of(answer: Acceptance) -> SessionState | None:
    """The state of the request that an answer of the door is about; None where only the ledger has its result.

    A conflict has none.
    """
    record = answer.record
    if record is None or (record.is_settled and record.result is None):
        return None
    return SessionState(
        answer.request,
        record.caller,
        record.status,
        record.reason,
        record.result,
        record.settled_at,
        record.accepted_at,
        record.odds_hash,
        record.seed_epoch,
    )
