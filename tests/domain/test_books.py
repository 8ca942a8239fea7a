"""Sealed books, pure: leaves, the Merkle tree, the house's side, blocks, checkpoints; beside naive readings of each."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from decimal import Decimal

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from tombola.producers.domain import operations
from tombola.producers.domain.books import checkpoints, house, merkle
from tombola.producers.domain.books.blocks import NO_BLOCK, Block, read_sums, written_sums
from tombola.producers.domain.books.checkpoints import Head, PrivateKey, PublicKey, WrongKey
from tombola.producers.domain.books.house import Group
from tombola.producers.domain.books.leaves import FIELDS, leaf
from tombola.producers.domain.books.merkle import Peaks
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage.schema import asset_transactions

# ---- leaves ----------------------------------------------------------------------------------------------------------

ROW = (
    *("42", "6", "-1.00", "10.00", "9.00", "2026-01-31 23:59:59.000250", "2026-01-31 23:59:59.000250"),
    *("s-1", "s-1", "d-1:consume", "lottery_consume", "POINT", "odds=a seed=b"),
)


def test_a_leaf_covers_every_column_of_the_ledger() -> None:
    assert sorted(asset_transactions.columns.keys()) == sorted(FIELDS)


def test_a_leaf_is_what_its_description_says() -> None:
    said = (
        b"\x00|42|6|-1.00|10.00|9.00|2026-01-31 23:59:59.000250|2026-01-31 23:59:59.000250"
        b"|3|s-1|3|s-1|11|d-1:consume|15|lottery_consume|5|POINT|13|odds=a seed=b"
    )
    assert leaf(ROW) == hashlib.sha256(said).digest()
    assert leaf([*ROW[:-1], None]) == hashlib.sha256(said.removesuffix(b"13|odds=a seed=b") + b"-|").digest()
    assert leaf([*ROW[:-1], ""]) == hashlib.sha256(said.removesuffix(b"13|odds=a seed=b") + b"0|").digest()
    assert leaf([None, *ROW[1:]]) == hashlib.sha256(said.replace(b"|42|", b"||", 1)).digest()


NUMBER_TEXTS = st.one_of(st.none(), st.from_regex(r"-?[0-9]{1,8}(\.[0-9]{2})?", fullmatch=True))
TEXT_TEXTS = st.one_of(st.none(), st.text(alphabet=st.sampled_from("|-0123a"), max_size=8), st.text())


@given(st.tuples(*([NUMBER_TEXTS] * 7 + [TEXT_TEXTS] * 6)), st.data())
def test_rows_that_differ_have_leaves_that_differ(texts: tuple[str | None, ...], data: st.DataObject) -> None:
    """Also where a piece of text moves from one field to the next, or looks like what stands between fields."""
    other = list(texts)
    at = data.draw(st.integers(7, 11))
    both = (texts[at] or "") + (texts[at + 1] or "")
    cut = data.draw(st.integers(0, len(both)))
    other[at], other[at + 1] = both[:cut], both[cut:]
    assert (leaf(texts) == leaf(other)) == (list(texts) == other)
    changed = list(texts)
    at = data.draw(st.integers(0, 12))
    changed[at] = data.draw(NUMBER_TEXTS if at < 7 else TEXT_TEXTS)
    assert (leaf(texts) == leaf(changed)) == (list(texts) == changed)


def test_text_is_hashed_as_utf_8() -> None:
    said = b"\x00" + b"|1" * 7 + (b"|9|" + "ü€😀".encode()) * 6
    assert leaf(["1"] * 7 + ["ü€😀"] * 6) == hashlib.sha256(said).digest()


# ---- the Merkle tree -------------------------------------------------------------------------------------------------

# The leaves and roots of the reference implementation's tests (Certificate Transparency, merkle_tree_test).
KNOWN_LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
KNOWN_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
_A, _B, _C = (
    "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
    "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
)
_BC = "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"
KNOWN_INCLUSION = {
    (0, 1): [],
    (0, 8): ["96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7", _A, _B],
    (5, 8): [_BC, _C, KNOWN_ROOTS[4]],
    (2, 3): [KNOWN_ROOTS[2]],
    (1, 5): [KNOWN_ROOTS[1], _A, _BC],
}
KNOWN_CONSISTENCY = {
    (1, 1): [],
    (1, 8): ["96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7", _A, _B],
    (6, 8): ["0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a", _C, KNOWN_ROOTS[4]],
    (2, 5): [_A, _BC],
}


def known(count: int) -> list[bytes]:
    return [merkle.leaf_hash(bytes.fromhex(it)) for it in KNOWN_LEAVES[:count]]


def naive_root(leaves: Sequence[bytes]) -> bytes:
    """MTH of RFC 6962, section 2.1, word by word; on leaf hashes."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + naive_root(leaves[:k]) + naive_root(leaves[k:])).digest()


def naive_path(m: int, leaves: Sequence[bytes]) -> list[bytes]:
    """PATH of RFC 6962, section 2.1.1."""
    if len(leaves) == 1:
        return []
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    if m < k:
        return [*naive_path(m, leaves[:k]), naive_root(leaves[k:])]
    return [*naive_path(m - k, leaves[k:]), naive_root(leaves[:k])]


@pytest.mark.parametrize("count", range(9))
def test_roots_are_those_of_the_reference_implementation(count: int) -> None:
    peaks = Peaks()
    for it in known(count):
        peaks = peaks.append(it)
    assert merkle.root(b"".join(known(count))).hex() == peaks.root.hex() == KNOWN_ROOTS[count]
    assert peaks.size == count


@pytest.mark.parametrize(("index", "size"), KNOWN_INCLUSION)
def test_inclusion_proofs_are_those_of_the_reference_implementation(index: int, size: int) -> None:
    proof = merkle.inclusion_proof(index, known(size))
    assert [it.hex() for it in proof] == KNOWN_INCLUSION[index, size]
    assert merkle.is_included(known(size)[index], index, size, proof, bytes.fromhex(KNOWN_ROOTS[size]))


@pytest.mark.parametrize(("first", "second"), KNOWN_CONSISTENCY)
def test_consistency_proofs_are_those_of_the_reference_implementation(first: int, second: int) -> None:
    proof = merkle.consistency_proof(first, known(second))
    roots = [bytes.fromhex(KNOWN_ROOTS[it]) for it in (first, second)]
    assert [it.hex() for it in proof] == KNOWN_CONSISTENCY[first, second]
    assert merkle.is_consistent(first, roots[0], second, roots[1], proof)


LEAVES = st.lists(st.binary(max_size=4).map(merkle.leaf_hash), min_size=1, max_size=70)


@given(LEAVES)
def test_any_root_is_the_naive_one(leaves: list[bytes]) -> None:
    peaks = Peaks()
    for it in leaves:
        peaks = peaks.append(it)
    assert merkle.root(b"".join(leaves)) == peaks.root == naive_root(leaves)
    assert merkle.split(b"".join(leaves)) == leaves


@given(LEAVES, st.data())
def test_any_leaf_is_proven_and_no_other_one(leaves: list[bytes], data: st.DataObject) -> None:
    index, root = data.draw(st.integers(0, len(leaves) - 1)), naive_root(leaves)
    proof = merkle.inclusion_proof(index, leaves)
    assert proof == naive_path(index, leaves)
    assert merkle.is_included(leaves[index], index, len(leaves), proof, root)
    assert not merkle.is_included(merkle.leaf_hash(b"another one"), index, len(leaves), proof, root)
    assert not merkle.is_included(leaves[index], index, len(leaves), proof, merkle.leaf_hash(b"another root"))
    assert not merkle.is_included(leaves[index], index, len(leaves), [*proof, root], root)
    assert not merkle.is_included(leaves[index], len(leaves), len(leaves), proof, root)
    if proof:
        assert not merkle.is_included(leaves[index], index, len(leaves), proof[:-1], root)


@given(LEAVES, st.data())
def test_any_tree_begins_with_its_smaller_ones_and_no_other(leaves: list[bytes], data: st.DataObject) -> None:
    first, second = data.draw(st.integers(1, len(leaves))), len(leaves)
    proof = merkle.consistency_proof(first, leaves)
    roots = naive_root(leaves[:first]), naive_root(leaves)
    other = merkle.leaf_hash(b"another root")
    assert merkle.is_consistent(first, roots[0], second, roots[1], proof)
    assert not merkle.is_consistent(first, other, second, roots[1], proof)
    assert not merkle.is_consistent(first, roots[0], second, other, proof)
    assert not merkle.is_consistent(first, roots[0], second, roots[1], [*proof, other])
    if proof:
        assert not merkle.is_consistent(first, roots[0], second, roots[1], proof[:-1])
        assert not merkle.is_consistent(first, roots[0], second, roots[1], [other, *proof[1:]])


def test_outside_of_a_tree_nothing_is_proven() -> None:
    for index in (-1, 8):
        with pytest.raises(ValueError, match="has no leaf"):
            merkle.inclusion_proof(index, known(8))
    for size in (0, 9):
        with pytest.raises(ValueError, match="does not begin"):
            merkle.consistency_proof(size, known(8))
    assert not merkle.is_consistent(0, merkle.EMPTY_ROOT, 8, naive_root(known(8)), [])


# ---- the house -------------------------------------------------------------------------------------------------------

RULES = operations.house_accounts()


def group(business_type: str, delta: str, *, campaign: str = "", channel: str = "", is_old: bool = False) -> Group:
    return Group(business_type, "POINT", campaign, channel, is_old, Decimal(delta))


@pytest.mark.parametrize(
    ("rows", "account"),
    [
        (group("lottery_consume", "-1", campaign="spring"), "house/spring/sales"),
        (group("lottery_consume", "-1"), "house/default/sales"),
        (group("lottery_reward", "5", campaign="spring"), "house/spring/prizes"),
        (group("lottery_item", "1", campaign="spring"), "house/spring/prizes"),
        (group("lottery_coupon", "1", campaign="spring"), "house/spring/prizes"),
        (group("lottery_notice", "0", campaign="spring"), ""),
        (group("recharge", "10"), "house/issued"),
        (group("recharge", "10", channel="stripe"), "house/issued/stripe"),
        (group("recharge", "10", channel="a/b"), "house/issued"),
        (group("recharge", "10", channel="x" * 65), "house/issued"),
        (group("transfer_out", "-1"), ""),
        (group("transfer_in", "1"), ""),
        (group("refund", "1", campaign="spring"), "house/spring/sales"),
        (group("refund_reward", "-5", campaign="spring"), "house/spring/prizes"),
        (group("adjustment", "1"), "house/adjustments"),
        (group("expiry", "-1"), "house/breakage"),
        (group("hold", "-1"), "house/holds"),
        (group("hold_post", "1"), "house/holds"),
        (group("hold_void", "1"), "house/holds"),
        (group("purchase", "-1"), "house/purchases"),
        (group("gift", "1"), "house/unknown"),
        (group("gift", "1", is_old=True), "house/legacy"),
        (group("lottery_consume", "-1", is_old=True), "house/default/sales"),
    ],
)
def test_every_row_has_its_other_side(rows: Group, account: str) -> None:
    assert house.account_of(rows, RULES, "default") == account


def test_the_house_gives_what_users_get() -> None:
    rows = [
        group("recharge", "10.00"),
        group("lottery_consume", "-1.00"),
        group("lottery_consume", "-0.50", campaign="default"),
        group("lottery_reward", "5.00"),
        group("transfer_out", "-2.00"),
        group("transfer_in", "2.00"),
        group("hold", "-1.00"),
        group("hold_void", "1.00"),
    ]
    sums = house.sums(rows, RULES, "default")
    assert sums == {
        ("house/default/prizes", "POINT"): Decimal("-5.00"),
        ("house/default/sales", "POINT"): Decimal("1.50"),
        ("house/issued", "POINT"): Decimal("-10.00"),
    }
    assert sum(sums.values()) + sum(it.delta for it in rows) == 0


@pytest.mark.parametrize(
    ("notes", "channel"),
    [
        (None, ""), ("", ""), ("on record", ""), ("channel=", ""), ("channel=stripe", "stripe"),
        ("channel=stripe reference=x channel=y", "stripe"), ("reference=channel=a channel=b", ""), ("Channel=a", ""),
    ],
)  # fmt: skip
def test_the_channel_stands_at_the_beginning_of_the_notes(notes: str | None, channel: str) -> None:
    assert house.channel_of(notes) == channel


# ---- blocks ----------------------------------------------------------------------------------------------------------

BLOCK = Block(2, 11, 20, 9, "ab" * 32, '{"house/issued":{"POINT":"-10.00"}}', "cd" * 32)


def test_a_block_is_hashed_as_described() -> None:
    text = "\n".join(["tombola block 1", "2", "11", "20", "9", "ab" * 32, BLOCK.sums, "cd" * 32, ""])
    assert BLOCK.hash == hashlib.sha256(b"\x00" + text.encode()).hexdigest()
    others = [Block._make((*BLOCK[:at], "x", *BLOCK[at + 1 :])) for at in range(len(BLOCK))]
    assert len({it.hash for it in [BLOCK, *others]}) == 1 + len(Block._fields)
    assert len(NO_BLOCK) == len(BLOCK.hash)


def test_sums_are_one_text() -> None:
    moved = {("house/b", "POINT"): Decimal("1.50"), ("house/a", "POINT"): Decimal(-3), ("house/b", "COIN"): Decimal(2)}
    text = written_sums(moved)
    assert text == '{"house/a":{"POINT":"-3.00"},"house/b":{"COIN":"2.00","POINT":"1.50"}}'
    assert read_sums(text) == moved
    assert written_sums({}) == "{}"
    for garbage in ("", "[]", "[1]", '{"house/a":1}', '{"house/a":{"POINT":"x"}}', '{"house/a":{"POINT":null}}'):
        with pytest.raises(ValueError):  # noqa: PT011 - JSON's own error among them
            read_sums(garbage)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

# The key and the note of Go's golang.org/x/mod/sumdb/note, in its tests.
GO_PUBLIC = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_PRIVATE = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
GO_TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
GO_SIGNATURE = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
ROOT = merkle.leaf_hash(b"a head")


@pytest.fixture(scope="module")
def key() -> PrivateKey:
    return PrivateKey.make("shop.example/books")


def test_keys_are_those_of_go() -> None:
    private = PrivateKey.read(GO_PRIVATE)
    assert private.public == PublicKey.read(GO_PUBLIC)
    assert (private.text, private.public.text) == (GO_PRIVATE, GO_PUBLIC)
    assert private.public.id.hex() == "c74f20a3"
    assert GO_PRIVATE[-20:] not in repr(private)
    signature = Ed25519PrivateKey.from_private_bytes(private.raw).sign(GO_TEXT.encode())
    assert base64.b64encode(private.public.id + signature).decode() == GO_SIGNATURE


def test_a_checkpoint_reads_as_its_format_says(key: PrivateKey) -> None:
    """By another reading of C2SP's tlog-checkpoint and signed-note than our own."""
    note = key.sign(20852, ROOT)
    text, signatures = note.split("\n\n")
    origin, size, root = text.split("\n")
    assert (origin, int(size), base64.b64decode(root, validate=True)) == (key.name, 20852, ROOT)
    dash, name, encoded = signatures.removesuffix("\n").split(" ")
    assert (dash, name) == ("\u2014", origin)
    signature = base64.b64decode(encoded, validate=True)
    _, key_id, public = key.public.text.split("+", 2)
    raw = base64.b64decode(public, validate=True)
    assert (raw[0], len(raw), len(signature)) == (1, 33, 4 + 64)
    assert signature[:4].hex() == key_id == hashlib.sha256(origin.encode() + b"\n" + raw).hexdigest()[:8]
    Ed25519PublicKey.from_public_bytes(raw[1:]).verify(signature[4:], f"{text}\n".encode())
    assert note == key.sign(20852, ROOT)


def test_a_checkpoint_is_verified(key: PrivateKey) -> None:
    note = key.sign(3, ROOT)
    assert checkpoints.read(note, key.public) == Head(key.name, 3, ROOT)
    witnessed = f"{note}\u2014 witness.example/w {base64.b64encode(b'x' * 76).decode()}\n"
    assert checkpoints.read(witnessed, key.public) == Head(key.name, 3, ROOT)
    other = PrivateKey.make(key.name)
    for spoilt in (note.replace("\n3\n", "\n4\n"), note.replace(key.name, "evil.example/books", 1)):
        with pytest.raises(WrongKey):
            checkpoints.read(spoilt, key.public)
    with pytest.raises(WrongKey, match=r"no signature of the key shop.example/books\+"):
        checkpoints.read(note, other.public)


def test_a_note_of_another_origin_is_refused(key: PrivateKey) -> None:
    head = Head("other.example/books", 3, ROOT)
    signature = Ed25519PrivateKey.from_private_bytes(key.raw).sign(head.text.encode())
    line = f"\u2014 {key.name} {base64.b64encode(key.public.id + signature).decode()}\n"
    with pytest.raises(WrongKey, match="another origin"):
        checkpoints.read(f"{head.text}\n{line}", key.public)


@given(st.text(max_size=300))
def test_no_garbage_is_a_checkpoint(text: str) -> None:
    with pytest.raises(InvalidRequest):
        checkpoints.read(text, PublicKey.read(GO_PUBLIC))


@pytest.mark.parametrize("size", ["-1", "01", "1e3", "", " 1", "١", "9" * 20])
def test_a_size_has_one_spelling(key: PrivateKey, size: str) -> None:
    with pytest.raises(InvalidRequest):
        checkpoints.read(key.sign(3, ROOT).replace("\n3\n", f"\n{size}\n"), key.public)


@given(st.data())
def test_a_key_with_a_wrong_character_is_refused(data: st.DataObject) -> None:
    for text, read in ((GO_PUBLIC, PublicKey.read), (GO_PRIVATE, PrivateKey.read)):
        at = data.draw(st.integers(0, len(text) - 1))
        spoilt = text[:at] + data.draw(st.sampled_from([it for it in "aB3+/= " if it != text[at]])) + text[at + 1 :]
        with pytest.raises(InvalidRequest) as refusal:
            read(spoilt)
        assert GO_PRIVATE[-20:] not in str(refusal.value)


@pytest.mark.parametrize("name", ["", "two words", "a+b", "line\nfeed", "x" * 201, "a\u00a0b"])
def test_a_name_that_cannot_be_an_origin_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="a key's name"):
        PrivateKey.make(name)


def test_sums_stay_within_ascii() -> None:
    assert json.loads(written_sums({("house/ü", "POINT"): Decimal(1)})) == {"house/ü": {"POINT": "1.00"}}
    assert written_sums({("house/ü", "POINT"): Decimal(1)}).isascii()
