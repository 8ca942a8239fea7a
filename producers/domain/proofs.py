"""The proof of a draw: all that a stranger needs to verify it offline, as one JSON object. Pure, no I/O.

    v            1
    request      the canonical body of the request, as text                      (contract)
    fingerprint  its SHA-256, as the request's row has it
    status       accepted, completed, rejected or dead
    odds         {hash, text}: the canonical odds; null where the request was bound to none
    epoch        {name, commitment, opens_at, closes_at, revealed_at, secret, anchor}; `secret` is null while it is one
    rows         the draw's ledger rows, in their order: each field as the text that its leaf hashes  (books.leaves)
    refund       the rows of the draw's refund
    result       the result's bytes, as text; null before it settles
    receipts     {accepted, settled}: JWS, or null                               (receipts)
    keys         the JWK Set of the keys of receipts, as text; null without keys
    books        {checkpoint, key, blocks: [{text, proof}], leaves: [{transaction_id, block, index, proof}]}; null
                 before a row is sealed. `proof` is a Merkle inclusion proof (RFC 6962) of hex hashes: of a row's leaf
                 in its block, of a block in the tree whose root the checkpoint signs (empty where it does not have it)

A proof of one draw at one state has always the same bytes. What went into the draw beside these (tier, counters, prizes
that were gone) stands in the notes of the first row (campaigns.record). Hashes are 64 hex digits, numbers within rows
and books are decimal text, times are UTC as in 2026-11-27T16:00:00.000000Z.

`producers/verifiers/` has two programs that verify proofs; neither imports anything of tombola. They refuse a proof
with a field that they do not know: another field is another `v`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, Literal, NamedTuple

import msgspec

from tombola.producers.domain.books import leaves
from tombola.producers.domain.books.merkle import inclusion_proof
from tombola.producers.domain.receipts import time_shown
from tombola.producers.domain.seeds import EpochName

VERSION: Final = 1


class ProofOdds(msgspec.Struct, frozen=True):
    """The odds that the request is bound to."""

    hash: str
    text: str


class ProofEpoch(msgspec.Struct, frozen=True):
    """The seed epoch that the draw is bound to. `anchor` is its chain's, for chain 0 the SHA-256 of the seed."""

    name: str
    commitment: str
    opens_at: str | None
    closes_at: str | None
    revealed_at: str | None
    secret: str | None
    anchor: str


class ProofRow(msgspec.Struct, frozen=True):
    """A ledger row; the texts of its fields are those that its leaf hashes."""

    transaction_id: str
    account_id: str
    delta_amount: str
    balance_before: str
    balance_after: str
    created_at: str
    updated_at: str
    business_id: str
    lottery_session_id: str
    idempotency_key: str
    business_type: str
    asset_code: str
    notes: str | None

    @property
    def leaf(self) -> bytes:
        """The row's leaf in the tree of its block, 32 bytes."""
        return leaves.leaf([getattr(self, name) for name in leaves.FIELDS])


class ProofReceipts(msgspec.Struct, frozen=True):
    """The receipts of the draw, as JWS."""

    accepted: str | None = None
    settled: str | None = None


class ProofBlock(msgspec.Struct, frozen=True):
    """A sealed block, and its inclusion proof in the tree that the checkpoint signs."""

    text: str
    proof: list[str]


class ProofLeaf(msgspec.Struct, frozen=True):
    """Where a ledger row stands in its block."""

    transaction_id: str
    block: str
    index: str
    proof: list[str]


class ProofBooks(msgspec.Struct, frozen=True):
    """The sealed blocks that have the rows, under a checkpoint; `key` is the public key of the books."""

    checkpoint: str | None
    key: str | None
    blocks: list[ProofBlock]
    leaves: list[ProofLeaf]


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """The proof of a draw."""

    v: Literal[1] = VERSION
    request: str
    fingerprint: str
    status: str
    odds: ProofOdds | None
    epoch: ProofEpoch | None
    rows: list[ProofRow]
    refund: list[ProofRow]
    result: str | None
    receipts: ProofReceipts
    keys: str | None
    books: ProofBooks | None

    def encode(self) -> bytes:
        """The proof's bytes: JSON without blanks, fields in the order above."""
        return _encode(self)


def row_of(values: Mapping[str, Any]) -> ProofRow:
    """A ledger row with these values of its columns, as storage.ledger reads them."""
    return ProofRow(**{name: _text(name, values[name]) for name in leaves.FIELDS})


class Times(NamedTuple):
    """When an epoch opens and closes, and when its secret was revealed."""

    opens_at: datetime | None
    closes_at: datetime | None
    revealed_at: datetime | None


def epoch_of(name: EpochName, commitment: str, times: Times, secret: bytes | None, anchor: bytes) -> ProofEpoch:
    """A seed epoch as proofs show it."""
    opens, closes, revealed = (None if it is None else time_shown(it) for it in times)
    shown = None if secret is None else secret.hex()
    return ProofEpoch(str(name), commitment, opens, closes, revealed, shown, anchor.hex())


def leaf_in_block(row: ProofRow, block: int, all_leaves: Sequence[bytes]) -> ProofLeaf:
    """Where the row stands among all leaves of its block; raises ValueError if it is not among them."""
    index = all_leaves.index(row.leaf)
    return ProofLeaf(row.transaction_id, str(block), str(index), hexes(inclusion_proof(index, all_leaves)))


def hexes(hashes: Sequence[bytes]) -> list[str]:
    """Hashes as proofs have them."""
    return [it.hex() for it in hashes]


def _text(name: str, value: Any) -> Any:
    """The text of a field in a leaf (books.leaves)."""
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S.%f")
    if isinstance(value, Decimal):
        return f"{value:.2f}"
    return None if value is None and name == "notes" else str(value)


_encode: Final = msgspec.json.Encoder().encode
