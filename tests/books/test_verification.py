"""Tampering with sealed books, in plain SQL: each kind is found, and named to its block or row."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, text

from tests.books.conftest import WHEELS, Draw, seal_all
from tests.ledgers import recharge
from tombola.producers.domain.books.blocks import Block
from tombola.producers.domain.operations.refund import RefundRequest
from tombola.producers.storage import books
from tombola.worker.books import head as heads
from tombola.worker.books import sealing
from tombola.worker.books.verification import check_blocks
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Settled
from tombola.worker.settle.rules import Rules

pytestmark = pytest.mark.slow

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


def test_nothing_is_sealed_behind_blocks_that_are_gone(sealed: Engine, forge: Forge) -> None:
    """A sealer that went on would cover what happened with blocks of its own."""
    forge(f"DELETE FROM {BLOCKS} WHERE number = 4")
    with pytest.raises(sealing.ChainBroken, match="the last block is 3, and 4 were sealed"):
        sealing.seal(sealed, after_s=0)
    assert len(blocks_of(sealed)) == 3
