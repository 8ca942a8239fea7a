"""Seed epochs: a secret for each day's draws, which is committed to before the day and revealed after it. Pure, no I/O.

A chain of epochs comes from one master seed, backwards: each secret is the hash of the next epoch's secret.

    master ──HKDF──► secret 3650 ──SHA-256──► secret 3649 ──► … ──► secret 1 ──SHA-256──► anchor (published first)

Who knows the anchor checks any revealed secret by hashing it down, and cannot compute a later one. The commitment of an
epoch is a hash of its own, under a label: the plain hash of a secret *is* the secret of the epoch before, which may
still be open. Draws use a key that is derived from the secret for their campaign. The revealed secrets prove all draws
of their epochs (ARCHITECTURE, Fairness).

Draws of before the epochs have chain 0, epoch 0, and are drawn under the master seed itself.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from functools import lru_cache
from typing import Final, NamedTuple

from tombola.producers.domain.errors import InvalidRequest

EPOCHS: Final = 3650  # in a chain: ten years of days
SECRET_BYTES: Final = 32

_CHAIN_LABEL: Final = b"epochs-1"
_COMMITMENT_LABEL: Final = b"tombola-commitment-1"
_DRAW_LABEL: Final = b"draw"
_is_name = re.compile(r"(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})").fullmatch


class EpochName(NamedTuple):
    """Which epoch of which chain; `1.17` as text. Chains count from 1, and so do the epochs of a chain."""

    chain: int
    epoch: int

    def __str__(self) -> str:
        return f"{self.chain}.{self.epoch}"

    @property
    def is_before_epochs(self) -> bool:
        """Whether draws of this epoch were drawn under the master seed itself."""
        return self == BEFORE_EPOCHS


BEFORE_EPOCHS: Final = EpochName(0, 0)


def parse_epoch_name(text: str) -> EpochName:
    """The name that is written `text`; raises InvalidRequest for other text."""
    found = _is_name(text)
    if found is None:
        raise InvalidRequest(f"the name of an epoch is its chain and its number, as 1.17: {text!r:.40}")
    return EpochName(int(found[1]), int(found[2]))


@lru_cache(maxsize=64)
def secret_of(master: bytes, epoch: int) -> bytes:
    """The secret of an epoch from 1 to EPOCHS, or with 0 the anchor of the chain; 32 bytes."""
    if not 0 <= epoch <= EPOCHS:
        raise ValueError(f"a chain has the epochs 1 to {EPOCHS}, not {epoch}")
    return hashed_down(_hkdf(master, _CHAIN_LABEL), EPOCHS - epoch)


def anchor_of(master: bytes) -> bytes:
    """What the chain of this master seed hashes down to; 32 bytes, to be published."""
    return secret_of(master, 0)


def hashed_down(secret: bytes, steps: int) -> bytes:
    """The secret of `steps` epochs before; the anchor after as many steps as the epoch's number."""
    for _ in range(steps):
        secret = hashlib.sha256(secret).digest()
    return secret


def commitment_of(secret: bytes) -> str:
    """What is published of an epoch before it opens: 64 hex digits, which bind its secret and say nothing about it."""
    return hashlib.sha256(_COMMITMENT_LABEL + secret).hexdigest()


@lru_cache(maxsize=256)
def draw_key(secret: bytes, campaign: str) -> bytes:
    """The key under which the draws of a campaign are drawn in the epoch of this secret; 32 bytes."""
    return _hkdf(secret, _DRAW_LABEL + campaign.encode())


def _hkdf(key: bytes, info: bytes) -> bytes:
    """32 bytes by HKDF-SHA256 without salt (RFC 5869): one block of its expansion."""
    extracted = hmac.digest(bytes(SECRET_BYTES), key, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")
