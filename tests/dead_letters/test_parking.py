"""Parking: one row for a message however often it comes, committed before the ack, with all that is known of it."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import amqp
import pytest
from redis import Redis
from sqlalchemy import Engine, create_engine, func, select, text, update

from tests import poison, servers
from tests.processes import House, draws
from tests.processes import wait_for as wait_until
from tombola.producers.brokers.quorum_queues import declare_queues
from tombola.producers.brokers.rabbitmq import open_amqp
from tombola.producers.brokers.streams import DEAD_QUEUE, QUEUE
from tombola.producers.domain.causes import Cause, LetterState
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import dead_letters
from tombola.worker.dead_letters import groups, message, parking, states
from tombola.worker.dead_letters.letters import DeadLetter, Selection, some
from tombola.worker.dead_letters.message import HEADERS_KEPT_LENGTH_MAX, Parking
from tombola.worker.deliveries import BODY_KEPT_BYTES_MAX, Delivery
from tombola.worker.deliveries.losses import PUBLISHED_MAX
from tombola.worker.relay.relay import Relay
from tombola.worker.settle.consumer import Consumer

DRAW = DrawRequest(account_id=6, request_key="k1")


@pytest.fixture
def house(database_url: str, redis_url: str) -> Iterator[House]:
    with House(database_url, redis_url, redis_url) as house:
        yield house


def park(engine: Engine, *parkings: Parking) -> list[bool]:
    return parking.park(engine, parkings, worker="host:1")


def of(draw: DrawRequest = DRAW, cause: str = Cause.UNKNOWN_CAMPAIGN, error: str = "why", **more: Any) -> Parking:
    return Parking(Delivery(draw.encode(), 1), cause, error, draw, **more)


def junk(body: bytes, **more: Any) -> Parking:
    return Parking(Delivery(body, 1, **more), Cause.UNPARSABLE, "not a JSON object")


def letters(engine: Engine) -> list[DeadLetter]:
    with engine.connect().execution_options(read_only=True) as connection:
        return some(connection, Selection(states=tuple(LetterState)), rows_max=1000)


def the_letter(engine: Engine) -> DeadLetter:
    (letter,) = letters(engine)
    return letter


def mark(engine: Engine, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(update(dead_letters).values(**values))


def status_of(engine: Engine, request_key: str) -> tuple[str, str | None] | None:
    with engine.connect().execution_options(read_only=True) as connection:
        row = connection.execute(
            select(requests.c.status, requests.c.reason).where(requests.c.request_key == request_key)
        ).first()
        return None if row is None else (row.status, row.reason)


# ---- one row ---------------------------------------------------------------------------------------------------------


def test_all_that_is_known_is_kept(house: House) -> None:
    body = b'{"v":1, "request_key":"k1", "account_id":6, "campain":"x"}'
    delivery = Delivery(body, 7, 3, {"traceparent": "00-1-2-01"})
    assert park(house.engine, Parking(delivery, Cause.INVALID, "not a draw request")) == [True]
    it = the_letter(house.engine)
    assert (it.body, it.body_bytes, it.is_whole) == (body, len(body), True)
    assert (it.request_key, it.lottery_session_id, it.account_id) == ("k1", None, 6)
    assert (it.cause, it.error, it.state, it.queue) == (Cause.INVALID, "not a draw request", LetterState.PARKED, QUEUE)
    assert (it.deliveries, it.times_parked, it.worker, it.version) == (3, 1, "host:1", message.VERSION)
    assert json.loads(it.headers or "") == {"traceparent": "00-1-2-01"}
    assert it.first_parked_at == it.last_parked_at == it.state_at


@pytest.mark.parametrize("make", [of, lambda: junk(b"\xff\x00 no text")], ids=["a request", "junk"])
def test_parked_twice_is_one_row(house: House, make: Any) -> None:
    assert park(house.engine, make()) == [True]
    first = the_letter(house.engine)
    assert park(house.engine, make()._replace(error="and again")) == [False]
    again = the_letter(house.engine)
    assert (again.id, again.times_parked, again.state, again.error) == (first.id, 2, LetterState.PARKED, "and again")
    assert again.first_parked_at == first.first_parked_at < again.last_parked_at


def test_twice_in_one_batch_is_one_row_and_new_once(house: House) -> None:
    assert park(house.engine, of(), junk(b"x"), of(), junk(b"x")) == [True, True, False, False]
    assert len(letters(house.engine)) == 2


def test_the_same_request_in_other_bytes_is_the_same_row(house: House) -> None:
    """Another producer's JSON library, blanks, fields in another order, the defaults said or left out."""
    park(house.engine, of())
    other = b'{ "account_id": 6,\n "request_key": "k1", "v": 1 }'
    assert other != DRAW.encode()
    park(house.engine, Parking(Delivery(other, 1), Cause.UNKNOWN_CAMPAIGN, "why", DRAW))
    assert the_letter(house.engine).times_parked == 2


def test_another_request_under_the_same_key_is_another_row(house: House) -> None:
    park(house.engine, of(), of(DrawRequest(account_id=7, request_key="k1")))
    assert {it.account_id for it in letters(house.engine)} == {6, 7}


@pytest.mark.parametrize("state", [LetterState.REPLAYING, LetterState.SETTLED, "discarded"])
def test_what_comes_back_after_all_is_parked_again(house: House, state: str) -> None:
    park(house.engine, of())
    mark(house.engine, state=state, replay_id=1)
    assert park(house.engine, of(cause=Cause.FAILED_ALONE, error="worse")) == [True]
    it = the_letter(house.engine)
    assert (it.state, it.cause, it.error, it.times_parked) == (LetterState.PARKED_AGAIN, Cause.FAILED_ALONE, "worse", 2)


def test_an_echo_keeps_the_cause_that_mattered(house: House) -> None:
    """A late copy of a request that was given up says nothing new."""
    park(house.engine, of(cause=Cause.TOO_MANY_DELIVERIES, error="it kills workers"))
    park(house.engine, of(cause=Cause.NEVER_SETTLED, error="given up before", is_echo=True))
    it = the_letter(house.engine)
    assert (it.cause, it.error, it.times_parked) == (Cause.TOO_MANY_DELIVERIES, "it kills workers", 2)
    # An echo of something that is parked no longer is news.
    mark(house.engine, state=LetterState.REPLAYING)
    park(house.engine, of(cause=Cause.NEVER_SETTLED, error="given up before", is_echo=True))
    assert (the_letter(house.engine).cause, the_letter(house.engine).state) == (
        Cause.NEVER_SETTLED,
        LetterState.PARKED_AGAIN,
    )


def test_parked_by_eight_threads_at_once_is_one_row(mariadb_url: str, redis_url: str) -> None:
    with House(mariadb_url, redis_url, redis_url) as house:
        some_parkings = [of(), junk(b"junk"), *[of(draw) for draw in draws([6], 30)]]
        start = threading.Barrier(8)
        news: list[list[bool]] = []
        failed: list[BaseException] = []

        def work(number: int) -> None:
            start.wait()
            try:
                # Each in an order of its own: that is where deadlocks come from.
                turned = some_parkings[number * 4 :] + some_parkings[: number * 4]
                told = park(house.engine, *turned)
                news.append(told[len(told) - number * 4 :] + told[: len(told) - number * 4])
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failed == []
        found = letters(house.engine)
        assert len(found) == len(some_parkings)
        assert {it.times_parked for it in found} == {8}
        # Each was news to exactly one of them.
        assert [sum(told) for told in zip(*news, strict=True)] == [1] * len(some_parkings)


# ---- the request behind it -------------------------------------------------------------------------------------------


def test_parking_gives_the_request_up_in_the_same_transaction(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    poison.accept(house.engine, [DRAW])
    with monkeypatch.context() as broken:
        broken.setattr(states, "park", lambda *_, **_options: 1 / 0)
        with pytest.raises(parking.Unparkable, match="division by zero"):
            park(house.engine, of())
    assert status_of(house.engine, "k1") == ("accepted", None)
    assert letters(house.engine) == []
    park(house.engine, of())
    assert status_of(house.engine, "k1") == ("dead", "PARKED")


def test_another_request_under_its_key_is_left_alone(house: House) -> None:
    poison.accept(house.engine, [DRAW])
    park(house.engine, of(DrawRequest(account_id=7, request_key="k1"), cause="fingerprint mismatch"))
    assert status_of(house.engine, "k1") == ("accepted", None)


def test_what_is_yet_to_be_tried_is_not_given_up(house: House) -> None:
    poison.accept(house.engine, [DRAW])
    park(house.engine, of(is_tried=False))
    assert status_of(house.engine, "k1") == ("accepted", None)
    parking.unpark(house.engine, of())
    assert letters(house.engine) == []


def test_to_unpark_one_with_a_past_settles_it(house: House) -> None:
    park(house.engine, of())
    park(house.engine, of())
    parking.unpark(house.engine, of())
    assert the_letter(house.engine).state == LetterState.SETTLED


def test_what_the_relay_gives_up_is_parked_with_it(house: House) -> None:
    tired, old, young = draws(house.accounts(1), 3)
    poison.accept(house.engine, [tired, old, young])
    with house.engine.begin() as connection:
        for draw, values in (
            (tired, {"publish_attempts": 99, "publish_at": requests.c.accepted_at}),
            (old, {"accepted_at": func.coalesce(requests.c.settled_at, "2020-01-01 00:00:00")}),
        ):
            connection.execute(update(requests).where(requests.c.request_key == draw.request_key).values(**values))
    relay = Relay.from_settings(house.settings)
    relay.run_once()
    relay.run_once()
    relay.close()
    found = {it.request_key: it for it in letters(house.engine)}
    assert found.keys() == {tired.request_key, old.request_key}
    assert {it.cause for it in found.values()} == {Cause.NEVER_SETTLED}
    assert "published many times" in found[tired.request_key].error
    assert "too long ago" in found[old.request_key].error
    assert found[tired.request_key].group_id != found[old.request_key].group_id
    assert all(it.times_parked == 1 and (it.worker or "").startswith("relay@") for it in found.values())
    assert found[old.request_key].request() == old
    assert status_of(house.engine, young.request_key) == ("accepted", None)


# ---- exceptions and groups -------------------------------------------------------------------------------------------


def lose(key: str) -> None:
    raise KeyError(f"{key} is not in the books")


def lose_elsewhere(key: str) -> None:
    raise KeyError(f"{key} is not in the books")


def raised(by: Any, key: str) -> KeyError:
    try:
        by(key)
    except KeyError as error:
        return error
    raise AssertionError


def test_an_exception_is_kept_with_its_stack_and_grouped_by_its_place(house: House) -> None:
    keys = [("k1", lose), ("k2", lose), ("k3", lose_elsewhere)]
    park(
        house.engine,
        *[
            of(DrawRequest(account_id=6, request_key=key), cause=Cause.FAILED_ALONE, error=str(error), exception=error)
            for key, by in keys
            for error in [raised(by, key)]
        ],
    )
    found = {it.request_key: it for it in letters(house.engine)}
    assert found["k1"].error_type == "KeyError"
    assert "in lose\n" in (found["k1"].traceback or "")
    assert "k1 is not in the books" in (found["k1"].traceback or "")
    assert found["k1"].group_id == found["k2"].group_id
    assert found["k1"].group_id != found["k3"].group_id


def test_another_type_at_the_same_place_is_another_group() -> None:
    def fail(error: Exception) -> Exception:
        try:
            raise error
        except Exception as caught:
            return caught

    ids = {
        groups.group_of(Cause.FAILED_ALONE, "x", fail(ValueError("x"))),
        groups.group_of(Cause.FAILED_ALONE, "x", fail(KeyError("x"))),
        groups.group_of(Cause.INVALID, "x", fail(KeyError("x"))),
    }
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("there is no campaign 'winter' here", "there is no campaign 'spring-25' here"),
        ("byte 17", "byte 1,017"),
        ("draw lottery_req_1700000000000_0a1b2c3d_001 is lost", "draw lottery_req_1800000000000_ffffffff_999 is lost"),
        ("this one holds ':'", "this one holds ':', ' ', 'ü'"),
        ("Object contains unknown field `campain`", "Object contains unknown field `amount`"),
        ("can't decode byte 0xff in position 1", "can't decode byte 0xe2 in position 12"),
    ],
)
def test_what_is_one_messages_own_does_not_part_a_group(one: str, other: str) -> None:
    assert groups.group_of(Cause.INVALID, one) == groups.group_of(Cause.INVALID, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Expected `int`, got `str` - at `$.account_id`", "Expected `int`, got `float` - at `$.account_id`"),
        ("Expected `str`, got `int` - at `$.campaign`", "Expected `str`, got `int` - at `$.request_key`"),
        ("Object missing required field `v`", "Object missing required field `request_key`"),
        ("a request key is too long", "a campaign is too long"),
    ],
)
def test_our_own_fields_and_types_part_groups(one: str, other: str) -> None:
    assert groups.group_of(Cause.INVALID, one) != groups.group_of(Cause.INVALID, other)


def test_a_group_is_the_same_in_every_process() -> None:
    """It is in operators' scripts and in links: another value is another release's."""
    assert groups.group_of(Cause.UNKNOWN_CAMPAIGN, "there is no campaign 'x' here") == "ab739c4ce3a00d18"


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_a_body_is_kept_up_to_its_bound_and_told_apart_beyond_it(house: House) -> None:
    beginning = b"x" * BODY_KEPT_BYTES_MAX
    park(house.engine, junk(beginning), junk(beginning + b"a"), junk(beginning + b"b"))
    found = letters(house.engine)
    assert len(found) == 3
    assert {it.body for it in found} == {beginning}
    assert sorted(it.is_whole for it in found) == [False, False, True]
    assert {it.body_bytes for it in found} == {BODY_KEPT_BYTES_MAX, BODY_KEPT_BYTES_MAX + 1}


@pytest.mark.parametrize(
    "body", [bytes(range(256)), b"", b"\x00" * 10, b"\xff\xfe\xfd", "ünïcödé 😀".encode(), b"\\'\"%s {}\x1f"]
)
def test_bytes_that_are_no_text_are_kept_as_they_are(house: House, body: bytes) -> None:
    park(house.engine, junk(body))
    assert (the_letter(house.engine).body, the_letter(house.engine).body_bytes) == (body, len(body))


@pytest.mark.parametrize(
    ("body", "claims"),
    [
        (b'{"request_key":"k","lottery_session_id":"s","account_id":6}', ("k", "s", 6)),
        (b'{"request_key":"k\\u0000","lottery_session_id":"\xc3\xbc","account_id":"6"}', (None, None, None)),
        (b'{"request_key":"%b","lottery_session_id":"%b"}' % (b"k" * 65, b"s" * 101), (None, None, None)),
        (b'{"request_key":"","lottery_session_id":5,"account_id":true}', (None, None, None)),
        (b'{"account_id":9223372036854775808}', (None, None, None)),
        (b'{"account_id":9223372036854775807}', (None, None, 2**63 - 1)),
        (b'["request_key","k"]', (None, None, None)),
        (b"[" * 100_000, (None, None, None)),
    ],
)
def test_what_a_message_says_of_itself_is_kept_where_it_fits(house: House, body: bytes, claims: Any) -> None:
    park(house.engine, junk(body))
    it = the_letter(house.engine)
    assert (it.request_key, it.lottery_session_id, it.account_id) == claims


def test_an_error_and_its_stack_are_bounded_and_storable(house: House) -> None:
    error = raised(lose, "\ud800\x00😀" * 20_000)
    park(house.engine, of(cause=Cause.FAILED_ALONE, error=str(error), exception=error))
    it = the_letter(house.engine)
    assert len(it.error) == message.ERROR_LENGTH_MAX
    assert len(it.traceback or "") == message.TRACEBACK_LENGTH_MAX
    assert "\\ud800" in it.error


def test_headers_are_kept_whatever_they_hold(house: House) -> None:
    class Odd:
        def __repr__(self) -> str:
            return "<odd \ud800>"

    headers = {
        "text": "ü", "number": 6, "list": [1, 2], "table": {"x-death": [{"count": 3}]}, "bytes": b"\xff\x00",
        "odd": Odd(), "huge": 10**40, "surrogate": "\ud800", "na\ud800me": 1, "none": None, "loop": [],
    }  # fmt: skip
    headers["loop"].append(headers["loop"])  # type: ignore[attr-defined]
    park(house.engine, junk(b"x", headers=headers))
    kept = json.loads(the_letter(house.engine).headers or "")
    assert {name: kept[name] for name in ("text", "number", "list", "table", "none")} == {
        "text": "ü", "number": 6, "list": [1, 2], "table": {"x-death": [{"count": 3}]}, "none": None,
    }  # fmt: skip
    assert len(kept) == len(headers)
    assert str(10**40) in str(kept["huge"])


def test_headers_are_bounded(house: House) -> None:
    park(house.engine, junk(b"x", headers={f"name-{number}": "v" * 1000 for number in range(100)}))
    headers = the_letter(house.engine).headers or ""
    assert len(headers) < 2 * HEADERS_KEPT_LENGTH_MAX
    assert "too long" in headers
    assert len(json.loads(headers)) < 10


# ---- the row first, then the ack -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "is_parked"),
    [("NEW.headers IS NOT NULL", True), ("NEW.body_bytes = 3", False)],
    ids=["bare", "not at all"],
)
def test_a_row_that_the_database_refuses_costs_that_message_alone(
    mariadb_url: str, redis_url: str, when: str, is_parked: bool
) -> None:
    """It is parked with the little that any database takes; what cannot be parked at all stays unacked."""
    with House(mariadb_url, redis_url, redis_url) as house:
        with house.engine.begin() as connection:
            connection.execute(
                text(
                    f"CREATE TRIGGER refuse BEFORE INSERT ON dead_letters FOR EACH ROW IF {when} THEN "
                    "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'refused'; END IF"
                )
            )
        parkings = [junk(b"junk %d" % number) for number in range(30)]
        parkings[11] = junk(b"odd", headers={"x": "y"})
        if is_parked:
            assert park(house.engine, *parkings) == [True] * 30
            (odd,) = [it for it in letters(house.engine) if it.body == b"odd"]
            assert (odd.headers, odd.cause, "log" in odd.error) == (None, Cause.UNPARSABLE, True)
            assert park(house.engine, *parkings) == [False] * 30
        else:
            with pytest.raises(parking.Unparkable) as refused:
                park(house.engine, *parkings)
            assert refused.value.parkings == [parkings[11]]
        assert len(letters(house.engine)) == (30 if is_parked else 29)


def test_what_cannot_be_parked_stays_queued_and_stops_nothing(mariadb_url: str, redis_url: str) -> None:
    with House(mariadb_url, redis_url, redis_url) as house:
        with house.engine.begin() as connection:
            connection.execute(
                text(
                    "CREATE TRIGGER refuse BEFORE INSERT ON dead_letters FOR EACH ROW IF NEW.body_bytes = 3 THEN "
                    "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'refused'; END IF"
                )
            )
        good = draws(house.accounts(3), 30)
        house.publish(b"odd", *[draw.encode() for draw in good], b"junk")
        consumer = Consumer.open(house.settings, house.engine, house.wheels)
        consumer.start()
        try:
            house.wait_settled(30, within_s=20)
            wait_until(lambda: house.dead() == 1, within_s=20, what=lambda: str(house.causes()))
            with house.engine.begin() as connection:
                connection.execute(text("DROP TRIGGER refuse"))
            wait_until(lambda: house.dead() == 2, within_s=20, what=lambda: str(house.causes()))
        finally:
            assert consumer.stop(timeout_s=20)


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest, redis_url: str) -> str:
    url: str = redis_url if request.param == "redis" else request.getfixturevalue("rabbitmq_url")
    return url


@pytest.fixture
def small(tmp_path: Path, broker_url: str, redis_url: str) -> Iterator[House]:
    with House(f"sqlite:///{tmp_path}/ledger.db", broker_url, redis_url) as house:
        yield house


def consume_all(house: House) -> None:
    """Until nothing comes any more."""
    consumer = Consumer.open(house.settings, house.engine, house.wheels)
    try:
        quiet = 0
        while quiet < 2:
            report = consumer.consume_once(wait_s=0.3)
            quiet = 0 if report.settled or report.parked else quiet + 1
    finally:
        consumer.deliveries.close()


def left(url: str, name: str = QUEUE) -> int:
    if url.startswith("redis"):
        with Redis.from_url(url) as client:
            return int(client.xlen(QUEUE))
    with open_amqp(url) as connection:
        return int(connection.channel().queue_declare(name, passive=True).message_count)


def test_headers_of_either_broker_are_kept(small: House, broker_url: str) -> None:
    poison.publish(broker_url, [(b"junk", {"origin": "gen1@shop", "lang": "py"})])
    consume_all(small)
    kept = json.loads(the_letter(small.engine).headers or "")
    assert {"origin": "gen1@shop", "lang": "py"}.items() <= kept.items()


def test_a_worker_that_dies_between_the_row_and_the_ack_parks_it_once(
    small: House, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    small.publish(b"junk")
    consumer = Consumer.open(small.settings, small.engine, small.wheels)
    with monkeypatch.context() as dying:
        dying.setattr(consumer.deliveries, "ack", die)
        with pytest.raises(Killed):
            consumer.consume_once(wait_s=10)
    assert the_letter(small.engine).times_parked == 1
    consumer.deliveries.close()
    consume_all(small)
    assert the_letter(small.engine).times_parked == 2
    assert left(broker_url) == 0


def test_a_database_outage_parks_nothing_and_acks_nothing(broker_url: str, redis_url: str) -> None:
    with servers.mariadb(private=True) as server:
        with create_engine(server.url, isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text("CREATE DATABASE ledger"))
        with House(server.url + "ledger", broker_url, redis_url) as house:
            house.publish(*[b"junk %d" % number for number in range(5)])
            server.kill()
            consumer = Consumer.open(house.settings, house.engine, house.wheels)
            consumer.start()
            time.sleep(2)  # it fetches, and tries again and again
            assert consumer._thread.is_alive()
            assert consumer.stop(timeout_s=30)
            wait_until(lambda: left(broker_url) == 5, within_s=10, what=lambda: f"{left(broker_url)} left of 5")
            server.restart()
            house.engine.dispose()
            assert letters(house.engine) == []
            consume_all(house)
            assert {it.times_parked for it in letters(house.engine)} == {1}
            assert {it.deliveries for it in letters(house.engine)} == {2}  # it had been in hand meanwhile
            assert len(letters(house.engine)) == 5
            assert left(broker_url) == 0


def test_park_says_when_the_database_is_away(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/nowhere/ledger.db")
    with pytest.raises(Exception, match="SQLite file") as raised_error:
        park(engine, of())
    assert not isinstance(raised_error.value, AssertionError)
    away = create_engine("mysql+pymysql://root@127.0.0.1:9/ledger")
    with pytest.raises(ServiceUnavailable):
        park(away, of())


# ---- RabbitMQ's own dead letters -------------------------------------------------------------------------------------


@pytest.fixture
def rabbit(tmp_path: Path, rabbitmq_url: str, redis_url: str) -> Iterator[House]:
    with House(f"sqlite:///{tmp_path}/ledger.db", rabbitmq_url, redis_url) as house:
        yield house


def bury_in_rabbitmq(url: str, bodies: Sequence[bytes], headers: dict[str, Any] | None = None) -> None:
    """As the broker does it: into the dead-letter exchange, with what it writes beside."""
    with open_amqp(url) as connection:
        channel: Any = connection.channel()
        declare_queues(channel)
        for body in bodies:
            message = amqp.Message(body, delivery_mode=2, application_headers=headers or {})
            channel.basic_publish_confirm(message, exchange=DEAD_QUEUE, routing_key=QUEUE)


def test_what_rabbitmq_gave_up_is_drained_into_the_table(rabbit: House) -> None:
    url = rabbit.settings.need("broker_url")
    (draw,) = draws(rabbit.accounts(1), 1)
    poison.accept(rabbit.engine, [draw])
    with rabbit.engine.begin() as connection:  # not for the first time
        connection.execute(update(requests).values(publish_attempts=PUBLISHED_MAX))
    bury_in_rabbitmq(url, [draw.encode(), b"\xff junk"], {"x-first-death-reason": "delivery_limit", "x-note": "n"})
    wait_until(lambda: left(url, DEAD_QUEUE) == 2, within_s=10, what=lambda: str(left(url, DEAD_QUEUE)))
    consume_all(rabbit)
    found = {it.request_key: it for it in letters(rabbit.engine)}
    assert found.keys() == {draw.request_key, None}
    assert {it.cause for it in found.values()} == {Cause.TOO_MANY_DELIVERIES}
    assert {it.error for it in found.values()} == {"RabbitMQ gave it up: delivery_limit"}
    assert json.loads(found[None].headers or "")["x-note"] == "n"
    assert found[draw.request_key].request() == draw
    assert status_of(rabbit.engine, draw.request_key) == ("dead", "PARKED")
    assert left(url, DEAD_QUEUE) == 0


def test_what_goes_beyond_the_delivery_limit_ends_in_the_table(rabbit: House) -> None:
    """Nobody settles it and nobody parks it, 200 times: RabbitMQ gives it up, we take it in."""
    url = rabbit.settings.need("broker_url")
    rabbit.publish(DRAW.encode())
    with open_amqp(url) as connection:
        channel: Any = connection.channel()
        deadline = time.monotonic() + 60
        while left(url, DEAD_QUEUE) == 0:
            assert time.monotonic() < deadline
            while (message := channel.basic_get(QUEUE)) is not None:
                channel.basic_reject(message.delivery_tag, requeue=True)
    consume_all(rabbit)
    it = the_letter(rabbit.engine)
    assert (it.cause, it.request_key, it.error) == (
        Cause.TOO_MANY_DELIVERIES,
        "k1",
        "RabbitMQ gave it up: delivery_limit",
    )
    assert left(url, DEAD_QUEUE) == left(url) == 0


def test_a_crash_between_the_row_and_the_ack_of_a_drained_one_does_no_harm(
    rabbit: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    url = rabbit.settings.need("broker_url")
    bury_in_rabbitmq(url, [DRAW.encode()])
    wait_until(lambda: left(url, DEAD_QUEUE) == 1, within_s=10, what=lambda: str(left(url, DEAD_QUEUE)))
    consumer = Consumer.open(rabbit.settings, rabbit.engine, rabbit.wheels)
    with monkeypatch.context() as dying:
        dying.setattr(consumer.deliveries, "ack_dead", die)
        with pytest.raises(Killed):
            consumer.consume_once(wait_s=0.3)
    assert the_letter(rabbit.engine).times_parked == 1
    consumer.deliveries.close()
    wait_until(lambda: left(url, DEAD_QUEUE) == 1, within_s=10, what=lambda: str(left(url, DEAD_QUEUE)))
    consume_all(rabbit)
    assert (the_letter(rabbit.engine).times_parked, the_letter(rabbit.engine).state) == (2, LetterState.PARKED)
    assert left(url, DEAD_QUEUE) == 0
