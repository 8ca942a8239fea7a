"""Sealing: every row once, none that may still change, whoever seals, and whatever kills it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, insert, select, text, update

from tests.books.conftest import Draw, seal_all
from tombola.producers.domain.books import merkle
from tombola.producers.domain.books.blocks import NO_BLOCK, read_sums
from tombola.producers.domain.books.leaves import FIELDS, leaf
from tombola.producers.storage import books
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.ledger_leaves import Range
from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.schema import books_blocks, books_head, books_snapshots
from tombola.worker.books import head as heads
from tombola.worker.books import rows, sealing, snapshots
from tombola.worker.books.head import Head, Seen
from tombola.worker.books.verification import check_blocks
from tombola.worker.ledger.old_rows import OldRows

PROJECT = Path(__file__).parents[2]


def blocks_of(engine: Engine) -> list[books.Sealed]:
    with engine.connect().execution_options(read_only=True) as connection:
        return books.sealed_from(connection, 1, rows_max=1000)


def ledger_ids(engine: Engine) -> list[int]:
    query = select(transactions.c.transaction_id).order_by(transactions.c.transaction_id)
    with engine.connect().execution_options(read_only=True) as connection:
        return list(connection.execute(query).scalars())


# ---- leaves ----------------------------------------------------------------------------------------------------------

AT = datetime(2026, 1, 31, 23, 59, 59, 250, tzinfo=UTC)
ODD_ROWS: list[tuple[dict[str, Any], dict[str, str | None]]] = [
    ({}, {}),
    ({"notes": None}, {"notes": None}),
    ({"notes": ""}, {"notes": ""}),
    ({"notes": "ü €😀 'quoted' \\ back\nline 5:-"}, {"notes": "ü €😀 'quoted' \\ back\nline 5:-"}),
    ({"delta_amount": Decimal("-0.05")}, {"delta_amount": "-0.05"}),
    ({"delta_amount": Decimal(0), "balance_after": Decimal(0)}, {"delta_amount": "0.00", "balance_after": "0.00"}),
    ({"delta_amount": Decimal("99999999.99")}, {"delta_amount": "99999999.99"}),
    ({"created_at": AT.replace(microsecond=0)}, {"created_at": "2026-01-31 23:59:59.000000"}),
    ({"business_id": "other", "asset_code": "ITEM.cat"}, {"business_id": "other", "asset_code": "ITEM.cat"}),
    ({"notes": "x" * 60_000}, {"notes": "x" * 60_000}),
]  # fmt: skip


def test_equal_rows_have_equal_leaves_on_every_database(engine: Engine) -> None:
    """What the server hashes, or SQLite's rows here, is what the description says of the row's text."""
    with engine.begin() as connection:
        values = {"user_id": 1, "asset_code": "POINT", "balance": Decimal(0), "created_at": AT, "updated_at": AT}
        connection.execute(insert(accounts).values(values))
        expected = []
        for number, (changed, told) in enumerate(ODD_ROWS, 1):
            row: dict[str, Any] = {
                **{"transaction_id": number * 10, "account_id": 1, "business_id": "s-1", "lottery_session_id": "s-1"},
                **{"idempotency_key": f"k{number}:consume", "business_type": "lottery_consume", "asset_code": "POINT"},
                **{"delta_amount": Decimal(-1), "balance_before": Decimal("10.5"), "balance_after": Decimal("9.50")},
                **{"notes": "odds=a", "created_at": AT, "updated_at": AT},
            }
            connection.execute(insert(transactions).values(row | changed))
            texts = {name: str(value) for name, value in row.items()} | {
                **{"delta_amount": "-1.00", "balance_before": "10.50", "balance_after": "9.50"},
                **{"created_at": "2026-01-31 23:59:59.000250", "updated_at": "2026-01-31 23:59:59.000250"},
            }
            expected.append(leaf([(texts | told)[name] for name in FIELDS]))
    with engine.connect().execution_options(read_only=True) as connection:
        found = rows.read_leaves(connection, Range(1, 1000), OldRows.NONE)
        assert merkle.split(found.whole()) == expected
        part = rows.read_leaves(connection, Range(21, 49), OldRows.NONE)
        assert (part.row_count, merkle.split(part.leaves)) == (2, expected[2:4])


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_a_ledger_is_sealed_whole_and_in_a_chain(engine: Engine, draw: Draw) -> None:
    draw(30)
    assert seal_all(engine, rows_max=10) > 3
    draw(5)
    seal_all(engine)
    sealed = blocks_of(engine)
    assert [it.block.number for it in sealed] == list(range(1, len(sealed) + 1))
    assert (sealed[0].block.first_id, sealed[0].block.previous) == (1, NO_BLOCK)
    for before, after in pairwise(sealed):
        assert after.block.first_id == before.block.last_id + 1
        assert after.block.previous == before.hash == before.block.hash
    ids = ledger_ids(engine)
    for it in sealed:
        inside = [id for id in ids if it.block.first_id <= id <= it.block.last_id]
        assert len(inside) == it.block.row_count > 0
    assert sum(it.block.row_count for it in sealed) == len(ids)
    assert list(check_blocks(engine)) == []


def test_all_rows_of_a_request_are_in_one_block(engine: Engine, draw: Draw) -> None:
    draw(60)
    seal_all(engine, rows_max=7)
    with engine.connect().execution_options(read_only=True) as connection:
        sessions = connection.execute(select(transactions.c.transaction_id, transactions.c.lottery_session_id)).all()
    ends = [it.block.last_id for it in blocks_of(engine)]
    assert len(ends) > 8
    by_session: dict[str, set[int]] = {}
    for id, session in sessions:
        by_session.setdefault(session, set()).add(sum(id > end for end in ends))
    assert [session for session, blocks in by_session.items() if len(blocks) > 1] == []
    assert any(sum(session == it for _, it in sessions) > 1 for session in by_session)


def test_a_session_larger_than_a_block_is_cut(engine: Engine, draw: Draw) -> None:
    draw(20)
    with engine.begin() as connection:
        connection.execute(update(transactions).values(lottery_session_id="all"))
    assert seal_all(engine, rows_max=5) > 3
    assert max(it.block.row_count for it in blocks_of(engine)) == 5
    assert list(check_blocks(engine)) == []


def test_gaps_are_part_of_a_range(engine: Engine, draw: Draw) -> None:
    """Of transactions that were rolled back: at the end, in the middle, and as a whole range."""
    draw(3)
    seal_all(engine)
    _skip_ids(engine, 100)
    assert seal_all(engine) == 0
    draw(3)
    seal_all(engine)
    sealed = [it.block for it in blocks_of(engine)]
    assert len(sealed) == 2
    assert sealed[1].first_id == sealed[0].last_id + 1
    assert sealed[1].last_id - sealed[1].first_id > 100 > sealed[1].row_count
    assert list(check_blocks(engine)) == []


def _skip_ids(engine: Engine, count: int) -> None:
    """As a transaction does that is rolled back."""
    highest = max(ledger_ids(engine))
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            statement = f"UPDATE sqlite_sequence SET seq = {highest + count} WHERE name = 'asset_transactions'"
        else:
            statement = f"ALTER TABLE asset_transactions AUTO_INCREMENT = {highest + count + 1}"
        connection.execute(text(statement))


def test_the_house_has_the_other_side(engine: Engine, draw: Draw) -> None:
    draw(40)
    seal_all(engine, rows_max=20)
    with engine.connect().execution_options(read_only=True) as connection:
        users = connection.execute(select(func.sum(accounts.c.balance))).scalar_one()
        house = books.house_balances(connection)
        spent = connection.execute(
            select(func.sum(transactions.c.delta_amount)).where(transactions.c.business_type == "lottery_consume")
        ).scalar_one()
    assert house["house/issued", "POINT"] == -140
    assert house["house/issued/stripe", "POINT"] == -60
    assert house["house/default/sales", "POINT"] == -spent
    names = ("issued", "issued/stripe", "default/sales", "default/prizes")
    assert set(house) == {(f"house/{it}", "POINT") for it in names}
    assert sum(house.values()) + users == 0
    moved = [read_sums(it.block.sums) for it in blocks_of(engine)]
    for key, balance in house.items():
        assert sum(it.get(key, 0) for it in moved) == balance


# ---- the horizon -----------------------------------------------------------------------------------------------------


def test_watermarks_ripen() -> None:
    start, after = datetime(2026, 1, 1, tzinfo=UTC), timedelta(seconds=60)
    head = Head().with_watermark(0, start, after)
    for second in range(1, 200):
        now = start + timedelta(seconds=second)
        head = head.with_watermark(second * 10, now, after)
        horizon = head.horizon(now, after)
        # Nothing younger than a minute; nothing older than that waits for longer than the next watermark.
        assert horizon <= max(0, second - 60) * 10
        assert horizon >= (second - 60 - 2) * 10
        assert len(head.seen) <= 33
    idle = head.with_watermark(1990, start + timedelta(hours=1), after)
    assert idle.horizon(start + timedelta(hours=1), after) == head.seen[-1].transaction_id


def test_a_clock_that_was_set_back_delays_sealing_and_no_more() -> None:
    start, after = datetime(2026, 1, 1, tzinfo=UTC), timedelta(seconds=60)
    head = Head(seen=(Seen(10, start + timedelta(hours=5)),)).with_watermark(20, start, after)
    assert head.horizon(start, after) == 0
    assert head.horizon(start + timedelta(seconds=61), after) >= 10


@pytest.mark.process
def test_a_row_is_not_sealed_before_every_older_transaction_has_ended(mariadb_url: str) -> None:
    """An open transaction has an id below rows that are committed: it must end before any of them is sealed."""
    from tests.ledgers import migrated

    engine = open_engine(mariadb_url)
    migrated(engine)
    with engine.begin() as connection:
        values = {"user_id": 1, "asset_code": "POINT", "balance": Decimal(9), "created_at": AT, "updated_at": AT}
        connection.execute(insert(accounts).values(values))
    waiting = engine.connect()
    waiting.execute(insert(transactions).values(_row("late")))
    with engine.begin() as connection:
        connection.execute(insert(transactions).values(_row("early")))
    assert sealing.seal(engine, after_s=3600) == 0
    assert blocks_of(engine) == []
    waiting.commit()
    waiting.close()
    _age_watermarks(engine, 3601)
    assert sealing.seal(engine, after_s=3600) == 2
    assert sealing.seal(engine, after_s=3600) == 0
    assert list(check_blocks(engine)) == []
    engine.dispose()


def _row(key: str) -> dict[str, Any]:
    return {
        **{"account_id": 1, "business_id": key, "lottery_session_id": key, "idempotency_key": key},
        **{"business_type": "recharge", "asset_code": "POINT", "delta_amount": Decimal(1)},
        **{"balance_before": Decimal(0), "balance_after": Decimal(1), "created_at": AT, "updated_at": AT},
    }


def _age_watermarks(engine: Engine, seconds: float) -> None:
    with engine.begin() as connection:
        head = heads.lock(connection)
        assert head is not None
        seen = tuple(it._replace(at=it.at - timedelta(seconds=seconds)) for it in head.seen)
        heads.write(connection, head._replace(seen=seen))


def test_an_idle_ledger_costs_no_write(engine: Engine, draw: Draw) -> None:
    draw(3)
    seal_all(engine)
    with engine.connect().execution_options(read_only=True) as connection:
        before = connection.execute(select(books_head)).one()
    for _ in range(3):
        assert sealing.seal(engine, after_s=0) == 0
    with engine.connect().execution_options(read_only=True) as connection:
        assert connection.execute(select(books_head)).one() == before


# ---- leaders and kills -----------------------------------------------------------------------------------------------


def test_two_leaders_at_once_seal_once(engine: Engine, draw: Draw) -> None:
    draw(60)
    count = len(ledger_ids(engine))
    both = threading.Barrier(4)
    failures: list[Exception] = []

    def lead() -> None:
        both.wait()
        try:
            for _ in range(40):
                sealing.seal_once(engine, after_s=0, rows_max=5)
        except Exception as error:
            failures.append(error)

    leaders = [threading.Thread(target=lead) for _ in range(4)]
    for it in leaders:
        it.start()
    for it in leaders:
        it.join()
    assert failures == []
    seal_all(engine, rows_max=5)
    assert sum(it.block.row_count for it in blocks_of(engine)) == count
    assert list(check_blocks(engine)) == []


@pytest.mark.process
def test_a_second_leader_does_not_wait(mariadb_url: str) -> None:
    from tests.ledgers import migrated

    engine = open_engine(mariadb_url)
    migrated(engine)
    with engine.begin() as connection:
        heads.lock(connection)
        values = {"user_id": 1, "asset_code": "POINT", "balance": Decimal(9), "created_at": AT, "updated_at": AT}
        connection.execute(insert(accounts).values(values))
        connection.execute(insert(transactions).values(_row("one")))
    with engine.connect() as leader:
        assert heads.lock(leader) is not None
        began = time.monotonic()
        assert sealing.seal(engine, after_s=0) == 0
        assert time.monotonic() - began < 0.5
        assert blocks_of(engine) == []
        leader.rollback()
    assert sealing.seal(engine, after_s=0) == 1
    engine.dispose()


KILLED = """
import os, signal, sys
from datetime import timedelta
from tombola.producers.storage.engines import open_engine
from tombola.worker.books import head, sealing
name = sys.argv[2]
head.SEEN_EVERY = timedelta(0)
owner = head if name == "write" else sealing
before = getattr(owner, name)
def killed(*arguments):
    before(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, killed)
sealing.seal(open_engine(sys.argv[1]), after_s=0)
"""


@pytest.mark.process
@pytest.mark.parametrize("after", ["_write", "write"])
def test_a_kill_in_the_middle_changes_nothing(engine: Engine, draw: Draw, after: str) -> None:
    """After the block's rows were inserted, and after the head was written: right before the commit."""
    draw(10)
    url = engine.url.render_as_string(hide_password=False)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", KILLED, url, after], cwd=PROJECT, env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert blocks_of(engine) == []
    with engine.connect().execution_options(read_only=True) as connection:
        assert books.house_balances(connection) == {}
        assert heads.read(connection).peaks.size == 0
    for _ in range(100):  # the server may take a moment to notice that the connection is gone
        if seal_all(engine):
            break
        time.sleep(0.05)
    assert sum(it.block.row_count for it in blocks_of(engine)) == len(ledger_ids(engine))
    assert list(check_blocks(engine)) == []


# ---- snapshots -------------------------------------------------------------------------------------------------------


def test_a_snapshot_is_of_past_days_and_of_accounts_that_moved(
    engine: Engine, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.ledgers import recharge

    monkeypatch.setattr(snapshots, "ROWS_MAX", 10)
    draw(20)
    seal_all(engine, rows_max=5)
    assert not snapshots.take_once(engine)
    with engine.begin() as connection:  # sealed yesterday
        connection.execute(update(books_blocks).values(sealed_at=datetime.now(UTC) - timedelta(days=1)))
    yesterday = len(blocks_of(engine))
    with engine.connect().execution_options(read_only=True) as connection:
        balances = {row.id: row.balance for row in connection.execute(select(accounts.c.id, accounts.c.balance))}
    recharge(engine, 1, Decimal(7))
    seal_all(engine)
    parts = 0
    while snapshots.take_once(engine):
        parts += 1
    assert parts >= 2
    found = _snapshots(engine)
    assert max(it.block for it in found) == yesterday
    last = {it.account_id: it for it in sorted(found, key=lambda it: it.block)}
    assert {account_id: it.balance for account_id, it in last.items()} == balances
    with engine.begin() as connection:
        connection.execute(update(books_blocks).values(sealed_at=datetime.now(UTC) - timedelta(days=1)))
    assert snapshots.take_once(engine)
    new = [it for it in _snapshots(engine) if it.block > yesterday]
    assert [(it.account_id, it.balance) for it in new] == [(1, balances[1] + 7)]


def _snapshots(engine: Engine) -> list[Any]:
    with engine.connect().execution_options(read_only=True) as connection:
        return list(connection.execute(select(books_snapshots)))
