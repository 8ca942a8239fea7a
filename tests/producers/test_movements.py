"""DrawClient moves money: on SQLite and MariaDB, alone and inside the application's own transaction."""

import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, text

from tests.books import table
from tests.kept_results import keep_results
from tests.processes import House
from tombola.producers import (
    AccountNotFound,
    AlreadyRefunded,
    DrawClient,
    DrawDead,
    DrawError,
    DrawNotCompleted,
    DrawRequest,
    HoldEnded,
    HoldExpired,
    HoldNotCompleted,
    HoldNotFound,
    IdempotencyKeyReused,
    InvalidKey,
    InvalidRequest,
    MovementTicket,
    OpenedAccount,
    PrizeSpent,
    ResultNotReady,
    ServiceUnavailable,
    SessionNotFound,
    Settings,
)
from tombola.producers.brokers.registry import open_broker
from tombola.producers.results import KEY_PREFIX, ResultStore
from tombola.worker.ledger.accounts import open_account
from tombola.worker.relay.given_up import time_out_once
from tombola.worker.relay.overdue import relay_once
from tombola.worker.relay.retention import archive_once
from tombola.worker.settle.consumer import Consumer

pytestmark = pytest.mark.process


@pytest.fixture
def house(database_url: str, redis_url: str) -> Iterator[House]:
    with House(database_url, redis_url, redis_url) as house:
        yield house


@pytest.fixture
def client(house: House) -> Iterator[DrawClient]:
    with DrawClient.from_settings(house.settings) as client:
        yield client


@pytest.fixture
def shop(house: House) -> Iterator[Engine]:
    """An engine of an application's own, with a table of its orders."""
    url = house.settings.need("database_url")
    level = {} if url.startswith("sqlite") else {"isolation_level": "READ COMMITTED"}
    engine = create_engine(url, **level)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (id INTEGER PRIMARY KEY)"))
    yield engine
    engine.dispose()


@pytest.fixture
def rich(house: House) -> int:
    return open_account(house.engine, user_id=1, balance=Decimal(100))


@pytest.fixture
def poor(house: House) -> int:
    return open_account(house.engine, user_id=2, balance=Decimal(1))


def consume(house: House) -> None:
    """What a worker does, until the queue is empty."""
    consumer = Consumer.open(house.settings, house.engine, house.wheels)
    while (report := consumer.consume_once(wait_s=0.2)).settled or report.parked:
        pass
    consumer.deliveries.close()


def relay(house: House) -> int:
    broker = open_broker(house.settings.need("broker_url"), publish_timeout_s=10)
    try:
        return relay_once(house.engine, broker, after_s=60)
    finally:
        broker.close()


def winning_key(house: House, account_id: int) -> str:
    wheel = house.wheels["default"]
    return next(key for key in (f"win-{number}" for number in range(1000)) if wheel.draw(account_id, key).amount)


def requests(house: House) -> list[str]:
    return sorted(row["request_key"] for row in table(house.engine, "api_idempotency_requests"))


def test_each_movement_is_a_method(house: House, client: DrawClient, rich: int, poor: int) -> None:
    opened = client.open_account(3, asset_code="POINT", amount="9.5", key="o", reference="welcome")
    assert opened == OpenedAccount(opened.account_id, 3, "POINT", True, MovementTicket("o", "o"))
    assert client.recharge(rich, "5", key="r", channel="cards", reference="p-1", session="pay-1") == (
        "r",
        "pay-1",
        None,
    )
    client.transfer(rich, poor, Decimal("7.00"), key="t", reference="gift")
    client.adjust(rich, "-3", "counted wrong", key="a")
    client.hold(rich, "30", key="h1")
    client.hold(rich, "20", key="h2", valid_s=60)
    win = winning_key(house, rich)
    client.enqueue(DrawRequest(account_id=rich, request_key=win, lottery_session_id="drawn"))
    with pytest.raises(ResultNotReady):
        client.movement("pay-1")
    consume(house)
    client.post("h1", amount="10", to=poor, key="p", reference="trade")
    client.void("h2", key="v", reason="no trade")
    client.refund("drawn", key="f", reason="it was the child")
    consume(house)
    told = {name: client.wait_movement(name) for name in ("o", "pay-1", "t", "a", "h1", "h2", "p", "v", "f")}
    assert {it.status for it in told.values()} == {"completed"}
    assert [(name, it.kind, it.balance_after) for name, it in told.items()] == [
        ("o", "recharge", "9.50"), ("pay-1", "recharge", "105.00"), ("t", "transfer", "98.00"),
        ("a", "adjust", "95.00"), ("h1", "hold", "65.00"), ("h2", "hold", "45.00"),
        ("p", "post", "69.00"), ("v", "void", "89.00"), ("f", "refund", "85.00"),
    ]  # fmt: skip
    assert told["pay-1"].reference == "p-1"
    # What has settled is answered with its first result: by the database, and by Redis.
    assert (
        client.recharge(rich, "5.00", key="r", channel="cards", reference="p-1", session="pay-1").result
        == told["pay-1"]
    )
    assert client.refund("drawn", key="f", reason="it was the child").result == told["f"]
    assert client.void("h2", key="v", reason="no trade").result == told["v"]
    again = client.open_account(3, amount="9.50", key="o", reference="welcome")
    assert (again.account_id, again.is_new, again.recharge) == (opened.account_id, False, ("o", "o", told["o"]))
    keep_results(house.engine)
    assert archive_once(house.engine, older_than_s=-3600) == 10
    assert client.post("h1", amount="10", to=poor, key="p", reference="trade").result == told["p"]
    assert house.violations() == []


@pytest.mark.parametrize("commits", [True, False])
def test_an_order_and_its_recharge_are_one_commit(
    house: House, client: DrawClient, shop: Engine, rich: int, commits: bool
) -> None:
    """The payment webhook comes twice: it books its order, and our recharge, once and in one transaction."""
    for _ in range(2):
        with shop.connect() as connection:
            if connection.execute(text("SELECT id FROM orders WHERE id = 17")).first() is None:
                connection.execute(text("INSERT INTO orders VALUES (17)"))
            ticket = client.recharge(rich, "5.00", key="payment-17", channel="cards", connection=connection)
            assert ticket == ("payment-17", "payment-17", None)
            (connection.commit if commits else connection.rollback)()
    assert [row["id"] for row in table(house.engine, "orders")] == ([17] if commits else [])
    assert requests(house) == (["payment-17"] if commits else [])
    assert relay(house) == commits
    consume(house)
    assert [row["idempotency_key"] for row in table(house.engine, "asset_transactions")][1:] == (
        ["payment-17:recharge"] if commits else []
    )
    if commits:
        with shop.begin() as connection:
            repeated = client.recharge(rich, "5.00", key="payment-17", channel="cards", connection=connection)
        assert repeated.result == client.movement("payment-17")
        with shop.begin() as connection, pytest.raises(IdempotencyKeyReused):
            client.recharge(rich, "6.00", key="payment-17", channel="cards", connection=connection)
    assert house.violations() == []


@pytest.mark.parametrize("commits", [True, False])
def test_a_user_and_the_account_are_one_commit(house: House, client: DrawClient, shop: Engine, commits: bool) -> None:
    """What is accepted in a transaction sees what the transaction has opened."""
    with shop.connect() as connection:
        connection.execute(text("INSERT INTO orders VALUES (4)"))
        opened = client.open_account(4, amount="5.00", key="open", connection=connection)
        assert opened.is_new
        assert opened.recharge == ("open", "open", None)
        more = client.recharge(opened.account_id, "1.00", key="more", connection=connection)
        again = client.open_account(4, amount="5.00", key="open", connection=connection)
        assert again == opened._replace(is_new=False)
        assert more.result is None
        (connection.commit if commits else connection.rollback)()
    accounts = [(row["user_id"], row["balance"]) for row in table(house.engine, "account_asset_balances")]
    assert accounts == ([(4, 0)] if commits else [])
    assert requests(house) == (["more", "open"] if commits else [])
    assert relay(house) == (2 if commits else 0)
    consume(house)
    balances = [row["balance"] for row in table(house.engine, "account_asset_balances")]
    assert balances == ([600] if commits else [])
    assert house.violations() == []


def test_an_account_is_given_its_amount_by_its_opening_alone(house: House, client: DrawClient) -> None:
    first = client.open_account(5, amount="5.00", key="k1")
    other = client.open_account(5, amount="5.00", key="k2")
    assert (other.account_id, other.is_new, other.recharge) == (first.account_id, False, None)
    assert client.open_account(5).recharge is None
    with pytest.raises(IdempotencyKeyReused):
        client.open_account(6, amount="5.00", key="k1")
    with pytest.raises(IdempotencyKeyReused):
        client.open_account(5, amount="6.00", key="k1")
    assert [row["user_id"] for row in table(house.engine, "account_asset_balances")] == [5]
    assert requests(house) == ["k1"]
    for wrong in (
        {"user_id": 0},
        {"user_id": True},
        {"asset_code": "a b"},
        {"amount": "-1"},
        {"amount": "x"},
        {"key": "a:b"},
    ):
        arguments: dict[str, Any] = {"user_id": 7, "amount": "1"} | wrong
        with pytest.raises(InvalidRequest):
            client.open_account(**arguments)


def test_what_evidently_cannot_be_is_raised_before_a_write(
    house: House, client: DrawClient, shop: Engine, rich: int, poor: int
) -> None:
    win = winning_key(house, poor)
    client.enqueue(DrawRequest(account_id=poor, request_key=win))
    client.enqueue(DrawRequest(account_id=rich, request_key="plain"))
    for name in ("ended", "open"):
        client.hold(rich, "10", key=name)
    client.hold(rich, "1", key="brief", valid_s=1)
    client.hold(rich, "9999", key="rejected")
    consume(house)
    client.transfer(poor, rich, "5.00", key="spent")
    client.void("ended", key="v")
    client.refund("plain", key="f")
    consume(house)
    assert client.movement("rejected").reason == "INSUFFICIENT_BALANCE"
    client.enqueue(DrawRequest(account_id=rich, request_key="pending"))
    client.hold(rich, "1", key="waiting")
    time.sleep(1.1)  # `brief` was valid for a second
    before = requests(house)
    tries: list[tuple[type[DrawError], Callable[[Connection | None], object]]] = [
        (AccountNotFound, lambda it: client.recharge(4711, "5", connection=it)),
        (AccountNotFound, lambda it: client.transfer(rich, 4711, "5", connection=it)),
        (AccountNotFound, lambda it: client.transfer(4711, rich, "5", connection=it)),
        (AccountNotFound, lambda it: client.adjust(4711, "5", "why", connection=it)),
        (AccountNotFound, lambda it: client.hold(4711, "5", connection=it)),
        (AccountNotFound, lambda it: client.post("open", to=4711, connection=it)),
        (SessionNotFound, lambda it: client.refund("nothing", connection=it)),
        (SessionNotFound, lambda it: client.refund("open", connection=it)),
        (DrawNotCompleted, lambda it: client.refund("pending", connection=it)),
        (AlreadyRefunded, lambda it: client.refund("plain", connection=it)),
        (PrizeSpent, lambda it: client.refund(win, connection=it)),
        (HoldNotFound, lambda it: client.post("nothing", connection=it)),
        (HoldNotFound, lambda it: client.void(win, connection=it)),
        (HoldNotCompleted, lambda it: client.void("waiting", connection=it)),
        (HoldNotCompleted, lambda it: client.post("rejected", connection=it)),
        (HoldEnded, lambda it: client.post("ended", connection=it)),
        (HoldEnded, lambda it: client.void("ended", connection=it)),
        (HoldExpired, lambda it: client.post("brief", connection=it)),
        (InvalidKey, lambda it: client.refund("ü", connection=it)),
        (InvalidKey, lambda it: client.void("ü", connection=it)),
        (InvalidRequest, lambda it: client.recharge(rich, 5.0, connection=it)),  # type: ignore[arg-type]
        (InvalidRequest, lambda it: client.adjust(rich, "5", "", connection=it)),
        (IdempotencyKeyReused, lambda it: client.recharge(4711, "5", key="plain", connection=it)),
        (IdempotencyKeyReused, lambda it: client.recharge(rich, "5", key="plain", connection=it)),
    ]
    for error, attempt in tries:
        with pytest.raises(error):
            attempt(None)
        with shop.begin() as connection, pytest.raises(error):
            attempt(connection)
    assert requests(house) == before
    client.void("brief", key="late")
    consume(house)
    assert house.violations() == []


def test_a_client_with_a_caller_ends_its_own_holds(house: House, client: DrawClient, rich: int) -> None:
    """A client without one is the operator's, and sees all."""
    with (
        DrawClient.from_settings(house.settings, caller="one") as one,
        DrawClient.from_settings(house.settings, caller="two") as two,
    ):
        mine, theirs = one.hold(rich, "10", key="h"), two.hold(rich, "20", key="h")
        assert (mine.request_key, theirs.request_key[:6]) == ("h", "alias_")
        drawn = one.enqueue(DrawRequest(account_id=rich, request_key="d"))
        consume(house)
        with pytest.raises(SessionNotFound):
            two.refund(drawn.lottery_session_id)
        ended = two.void("h", key="v")
        with pytest.raises(HoldNotFound):
            one.void(theirs.request_key)
        client.post("h", key="p")
        client.refund(drawn.lottery_session_id, key="f")
        consume(house)
        assert [row.idempotency_key for row in two.movement(ended.lottery_session_id).transactions] == [
            f"{theirs.request_key}:void"
        ]
    states = {row["hold_key"]: row["state"] for row in table(house.engine, "account_holds")}
    assert states == {"h": "posted", theirs.request_key: "voided"}
    assert house.violations() == []


def test_another_requests_result_in_redis_is_not_believed(
    house: House, client: DrawClient, rich: int, redis_url: str
) -> None:
    client.recharge(rich, "5", key="r")
    client.recharge(rich, "6", key="s", session="s2")
    consume(house)
    store = ResultStore.open(redis_url, ttl_s=600)
    envelope = store._client.get(f"{KEY_PREFIX}s2")
    assert isinstance(envelope, bytes)
    store._client.set(f"{KEY_PREFIX}r", envelope.replace(b'"lottery_session_id":"s2"', b'"lottery_session_id":"r"'))
    assert client.recharge(rich, "5", key="r").result is None  # remembered as accepted: Redis is asked
    store.close()
    with DrawClient.from_settings(house.settings) as fresh:
        found = fresh.recharge(rich, "5", key="r").result
        assert found is not None
        assert found.request_key == "r"


def test_a_movement_that_was_given_up_is_dead(house: House, client: DrawClient, rich: int) -> None:
    client.recharge(rich, "5", key="r")
    assert time_out_once(house.engine, timeout_s=-60) == 1
    with pytest.raises(DrawDead):
        client.wait_movement("r")


def test_a_database_that_is_away_is_said_so(redis_url: str) -> None:
    names = {"DATABASE": "mysql+pymysql://shop@127.0.0.1:9/tombola", "BROKER": redis_url}
    settings = Settings.from_env({f"TOMBOLA_{name}_URL": url for name, url in names.items()})
    with DrawClient.from_settings(settings) as client:
        for attempt in (
            lambda: client.recharge(1, "5"),
            lambda: client.refund("x"),
            lambda: client.void("x"),
            lambda: client.open_account(1),
        ):
            with pytest.raises(ServiceUnavailable):
                attempt()
