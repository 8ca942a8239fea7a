"""Making the proofs of draws from the database: what gateway and commands share (producers.domain.proofs).

    proofs = Proofs(receipts, books_key)
    body = proofs.of(connection, state).encode()

Everything is read from the database, nothing from the result store.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, select

from tombola.producers.domain.books import checkpoints
from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import CAMPAIGNS, NOTES_PREFIX
from tombola.producers.domain.errors import ConfigurationError, InvalidRequest, ProofNotFound
from tombola.producers.domain.operations.refund import REFUND_TYPE
from tombola.producers.domain.proofs import (
    Proof,
    ProofBlock,
    ProofBooks,
    ProofEpoch,
    ProofLeaf,
    ProofOdds,
    ProofReceipts,
    ProofRow,
    Times,
    epoch_of,
    hexes,
    leaf_in_block,
    row_of,
)
from tombola.producers.domain.receipt_keys import jwk_set
from tombola.producers.domain.seeds import parse_epoch_name
from tombola.producers.receipts import Receipts
from tombola.producers.settings import Settings
from tombola.producers.storage import books, ledger, seeds
from tombola.producers.storage.ledger_leaves import Range, read_leaves
from tombola.producers.storage.receipt_keys import list_keys
from tombola.producers.storage.requests import SessionState
from tombola.producers.storage.schema import campaign_versions as versions

CHARGE: Final = 0  # the charge is the first row of a draw


class Proofs:
    """Makes proofs, with the receipts that this process can sign and the public key of the books that it knows."""

    def __init__(self, receipts: Receipts, books_key: str | None) -> None:
        self._receipts = receipts
        self._books_key = books_key
        self._tree = books.BlockTree()

    def of(self, connection: Connection, state: SessionState) -> Proof:
        """The proof of a draw as it stands.

        Raises ProofNotFound for a request that is no draw, and for a draw that old code has made; ServiceUnavailable or
        SQLAlchemy's errors when the database cannot be used.
        """
        request = state.request
        if not isinstance(request, DrawRequest):
            raise ProofNotFound
        receipts = self._signed(
            state
        )  # before anything is read: to list a new key is a write, in a transaction of its own
        rows, refund = _rows(connection, request, state.status)
        return Proof(
            request=request.encode().decode(),
            fingerprint=request.fingerprint(),
            status=state.status,
            odds=_odds(connection, request, state, rows),
            epoch=_epoch(connection, state, rows),
            rows=rows,
            refund=refund,
            result=None if state.result is None else state.result.decode(),
            receipts=receipts,
            keys=jwk_set(list_keys(connection)).decode(),
            books=self._books(connection, [*rows, *refund]),
        )

    def _signed(self, state: SessionState) -> ProofReceipts:
        if not self._receipts:
            return ProofReceipts()
        self._receipts.learn(state.seed_epoch)
        before = state._replace(status=Status.ACCEPTED, result=None, settled_at=None)
        is_settled = state.status in (Status.COMPLETED, Status.REJECTED)
        return ProofReceipts(
            accepted=None if state.accepted_at is None else self._receipts.sign(before),
            settled=self._receipts.sign(state) if is_settled else None,
        )

    def _books(self, connection: Connection, rows: Sequence[ProofRow]) -> ProofBooks | None:
        """The sealed blocks of these rows; None if none of them is sealed."""
        found: dict[int, tuple[books.Sealed, list[ProofRow]]] = {}
        for row in rows:
            sealed = books.block_with(connection, int(row.transaction_id))
            if sealed is not None:
                found.setdefault(sealed.block.number, (sealed, []))[1].append(row)
        if not found:
            return None
        note = books.latest_checkpoint(connection)
        head = None if note is None else checkpoints.read_unverified(note)
        leaves: list[ProofLeaf] = []
        proven: list[ProofBlock] = []
        for number, (sealed, own) in sorted(found.items()):
            block = sealed.block
            all_leaves = read_leaves(connection, Range(block.first_id, block.last_id)).split()
            leaves += (leaf_in_block(row, number, all_leaves) for row in own)
            is_under = head is not None and number <= head.size
            proof = self._tree.proof(connection, number, head.size, head.root) if head and is_under else []
            proven.append(ProofBlock(block.text, hexes(proof)))
        return ProofBooks(note, self._books_key, proven, leaves)


def books_key_of(settings: Settings) -> str | None:
    """The public key of the books, where this process has TOMBOLA_BOOKS_KEY; raises ConfigurationError."""
    text = settings.books_key.get_secret_value()
    try:
        return checkpoints.PrivateKey.read(text).public.text if text else None
    except InvalidRequest as error:
        raise ConfigurationError(f"TOMBOLA_BOOKS_KEY: {error}") from None


def _rows(connection: Connection, request: DrawRequest, status: str) -> tuple[list[ProofRow], list[ProofRow]]:
    """The draw's rows and those of its refund, none before it has settled."""
    if status not in (Status.COMPLETED, Status.REJECTED):
        return [], []  # it may settle at this moment: a state and rows of different moments would contradict each other
    own = [row_of(it) for it in ledger.session_rows(connection, request.lottery_session_id) if _is_of(it, request)]
    if status == Status.COMPLETED and not (own and (own[CHARGE].notes or "").startswith(NOTES_PREFIX)):
        raise ProofNotFound
    return own, [row_of(it) for it in ledger.rows_under(connection, request.ledger_key, REFUND_TYPE)]


def _is_of(row: Any, request: DrawRequest) -> bool:
    """Whether a ledger row of the session is the draw's: a recharge may have the same session."""
    return bool(row["idempotency_key"].partition(":")[0] == request.ledger_key)


def _odds(
    connection: Connection, request: DrawRequest, state: SessionState, rows: Sequence[ProofRow]
) -> ProofOdds | None:
    """The odds that the ledger names, else those that the request is bound to."""
    built_in = CAMPAIGNS.get(request.campaign)
    if built_in is not None:
        return ProofOdds(built_in.odds_hash, built_in.canonical.decode())
    notes = (rows[CHARGE].notes or "") if rows else ""
    odds_hash = notes.removeprefix(NOTES_PREFIX).partition(" ")[0] if notes else state.odds_hash
    if odds_hash is None:
        return None
    text = connection.execute(select(versions.c.manifest).where(versions.c.odds_hash == odds_hash)).scalar()
    return None if text is None else ProofOdds(odds_hash, text)


def _epoch(connection: Connection, state: SessionState, rows: Sequence[ProofRow]) -> ProofEpoch | None:
    """The seed epoch that the ledger names, else the one that the request is bound to."""
    named = _IS_NAMED(rows[CHARGE].notes or "") if rows else None
    id = state.seed_epoch
    if named is not None:
        id = seeds.id_of(parse_epoch_name(named[1])) if "." in named[1] else seeds.BEFORE_EPOCHS_ID
    epoch = None if id is None else seeds.by_id(connection, id)
    chain = None if epoch is None else seeds.find_chain(connection, epoch.name.chain)
    if epoch is None or chain is None:
        return None
    times = Times(epoch.opens_at, epoch.closes_at, epoch.revealed_at)
    return epoch_of(epoch.name, epoch.commitment, times, epoch.revealed, chain.anchor)


_IS_NAMED: Final = re.compile(r"odds=[0-9a-f]{64} seed=([0-9a-f]{16}|[0-9]+\.[0-9]+)(?: .*)?").fullmatch
