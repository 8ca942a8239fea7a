"""The Merkle tree of RFC 6962, section 2.1: roots, inclusion proofs, consistency proofs.

    leaf hash  SHA-256(0x00 ‖ entry)
    node hash  SHA-256(0x01 ‖ left ‖ right)

A tree of n leaves splits at the largest power of two below n. All functions take leaf hashes, not entries. Checking a
proof follows RFC 9162, sections 2.1.3.2 and 2.1.4.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, NamedTuple

HASH_BYTES: Final = 32
NODE_PREFIX: Final = b"\x01"
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()


def leaf_hash(entry: bytes) -> bytes:
    """The leaf hash of an entry."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of the node above two nodes."""
    return hashlib.sha256(NODE_PREFIX + left + right).digest()


def split(leaves: bytes) -> list[bytes]:
    """The leaf hashes in a concatenation of leaf hashes."""
    return [leaves[start : start + HASH_BYTES] for start in range(0, len(leaves), HASH_BYTES)]


def root(leaves: bytes) -> bytes:
    """The root of the tree over these leaf hashes, given as their concatenation: a tree has many.

    Pairs are joined level by level, and a last node without a partner moves up as it is: that is the tree which splits
    at the largest power of two.
    """
    if not leaves:
        return EMPTY_ROOT
    level, pair, sha256 = leaves, 2 * HASH_BYTES, hashlib.sha256
    while len(level) > HASH_BYTES:
        whole = len(level) - len(level) % pair
        nodes = [sha256(NODE_PREFIX + level[start : start + pair]).digest() for start in range(0, whole, pair)]
        level = b"".join(nodes) + level[whole:]
    return level


class Peaks(NamedTuple):
    """A tree that grows at its end, without its leaves: the roots of its perfect subtrees, the largest one first."""

    size: int = 0
    hashes: tuple[bytes, ...] = ()

    def append(self, leaf: bytes) -> Peaks:
        """This tree with one more leaf."""
        hashes, size = [*self.hashes, leaf], self.size
        while size & 1:  # the last subtree has as many leaves as the new one
            right, left = hashes.pop(), hashes.pop()
            hashes.append(node_hash(left, right))
            size >>= 1
        return Peaks(self.size + 1, tuple(hashes))

    @property
    def root(self) -> bytes:
        """The root of the tree."""
        if not self.hashes:
            return EMPTY_ROOT
        top = self.hashes[-1]
        for left in reversed(self.hashes[:-1]):
            top = node_hash(left, top)
        return top


# ---- proofs ----------------------------------------------------------------------------------------------------------


def inclusion_proof(index: int, leaves: Sequence[bytes]) -> list[bytes]:
    """The audit path of the leaf at `index`, from 0; raises ValueError for an index outside of the tree."""
    if not 0 <= index < len(leaves):
        raise ValueError(f"a tree of {len(leaves)} leaves has no leaf {index}")
    if len(leaves) == 1:
        return []
    half = _largest_power_below(len(leaves))
    if index < half:
        return [*inclusion_proof(index, leaves[:half]), _root_of(leaves[half:])]
    return [*inclusion_proof(index - half, leaves[half:]), _root_of(leaves[:half])]


def is_included(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether `proof` shows that the tree of `size` leaves with this root has `leaf` at `index`."""
    if not 0 <= index < size:
        return False
    node, last, found = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if node & 1 or node == last:
            found = node_hash(sibling, found)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        node, last = node >> 1, last >> 1
    return last == 0 and found == root


def consistency_proof(size: int, leaves: Sequence[bytes]) -> list[bytes]:
    """The proof that the tree over the first `size` leaves is the beginning of the tree over all of them.

    Raises ValueError unless 0 < size <= len(leaves).
    """
    if not 0 < size <= len(leaves):
        raise ValueError(f"a tree of {len(leaves)} leaves does not begin with a tree of {size}")
    return _subproof(size, leaves, is_whole=True)


def _subproof(size: int, leaves: Sequence[bytes], *, is_whole: bool) -> list[bytes]:
    """SUBPROOF of RFC 6962; `is_whole` while the first tree is a subtree whose root the verifier has."""
    if size == len(leaves):
        return [] if is_whole else [_root_of(leaves)]
    half = _largest_power_below(len(leaves))
    if size <= half:
        return [*_subproof(size, leaves[:half], is_whole=is_whole), _root_of(leaves[half:])]
    return [*_subproof(size - half, leaves[half:], is_whole=False), _root_of(leaves[:half])]


def is_consistent(first: int, first_root: bytes, second: int, second_root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether `proof` shows that the tree of `second` leaves begins with the tree of `first` leaves."""
    if not 0 < first <= second:
        return False
    if first == second:
        return not proof and first_root == second_root
    path = list(proof) if first & (first - 1) else [first_root, *proof]
    if not path:
        return False
    node, last = first - 1, second - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    before = after = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if node & 1 or node == last:
            before, after = node_hash(sibling, before), node_hash(sibling, after)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            after = node_hash(after, sibling)
        node, last = node >> 1, last >> 1
    return last == 0 and before == first_root and after == second_root


def _root_of(leaves: Sequence[bytes]) -> bytes:
    return root(b"".join(leaves))


def _largest_power_below(count: int) -> int:
    """The largest power of two that is smaller than `count`, for a count of 2 or more."""
    return 1 << (count - 1).bit_length() - 1
