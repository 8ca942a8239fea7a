"""The head outside: checkpoints find a rebuilt chain, a cut end and a rollback, which hold without them."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import Engine, select, text

from tests.books.conftest import Draw, seal_all
from tests.ledgers import recharge
from tombola.producers.domain.books.checkpoints import PrivateKey
from tombola.producers.domain.books.merkle import Peaks
from tombola.producers.storage import books
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.books import anchors
from tombola.worker.books import head as heads
from tombola.worker.books.anchors import AnchorConflict, check_anchors
from tombola.worker.books.verification import check_blocks

LEDGER, BLOCKS, HOUSE, HEAD = "asset_transactions", "books_blocks", "books_house", "books_head"


def blocks_of(engine: Engine) -> list[books.Sealed]:
    with engine.connect().execution_options(read_only=True) as connection:
        return books.sealed_from(connection, 1, rows_max=1000)


@pytest.fixture
def sealed(engine: Engine, draw: Draw) -> Engine:
    """Four blocks."""
    for _ in range(4):
        draw(4)
        seal_all(engine)
    return engine


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
