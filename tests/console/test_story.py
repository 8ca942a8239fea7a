"""The story of a draw, on both databases: everything on record, in order, found without reading whole tables."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, insert, text, update

from tests import processes
from tests.kept_results import keep_results
from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.storage import clock, requests
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.requests import Submission, accept
from tombola.producers.storage.schema import (
    account_asset_balances,
    api_idempotency_requests,
    asset_transactions,
    replays,
)
from tombola.producers.storage.schema import dead_letters as letters
from tombola.producers.storage.transactions import transaction
from tombola.worker.console import story
from tombola.worker.console.story import Story
from tombola.worker.dead_letters import letters as dead_letters
from tombola.worker.dead_letters import parking
from tombola.worker.dead_letters.message import Parking
from tombola.worker.deliveries import Delivery
from tombola.worker.operators import actions
from tombola.worker.settle.rules import Rules
from tombola.worker.settle.tries import settle

pytestmark = pytest.mark.slow


@pytest.fixture
def house(database_url: str) -> Iterator[processes.House]:
    with processes.House(database_url, "redis://127.0.0.1:1", "redis://127.0.0.1:1") as house:
        yield house


def tell(house: processes.House, query: str) -> Story:
    with house.engine.connect().execution_options(read_only=True) as connection:
        return story.find(connection, query)


def accepted(house: processes.House, draw: DrawRequest, caller: str = "shop") -> None:
    now = clock.now(house.engine)  # as the door and the worker: the database's
    with transaction(house.engine) as open_transaction:
        accept(open_transaction, [Submission(draw, caller)], now, publish_at=now, is_published=True)


def settled(house: processes.House, *draws: DrawRequest) -> None:
    settle(house.engine, list(draws), Rules(house.wheels, tries_max=3))


def parked(house: processes.House, draw: DrawRequest, error: str = "boom") -> int:
    delivery = Delivery(draw.encode(), b"0", 5)
    parking.park(house.engine, [Parking(delivery, Cause.FAILED_ALONE, error, draw)], worker="w9")
    with house.engine.connect().execution_options(read_only=True) as connection:
        (found,) = dead_letters.some(connection, dead_letters.Selection(request_key=draw.request_key), rows_max=10)
    return found.id


def whats(told: Story) -> list[str]:
    return [it.what for it in told.events]


def test_a_draw_that_went_through(house: processes.House) -> None:
    (account_id,) = house.accounts(1)
    draw = DrawRequest(account_id=account_id, request_key="key_1", lottery_session_id="session_1")
    accepted(house, draw)
    settled(house, draw)
    told = tell(house, "key_1")
    assert whats(told)[:4] == ["accepted", "published", "completed", "lottery consume"]
    assert "by shop" in told.events[0].text
    assert "-1.00 POINT" in told.events[3].text
    assert "1000.00 → 999.00" in told.events[3].text
    assert told.kind == "draw"
    assert told.request is not None
    assert told.request["status"] == "completed"
    assert told.result is not None
    assert b'"request_key":"key_1"' in told.result
    assert told.account is not None
    assert told.account.account_id == account_id
    # Its session leads to the same story, and blanks around it do not matter.
    assert tell(house, " session_1 ")._replace(query="key_1") == told
    assert all(before.at <= after.at for before, after in pairwise(told.events))


def test_a_draw_shows_its_pulls_and_its_nonce(house: processes.House) -> None:
    accepted(house, DrawRequest(account_id=1, request_key="plain"))
    accepted(house, DrawRequest(account_id=1, request_key="nonce", client_nonce="nonce-of-a-browser_0"))
    accepted(house, DrawRequest(account_id=1, request_key="pulls", campaign="winter", pulls=10))
    assert tell(house, "plain").fields == ()
    assert tell(house, "nonce").fields == [("client_nonce", "nonce-of-a-browser_0")]
    assert tell(house, "pulls").fields == [("pulls", 10)]


def test_a_draw_that_was_told_no(house: processes.House) -> None:
    draw = DrawRequest(account_id=404, request_key="key_1")
    settled(house, draw)
    told = tell(house, "key_1")
    assert whats(told) == ["first seen", "rejected"]
    assert "ACCOUNT_NOT_FOUND" in told.events[1].text
    assert told.account is None
    assert told.account_id == 404
    assert told.ledger_rows == []


def test_what_is_archived_is_told_all_the_same(house: processes.House) -> None:
    (account_id,) = house.accounts(1)
    settled(house, DrawRequest(account_id=account_id, request_key="key_1"))
    before = tell(house, "key_1")
    keep_results(house.engine)
    with house.engine.begin() as connection:
        assert requests.archive(connection, utc_now() + timedelta(days=1), rows_max=10) == 1
    after = tell(house, "key_1")
    assert after.events == before.events
    assert after.result == before.result


def test_a_draw_that_died_and_was_replayed(house: processes.House) -> None:
    (account_id,) = house.accounts(1)
    draw = DrawRequest(account_id=account_id, request_key="key_1")
    accepted(house, draw)
    id = parked(house, draw)
    told = tell(house, "key_1")
    assert whats(told) == ["accepted", "published", "parked"]
    assert told.events[2].link == f"/dead-letters/{id}"
    assert "failed alone: boom" in told.events[2].text
    assert told.request is not None
    assert told.request["status"] == "dead"
    # Put away and back by an operator, then replayed, parked again, and settled at last.
    chosen = dead_letters.Selection(ids=(id,))
    dead_letters.discard(house.engine, chosen, operator="ann", reason="garbage")
    dead_letters.restore(house.engine, chosen, operator="bob", reason="no, it is not")
    parked(house, draw, "boom again")
    now = utc_now() + timedelta(seconds=1)
    with house.engine.begin() as connection:
        connection.execute(
            insert(replays).values(
                id=41, operator="ann", reason="deploy is back", selection="{}", options="{}", status="done",
                selected=1, settled=1, started_at=now, seen_at=now, ended_at=now + timedelta(seconds=2),
            )
        )  # fmt: skip
        values = {"state": "settled", "state_at": now + timedelta(seconds=1), "replay_id": 41}
        connection.execute(update(letters).values(values))
        requests.revive(connection, ["key_1"], now)
        actions.record(connection, operator="eve", action="login", reason="", count=1, details={"id": id})
        actions.record(
            connection, operator="eve", action="discard", reason="another", count=1, details={"ids": [id + 1]}
        )
    told = tell(house, "key_1")
    before = ("accepted", "parked", "discard", "restore", "parked again")
    after = ("replay 41", "accepted again", "settled", "replay 41 done")
    assert sorted(whats(told)) == sorted((*before, *after))
    # The publishes before the replay are forgotten: it began to count anew.
    assert all(first.at <= second.at for first, second in pairwise(told.events))
    by = {it.what: it for it in told.events}
    assert by["discard"].text == "by ann: garbage"
    assert by["replay 41"].link == "/replays/41"
    assert by["replay 41 done"].text == "1 settled"
    assert "2 times so far" in by["parked again"].text


def test_a_message_that_never_became_a_request(house: processes.House) -> None:
    delivery = Delivery(b'{"v":9,"request_key":"key_9","account_id":5}', b"0", 1)
    parking.park(house.engine, [Parking(delivery, Cause.UNKNOWN_VERSION, "version 9")], worker="w9")
    told = tell(house, "key_9")
    assert whats(told) == ["parked"]
    assert told.request is None
    assert told.result is None
    assert told.account_id == 5
    assert [it.cause for it in told.dead_letters] == ["unknown version"]


def test_an_edited_copy_belongs_to_the_story(house: processes.House) -> None:
    (account_id,) = house.accounts(1)
    raw = b'{"v":1,"request_key":"key_1","account_id":%d,"extra":1}' % account_id
    parking.park(house.engine, [Parking(Delivery(raw, b"0", 1), Cause.INVALID, "extra")], worker="w9")
    body = DrawRequest(account_id=account_id, request_key="key_1", lottery_session_id="other").encode()
    copy_id = dead_letters.edit(house.engine, 1, body, operator="ann", reason="no such field")
    told = tell(house, "other")
    assert [it.id for it in told.dead_letters] == [1, copy_id]
    assert {"parked", "edited", "edit"} <= set(whats(told))


def test_an_account(house: processes.House) -> None:
    first, second = house.accounts(2)
    draws = [DrawRequest(account_id=first, request_key=f"key_{number}") for number in range(5)]
    for draw in draws:
        settled(house, draw)
    settled(house, DrawRequest(account_id=second, request_key="other"))
    id = parked(house, DrawRequest(account_id=first, request_key="dead"))
    told = tell(house, str(first))
    assert told.kind == "account"
    assert told.account is not None
    assert {it.lottery_session_id for it in told.draws} >= {draw.request_key for draw in draws}
    assert "other" not in {it.lottery_session_id for it in told.draws}
    assert [it.at for it in told.draws] == sorted((it.at for it in told.draws), reverse=True)
    assert told.draws[0].balance_after == told.account.balance
    assert [it.id for it in told.dead_letters] == [id]
    # A dead letter names an account that does not exist.
    parked(house, DrawRequest(account_id=77_777, request_key="dead_2"))
    told = tell(house, "77777")
    assert (told.kind, told.account, len(told.dead_letters)) == ("account", None, 1)


def test_a_key_of_digits_is_a_key_first(house: processes.House) -> None:
    (account_id,) = house.accounts(1)
    settled(house, DrawRequest(account_id=account_id, request_key=str(account_id)))
    assert tell(house, str(account_id)).kind == "draw"


@pytest.mark.parametrize("query", ["", " ", "unknown", "KEY_1", "é", "%", "key_%", "x" * 101, "9" * 40, "-1", "\x00"])
def test_nothing_is_known_of_the_rest(house: processes.House, query: str) -> None:
    (account_id,) = house.accounts(1)
    settled(house, DrawRequest(account_id=account_id, request_key="key_1"))
    told = tell(house, query)
    assert (told.kind, list(told.events)) == ("nothing", [])


# ---- no table is read whole ------------------------------------------------------------------------------------------

ROWS = 3000
BIG = {"api_idempotency_requests", "asset_transactions", "dead_letters"}


def fill(engine: Engine, account_id: int) -> None:
    now = utc_now()
    keys = [f"many_{number:05d}" for number in range(ROWS)]
    with engine.begin() as connection:
        connection.execute(
            insert(account_asset_balances),
            [
                {
                    "id": 100 + n, "user_id": 100 + n, "asset_code": "POINT", "balance": 0,
                    "created_at": now, "updated_at": now,
                }
                for n in range(100)
            ],
        )  # fmt: skip
        common = {"created_at": now, "updated_at": now, "balance_before": Decimal(0), "balance_after": Decimal(0)}
        connection.execute(
            insert(asset_transactions),
            [
                {
                    **common, "account_id": 100 + n % 100, "business_id": key, "lottery_session_id": key,
                    "idempotency_key": f"{key}:consume", "business_type": "lottery_consume", "asset_code": "POINT",
                    "delta_amount": Decimal(0),
                }
                for n, key in enumerate(keys)
            ],
        )  # fmt: skip
        connection.execute(
            insert(api_idempotency_requests),
            [
                {
                    "request_key": key, "lottery_session_id": key, "account_id": 100 + n % 100, "campaign": "default",
                    "fingerprint": f"{n:064x}", "status": "completed", "created_at": now, "settled_at": now,
                }
                for n, key in enumerate(keys)
            ],
        )  # fmt: skip
        connection.execute(
            insert(letters),
            [
                {
                    "body_sha256": f"{n:064x}", "cause": "invalid", "error": "x", "group_id": "g", "body": b"x",
                    "body_bytes": 1, "request_key": key, "lottery_session_id": key, "account_id": 100 + n % 100,
                    "queue": "draws", "deliveries": 1, "times_parked": 1, "first_parked_at": now,
                    "last_parked_at": now, "edited_from": n if n % 7 == 0 else None,
                }
                for n, key in enumerate(keys)
            ],
        )  # fmt: skip


def plans(connection: Connection, statements: list[tuple[str, Any]]) -> Iterator[str]:
    """How the database goes about each statement, a line for each table it touches."""
    is_sqlite = connection.dialect.name == "sqlite"
    for statement, parameters in statements:
        for row in connection.exec_driver_sql(f"EXPLAIN {'QUERY PLAN ' if is_sqlite else ''}{statement}", parameters):
            yield str(row._mapping["detail"]) if is_sqlite else f"{row._mapping['type']} {row._mapping['table']}"


@pytest.mark.parametrize("query", ["many_00042", "unknown", "142", "4242424242"])
def test_it_is_found_by_index(house: processes.House, query: str) -> None:
    (account_id,) = house.accounts(1)
    fill(house.engine, account_id)
    with house.engine.begin() as connection:
        for table in sorted(BIG):
            connection.execute(text(f"ANALYZE {'' if connection.dialect.name == 'sqlite' else 'TABLE '}{table}"))
    said: list[tuple[str, Any]] = []

    def hear(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool) -> None:
        if statement.lstrip().startswith("SELECT"):
            said.append((statement, parameters))

    event.listen(house.engine, "before_cursor_execute", hear)
    tell(house, query)
    event.remove(house.engine, "before_cursor_execute", hear)
    assert len(said) >= 4
    with house.engine.connect().execution_options(read_only=True) as connection:
        found = list(plans(connection, said))
    whole = [it for it in found if it.startswith(("SCAN", "ALL", "index ")) and any(name in it for name in BIG)]
    assert whole == [], found
