"""Read the sealed books: blocks, the house's balances, the last checkpoint, proofs. worker.books writes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, and_, func, select

from tombola.producers.domain.books.blocks import Block
from tombola.producers.domain.books.house import HouseAccount
from tombola.producers.domain.books.merkle import inclusion_proof, is_included, root
from tombola.producers.storage.schema import books_blocks as blocks
from tombola.producers.storage.schema import books_head as head
from tombola.producers.storage.schema import books_house as house

HEAD: Final = "head"


class Sealed(NamedTuple):
    """A block as it is stored: `hash` is what the row says, which verification compares with `block.hash`."""

    block: Block
    hash: str
    sealed_at: datetime


def last_sealed(connection: Connection) -> Sealed | None:
    """The block with the highest number; None where nothing is sealed."""
    row = connection.execute(select(blocks).order_by(blocks.c.number.desc()).limit(1)).first()
    return None if row is None else _sealed(row)


def sealed_from(connection: Connection, number: int, *, rows_max: int) -> list[Sealed]:
    """Up to `rows_max` blocks from this number on, in their order."""
    query = select(blocks).where(blocks.c.number >= number).order_by(blocks.c.number).limit(rows_max)
    return [_sealed(row) for row in connection.execute(query)]


def block_with(connection: Connection, transaction_id: int) -> Sealed | None:
    """The block that covers this ledger row; None before the row is sealed."""
    query = select(blocks).where(blocks.c.last_id >= transaction_id).order_by(blocks.c.last_id).limit(1)
    row = connection.execute(query).first()
    return None if row is None or row.first_id > transaction_id else _sealed(row)


def block_hashes(connection: Connection) -> Iterator[tuple[int, str]]:
    """Number and stored hash of every block, in their order."""
    rows = connection.execute(select(blocks.c.number, blocks.c.hash).order_by(blocks.c.number))
    yield from ((number, hash) for number, hash in rows)


def house_balances(connection: Connection) -> dict[HouseAccount, Decimal]:
    """The balance of each house account after the last block, by account and asset."""
    last = (
        select(house.c.account, house.c.asset_code, func.max(house.c.block).label("block"))
        .group_by(house.c.account, house.c.asset_code)
        .subquery()
    )
    is_last = and_(
        house.c.block == last.c.block, house.c.account == last.c.account, house.c.asset_code == last.c.asset_code
    )
    rows = connection.execute(select(house.c.account, house.c.asset_code, house.c.balance).join(last, is_last))
    return {(account, asset_code): balance for account, asset_code, balance in rows}


def latest_checkpoint(connection: Connection) -> str | None:
    """The last signed head, as text; None where no key signs."""
    note: str | None = connection.execute(select(head.c.checkpoint).where(head.c.name == HEAD)).scalar()
    return note


TILE: Final = 1024  # blocks


class BlockTree:
    """Inclusion proofs of blocks in the tree over all blocks, whose root a checkpoint signs. Safe to share.

    Blocks never change, so the roots of whole tiles of TILE blocks are kept: a process reads each block once, and then
    for each proof the hashes of two tiles at most.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tiles: list[bytes] = []

    def proof(self, connection: Connection, number: int, size: int, head: bytes) -> list[bytes]:
        """The proof that block `number` is in the tree of `size` blocks with the root `head`, 1 <= number <= size.

        Where the stored blocks are not the signed ones, the proof does not hold: `tombola books verify` tells.
        """
        with self._lock:
            leaf, found = self._proof(connection, number, size)
            if not is_included(leaf, number - 1, size, found, head):
                self._tiles.clear()  # of a database that was restored since
                leaf, found = self._proof(connection, number, size)
            return found

    def _proof(self, connection: Connection, number: int, size: int) -> tuple[bytes, list[bytes]]:
        whole = size // TILE
        while len(self._tiles) < whole:
            self._tiles.append(root(b"".join(_tile(connection, len(self._tiles), size))))
        at, inside = divmod(number - 1, TILE)
        tile = _tile(connection, at, size)
        tiles = self._tiles[:whole]
        if size % TILE:
            tiles = [*tiles, root(b"".join(tile if at == whole else _tile(connection, whole, size)))]
        if inside >= len(tile):
            return b"", []
        return tile[inside], [*inclusion_proof(inside, tile), *inclusion_proof(at, tiles)]


def _tile(connection: Connection, at: int, size: int) -> list[bytes]:
    """The hashes of the blocks of tile `at`, counted from 0, of the first `size` blocks."""
    is_in = and_(blocks.c.number > at * TILE, blocks.c.number <= min((at + 1) * TILE, size))
    rows = connection.execute(select(blocks.c.hash).where(is_in).order_by(blocks.c.number))
    return [bytes.fromhex(hash) for (hash,) in rows]


def _sealed(row: Any) -> Sealed:
    block = Block(row.number, row.first_id, row.last_id, row.row_count, row.root, row.sums, row.previous)
    return Sealed(block, row.hash, row.sealed_at)
