"""Sealed blocks beside what they were sealed from (I9): a sealed row that was changed, is gone, or appeared later.

`check_blocks` reads the ledger as it is now, block by block, each in a transaction of its own: what it says of a block
stays true, since a sealed range never changes. It can go on from any block.

    number, range     each block begins where the one before ended
    hash, previous    each hash covers its block, and the hash of the block before
    rows              count, Merkle root and sums of the range are what was sealed
    house             books_house says what the sums say, and its balances go on from block to block
    head              the tree over all blocks is the one that the head signs; from block 1 only

Whoever can write the whole database can also make a new chain that holds: worker.books.anchors finds that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Engine, or_, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain import operations
from tombola.producers.domain.books import house as house_side
from tombola.producers.domain.books import merkle
from tombola.producers.domain.books.blocks import NO_BLOCK, Block, read_sums
from tombola.producers.domain.books.house import HouseAccount, Rules
from tombola.producers.domain.books.merkle import Peaks
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN
from tombola.producers.storage import books
from tombola.producers.storage.books import Sealed
from tombola.producers.storage.faults import explain
from tombola.producers.storage.ledger_leaves import Range
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.schema import books_house
from tombola.worker.books import head as heads
from tombola.worker.books import rows
from tombola.worker.books.sealing import FIRST_ID
from tombola.worker.ledger.old_rows import OldRows

BLOCKS_AT_ONCE: Final = 100
SUSPECTS_MAX: Final = 5


class Tampering(NamedTuple):
    """A sealed block that is not what it was sealed from. `subject` names the block, or a ledger row of it."""

    block: int
    subject: str
    what: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.what}"


def check_blocks(
    engine: Engine,
    *,
    from_block: int = 1,
    to_block: int | None = None,
    rules: Rules | None = None,
    on_block: Callable[[Block], None] = lambda _block: None,
) -> Iterator[Tampering]:
    """Check the blocks from `from_block` to `to_block` (None: the last one), and yield what is wrong.

    `on_block` is called with each block that was checked, wrong or not: a later call goes on behind it. With
    `from_block` above 1, the block before is taken as it stands, and its absence is tampering. Raises
    ServiceUnavailable or ConfigurationError when the database cannot be read.
    """
    try:
        walk = _Walk(engine, operations.house_accounts() if rules is None else rules, from_block)
        yield from walk.begin()
        while some := walk.read(to_block):
            for sealed in some:
                yield from walk.check(sealed)
                on_block(sealed.block)
        if from_block == 1 and to_block is None:
            yield from walk.end()
    except SQLAlchemyError as error:
        raise explain(error) from error


class _Walk:
    """A walk along the chain: what the block before said."""

    def __init__(self, engine: Engine, rules: Rules, from_block: int) -> None:
        self._engine = engine
        self._rules = rules
        self._next = from_block
        self._before: Sealed | None = None
        self._is_whole = from_block == 1
        self._balances: dict[HouseAccount, Decimal] = {}
        self._peaks = Peaks()
        self._root_at_head = b""

    def _open(self) -> Any:
        return self._engine.connect().execution_options(read_only=True)

    def begin(self) -> Iterator[Tampering]:
        """Read the block before the first one; rows with ids before all blocks are tampering as well."""
        with self._open() as connection:
            self._old = OldRows.of(connection)
            self._head = heads.read(connection)
            before_all = _ids(connection, transactions.c.transaction_id < FIRST_ID) if self._is_whole else []
            found = books.sealed_from(connection, self._next - 1, rows_max=1)
        for id in before_all:
            yield Tampering(1, f"transaction {id}", "its id lies before all blocks")
        if self._is_whole:
            return
        if found and found[0].block.number == self._next - 1:
            self._before = found[0]
        else:
            number = self._next - 1
            yield Tampering(number, f"block {number}", "was sealed, and is gone")

    def read(self, to_block: int | None) -> list[Sealed]:
        """The next blocks up to `to_block`; empty at the end."""
        with self._open() as connection:
            found = books.sealed_from(connection, self._next, rows_max=BLOCKS_AT_ONCE)
        if found:
            self._next = found[-1].block.number + 1
        return [it for it in found if to_block is None or it.block.number <= to_block]

    def check(self, sealed: Sealed) -> Iterator[Tampering]:
        """Check a block beside the one before, its rows, and the house's accounts."""
        number, subject = sealed.block.number, f"block {sealed.block.number}"
        with self._open() as connection:  # closed before anything is yielded: whoever reads on may take a while
            found = [Tampering(number, subject, what) for what in self._links(sealed)]
            found += self._rows(connection, sealed)
            found += [Tampering(number, subject, what) for what in self._house(connection, sealed.block)]
        yield from found
        self._before = sealed
        self._peaks = self._peaks.append(_bytes(sealed.hash))
        if sealed.block.number == self._head.peaks.size:
            self._root_at_head = self._peaks.root

    def _links(self, sealed: Sealed) -> Iterator[str]:
        block, before = sealed.block, self._before
        if block.hash != sealed.hash:
            yield "its hash is not that of its content"
        if before is None:
            if block.number == 1 and (block.first_id, block.previous) != (FIRST_ID, NO_BLOCK):
                yield f"is the first one, and begins at transaction {block.first_id} after {block.previous:.16}"
            elif block.number != 1:
                yield "is the first one that is left: the blocks before are gone"
            return
        if block.number != before.block.number + 1:
            yield f"follows block {before.block.number}: the blocks between are gone"
        if block.first_id != before.block.last_id + 1:
            yield f"begins at transaction {block.first_id}, the block before ended at {before.block.last_id}"
        if block.previous != before.hash:
            yield "does not name the hash of the block before"

    def _rows(self, connection: Connection, sealed: Sealed) -> Iterator[Tampering]:
        block = sealed.block
        ids = Range(block.first_id, block.last_id)
        hashed, wrong = rows.read_leaves(connection, ids, self._old), ""
        if hashed.row_count > block.row_count:
            wrong = f"{hashed.row_count - block.row_count:,} rows appeared after it was sealed"
        elif hashed.row_count < block.row_count:
            wrong = f"{block.row_count - hashed.row_count:,} of {block.row_count:,} sealed rows are gone"
        elif merkle.root(hashed.whole()).hex() != block.root:
            wrong = "a row is not what was sealed"
        if wrong:
            subject = f"block {block.number}, transactions {ids.first_id} to {ids.last_id}"
            yield Tampering(block.number, subject, wrong)
            for id in _suspects(connection, ids, sealed):
                yield Tampering(block.number, f"transaction {id}", "was written or changed after its block was sealed")
        groups = rows.read_groups(connection, ids, self._rules, self._old)
        yield from self._sums(block, house_side.sums(groups, self._rules, DEFAULT_CAMPAIGN.name))

    def _sums(self, block: Block, found: dict[HouseAccount, Decimal]) -> Iterator[Tampering]:
        subject = f"block {block.number}"
        try:
            said = read_sums(block.sums)
        except ValueError as error:
            yield Tampering(block.number, subject, str(error))
            return
        for key in sorted(said.keys() | found.keys()):
            if said.get(key, 0) != found.get(key, 0):
                account, asset_code = key
                what = f"{account} moved {found.get(key, Decimal(0)):.2f} {asset_code} by its rows, "
                yield Tampering(block.number, subject, f"{what}{said.get(key, Decimal(0)):.2f} were sealed")

    def _house(self, connection: Connection, block: Block) -> Iterator[str]:
        """The rows of books_house: what the block's sums say, and balances that go on."""
        try:
            said = read_sums(block.sums)
        except ValueError:
            return  # _sums says so
        query = select(books_house).where(books_house.c.block == block.number)
        written = {(row.account, row.asset_code): row for row in connection.execute(query)}
        if {key: row.delta for key, row in written.items()} != said:
            yield "books_house does not say what its sums say"
        for key, row in written.items():
            before = self._balances.get(key, Decimal(0) if self._is_whole else row.balance - row.delta)
            if before + row.delta != row.balance:
                account, asset_code = key
                yield f"{account} has {row.balance} {asset_code} in books_house, and {before} {row.delta:+} before it"
            self._balances[key] = row.balance

    def end(self) -> Iterator[Tampering]:
        """The head, as it stood when the walk began: the tree over all blocks up to it."""
        size, number = self._head.peaks.size, 0 if self._before is None else self._before.block.number
        if size > number:
            yield Tampering(number, "the head", f"has seen {size} blocks, {number} are left")
        elif size and self._root_at_head != self._head.peaks.root:
            yield Tampering(size, "the head", "is of another chain than these blocks")


def _ids(connection: Connection, condition: Any) -> list[int]:
    query = select(transactions.c.transaction_id).where(condition).order_by(transactions.c.transaction_id)
    return list(connection.execute(query.limit(SUSPECTS_MAX)).scalars())


def _suspects(connection: Connection, ids: Range, sealed: Sealed) -> list[int]:
    """Rows of a spoilt block that say themselves that they are younger than the block."""
    times = (transactions.c.created_at, transactions.c.updated_at)
    is_younger = or_(*(it > sealed.sealed_at for it in times))
    return _ids(connection, transactions.c.transaction_id.between(*ids) & is_younger)


def _bytes(hash: str) -> bytes:
    try:
        return bytes.fromhex(hash)
    except ValueError:
        return b""
