"""DrawClient as a web frontend uses it, on both brokers."""

import socket
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import event
from typer.testing import CliRunner

import tombola.producers.client
from tests import servers
from tests.books import table
from tests.kept_results import keep_results
from tests.processes import House, draws
from tombola.producers import (
    ConfigurationError,
    DrawClient,
    DrawDead,
    DrawError,
    DrawRequest,
    IdempotencyKeyReused,
    ResultNotReady,
    ServiceUnavailable,
    Settings,
    Ticket,
    UnknownCampaign,
)
from tombola.producers.domain.contract import parse_request, parse_result
from tombola.producers.domain.keys import alias
from tombola.producers.domain.operations import draw as operation
from tombola.producers.domain.operations.operation import Rejection
from tombola.producers.results import KEY_PREFIX, ResultStore, StoredResult
from tombola.producers.storage.clock import utc_now
from tombola.worker.cli import app
from tombola.worker.dead_letters.parking import bury
from tombola.worker.deliveries import Delivery, open_deliveries
from tombola.worker.relay.given_up import time_out_once
from tombola.worker.relay.retention import archive_once
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Settled
from tombola.worker.settle.rules import Rules


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def house(tmp_path: Path, broker_url: str, redis_url: str) -> Iterator[House]:
    with House(f"sqlite:///{tmp_path}/ledger.db", broker_url, redis_url) as house:
        yield house


@pytest.fixture
def client(house: House) -> Iterator[DrawClient]:
    with DrawClient.from_settings(house.settings) as client:
        yield client


def queued(url: str, count: int) -> list[DrawRequest]:
    """What waits on the queue: `count` requests, and nothing behind them."""
    source = open_deliveries(url, claim_after_s=3600, prefetch=5000)
    taken: list[Delivery] = []
    try:
        while len(taken) < count:
            fetched = source.fetch(5000, wait_s=5)
            assert fetched, f"{len(taken)} of {count}"
            taken += fetched
        assert source.fetch(1, wait_s=0.2) == []
    finally:
        source.close()
    return [parse_request(delivery.body) for delivery in taken]


def settle(house: House, *asked: DrawRequest, store: bool = True) -> list[bytes]:
    """What a worker would do, in this process."""
    answers = tries.settle(house.engine, asked, Rules(house.wheels, tries_max=1))
    settled = [answer for answer in answers if isinstance(answer, Settled)]
    assert len(settled) == len(asked)
    if store:
        results = ResultStore.open(house.settings.need("result_url"), ttl_s=600)
        results.put([StoredResult(it.request.lottery_session_id, it.result, it.settled_at) for it in settled])
        results.close()
    return [it.result for it in settled]


def test_enqueue_puts_the_draw_on_the_queue(client: DrawClient, broker_url: str) -> None:
    request = DrawRequest(account_id=6)
    ticket = client.enqueue(request)
    assert ticket == Ticket(request.request_key, request.lottery_session_id)
    assert ticket.reason is None
    assert queued(broker_url, 1) == [request]


def test_enqueue_many_publishes_all_in_order(client: DrawClient, broker_url: str) -> None:
    asked = draws([1, 2, 3], 2500)
    assert client.enqueue_many(asked) == 2500
    assert queued(broker_url, 2500) == asked


def test_enqueue_many_holds_one_chunk_in_memory(client: DrawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tombola.producers.client, "PUBLISH_SIZE_MAX", 10)
    made, ahead = 0, []
    publish = client._broker.publish

    def watch(bodies: list[bytes]) -> None:
        ahead.append((made, len(bodies)))
        publish(bodies)

    def requests() -> Iterator[DrawRequest]:
        nonlocal made
        for draw in draws([1], 25):
            made += 1
            yield draw

    monkeypatch.setattr(client._broker, "publish", watch)
    assert client.enqueue_many(requests()) == 25
    assert ahead == [(10, 10), (20, 10), (25, 5)]


def test_enqueue_many_of_nothing(client: DrawClient) -> None:
    assert client.enqueue_many([]) == 0


def test_a_known_repeat_gets_the_first_result_and_is_not_sent_again(
    house: House, client: DrawClient, broker_url: str
) -> None:
    (account_id,) = house.accounts(1)
    request = DrawRequest(account_id=account_id)
    client.enqueue(request)
    (first,) = settle(house, request)
    again = client.enqueue(DrawRequest(account_id=account_id, request_key=request.request_key))
    assert again.reason == "DUPLICATE_REQUEST_IDEMPOTENT"
    assert again.result is not None
    assert again.result.encode() == first
    assert queued(broker_url, 1) == [request]


def test_the_same_key_with_another_nonce_is_refused(client: DrawClient, house: House) -> None:
    (account_id,) = house.accounts(1)
    first = DrawRequest(account_id=account_id, request_key="k", client_nonce="nonce-of-a-browser_0")
    assert client.enqueue(first) == client.enqueue(first) == Ticket("k", "k")
    others = [DrawRequest(account_id=account_id, request_key="k", client_nonce=it) for it in ("", "n" * 16)]
    for other in others:
        with pytest.raises(IdempotencyKeyReused):
            client.enqueue(other)
    with pytest.raises(IdempotencyKeyReused):
        client.enqueue_many([first, *others])
    (result,) = settle(house, first)
    repeat = client.enqueue(first)
    assert repeat.result is not None
    assert (repeat.result.encode(), repeat.reason) == (result, "DUPLICATE_REQUEST_IDEMPOTENT")
    assert house.violations() == []


def test_a_key_with_another_request_behind_it_is_refused(house: House, client: DrawClient) -> None:
    mine, other = house.accounts(2)
    request = DrawRequest(account_id=mine)
    settle(house, request)
    with pytest.raises(IdempotencyKeyReused) as refused:
        client.enqueue(DrawRequest(account_id=other, request_key=request.request_key))
    assert str(mine) not in str(refused.value)
    with pytest.raises(IdempotencyKeyReused):
        client.enqueue(DrawRequest(account_id=mine, request_key=request.request_key, campaign="another"))


# ---- repeats ---------------------------------------------------------------------------------------------------------


def count_transactions(client: DrawClient) -> Callable[[], int]:
    """How many transactions this client makes from here on."""
    begun: list[object] = []
    event.listen(client._entry.engine, "checkout", lambda *connection: begun.append(connection))
    return lambda: len(begun)


@pytest.mark.parametrize("stored", [True, False])
def test_a_storm_of_repeats_does_not_reach_the_database(house: House, client: DrawClient, stored: bool) -> None:
    (account_id,) = house.accounts(1)
    request = DrawRequest(account_id=account_id)
    begun = count_transactions(client)
    tickets = [client.enqueue(request) for _ in range(1000)]
    assert tickets == [Ticket(request.request_key, request.lottery_session_id)] * 1000
    assert begun() <= 5
    (first,) = settle(house, request, store=stored)
    with DrawClient.from_settings(house.settings) as another:
        begun = count_transactions(another)
        tickets = [another.enqueue(request) for _ in range(1000)]
        assert begun() <= 5
    assert tickets == [Ticket(request.request_key, request.lottery_session_id, parse_result(first))] * 1000
    if stored:  # this one has never asked the database again
        assert client.enqueue(request) == tickets[0]


def test_a_storm_of_foreign_repeats_does_not_reach_the_database(house: House, client: DrawClient) -> None:
    client.enqueue(DrawRequest(account_id=1, request_key="k"))
    begun = count_transactions(client)
    for _ in range(1000):
        with pytest.raises(IdempotencyKeyReused):
            client.enqueue(DrawRequest(account_id=2, request_key="k"))
    assert begun() <= 5


def forged(session_id: str) -> bytes:
    """A stranger's result in an envelope of ours, under the key that is asked for."""
    draw = DrawRequest(account_id=4712, request_key="k", lottery_session_id=session_id)
    return StoredResult(
        session_id, operation.result(draw, Rejection("INSUFFICIENT_BALANCE", Decimal(0))), utc_now()
    ).envelope()


HELD = {
    "garbage": b"\x00\xff",
    "another session's": forged("theirs"),
    "another account's": forged("mine"),
}


@pytest.mark.parametrize("held", [*HELD, "a list"])
def test_what_else_lies_in_the_result_store_is_no_answer(
    house: House, client: DrawClient, redis_url: str, held: str
) -> None:
    with Redis.from_url(redis_url) as redis:
        request = DrawRequest(account_id=4711, request_key="k", lottery_session_id="mine")
        client.enqueue(request)
        for is_settled in (False, True):
            first = parse_result(settle(house, request, store=False)[0]) if is_settled else None
            redis.delete(KEY_PREFIX + "mine")
            if held == "a list":
                redis.rpush(KEY_PREFIX + "mine", "x")
            else:
                redis.set(KEY_PREFIX + "mine", HELD[held])
            # The one that remembers does not ask the database: it knows of no result, but never of a wrong one.
            assert client.enqueue(request) == Ticket("k", "mine")
            with DrawClient.from_settings(house.settings) as another:
                assert [another.enqueue(request) for _ in range(2)] == [Ticket("k", "mine", first)] * 2


def test_a_repeat_needs_no_result_store(house: House) -> None:
    (account_id,) = house.accounts(1)
    request = DrawRequest(account_id=account_id)
    with servers.redis(private=True) as server:
        server.stop()
        settings = Settings.from_env(house.env | {"TOMBOLA_RESULT_URL": server.url})
        with DrawClient.from_settings(settings) as client:
            for _ in range(2):
                assert client.enqueue(request).result is None
        (first,) = settle(house, request, store=False)
        with DrawClient.from_settings(settings) as client:
            for _ in range(2):
                assert client.enqueue(request).result == parse_result(first)
            keep_results(house.engine)
            assert client.enqueue(request).result == parse_result(first)
            assert archive_once(house.engine, older_than_s=-3600) == 1
            assert client.enqueue(request).result == parse_result(first)
        with DrawClient.from_settings(settings) as client:
            for _ in range(2):
                assert client.enqueue(request).result == parse_result(first)
            assert client.result(request.lottery_session_id).encode() == first


def test_what_is_archived_is_told_again(house: House, client: DrawClient, broker_url: str) -> None:
    (account_id,) = house.accounts(1)
    mine = [DrawRequest(account_id=account_id), DrawRequest(account_id=4711)]
    client.enqueue_many(mine)
    first = [parse_result(body) for body in settle(house, *mine)]
    keep_results(house.engine)
    assert archive_once(house.engine, older_than_s=-3600) == 2
    with Redis.from_url(house.env["TOMBOLA_RESULT_URL"]) as redis:
        redis.delete(*[KEY_PREFIX + request.lottery_session_id for request in mine])
    with DrawClient.from_settings(house.settings) as another:
        for _ in range(2):
            assert [another.enqueue(request).result for request in mine] == first
        assert another.enqueue_many(mine) == 2
    assert queued(broker_url, 2) == mine  # none was sent again
    # By nobody's name, it is the same for the one that asks for the same; from then on it is his.
    for name, is_same in (("shop", True), ("shop", True), ("rival", False)):
        with DrawClient.from_settings(house.settings, caller=name) as named:
            ticket = named.enqueue(mine[0])
            assert (ticket.result == first[0], ticket.request_key == mine[0].request_key) == (is_same, is_same)


def test_enqueue_many_tells_of_conflicts_when_all_others_are_in(
    house: House, client: DrawClient, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tombola.producers.client, "PUBLISH_SIZE_MAX", 10)
    taken, free = draws([1], 30)[:12], draws([1], 30)[12:]
    before = [DrawRequest(account_id=2, request_key=it.request_key) for it in taken]
    assert client.enqueue_many(before) == 12
    with pytest.raises(IdempotencyKeyReused) as refused:
        client.enqueue_many([*free[:9], *taken, *free[9:]])
    assert str(refused.value).split(": ")[1] == ", ".join(it.request_key for it in taken[:10])
    assert queued(broker_url, 30) == [*before, *free]
    assert client.enqueue_many(free) == 18


def test_what_another_caller_holds_is_drawn_under_an_alias(house: House, client: DrawClient, broker_url: str) -> None:
    mine, theirs = house.accounts(2)
    one, other = (DrawRequest(account_id=account_id, request_key="order-17") for account_id in (mine, theirs))
    with DrawClient.from_settings(house.settings, caller="somebody-else") as stranger:
        assert stranger.enqueue(other).request_key == "order-17"
        for _ in range(2):
            ticket = client.enqueue(one)
            assert ticket == Ticket(alias("", "order-17"), alias("", "order-17"))
        assert client.enqueue_many([one]) == 1
        with pytest.raises(IdempotencyKeyReused):
            client.enqueue(DrawRequest(account_id=theirs + 1, request_key="order-17"))
        published = queued(broker_url, 2)
        assert {it.request_key for it in published} == {"order-17", ticket.request_key}
        settle(house, *published)
        assert client.wait(ticket.lottery_session_id).account_id == mine
        assert stranger.wait("order-17").account_id == theirs
        again = client.enqueue(one).result
        assert again is not None
        assert again.account_id == mine


def test_an_unknown_campaign_is_refused_before_anything_is_written(
    house: House, client: DrawClient, broker_url: str
) -> None:
    stranger, good = DrawRequest(account_id=1, campaign="spring"), draws([1], 5)
    with pytest.raises(UnknownCampaign, match="'spring'"):
        client.enqueue(stranger)
    with house.engine.begin() as connection, pytest.raises(UnknownCampaign):
        client.enqueue(stranger, connection=connection)
    with pytest.raises(UnknownCampaign, match=stranger.request_key):
        client.enqueue_many([*good[:2], stranger, *good[2:]])
    assert {row["request_key"] for row in table(house.engine, "api_idempotency_requests")} == {
        it.request_key for it in good
    }
    assert queued(broker_url, 5) == good


def test_a_dead_draw_says_why(house: House, client: DrawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    request = DrawRequest(account_id=1)
    client.enqueue(request)
    time_out_once(house.engine, timeout_s=0)
    for ask in (client.result, client.wait):
        with pytest.raises(DrawDead, match="operator can replay it") as told:
            ask(request.lottery_session_id)
        assert told.value.reason == "TIMED_OUT"
    with house.engine.begin() as connection:
        bury(connection, [request], "TIMED_OUT", worker="host:1")
    for name, value in house.env.items():
        monkeypatch.setenv(name, value)
    ended = CliRunner().invoke(app, ["result", request.lottery_session_id])
    assert isinstance(ended.exception, DrawDead)
    assert "Dead letter 1 names this session; parked, never settled: accepted too long ago" in str(ended.exception)


def test_wait_for_a_result(house: House, client: DrawClient) -> None:
    (account_id,) = house.accounts(1)
    request = DrawRequest(account_id=account_id)
    ticket = client.enqueue(request)
    with pytest.raises(ResultNotReady):
        client.wait(ticket.lottery_session_id, timeout_s=0.1)
    with pytest.raises(ResultNotReady):
        client.result(ticket.lottery_session_id)
    (first,) = settle(house, request, store=False)  # the store never heard of it: the database has
    assert client.wait(ticket.lottery_session_id, timeout_s=1).encode() == first
    assert client.result(ticket.lottery_session_id).encode() == first


def test_a_result_store_that_is_down_does_not_keep_a_draw_from_the_queue(house: House, broker_url: str) -> None:
    with servers.redis(private=True) as server:
        server.stop()
        env = house.env | {"TOMBOLA_RESULT_URL": server.url}
        request = DrawRequest(account_id=1)
        with DrawClient.from_settings(Settings.from_env(env)) as client:
            client.enqueue(request)
        assert queued(broker_url, 1) == [request]


def test_from_env(house: House, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in house.env.items():
        monkeypatch.setenv(name, value)
    request = DrawRequest(account_id=1)
    with DrawClient.from_env() as client:
        client.enqueue(request)
    assert queued(broker_url, 1) == [request]


def test_a_client_without_a_result_store_says_so(tmp_path: Path) -> None:
    env = {"TOMBOLA_DATABASE_URL": f"sqlite:///{tmp_path}/x.db", "TOMBOLA_BROKER_URL": "amqp://guest:guest@localhost//"}
    with (
        DrawClient.from_settings(Settings.from_env(env)) as client,
        pytest.raises(DrawError, match="TOMBOLA_RESULT_URL"),
    ):
        client.wait("session")


@pytest.mark.parametrize("missing", ["DATABASE_URL", "BROKER_URL"])
def test_from_env_without_what_it_needs(house: House, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in house.env.items():
        if name != f"TOMBOLA_{missing}":
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"TOMBOLA_{missing} is not set"):
        DrawClient.from_env()
    monkeypatch.setenv("TOMBOLA_BROKER", "redis://127.0.0.1")
    with pytest.raises(ConfigurationError, match="did you mean TOMBOLA_BROKER_URL"):
        DrawClient.from_env()


@pytest.mark.parametrize("scheme", ["redis://{}/0", "amqp://guest:secret@{}//"])
def test_a_draw_is_accepted_while_the_broker_is_away(
    tmp_path: Path, scheme: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as holder:
        holder.bind((servers.HOST, 0))  # bound, and nobody listens
        url = scheme.format(f"{servers.HOST}:{holder.getsockname()[1]}")
        request = DrawRequest(account_id=1)
        with (
            House(f"sqlite:///{tmp_path}/ledger.db", url, redis_url) as house,
            DrawClient.from_settings(house.settings) as client,
        ):
            assert client.enqueue(request).lottery_session_id == request.lottery_session_id
            assert client.enqueue_many([DrawRequest(account_id=1)]) == 1
            assert [row["status"] for row in table(house.engine, "api_idempotency_requests")] == ["accepted"] * 2
    (first, second) = [record.getMessage() for record in caplog.records if "left to the relay" in record.getMessage()]
    assert "refused" in first
    assert "secret" not in first + second
    assert len(first.splitlines()) == 1


def test_nothing_is_promised_while_the_database_is_away(redis_url: str) -> None:
    with socket.socket() as holder:
        holder.bind((servers.HOST, 0))
        url = f"mysql+pymysql://me:secret@{servers.HOST}:{holder.getsockname()[1]}/x"
        env = {"TOMBOLA_DATABASE_URL": url, "TOMBOLA_BROKER_URL": redis_url}
        with DrawClient.from_settings(Settings.from_env(env)) as client:
            with pytest.raises(ServiceUnavailable) as failed:
                client.enqueue(DrawRequest(account_id=1))
            assert len(str(failed.value).splitlines()) == 1
            assert "secret" not in str(failed.value)
    with Redis.from_url(redis_url) as redis:
        assert redis.xlen("draws") == 0
