"""Seed epochs: the derivations are those of their sources, and a revealed secret says nothing about later ones."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tombola.producers.domain import seeds
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.seeds import BEFORE_EPOCHS, EPOCHS, EpochName, parse_epoch_name

MASTER = bytes(range(32))


def _derived(key: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=None, info=info).derive(key)


def test_the_last_secret_and_the_keys_of_draws_are_hkdf_by_the_book() -> None:
    assert seeds.secret_of(MASTER, EPOCHS) == _derived(MASTER, b"epochs-1")
    secret = seeds.secret_of(MASTER, 17)
    assert seeds.draw_key(secret, "winter-2026") == _derived(secret, b"drawwinter-2026")
    assert seeds.draw_key(secret, "winter-2026") != seeds.draw_key(secret, "default")


def test_each_secret_is_the_hash_of_the_next_down_to_the_anchor() -> None:
    for epoch in (0, 1, 2, EPOCHS - 1):
        assert seeds.secret_of(MASTER, epoch) == hashlib.sha256(seeds.secret_of(MASTER, epoch + 1)).digest()
    assert seeds.hashed_down(seeds.secret_of(MASTER, 17), 17) == seeds.anchor_of(MASTER)
    assert seeds.hashed_down(seeds.secret_of(MASTER, 17), 5) == seeds.secret_of(MASTER, 12)


def test_a_commitment_is_not_the_secret_of_the_epoch_before() -> None:
    secret = seeds.secret_of(MASTER, 17)
    assert seeds.commitment_of(secret) == hashlib.sha256(b"tombola-commitment-1" + secret).hexdigest()
    assert seeds.commitment_of(secret) != seeds.secret_of(MASTER, 16).hex()


def test_the_vectors_of_this_construction() -> None:
    """Fixed for ever: revealed secrets of years ago must still prove their draws."""
    secret = seeds.secret_of(MASTER, 17)
    assert (secret.hex(), seeds.anchor_of(MASTER).hex(), seeds.commitment_of(secret)) == (
        "51e7634429316903f35a3665200969dbb758eedaa6dd2878a0c5d6485cbdced7",
        "9f5d3936122fa08e3df4e6f5634aaae70c99664281483fc5310594086a23a48f",
        "ebbb7015f2e71490eae28bbf64e55c5d072b160686522c85a88270436eaa95b9",
    )
    assert seeds.draw_key(secret, "default").hex() == "6fa83cf0a7134f361e7ea85b08892d5bcfab7b15758180a31729e671a15ba51f"


@pytest.mark.parametrize("epoch", [-1, EPOCHS + 1])
def test_a_chain_has_an_end(epoch: int) -> None:
    with pytest.raises(ValueError, match="the epochs 1 to 3650"):
        seeds.secret_of(MASTER, epoch)


def test_names() -> None:
    assert str(EpochName(1, 17)) == "1.17"
    assert parse_epoch_name("1.17") == EpochName(1, 17)
    assert parse_epoch_name("0.0") == BEFORE_EPOCHS
    assert BEFORE_EPOCHS.is_before_epochs
    assert not EpochName(1, 1).is_before_epochs


@pytest.mark.parametrize(
    "text", ["", "1", "1.", ".1", "01.1", "1.01", "1.1.1", "-1.1", "1.1 ", "1.１", "1.1234567", "a.b"]
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"as 1\.17"):
        parse_epoch_name(text)
