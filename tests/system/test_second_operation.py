"""A second operation, of two accounts with an asset each, registered here and nowhere else.

It settles beside draws in the real batch, is foretold, replayed, audited and answered: none of these knows a draw but
by the four functions that it has as well.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
import redis
from sqlalchemy import text

from tests.books import Shape, assert_books
from tests.kept_results import keep_results
from tests.processes import House
from tombola.producers.brokers.registry import open_broker
from tombola.producers.domain import operations
from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import DrawRequest, Request, Row
from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.errors import InvalidRequest, UnknownVersion
from tombola.producers.domain.operations.operation import (
    Decision,
    Findings,
    Locked,
    Movement,
    Needs,
    Outcome,
    Rejection,
    Written,
)
from tombola.producers.gateway.results import Results
from tombola.producers.results import ResultStore
from tombola.producers.storage import requests
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.transactions import transaction
from tombola.worker.audit.audit import audit
from tombola.worker.dead_letters import parking
from tombola.worker.dead_letters.letters import Selection
from tombola.worker.dead_letters.message import Parking
from tombola.worker.deliveries import received
from tombola.worker.ledger.accounts import open_account
from tombola.worker.replays import replay
from tombola.worker.replays.forecast import forecast
from tombola.worker.replays.replay import Options
from tombola.worker.replays.replayer import Replayer
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Deferred, Settled
from tombola.worker.settle.batch import Handling
from tombola.worker.settle.consumer import Consumer
from tombola.worker.settle.lanes import Lanes
from tombola.worker.settle.rules import Rules

CENT = Decimal("0.01")


# ---- the operation ---------------------------------------------------------------------------------------------------


class ExchangeRequest(Request, frozen=True, kw_only=True):
    """`account_id` pays `pays`, and `to` gets `gets`, in whatever each of them holds."""

    kind = "exchange"

    to: int
    pays: Decimal
    gets: Decimal

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        if min(self.pays, self.gets) <= 0 or self.to == self.account_id:
            raise InvalidRequest("an exchange moves something, between two accounts")


class ExchangeResult(msgspec.Struct, kw_only=True):
    v: int = 2
    kind: str = "exchange"
    request_key: str
    lottery_session_id: str
    account_id: int
    status: str
    reason: str | None
    balance_after: str | None
    moved: dict[str, str]


class Exchange:
    """All that there is to an operation."""

    FIELDS = ExchangeRequest
    TYPES: Mapping[str, str] = MappingProxyType({"given": "exchange_given", "taken": "exchange_taken"})
    HOUSE: Mapping[str, str] = MappingProxyType(dict.fromkeys(("exchange_given", "exchange_taken"), "house/exchange"))

    def needs(self, request: ExchangeRequest, _wheels: Wheels, /) -> Needs:
        return Needs((request.account_id, request.to))

    def decide(self, request: ExchangeRequest, locked: Locked, /) -> Decision:
        payer = locked.accounts.get(request.account_id)
        if payer is None or request.to not in locked.accounts:
            return Rejection("ACCOUNT_NOT_FOUND", None)
        if payer.balance < request.pays:
            return Rejection("INSUFFICIENT_BALANCE", payer.balance)
        return [
            Movement(request.account_id, "given", "exchange_given", -request.pays, ""),
            Movement(request.to, "taken", "exchange_taken", request.gets, ""),
        ]

    def result(self, request: ExchangeRequest, outcome: Outcome, /) -> bytes:
        is_rejected = isinstance(outcome, Rejection)
        rows: list[Row] = [] if isinstance(outcome, Rejection) else list(outcome)
        balance = outcome.balance if isinstance(outcome, Rejection) else rows[0].after
        return msgspec.json.encode(
            ExchangeResult(
                request_key=request.request_key,
                lottery_session_id=request.lottery_session_id,
                account_id=request.account_id,
                status="rejected" if is_rejected else "completed",
                reason=outcome.reason if isinstance(outcome, Rejection) else None,
                balance_after=None if balance is None else str(balance),
                moved={f"{row.account_id} {row.asset_code}": str(row.delta) for row in rows},
            )
        )

    def check(self, request: ExchangeRequest, written: Written, /) -> Findings:
        return {"I1": self._charged(written), "I2": self._moved(request, written)}

    def _charged(self, written: Written) -> Iterator[str]:
        given = [row for row in written.rows if row.business_type == "exchange_given"]
        if len(given) != (1 if written.is_completed else 0):
            yield f"is {written.status} and has given {len(given)} times"

    def _moved(self, request: ExchangeRequest, written: Written) -> Iterator[str]:
        moved = [row.delta for row in written.rows]
        if written.is_completed and moved != [-request.pays, request.gets]:
            yield f"has moved {', '.join(map(str, moved))}"


def _exchanged(rows: list[dict[str, Any]]) -> None:
    given, taken = rows
    assert given["delta_amount"] < 0 < taken["delta_amount"]
    assert given["account_id"] != taken["account_id"]


def _says(_request: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    moved = {
        f"{row['account_id']} {row['asset_code']}": f"{Decimal(row['delta_amount']).scaleb(-2):.2f}" for row in rows
    }
    return {"moved": moved}


SHAPES = {"exchange": Shape({"given": "exchange_given", "taken": "exchange_taken"}, _exchanged, _says)}


# ---- a house that has it ---------------------------------------------------------------------------------------------


@pytest.fixture
def house(database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setitem(operations.OPERATIONS, "exchange", Exchange())
    with House(database_url, redis_url, redis_url) as house:
        yield house


@pytest.fixture
def mariadb_house(mariadb_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    """For what SQLite has not, which has one writer at a time."""
    monkeypatch.setitem(operations.OPERATIONS, "exchange", Exchange())
    with House(mariadb_url, redis_url, redis_url) as house:
        yield house


@pytest.fixture
def ids(house: House) -> tuple[int, int, int]:
    """Three accounts: 100 POINT, 7 COIN, 1 POINT."""
    return (
        open_account(house.engine, user_id=1, balance=Decimal(100)),
        open_account(house.engine, user_id=1, asset_code="COIN", balance=Decimal(7)),
        open_account(house.engine, user_id=2, balance=Decimal(1)),
    )


def exchange(key: str, account_id: int, to: int, pays: str = "5.00", gets: str = "3.00") -> ExchangeRequest:
    return ExchangeRequest(account_id=account_id, request_key=key, to=to, pays=Decimal(pays), gets=Decimal(gets))


def consume(house: House, *bodies: bytes) -> None:
    """Publish, and consume until the queue is empty."""
    house.publish(*bodies)
    consumer = Consumer.open(house.settings, house.engine, house.wheels)
    while (report := consumer.consume_once(wait_s=0.2)).settled or report.parked:
        pass
    consumer.deliveries.close()


def store_of(house: House) -> ResultStore:
    return ResultStore.from_settings(house.settings, engine=house.engine)


def found_by_gateway(house: House, session_id: str) -> bytes | None:
    """What the gateway's result store answers, which looks into Redis."""

    async def look() -> bytes | None:
        with ThreadPoolExecutor(1) as readers:
            results = Results(house.settings.need("result_url"), lambda _sessions: {}, readers)
            results.start()
            try:
                return await results.wait(session_id, timeout_s=20)
            finally:
                await results.close()

    return asyncio.run(look())


def violations(house: House) -> list[str]:
    return [str(it) for it in audit(house.engine, house.wheels).violations]


# ---- and what becomes of it ------------------------------------------------------------------------------------------


def test_it_settles_beside_draws_and_is_answered_for_ever(
    house: House, ids: tuple[int, int, int], redis_url: str
) -> None:
    rich, coins, poor = ids
    asked = exchange("swap", rich, coins)
    other = {"v": 1, "request_key": "swap", "account_id": rich}
    consume(
        house,
        DrawRequest(account_id=rich, request_key="d1").encode(),
        asked.encode(),
        asked.encode(),
        exchange("short", poor, coins).encode(),
        exchange("nobody", rich, 4711).encode(),
        exchange("back", coins, rich, "10.00", "1.00").encode(),  # paid with what was just taken
        json.dumps(other).encode(),
    )
    assert house.causes() == [Cause.FINGERPRINT_MISMATCH]  # the draw under the exchange's key
    said = {key: json.loads(result) for key, result in house.results().items()}
    assert {key: (it["status"], it["reason"]) for key, it in said.items()} == {
        "d1": ("completed", None),
        "swap": ("completed", None),
        "short": ("rejected", "INSUFFICIENT_BALANCE"),
        "nobody": ("rejected", "ACCOUNT_NOT_FOUND"),
        "back": ("completed", None),
    }
    assert said["swap"]["moved"] == {f"{rich} POINT": "-5.00", f"{coins} COIN": "3.00"}
    assert said["back"]["balance_after"] == "0.00"
    assert_books(house.engine, SHAPES)
    assert violations(house) == []

    first = {session_id: house.results()[session_id].encode() for session_id in said}
    results = store_of(house)
    assert {it: results.wait_for_body(it, timeout_s=5) for it in first} == first
    assert found_by_gateway(house, "swap") == first["swap"]
    # What was archived, and forgotten by Redis, is rebuilt from its rows: to the byte, by whomever asks.
    keep_results(house.engine)
    assert violations(house) == []
    with house.engine.begin() as connection:
        assert requests.archive(connection, utc_now() + timedelta(days=1), rows_max=100) == len(first)
    client = redis.Redis.from_url(redis_url)
    client.delete(*[f"celery-task-meta-{it}" for it in first])
    assert violations(house) == []
    assert {it: results.get(it) for it in first} == first
    client.delete(*[f"celery-task-meta-{it}" for it in first])
    consume(house, asked.encode(), exchange("short", poor, coins).encode())  # redelivered
    assert (found_by_gateway(house, "swap"), found_by_gateway(house, "short")) == (first["swap"], first["short"])
    results.close()
    client.close()


def test_it_waits_for_each_of_its_accounts(mariadb_house: House) -> None:
    house = mariadb_house
    rich, coins, poor = house.accounts(3)
    asked = [exchange("swap", rich, coins), DrawRequest(account_id=rich, request_key="d1"), exchange("to", rich, poor)]
    rules = Rules(house.wheels, tries_max=2)
    with house.engine.begin() as connection:
        connection.execute(text("SELECT * FROM account_asset_balances WHERE id = :id FOR UPDATE"), {"id": coins})
        held, *others = tries.settle(house.engine, asked, rules, has_patience=False)
    assert (type(held), [type(it) for it in others]) == (Deferred, [Settled, Settled])
    (answer,) = tries.settle(house.engine, asked[:1], rules, has_patience=False)
    assert isinstance(answer, Settled)
    assert_books(house.engine, SHAPES)


def test_lanes_share_no_account(mariadb_house: House) -> None:
    """Each is settled at the first try: no two transactions at once touch an account."""
    house = mariadb_house
    accounts = [open_account(house.engine, user_id=number, balance=Decimal(1000)) for number in range(1, 9)]
    asked: list[Request] = [
        exchange(f"x{number}", accounts[number % 8], accounts[(number + 1 + number // 8) % 8], "1.00", "1.00")
        if number % 2 and (1 + number // 8) % 8
        else DrawRequest(account_id=accounts[number % 8], request_key=f"d{number}")
        for number in range(160)
    ]
    lanes = Lanes(house.engine, Rules(house.wheels, tries_max=1, lock_wait_s=20), 4)
    answers = lanes.begin(asked, Handling()).answers()
    assert [it.request.request_key for it in answers] == [it.request_key for it in asked]
    assert all(isinstance(it, Settled) for it in answers)
    assert_books(house.engine, SHAPES)


def test_it_is_foretold_and_replayed(house: House, ids: tuple[int, int, int]) -> None:
    rich, coins, poor = ids
    asked = [
        exchange("swap", rich, coins),
        exchange("back", coins, rich, "9.50", "1.00"),  # which only the first one makes possible
        exchange("short", poor, coins),
        DrawRequest(account_id=rich, request_key="d1"),
    ]
    deliveries = [received(it.encode(), number) for number, it in enumerate(asked)]
    parking.park(
        house.engine, [Parking(it, Cause.FAILED_ALONE, "why", it.request()) for it in deliveries], worker="host:1"
    )
    said = forecast(house.engine, Selection())
    assert [(it.request_key, it.outcome) for it in said.lines] == [
        ("swap", "would charge"),
        ("back", "would charge"),
        ("short", "would be rejected"),
        ("d1", "would charge"),
    ]
    assert said.charged == {"POINT": Decimal("6.00"), "COIN": Decimal("9.50")}

    consumer = Consumer.open(house.settings, house.engine, house.wheels)
    consumer.start()
    broker = open_broker(house.settings.need("broker_url"), publish_timeout_s=10)
    try:
        replay_id = replay.begin(house.engine, Selection(), Options(), operator="ada", reason="it is mended")
        done = Replayer(house.engine, broker, house.settings).run(replay_id)
    finally:
        assert consumer.stop(timeout_s=20)
        broker.close()
    assert (done.status, done.settled, done.parked_again, done.refused) == ("done", 4, 0, 0)
    statuses = {key: json.loads(result)["status"] for key, result in house.results().items()}
    assert statuses == {"swap": "completed", "back": "completed", "short": "rejected", "d1": "completed"}
    assert_books(house.engine, SHAPES)
    assert violations(house) == []


def test_the_relay_knows_it_by_its_row(house: House, ids: tuple[int, int, int]) -> None:
    rich, coins, _ = ids
    asked = [exchange("swap", rich, coins), DrawRequest(account_id=rich, request_key="d1")]
    requests_of = {it.request_key: it for it in asked}
    with transaction(house.engine) as open_transaction:
        accepted = [requests.Submission(it) for it in asked]
        requests.accept(open_transaction, accepted, utc_now(), publish_at=utc_now(), is_published=False)
    with house.engine.begin() as connection:
        leased = requests.lease(
            connection,
            utc_now() + timedelta(seconds=1),
            rows_max=10,
            tries_max=5,
            delay_after=lambda _attempts: timedelta(seconds=30),
            published_before=None,
        )
    assert {it.request_key: it for it in leased.due} == requests_of
    assert {it.encode() for it in leased.due} == {it.encode() for it in asked}
    consume(house, *[it.encode() for it in leased.due])
    assert house.settled() == 2
    assert_books(house.engine, SHAPES)
    assert violations(house) == []


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("DELETE FROM asset_transactions WHERE idempotency_key = 'swap:given'", ["I1", "I2", "I10"]),
        ("DELETE FROM asset_transactions WHERE idempotency_key = 'swap:taken'", ["I2", "I10"]),
        ("UPDATE asset_transactions SET account_id = 3 WHERE idempotency_key = 'swap:taken'", ["I10", "I11"]),
        ("DELETE FROM api_idempotency_requests WHERE request_key = 'swap'", ["I1"]),
        ('UPDATE api_idempotency_requests SET terms = \'[2,"5.00","4.00"]\'', ["I2", "I10"]),
        ("UPDATE api_idempotency_requests SET terms = '[2'", ["I10"]),
        ("UPDATE api_idempotency_requests SET kind = 'lease'", ["I10"]),
    ],
)
def test_the_audit_asks_the_operation(
    house: House, ids: tuple[int, int, int], statement: str, found: list[str]
) -> None:
    rich, coins, _ = ids
    assert ids == (1, 2, 3)
    consume(house, exchange("swap", rich, coins).encode())
    keep_results(house.engine)  # as an older release did: the audit compares them (I10)
    assert violations(house) == []
    with house.engine.begin() as connection:
        assert connection.exec_driver_sql(statement).rowcount == 1
    told = {it.partition(" ")[0] for it in violations(house)}
    assert told - {"I3", "I4"} == set(found)  # a row that is gone breaks its chain as well


def test_what_is_no_request_of_a_known_kind_is_set_aside(house: House, ids: tuple[int, int, int]) -> None:
    rich, coins, _ = ids
    good: dict[str, Any] = json.loads(exchange("swap", rich, coins).encode())
    for wrong, error, words in (
        ({"kind": "lease"}, UnknownVersion, "contract version 2"),
        ({"kind": "draw"}, InvalidRequest, "unknown fields"),
        ({"kind": 7}, UnknownVersion, "contract version 2"),
        ({"v": 3}, UnknownVersion, "contract version 3"),
        ({"more": 1}, InvalidRequest, "unknown fields"),
        ({"request_key": ""}, InvalidRequest, "no request_key"),
        ({"request_key": "a:b"}, InvalidRequest, "request key"),
        ({"to": "2"}, InvalidRequest, "not a exchange request"),
        ({"to": rich}, InvalidRequest, "between two accounts"),
        ({"pays": "1" * 250}, InvalidRequest, "have at most"),
    ):
        with pytest.raises(error, match=words):
            operations.parse_request(json.dumps(good | wrong).encode())
    without = {name: value for name, value in good.items() if name != "to"}
    with pytest.raises(InvalidRequest, match="not a exchange request"):
        operations.parse_request(json.dumps(without).encode())
    assert operations.parse_request(json.dumps(good).encode()) == exchange("swap", rich, coins)
    consume(house, *[json.dumps(good | it).encode() for it in ({"kind": "lease"}, {"more": 1})])
    assert house.causes() == [Cause.INVALID, Cause.UNKNOWN_VERSION]
    assert house.settled() == 0
