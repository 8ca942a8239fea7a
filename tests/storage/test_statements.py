"""An account's history in pages and its statements: complete, in order, adding up while draws go on."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, text, update

from tests.ledgers import migrated
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.storage import ledger, statements
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import asset_transactions as table
from tombola.worker.ledger.accounts import open_account
from tombola.worker.settle import tries
from tombola.worker.settle.rules import Rules

WHEELS = {DEFAULT_CAMPAIGN.name: Wheel(DEFAULT_CAMPAIGN, b"seed" * 8)}
EPOCH = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = open_engine(database_url, lock_wait_s=5)
    migrated(made)
    yield made
    made.dispose()


def draw(engine: Engine, account_id: int, *keys: str) -> None:
    asked = [DrawRequest(account_id=account_id, request_key=key) for key in keys]
    tries.settle(engine, asked, Rules(WHEELS, tries_max=5))


def reading(engine: Engine) -> Connection:
    return engine.connect().execution_options(read_only=True)


def ids(rows: list[dict[str, Any]]) -> list[int]:
    return [it["transaction_id"] for it in rows]


def all_rows(engine: Engine, account_id: int) -> list[dict[str, Any]]:
    with reading(engine) as connection:
        found = connection.execute(table.select().where(table.c.account_id == account_id)).mappings()
        return sorted((dict(it) for it in found), key=lambda it: it["transaction_id"])


def put_times(engine: Engine, times: dict[int, datetime]) -> None:
    with engine.begin() as connection:
        for id, at in times.items():
            connection.execute(update(table).where(table.c.transaction_id == id).values(created_at=at))


def test_pages_have_every_row_once_in_the_order_of_the_chain(engine: Engine) -> None:
    one, other = (open_account(engine, user_id=user, balance=Decimal(100)) for user in (1, 2))
    for number in range(12):
        draw(engine, one, f"a{number}")
        draw(engine, other, f"b{number}")
    whole = all_rows(engine, one)
    # Not even the times of a clock that goes backwards change the order.
    put_times(engine, {row["transaction_id"]: EPOCH - timedelta(hours=n) for n, row in enumerate(whole)})
    whole = all_rows(engine, one)
    after, found = 0, []
    with reading(engine) as connection:
        while page := statements.rows(connection, one, after_id=after, rows_max=5):
            found += page
            after = page[-1]["transaction_id"]
            assert len(page) <= 5
        newest, before = [], None
        while page := statements.newest_rows(connection, one, before_id=before, rows_max=5):
            newest += page
            before = page[-1]["transaction_id"]
        assert statements.rows(connection, 4711, rows_max=5) == []
    assert found == whole
    assert newest == whole[::-1]
    for row, following in itertools.pairwise(found):
        assert row["balance_after"] == following["balance_before"]


def test_a_page_stays_as_it_was_read(engine: Engine) -> None:
    account = open_account(engine, user_id=1, balance=Decimal(100))
    draw(engine, account, *(f"a{number}" for number in range(5)))
    with reading(engine) as connection:
        first = statements.rows(connection, account, rows_max=4)
    draw(engine, account, *(f"b{number}" for number in range(5)))
    with reading(engine) as connection:
        assert statements.rows(connection, account, rows_max=4) == first
        rest = statements.rows(connection, account, after_id=first[-1]["transaction_id"], rows_max=1000)
    assert first + rest == all_rows(engine, account)


def test_a_statement_adds_up_and_adjoining_ones_meet(engine: Engine) -> None:
    account = open_account(engine, user_id=1, balance=Decimal(1000))
    draw(engine, account, *(f"a{number}" for number in range(40)))
    chance = random.Random(7)
    whole = all_rows(engine, account)
    # Times that are not quite in the order of the chain: a batch reads the clock, then waits for its locks.
    put_times(
        engine,
        {
            row["transaction_id"]: EPOCH + timedelta(minutes=10 * n, seconds=chance.uniform(-1500, 1500))
            for n, row in enumerate(whole)
        },
    )
    ends = [EPOCH + timedelta(minutes=it) for it in (-100, 0, 1, 50, 51, 52, 200, 333, 10_000)]
    seen: list[int] = []
    with reading(engine) as connection:
        before = None
        for since, until in itertools.pairwise(ends):
            found = statements.statement(connection, account, since, until)
            rows = statements.rows(
                connection, account, after_id=found.first_id - 1, end_id=found.end_id, rows_max=10_000
            )
            assert found.opening + sum(row["delta_amount"] for row in rows) == found.closing
            assert before in (None, found.opening)
            assert found.is_final == (until < utc_now() - statements.LATE_MAX)
            before = found.closing
            seen += ids(rows)
        total = statements.statement(connection, account, ends[0], None)
        balance = ledger.find_account(connection, account)
    assert seen == ids(whole)
    assert balance is not None
    assert total.opening == 0
    assert total.closing == balance.balance
    assert not total.is_final


def test_a_period_without_rows_says_what_was_there(engine: Engine) -> None:
    account, empty = open_account(engine, user_id=1, balance=Decimal(10)), open_account(engine, user_id=2)
    (row,) = all_rows(engine, account)
    put_times(engine, {row["transaction_id"]: EPOCH})
    day = timedelta(days=1)
    cases = [(EPOCH - 2 * day, EPOCH - day, 0), (EPOCH + day, EPOCH + 2 * day, 10), (EPOCH + day, None, 10)]
    with reading(engine) as connection:
        for since, until, balance in cases:
            found = statements.statement(connection, account, since, until)
            assert found.opening == found.closing == balance
            assert found.first_id == found.end_id
        # From its beginning on, until before its end.
        told = [
            statements.statement(connection, account, EPOCH, EPOCH + day),
            statements.statement(connection, account, EPOCH - day, EPOCH),
            statements.statement(connection, empty, EPOCH, None),
        ]
        assert [it.opening for it in told] == [0, 0, 0]
        assert [it.closing for it in told] == [10, 0, 0]


def test_statements_add_up_while_draws_go_on(engine: Engine) -> None:
    """Of periods that end now: whatever is posted meanwhile, the next period begins with what this one ended with."""
    account = open_account(engine, user_id=1, balance=Decimal(100_000))
    stopping, failed, drawn = threading.Event(), [], list[str]()

    def draws(name: str) -> None:
        number = 0
        try:
            while not stopping.is_set():
                draw(engine, account, *(f"{name}-{number}-{it}" for it in range(3)))
                drawn.append(f"{name}-{number}")
                number += 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=draws, args=(name,)) for name in ("x", "y")]
    for thread in threads:
        thread.start()
    ends = [utc_now() - timedelta(hours=1)]
    found: list[statements.Statement] = []
    try:
        while len(found) < 40 or (len(drawn) < 20 and not failed):
            until = utc_now() - timedelta(milliseconds=random.uniform(0, 20))
            until = max(until, ends[-1])
            with reading(engine) as connection:
                one = statements.statement(connection, account, ends[-1], until)
                rows = statements.rows(
                    connection, account, after_id=one.first_id - 1, end_id=one.end_id, rows_max=100_000
                )
            assert one.opening + sum(row["delta_amount"] for row in rows) == one.closing
            found.append(one)
            ends.append(until)
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    assert failed == []
    whole = all_rows(engine, account)
    assert len(whole) > 50
    # Once all is posted, the same periods tile the chain, row by row.
    seen, before = [], Decimal(0)
    following: list[datetime | None] = [*ends[1:], None]
    with reading(engine) as connection:
        for since, end in zip(ends, following, strict=True):
            one = statements.statement(connection, account, since, end)
            rows = statements.rows(connection, account, after_id=one.first_id - 1, end_id=one.end_id, rows_max=100_000)
            assert one.opening == before
            assert one.opening + sum(row["delta_amount"] for row in rows) == one.closing
            before = one.closing
            seen += ids(rows)
    assert seen == ids(whole)


@pytest.mark.process
def test_ids_are_found_in_the_index_of_the_account(mariadb_url: str) -> None:
    """Not by walking the ledger in search of the few rows of one account."""
    engine = open_engine(mariadb_url)
    migrated(engine)
    accounts = [open_account(engine, user_id=user, balance=Decimal(10_000)) for user in range(1, 41)]
    for account in accounts:
        draw(engine, account, *(f"k{account}-{number}" for number in range(60)))
    with engine.begin() as connection:
        connection.execute(text("ANALYZE TABLE asset_transactions"))
    asked: list[tuple[str, Any]] = []

    @event.listens_for(engine, "before_cursor_execute")
    def hear(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_more: Any) -> None:
        if "FROM asset_transactions" in statement:
            asked.append((statement, parameters))

    with reading(engine) as connection:
        statements.rows(connection, accounts[20], rows_max=10)
        statements.newest_rows(connection, accounts[20], rows_max=10)
        statements.statement(connection, accounts[20], EPOCH, utc_now() + timedelta(days=1))
    event.remove(engine, "before_cursor_execute", hear)
    with reading(engine) as connection:
        for statement, parameters in asked:
            # MariaDB knows no other format of rows, and not its name.
            style = "" if getattr(engine.dialect, "is_mariadb", False) else "FORMAT=TRADITIONAL "
            plan = connection.exec_driver_sql(f"EXPLAIN {style}{statement}", parameters).mappings().all()
            assert {it["key"] for it in plan} <= {"idx_account_created", "PRIMARY", "key0", None}, plan
            if ".account_id =" not in statement:  # the few rows whose ids were found
                assert [it["key"] for it in plan] == ["PRIMARY"]
                continue
            of_index = [it for it in plan if it["key"] == "idx_account_created"]
            assert of_index, plan
            assert all("Using index" in it["Extra"] for it in of_index), plan
            others = [it for it in plan if it not in of_index and it["table"] is not None]
            assert all(it["type"] in ("const", "eq_ref") or it["table"].startswith("<") for it in others), plan
    engine.dispose()
