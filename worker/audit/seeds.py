"""I2, the part of the seeds: each draw is of the epoch that it was bound to, and the published secrets fit together.

A draw's notes name its epoch; its request is bound to the same one. It was accepted or drawn while the epoch was open,
and drawn before the secret was public: otherwise whoever wrote the row may have known what it would win. A secret is
taken from TOMBOLA_SEED where it is known, else from the table. A draw of an epoch whose secret this process does not
know cannot be proven yet; with another audit, after the secret is revealed, it can.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Engine

from tombola.producers.domain.draw import Seed, seed_id_of
from tombola.producers.domain.seeds import EpochName, anchor_of, commitment_of, hashed_down, secret_of
from tombola.producers.storage.seeds import BEFORE_EPOCHS_ID, Chain, Epoch, all_chains, all_epochs, id_of
from tombola.producers.storage.transactions import time_text
from tombola.worker.audit.on_record import recorded
from tombola.worker.audit.report import Violation
from tombola.worker.seeds.chains import ROTATE
from tombola.worker.seeds.masters import Masters

# Between the moment that a process reads the clock and the moment that it writes; clocks that are carried on.
CLOCKS: Final = timedelta(seconds=60)
REVEALED_CLOCKS: Final = timedelta(seconds=1)
# Workers of the release before run beside those of this one, and draw without epochs.
BEFORE_ENDS: Final = timedelta(days=1)
READ_EVERY_S: Final = 1.0
_is_seed_id: Final = re.compile(r"[0-9a-f]{16}").fullmatch


class Window(NamedTuple):
    """When draws of an epoch may be accepted or drawn. Times are texts, as the ledger has them."""

    name: str
    id: str  # empty: before the epochs
    opens_at: str = ""
    closes_at: str = "~"  # after all times
    revealed_at: str = "~"

    def why_not(self, bound_to: str, accepted_at: str, drawn_at: str) -> str:
        """What is wrong with a draw of this epoch whose request is bound to the epoch `bound_to`; empty if nothing."""
        if not self.id:
            is_late = drawn_at >= self.closes_at
            return f"was drawn at {drawn_at} without an epoch, after the epochs had begun" if is_late else ""
        if bound_to != self.id:
            return f"was drawn in epoch {self.name}, and is bound to {bound_to or 'none'}"
        if drawn_at >= self.revealed_at:
            return f"was drawn at {drawn_at} in epoch {self.name}, whose secret was public by then"
        if not any(self.opens_at <= moment < self.closes_at for moment in (accepted_at, drawn_at)):
            return f"was accepted at {accepted_at} and drawn at {drawn_at}, epoch {self.name} was not open then"
        return ""


class Noted(NamedTuple):
    """What the notes of a draw call its seed: the seed, None for the one of the audit's wheels; and its window."""

    seed: Seed | None
    window: Window

    @property
    def is_known(self) -> bool:
        return self.seed is None or self.seed.is_known


class NotedSeeds:
    """The seeds that the notes of draws name. `own` is the seed of the audit's wheels, None for blind ones."""

    def __init__(self, engine: Engine, masters: Masters, own: bytes | None = None) -> None:
        self._engine = engine
        self._masters = masters
        self._own = own
        self._found: dict[str, Noted] = {}
        self._chains: Mapping[int, Chain] = {}
        self._epochs: dict[str, Epoch] = {}
        self._next_read = 0.0

    def of(self, name: str) -> Noted | None:
        """The seed that notes call so; None for a name that no seed has. Raises SQLAlchemy's errors."""
        found = self._found.get(name)
        if found is None:
            if name not in self._epochs and time.monotonic() >= self._next_read:
                self._read()
            found = self._look(name)
            if found is not None:
                self._found[name] = found
        return found

    def _read(self) -> None:
        with self._engine.connect().execution_options(read_only=True) as connection:
            self._chains = {it.chain: it for it in all_chains(connection)}
            self._epochs = {str(it.name): it for it in all_epochs(connection)}
        self._next_read = time.monotonic() + READ_EVERY_S

    def _look(self, name: str) -> Noted | None:
        epoch = self._epochs.get(name)
        if epoch is not None and epoch.id != BEFORE_EPOCHS_ID:
            return Noted(self._of_epoch(epoch), _window(epoch))
        before = self._chains.get(0)
        ends = self._epochs.get("0.0")
        window = Window(name, "") if ends is None else _window(ends)
        if self._own is not None and name == seed_id_of(self._own):
            return Noted(None, window)
        revealed = () if ends is None or ends.revealed is None else (ends.revealed,)
        for master in (*self._masters.seeds, *revealed):
            if seed_id_of(master) == name:
                return Noted(Seed.of_master(master), window)
        # Without a seed, and without a chain that names one, whoever drew before the epochs is unknown here.
        is_unknown = before is None and not self._masters.seeds and self._own is None and _is_seed_id(name)
        is_named = before is not None and before.seed_id == name
        return Noted(Seed(name, None), window) if is_unknown or is_named else None

    def _of_epoch(self, epoch: Epoch) -> Seed:
        seed = self._masters.seed(epoch.name, self._chains.get(epoch.name.chain))
        if seed is not None:
            return seed
        # A secret that does not fit is named by check_seeds, and proves nothing.
        is_whole = epoch.revealed is not None and commitment_of(epoch.revealed) == epoch.commitment
        return Seed.of_epoch(epoch.name, epoch.revealed if is_whole else None)


def _window(epoch: Epoch) -> Window:
    name, closes_at = str(epoch.name), epoch.closes_at
    if epoch.id == BEFORE_EPOCHS_ID:
        return Window(name, "", closes_at="~" if closes_at is None else time_text(closes_at + BEFORE_ENDS))
    if closes_at is None or closes_at <= epoch.opens_at:
        return Window(name, str(epoch.id), "~", "")  # never opens
    return Window(
        name,
        str(epoch.id),
        time_text(epoch.opens_at - CLOCKS),
        time_text(closes_at + CLOCKS),
        "~" if epoch.revealed_at is None else time_text(epoch.revealed_at + REVEALED_CLOCKS),
    )


def moment_text(stored: Any) -> str:
    """A stored time as a Window compares it."""
    return time_text(stored.replace(tzinfo=UTC)) if isinstance(stored, datetime) else str(stored)


# ---- the record ------------------------------------------------------------------------------------------------------


def check_rotations(connection: Connection) -> Iterator[Violation]:
    """I12: every chain but the first was begun by an operator, and is on record with its anchor."""
    said = {it.get("chain"): it.get("anchor") for _, _, it in recorded(connection, ROTATE) if it}
    for chain in all_chains(connection):
        if chain.chain > 1 and said.pop(chain.chain, None) != chain.anchor.hex():
            yield Violation("I12", f"chain {chain.chain}", "its beginning is not on record with this anchor")
    for number in said:
        yield Violation("I12", f"chain {number}", "its beginning is on record, and there is no such chain")


# ---- the tables ------------------------------------------------------------------------------------------------------


def check_seeds(connection: Connection, masters: Masters) -> Iterator[Violation]:
    """Each secret hashes down to its chain's anchor, each commitment is that of its secret, epochs do not overlap."""
    epochs: dict[int, list[Epoch]] = {}
    for epoch in all_epochs(connection):
        epochs.setdefault(epoch.name.chain, []).append(epoch)
    for chain in all_chains(connection):
        of_chain = epochs.pop(chain.chain, [])
        wrong = _check_before(chain, of_chain) if chain.chain == 0 else _check_chain(chain, of_chain, masters)
        for epoch_name, what in wrong:
            yield Violation("I2", f"epoch {epoch_name}", what)
    for number in epochs:
        yield Violation("I2", f"chain {number}", "has epochs, and no anchor")


def _check_before(chain: Chain, epochs: Sequence[Epoch]) -> Iterator[tuple[EpochName, str]]:
    for epoch in epochs:
        said = {chain.anchor.hex(), epoch.commitment, *(() if epoch.revealed is None else (_sha256(epoch.revealed),))}
        if len(said) > 1:
            yield epoch.name, "its seed, its commitment and its anchor do not fit together"


def _sha256(secret: bytes) -> str:
    return hashed_down(secret, 1).hex()


def _check_chain(chain: Chain, epochs: Sequence[Epoch], masters: Masters) -> Iterator[tuple[EpochName, str]]:
    if [it.name.epoch for it in epochs] != list(range(1, chain.epochs + 1)) or any(
        it.id != id_of(it.name) for it in epochs
    ):
        yield EpochName(chain.chain, 0), f"chain {chain.chain} does not have the epochs 1 to {chain.epochs}"
        return
    yield from _check_times(epochs)
    master = masters.of_chain(chain)
    is_ours = next((it for it in masters.seeds if seed_id_of(it) == chain.seed_id), None)
    if master is None and is_ours is not None:
        yield EpochName(chain.chain, 0), f"its anchor is not the one of its seed, {anchor_of(is_ours).hex()}"
        return
    yield from _check_secrets(chain, epochs, master)


def _check_secrets(chain: Chain, epochs: Sequence[Epoch], master: bytes | None) -> Iterator[tuple[EpochName, str]]:
    """Hash down from the last secret that is known: a hash for each epoch."""
    secret: bytes | None = None if master is None else secret_of(master, chain.epochs)
    for epoch in reversed(epochs):
        revealed = epoch.revealed
        if secret is None and revealed is not None and hashed_down(revealed, epoch.name.epoch) == chain.anchor:
            secret = revealed
        if revealed is not None and revealed != secret:
            yield epoch.name, "its revealed secret does not hash down to the anchor of its chain"
        if secret is not None:
            if commitment_of(secret) != epoch.commitment:
                yield epoch.name, "its commitment is not the one of its secret"
            secret = hashed_down(secret, 1)


def _check_times(epochs: Sequence[Epoch]) -> Iterator[tuple[EpochName, str]]:
    before: Epoch | None = None
    for epoch in epochs:
        closes_at = epoch.closes_at
        if closes_at is None or closes_at < epoch.opens_at:
            yield epoch.name, "has no end"
        elif before is not None and before.closes_at is not None and _is_out_of_order(before.closes_at, epoch):
            yield epoch.name, f"opens at {epoch.opens_at}, the one before closes at {before.closes_at}"
        if epoch.revealed is not None and (
            epoch.revealed_at is None or closes_at is None or epoch.revealed_at < closes_at
        ):
            yield epoch.name, "was revealed before it was over"
        before = epoch


def _is_out_of_order(closed_at: datetime, epoch: Epoch) -> bool:
    """Whether an epoch does not follow the one before, which closed then. Epochs that never open have no length."""
    return epoch.opens_at < closed_at or (epoch.opens_at != closed_at and epoch.closes_at != epoch.opens_at)
