"""Read the sealed books: blocks, the house's balances, the last checkpoint. worker.books writes them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, and_, func, select

from tombola.producers.domain.books.blocks import Block
from tombola.producers.domain.books.house import HouseAccount
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


def _sealed(row: Any) -> Sealed:
    block = Block(row.number, row.first_id, row.last_id, row.row_count, row.root, row.sums, row.previous)
    return Sealed(block, row.hash, row.sealed_at)
