"""Tampering with sealed books, in plain SQL: each kind is found, and named to its block or row."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select, text

from tests.books.conftest import WHEELS, Draw, seal_all
from tests.ledgers import recharge
from tombola.producers.domain.books.blocks import Block
from tombola.producers.domain.books.checkpoints import PrivateKey
from tombola.producers.domain.books.merkle import Peaks
from tombola.producers.domain.operations.refund import RefundRequest
from tombola.producers.storage import books
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.books import anchors
from tombola.worker.books import head as heads
from tombola.worker.books.anchors import AnchorConflict, check_anchors
from tombola.worker.books.verification import check_blocks
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Settled
from tombola.worker.settle.rules import Rules

LEDGER, BLOCKS, HOUSE, HEAD = "asset_transactions", "books_blocks", "books_house", "books_head"
COLUMNS = (
    "transaction_id, account_id, business_id, lottery_session_id, idempotency_key, business_type, asset_code, "
    "delta_amount, balance_before, balance_after, notes, created_at, updated_at"
)
Forge = Callable[..., None]


@pytest.fixture
def sealed(engine: Engine, draw: Draw) -> Engine:
    """Four blocks or more, and then rows that are not sealed; with a gap in the ids of the third block."""
    for number in range(3):
        draw(8)
        if number == 2:
            back = RefundRequest(account_id=1, request_key="back", draw="d0000", policy="write_off", reason="test")
            assert isinstance(tries.settle(engine, [back], Rules(WHEELS, tries_max=3))[0], Settled)
        seal_all(engine)
    with engine.begin() as connection:
        highest = heads.highest_id(connection)
        if engine.dialect.name == "sqlite":
            statement = f"UPDATE sqlite_sequence SET seq = {highest + 10} WHERE name = 'asset_transactions'"
        else:
            statement = f"ALTER TABLE asset_transactions AUTO_INCREMENT = {highest + 11}"
        connection.execute(text(statement))
    draw(8)
    seal_all(engine)
    draw(2)
    assert list(check_blocks(engine)) == []
    return engine


@pytest.fixture
def forge(sealed: Engine) -> Forge:
    """Runs SQL past every constraint.

    ¤9.99 is an amount; {first} and {last} are the ids at the ends of block 2, {gap} is one in the gap of block 4.
    """
    is_sqlite = sealed.dialect.name == "sqlite"
    blocks = blocks_of(sealed)
    places = {
        "first": blocks[1].block.first_id, "last": blocks[1].block.last_id, "gap": blocks[3].block.first_id + 1,
        "columns": COLUMNS,
    }  # fmt: skip

    def forge(*statements: str) -> None:
        with sealed.connect().execution_options(autobegin=False) as connection:
            driver: Any = connection.connection.driver_connection
            if is_sqlite:
                for pragma in ("foreign_keys=OFF", "ignore_check_constraints=ON"):
                    driver.execute(f"PRAGMA {pragma}")
            else:
                with driver.cursor() as cursor:
                    cursor.execute("SET foreign_key_checks=0, sql_mode=''")
            with connection.begin():
                for statement in statements:
                    amounts = re.sub(
                        r"¤(-?[\d.]+)", lambda it: str(int(Decimal(it[1]) * 100)) if is_sqlite else it[1], statement
                    )
                    assert connection.exec_driver_sql(amounts.format(**places)).rowcount, statement
            connection.invalidate()

    return forge


def blocks_of(engine: Engine) -> list[books.Sealed]:
    with engine.connect().execution_options(read_only=True) as connection:
        return books.sealed_from(connection, 1, rows_max=1000)


FORGERIES: dict[str, tuple[list[str], list[str]]] = {
    "an amount": (
        [f"UPDATE {LEDGER} SET delta_amount = ¤-0.01 WHERE transaction_id = {{first}}"],
        [
            r"block 2, transactions \d+ to \d+: a row is not what was sealed",
            r"house/default/sales moved .* by its rows",
        ],
    ),
    "a balance after": (
        [f"UPDATE {LEDGER} SET balance_after = ¤77.00 WHERE transaction_id = {{first}}"],
        ["block 2, .*: a row is not what was sealed"],
    ),
    "a balance before": (
        [f"UPDATE {LEDGER} SET balance_before = ¤77.00 WHERE transaction_id = {{first}}"],
        ["block 2, .*: a row is not what was sealed"],
    ),
    "whose row it is": (
        [f"UPDATE {LEDGER} SET account_id = 2 WHERE transaction_id = {{first}} AND account_id = 1"],
        ["block 2, .*: a row is not what was sealed"],
    ),
    "the notes": (
        [f"UPDATE {LEDGER} SET notes = 'odds=other' WHERE transaction_id = {{last}}"],
        ["block 2, .*: a row is not what was sealed"],
    ),
    "notes that are gone": (
        [f"UPDATE {LEDGER} SET notes = NULL WHERE transaction_id = {{last}}"],
        ["block 2, .*: a row is not what was sealed"],
    ),
    "a key": (
        [f"UPDATE {LEDGER} SET idempotency_key = 'other:consume' WHERE transaction_id = {{first}}"],
        ["block 2, .*: a row is not what was sealed"],
    ),
    "a session": (
        [f"UPDATE {LEDGER} SET lottery_session_id = 'other' WHERE transaction_id = {{first}}"],
        ["block 2, .*: a row is not what was sealed"],
    ),
    "the old name of a session": (
        [f"UPDATE {LEDGER} SET business_id = 'other' WHERE transaction_id = {{first}}"],
        ["block 2, .*: a row is not what was sealed"],
    ),
    "a business type": (
        [f"UPDATE {LEDGER} SET business_type = 'gift' WHERE transaction_id = {{first}}"],
        ["block 2, .*: a row is not what was sealed", "house/unknown moved .* by its rows, 0.00 were sealed"],
    ),
    "an asset": (
        [f"UPDATE {LEDGER} SET asset_code = 'COIN' WHERE transaction_id = {{first}}"],
        ["block 2, .*: a row is not what was sealed", "house/default/sales moved .* COIN by its rows"],
    ),
    "a time": (
        [f"UPDATE {LEDGER} SET created_at = '2020-01-01 00:00:00.000000' WHERE transaction_id = {{first}}"],
        ["block 2, .*: a row is not what was sealed"],
    ),
    "a time of change": (
        [f"UPDATE {LEDGER} SET updated_at = '2099-01-01 00:00:00.000000' WHERE transaction_id = {{first}}"],
        ["block 2, .*: a row is not what was sealed", r"^transaction \d+: was written or changed after"],
    ),
    "two rows swapped": (
        [
            f"UPDATE {LEDGER} SET transaction_id = -1 WHERE transaction_id = {{first}}",
            f"UPDATE {LEDGER} SET transaction_id = {{first}} WHERE transaction_id = {{last}}",
            f"UPDATE {LEDGER} SET transaction_id = {{last}} WHERE transaction_id = -1",
        ],
        ["block 2, .*: a row is not what was sealed"],
    ),
    "a row deleted": (
        [f"DELETE FROM {LEDGER} WHERE transaction_id = {{first}}"],
        ["block 2, .*: 1 of .* sealed rows are gone"],
    ),
    "a block's rows deleted": (
        [f"DELETE FROM {LEDGER} WHERE transaction_id BETWEEN {{first}} AND {{last}}"],
        ["block 2, .* sealed rows are gone"],
    ),
    "an old row inserted into a gap": (
        [
            f"INSERT INTO {LEDGER} ({{columns}}) SELECT {{gap}}, 1, 'x', 'x', 'x:recharge', 'recharge', "
            "'POINT', ¤5.00, ¤0.00, ¤5.00, NULL, created_at, updated_at "
            f"FROM {LEDGER} WHERE transaction_id = {{first}}"
        ],
        ["block 4, .*: 1 rows appeared after it was sealed", "house/issued moved -5.00 POINT by its rows, 0.00 were"],
    ),
    "a young row inserted into a gap": (
        [
            f"INSERT INTO {LEDGER} ({{columns}}) VALUES ({{gap}}, 1, 'x', 'x', 'x:recharge', 'recharge', "
            "'POINT', ¤5.00, ¤0.00, ¤5.00, NULL, '2099-01-01 00:00:00.000000', '2099-01-01 00:00:00.000000')"
        ],
        ["block 4, .*: 1 rows appeared after it was sealed", r"^transaction \d+: was written or changed after"],
    ),
    "a row before all blocks": (
        [
            f"INSERT INTO {LEDGER} ({{columns}}) VALUES (-5, 1, 'x', 'x', 'x:recharge', 'recharge', "
            "'POINT', ¤5.00, ¤0.00, ¤5.00, NULL, '2026-01-01 00:00:00.000000', '2026-01-01 00:00:00.000000')"
        ],
        ["transaction -5: its id lies before all blocks"],
    ),
    "the campaign of a refund": (
        ["UPDATE api_idempotency_requests SET campaign = 'other' WHERE request_key = 'back'"],
        ["block 3: house/other/sales moved .* by its rows, 0.00 were sealed"],
    ),
    "a block's root": (
        [f"UPDATE {BLOCKS} SET root = '{'ab' * 32}' WHERE number = 2"],
        ["block 2: its hash is not that of its content", "block 2, .*: a row is not what was sealed"],
    ),
    "a block's sums": (
        [f"""UPDATE {BLOCKS} SET sums = '{{{{"house/issued":{{{{"POINT":"-1.00"}}}}}}}}' WHERE number = 2"""],
        [
            "block 2: its hash is not that of its content",
            "block 2: house/issued moved 0.00 POINT by its rows, -1.00 were",
        ],
    ),
    "sums that are none": (
        [f"UPDATE {BLOCKS} SET sums = 'x' WHERE number = 2"],
        ["block 2: its hash is not that of its content"],
    ),
    "a block's hash": (
        [f"UPDATE {BLOCKS} SET hash = '{'ab' * 32}' WHERE number = 2"],
        ["block 2: its hash is not that of its content", "block 3: does not name the hash of the block before"],
    ),
    "a block deleted": ([f"DELETE FROM {BLOCKS} WHERE number = 2"], ["block 3: follows block 1: the blocks between"]),
    "the first block deleted": (
        [f"DELETE FROM {BLOCKS} WHERE number = 1"],
        ["block 2: is the first one that is left: the blocks before are gone"],
    ),
    "the last block deleted": (
        [f"DELETE FROM {BLOCKS} WHERE number = 4"],
        ["the head: has seen 4 blocks, 3 are left"],
    ),
    "all blocks deleted": ([f"DELETE FROM {BLOCKS}"], ["the head: has seen 4 blocks, 0 are left"]),
    "a range": (
        [f"UPDATE {BLOCKS} SET last_id = last_id - 1 WHERE number = 2"],
        ["block 2: its hash is not", "block 3: begins at transaction .*, the block before ended at"],
    ),
    "the house's balance": (
        [f"UPDATE {HOUSE} SET balance = balance + 1 WHERE block = 2 AND account = 'house/default/sales'"],
        ["block 2: house/default/sales has .* POINT in books_house, and"],
    ),
    "the house's movement": (
        [f"UPDATE {HOUSE} SET delta = delta + 1, balance = balance + 1 WHERE block = 3"],
        ["block 3: books_house does not say what its sums say"],
    ),
    "a house account that never was": (
        [f"INSERT INTO {HOUSE} (block, account, asset_code, delta, balance) VALUES (2, 'house/x', 'POINT', ¤1, ¤1)"],
        ["block 2: books_house does not say what its sums say"],
    ),
    "the head": (
        [f"UPDATE {HEAD} SET peaks = '[4, [\"{'ab' * 32}\"]]'"],
        ["the head: is of another chain than these blocks"],
    ),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forgery_is_found_and_named(sealed: Engine, forge: Forge, what: str) -> None:
    statements, expected = FORGERIES[what]
    assert len(blocks_of(sealed)) == 4
    forge(*statements)
    found = [str(it) for it in check_blocks(sealed)]
    assert found
    for pattern in expected:
        assert any(re.search(pattern, it) for it in found), (pattern, found)


def test_an_unsealed_row_is_no_ones_yet(sealed: Engine, forge: Forge) -> None:
    """It is the other invariants' matter until it is sealed."""
    last = blocks_of(sealed)[-1].block.last_id
    forge(f"UPDATE {LEDGER} SET notes = 'x' WHERE transaction_id > {last}")
    assert list(check_blocks(sealed)) == []


def test_verification_goes_on_from_any_block(sealed: Engine, forge: Forge) -> None:
    seen: list[int] = []
    assert list(check_blocks(sealed, from_block=3, on_block=lambda it: seen.append(it.number))) == []
    assert seen == [3, 4]
    forge(f"UPDATE {LEDGER} SET notes = 'x' WHERE transaction_id = {{first}}")
    assert list(check_blocks(sealed, from_block=3)) == []
    assert [it.block for it in check_blocks(sealed, from_block=2)] == [2]
    assert list(check_blocks(sealed, to_block=1)) == []
    assert {it.block for it in check_blocks(sealed, to_block=2)} == {2}
    # A block that was checked before, and is gone: the end was cut off.
    assert list(check_blocks(sealed, from_block=5)) == []
    forge(f"DELETE FROM {BLOCKS} WHERE number = 4")
    assert [str(it) for it in check_blocks(sealed, from_block=5)] == ["block 4: was sealed, and is gone"]


def test_what_is_sealed_meanwhile_is_no_tampering(sealed: Engine) -> None:
    seen: list[int] = []

    def seal_more(block: Block) -> None:
        seen.append(block.number)
        if len(seen) < 4:
            recharge(sealed, 1, Decimal(1))
            seal_all(sealed)

    assert list(check_blocks(sealed, on_block=seal_more)) == []
    assert seen[:4] == [1, 2, 3, 4]
    assert len(blocks_of(sealed)) == 7


# ---- anchors ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def key() -> PrivateKey:
    return PrivateKey.make("shop.example/books")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "anchors"
    path.mkdir()
    return path


@pytest.fixture
def anchored(sealed: Engine, folder: Path, key: PrivateKey, draw: Draw) -> Engine:
    """Checkpoints of 4 and of 5 blocks, then a sixth block that none covers."""
    for more in (3, 3):
        note = anchors.sign_once(sealed, key, every_s=0)
        assert note is not None
        assert anchors.write(folder, note)
        assert not anchors.write(folder, note)
        draw(more)
        seal_all(sealed)
    found = check_anchors(sealed, folder, [key.public])
    assert (found.blocks, found.upto, found.checkpoints, list(found.wrong)) == (6, 5, 2, [])
    return sealed


def rebuild(engine: Engine) -> None:
    """Seal the ledger as it is now anew, from its first row on: a chain that holds."""
    count = len(blocks_of(engine))
    with engine.begin() as connection:
        for table in (HOUSE, BLOCKS, HEAD):
            connection.execute(text(f"DELETE FROM {table}"))
    while len(blocks_of(engine)) < count:
        recharge(engine, 1, Decimal(1))
        seal_all(engine)
    assert list(check_blocks(engine)) == []


def test_a_rebuilt_chain_holds_and_is_found_by_its_anchors(anchored: Engine, folder: Path, key: PrivateKey) -> None:
    with anchored.begin() as connection:
        first = select(transactions.c.transaction_id).order_by(transactions.c.transaction_id).limit(1)
        connection.execute(text(f"UPDATE {LEDGER} SET notes = 'x' WHERE transaction_id = {connection.scalar(first)}"))
    rebuild(anchored)
    found = check_anchors(anchored, folder, [key.public])
    assert found.upto == 0
    assert any("blocks 1 to 4 are not the ones that were signed: the chain was rebuilt" in it for it in found.wrong)


def test_a_chain_rebuilt_under_a_new_key_is_found(anchored: Engine, folder: Path, key: PrivateKey) -> None:
    other = PrivateKey.make(key.name)
    rebuild(anchored)
    note = anchors.sign_once(anchored, other, every_s=0)
    assert note is not None
    # The sealer itself notices another checkpoint of as many blocks, or writes a new file under the new key.
    anchors.write(folder, note)
    found = check_anchors(anchored, folder, [key.public])
    assert any("was rebuilt" in it for it in found.wrong)
    assert any("no signature of the key" in it for it in found.wrong)
    # Even whoever takes the new key for good has the old checkpoints against it.
    assert any("was rebuilt" in it for it in check_anchors(anchored, folder, [key.public, other.public]).wrong)
    for path in folder.iterdir():
        if path.read_text() != note:
            path.unlink()
    assert [it for it in check_anchors(anchored, folder, [key.public]).wrong if "nothing is anchored" in it]


def test_a_cut_end_holds_and_is_found_by_its_anchors(anchored: Engine, folder: Path, key: PrivateKey) -> None:
    """The last hour deleted: rows, blocks, and the head put back; it verifies cleanly without an anchor."""
    blocks = blocks_of(anchored)
    peaks = Peaks()
    for it in blocks[:3]:
        peaks = peaks.append(bytes.fromhex(it.hash))
    with anchored.begin() as connection:
        head = heads.lock(connection)
        assert head is not None
        heads.write(connection, head._replace(peaks=peaks, checkpoint=None, checkpoint_at=None))
        for statement in (
            f"DELETE FROM {LEDGER} WHERE transaction_id > {blocks[2].block.last_id}",
            f"DELETE FROM {BLOCKS} WHERE number > 3",
            f"DELETE FROM {HOUSE} WHERE block > 3",
        ):
            connection.execute(text(statement))
    assert list(check_blocks(anchored)) == []
    found = check_anchors(anchored, folder, [key.public])
    assert len(found.wrong) == 2
    assert all("3 are left: blocks were cut off, or the database was rolled back" in it for it in found.wrong)
    note = anchors.sign_once(anchored, key, every_s=0)
    assert note is not None
    with pytest.raises(AnchorConflict, match="the database was rolled back"):
        anchors.write(folder, note)


def test_another_checkpoint_of_as_many_blocks_is_not_written_over(
    anchored: Engine, folder: Path, key: PrivateKey
) -> None:
    before = {it.name: it.read_text() for it in folder.iterdir()}
    with pytest.raises(AnchorConflict, match="another checkpoint than the books have"):
        anchors.write(folder, key.sign(5, b"x" * 32))
    assert {it.name: it.read_text() for it in folder.iterdir()} == before


def test_a_spoilt_checkpoint_is_named(anchored: Engine, folder: Path, key: PrivateKey) -> None:
    names = sorted(it.name for it in folder.iterdir())
    (folder / names[0]).write_text((folder / names[0]).read_text().replace("\n4\n", "\n3\n"))
    (folder / "000000000009.checkpoint").write_bytes(b"\xff\xfe")
    (folder / "000000000008.checkpoint").write_text("")
    found = check_anchors(anchored, folder, [key.public])
    assert found.upto == 5
    assert [it.partition(":")[0] for it in found.wrong] == [
        names[0],
        "000000000008.checkpoint",
        "000000000009.checkpoint",
    ]


def test_a_key_may_follow_another(anchored: Engine, folder: Path, key: PrivateKey) -> None:
    new = PrivateKey.make(key.name)
    note = anchors.sign_once(anchored, new, every_s=0)
    assert note is not None
    anchors.write(folder, note)
    assert check_anchors(anchored, folder, [key.public, new.public]).upto == 6
    assert check_anchors(anchored, folder, [key.public]).wrong


def test_the_head_is_signed_when_it_has_changed_and_not_too_often(sealed: Engine, key: PrivateKey, draw: Draw) -> None:
    first = anchors.sign_once(sealed, key, every_s=3600)
    assert first is not None
    assert anchors.sign_once(sealed, key, every_s=0) is None
    draw(2)
    seal_all(sealed)
    assert anchors.sign_once(sealed, key, every_s=3600) is None
    second = anchors.sign_once(sealed, key, every_s=0)
    assert second not in (None, first)
    with sealed.connect().execution_options(read_only=True) as connection:
        assert books.latest_checkpoint(connection) == second
