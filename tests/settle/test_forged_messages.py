"""Whoever can write to the broker cannot draw: signed messages, accepted requests, and what becomes of all others."""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import amqp
import pytest
from redis import Redis

from tests.books import assert_books, table
from tests.processes import House
from tombola.producers.brokers.rabbitmq import open_amqp
from tombola.producers.brokers.registry import broker_of, open_broker
from tombola.producers.brokers.streams import DEAD_QUEUE, QUEUE
from tombola.producers.client import DrawClient
from tombola.producers.domain.causes import LetterState
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import InvalidRequest, NotSigned
from tombola.producers.domain.signatures import Keyring
from tombola.producers.entry import Entry
from tombola.producers.results import KEY_PREFIX
from tombola.producers.settings import Settings
from tombola.producers.storage.requests import Submission
from tombola.worker.dead_letters.letters import DeadLetter, Selection, edit, some
from tombola.worker.deliveries import Delivery
from tombola.worker.doctor.configuration import examine_settings
from tombola.worker.host import tasks
from tombola.worker.relay.given_up import time_out_once
from tombola.worker.relay.relay import Relay
from tombola.worker.replays import replay
from tombola.worker.replays.forecast import Forecast, forecast
from tombola.worker.replays.replay import Options
from tombola.worker.replays.replayer import Replayer
from tombola.worker.replays.vouching import Vouching
from tombola.worker.settle.consumer import Consumer

SECRET, OLD, WRONG = (f"{number:02x}" * 32 for number in (1, 2, 3))
SIGNED = {"TOMBOLA_MESSAGE_SECRET": SECRET}
ACCEPTED_ONLY = {"TOMBOLA_ACCEPTED_ONLY": "true"}


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


def house_of(tmp_path: Path, broker_url: str, redis_url: str, env: Mapping[str, str]) -> House:
    # One of these messages is tried once: a test of what is delivered too often need not wait.
    return House(f"sqlite:///{tmp_path}/ledger.db", broker_url, redis_url, TOMBOLA_DELIVERIES_MAX="1", **env)


@pytest.fixture
def house(tmp_path: Path, broker_url: str, redis_url: str) -> Iterator[House]:
    """Whose workers want signatures."""
    with house_of(tmp_path, broker_url, redis_url, SIGNED) as house:
        yield house
        assert_books(house.engine)


@pytest.fixture
def careful_house(tmp_path: Path, redis_url: str) -> Iterator[House]:
    """Whose workers want what is accepted, and no signatures."""
    with house_of(tmp_path, redis_url, redis_url, ACCEPTED_ONLY) as house:
        yield house
        assert_books(house.engine)


def signed(draw: DrawRequest, secret: str = SECRET) -> str:
    return Keyring((bytes.fromhex(secret),)).sign(draw.encode())


def send(house: House, *messages: tuple[DrawRequest, dict[str, Any]]) -> None:
    """As whoever has the broker's password does: these bodies, with that beside them."""
    with closing(open_broker(house.settings.need("broker_url"), publish_timeout_s=20)) as broker:
        broker.publish([draw.encode() for draw, _ in messages], [beside for _, beside in messages])


def work(house: House, **env: str) -> None:
    """Consume until nothing is left."""
    settings = Settings.from_env(house.env | env)
    consumer = Consumer.open(settings, house.engine, house.wheels)
    try:
        while (report := consumer.consume_once(wait_s=0.3)).settled or report.parked:
            pass
    finally:
        consumer.results.close()
        consumer.deliveries.close()


def handle(house: House, *deliveries: Delivery) -> None:
    """See through what a broker has delivered in this way."""
    consumer = Consumer.open(house.settings, house.engine, house.wheels)
    consumer.deliveries = _NoBroker()  # type: ignore[assignment]
    consumer._see_through(deliveries)
    consumer.results.close()


class _NoBroker:
    def ack(self, deliveries: object) -> None:
        pass


def letters(house: House) -> list[DeadLetter]:
    with house.engine.connect().execution_options(read_only=True) as connection:
        return some(connection, Selection(states=tuple(LetterState)), rows_max=100)


def charged(house: House) -> set[str]:
    """The request keys that were charged."""
    rows = table(house.engine, "asset_transactions")
    return {row["idempotency_key"].partition(":")[0] for row in rows if row["business_type"] == "lottery_consume"}


def statuses(house: House) -> dict[str, str]:
    return {row["request_key"]: row["status"] for row in table(house.engine, "api_idempotency_requests")}


def foretell(house: House, **vouching: Any) -> Forecast:
    return forecast(house.engine, Selection(), vouching=Vouching.of(house.settings, **vouching))


def replay_all(house: House, **options: Any) -> replay.Replay:
    """As the command does; a worker is at work."""
    with closing(broker_of(house.settings)) as broker:
        consumer = Consumer.open(house.settings, house.engine, house.wheels)
        consumer.start()
        try:
            number = replay.begin(house.engine, Selection(), Options(**options), operator="ada", reason="checked")
            return Replayer(house.engine, broker, house.settings).run(number)
        finally:
            assert consumer.stop(timeout_s=20)


# ---- who signs, and who does not -------------------------------------------------------------------------------------


def test_what_our_publishers_send_is_signed(house: House) -> None:
    (account_id,) = house.accounts(1)
    with DrawClient.from_settings(house.settings) as client:
        one = client.enqueue(DrawRequest(account_id=account_id))
        client.enqueue_many([DrawRequest(account_id=account_id, request_key=key) for key in ("many-1", "many-2")])
        with house.engine.begin() as connection:
            client.enqueue(DrawRequest(account_id=account_id, request_key="joined"), connection=connection)
    with closing(Relay.from_settings(house.settings)) as relay:
        # Nothing has been overtaken yet, but this one was never published.
        assert relay.run_once() == 1
    work(house)
    assert letters(house) == []
    assert charged(house) == {one.request_key, "many-1", "many-2", "joined"}


def test_what_is_not_signed_is_parked_and_charges_nobody(house: House) -> None:
    (account_id,) = house.accounts(1)
    good, *bad = (DrawRequest(account_id=account_id, request_key=f"k{number}") for number in range(7))
    send(
        house,
        (good, {"signature": signed(good), "traceparent": "00-1-2-01"}),
        (bad[0], {}),
        (bad[1], {"signature": signed(bad[1], WRONG)}),
        (bad[2], {"signature": signed(good)}),
        (bad[3], {"signature": ""}),
        (bad[4], {"signature": "\u00fc" * 32}),
        (bad[5], {"Signature": signed(bad[5])}),
    )
    work(house)
    assert charged(house) == {"k0"}
    assert statuses(house) == {"k0": "completed"}
    found = {it.request_key: it for it in letters(house)}
    assert set(found) == {it.request_key for it in bad}
    assert {it.cause for it in found.values()} == {"not signed"}
    assert {it.account_id for it in found.values()} == {account_id}
    assert "no `signature`" in found["k1"].error
    assert "not by a secret of this deployment" in found["k2"].error
    with Redis.from_url(house.env["TOMBOLA_RESULT_URL"]) as redis:
        assert [redis.exists(KEY_PREFIX + it.lottery_session_id) for it in (good, *bad)] == [1, 0, 0, 0, 0, 0, 0]


def test_a_signature_of_any_type_is_parked(tmp_path: Path, rabbitmq_url: str, redis_url: str) -> None:
    """RabbitMQ's headers hold more than text."""
    with house_of(tmp_path, rabbitmq_url, redis_url, SIGNED) as house:
        (account_id,) = house.accounts(1)
        odd = [b"\xff\xfe", 7, True, None, [1], {"a": {"b": 1}}, signed(DrawRequest(account_id=1))]
        draws = [DrawRequest(account_id=account_id, request_key=f"k{number}") for number in range(len(odd))]
        send(house, *[(draw, {"signature": value}) for draw, value in zip(draws, odd, strict=True)])
        work(house)
        assert house.causes() == ["not signed"] * len(odd)
        assert charged(house) == set()


def test_secrets_change_while_everything_runs(house: House) -> None:
    (account_id,) = house.accounts(1)
    draws = [DrawRequest(account_id=account_id, request_key=key) for key in ("old", "new", "late")]
    send(house, (draws[0], {"signature": signed(draws[0], OLD)}), (draws[1], {"signature": signed(draws[1])}))
    work(house, TOMBOLA_MESSAGE_SECRET=f"{SECRET},{OLD}")
    assert charged(house) == {"old", "new"}
    send(house, (draws[2], {"signature": signed(draws[2], OLD)}))
    work(house)
    assert house.causes() == ["not signed"]
    assert charged(house) == {"old", "new"}


def test_a_worker_without_a_secret_draws_for_signed_messages_as_well(house: House) -> None:
    """While a secret is being brought in, publishers may have it before workers do."""
    (account_id,) = house.accounts(1)
    draw = DrawRequest(account_id=account_id)
    send(house, (draw, {"signature": signed(draw)}))
    work(house, TOMBOLA_MESSAGE_SECRET="")
    assert charged(house) == {draw.request_key}


# ---- a stranger's message and an honest caller's request -------------------------------------------------------------


def test_a_forged_message_does_not_take_an_honest_callers_key(house: House) -> None:
    mine, theirs = house.accounts(2)
    honest = DrawRequest(account_id=mine, request_key="order-17")
    send(house, (DrawRequest(account_id=theirs, request_key="order-17"), {}))
    send(house, (DrawRequest(account_id=mine, request_key="other", lottery_session_id="order-17"), {}))
    work(house)
    assert statuses(house) == {}
    with DrawClient.from_settings(house.settings) as client:
        ticket = client.enqueue(honest)
        assert ticket.request_key == "order-17"
        work(house)
        result = client.wait("order-17", timeout_s=5)
        assert (result.account_id, result.status) == (mine, "completed")
        assert client.enqueue(honest).result == result
    assert {it.cause for it in letters(house)} == {"not signed"}
    assert charged(house) == {"order-17"}
    # Replayed with the operator's word for it, it is still another request.
    ended = replay_all(house, vouch=True)
    assert (ended.refused, ended.settled) == (2, 0)
    assert charged(house) == {"order-17"}


def test_a_copy_without_a_signature_does_no_harm_to_what_was_accepted(house: House) -> None:
    """Whoever reads the queue knows every request word for word: it is not to be killed with that."""
    (account_id,) = house.accounts(1)
    honest = DrawRequest(account_id=account_id, request_key="k")
    Entry(house.engine, relay_after_s=60).accept([Submission(honest, "shop")])
    send(house, (honest, {}), (honest, {"signature": signed(honest, WRONG)}))
    work(house)
    handle(house, Delivery(honest.encode(), 1, 9), Delivery(honest.encode(), 2, 9))  # delivered again and again
    assert statuses(house) == {"k": "accepted"}
    (letter,) = letters(house)
    assert (letter.cause, letter.times_parked) == ("not signed", 3)  # twice in one batch counts once
    # The honest one may be delivered too often as well, and is tried all the same.
    handle(house, Delivery(honest.encode(), 3, 9, {"signature": signed(honest)}))
    assert statuses(house) == {"k": "completed"}
    assert [it.cause for it in letters(house)] == ["not signed"]


def test_what_a_stranger_lays_into_the_brokers_own_dead_letters(
    tmp_path: Path, rabbitmq_url: str, redis_url: str
) -> None:
    with house_of(tmp_path, rabbitmq_url, redis_url, SIGNED) as house:
        (account_id,) = house.accounts(1)
        honest = DrawRequest(account_id=account_id, request_key="k")
        Entry(house.engine, relay_after_s=60).accept([Submission(honest)])
        with closing(open_broker(rabbitmq_url, publish_timeout_s=20)) as broker:
            broker.backlog()  # declares the queues
        connection = open_amqp(rabbitmq_url)
        channel = connection.connection.channel()
        channel.basic_publish(amqp.Message(honest.encode(), delivery_mode=2), exchange=DEAD_QUEUE, routing_key=QUEUE)
        channel.close()
        connection.release()
        for _ in range(20):
            work(house)
            if house.dead():
                break
        assert house.causes() == ["not signed"]
        assert statuses(house) == {"k": "accepted"}


# ---- only what is accepted -------------------------------------------------------------------------------------------


def test_only_what_is_accepted_is_drawn(careful_house: House) -> None:
    house = careful_house
    mine, theirs = house.accounts(2)
    with DrawClient.from_settings(house.settings) as client:
        client.enqueue(DrawRequest(account_id=mine, request_key="accepted"))
        work(house)
        first = client.wait("accepted", timeout_s=5)
        send(
            house,
            (DrawRequest(account_id=mine, request_key="accepted"), {}),  # a repeat
            (DrawRequest(account_id=theirs, request_key="accepted"), {}),
            (DrawRequest(account_id=mine, request_key="forged"), {}),
        )
        work(house)
        assert house.causes() == ["fingerprint mismatch", "not accepted"]
        assert charged(house) == {"accepted"}
        assert statuses(house) == {"accepted": "completed"}
        # Not even one of its own words keeps an honest request from happening, also when it is delivered too often.
        forged = DrawRequest(account_id=mine, request_key="forged")
        handle(house, Delivery(forged.encode(), 1, 9))
        assert house.causes() == ["fingerprint mismatch", "not accepted"]
        client.enqueue(forged)
        handle(house, Delivery(forged.encode(), 1, 9))
        assert statuses(house)["forged"] == "completed"
        assert client.enqueue(DrawRequest(account_id=mine, request_key="accepted")).result == first


def test_nothing_but_accepting_gives_an_alias(tmp_path: Path, redis_url: str) -> None:
    """Else a stranger could take it, and so keep a caller from the name that he gets instead of his own."""
    with house_of(tmp_path, redis_url, redis_url, {}) as house:
        (account_id,) = house.accounts(1)
        alias = f"alias_{'0' * 40}"
        send(
            house,
            (DrawRequest(account_id=account_id, request_key=alias), {}),
            (DrawRequest(account_id=account_id, request_key="k", lottery_session_id=alias), {}),
            (DrawRequest(account_id=account_id, request_key=f"{alias}0"), {}),  # is none
        )
        work(house)
        assert house.causes() == ["not accepted"] * 2
        assert charged(house) == {f"{alias}0"}
        assert foretell(house).counts == {"not vouched for": 2}
        assert replay_all(house, vouch=True).refused == 2
        assert charged(house) == {f"{alias}0"}


# ---- replay ----------------------------------------------------------------------------------------------------------


def test_a_replay_signs_nothing_that_nobody_vouches_for(house: House) -> None:
    (account_id,) = house.accounts(1)
    forged = DrawRequest(account_id=account_id, request_key="forged")
    unknown = DrawRequest(account_id=account_id, request_key="signed", campaign="spring")
    known = DrawRequest(account_id=account_id, request_key="on-record")
    send(house, (forged, {}), (unknown, {"signature": signed(unknown)}), (known, {}))
    work(house)
    assert house.causes() == ["not signed", "not signed", "unknown campaign"]
    Entry(house.engine, relay_after_s=60).accept([Submission(known, "shop")])
    time_out_once(house.engine, timeout_s=-60)
    assert statuses(house) == {"on-record": "dead"}

    # What nobody signed has a row of its own beside that of the request that was given up: one draw.
    assert foretell(house).counts == {
        "not vouched for": 1,
        "unknown campaign": 1,
        "would charge": 1,
        "already settled": 1,
    }
    (line,) = (it for it in foretell(house).lines if it.outcome == "not vouched for")
    assert (line.request_key, line.why) == ("forged", "not signed, and not on record")
    ended = replay_all(house)
    # What is on record was asked for; what is signed is as it was; the third one stays where it is.
    assert (ended.refused, ended.settled, ended.parked_again) == (1, 2, 1)
    assert charged(house) == {"on-record"}
    assert {it.request_key: it.state for it in letters(house)} == {
        "forged": "parked",
        "signed": "parked again",
        "on-record": "settled",
    }
    # A copy that an operator has edited says no more of who sent the first one.
    (letter,) = (it for it in letters(house) if it.request_key == "forged")
    body = DrawRequest(account_id=account_id, request_key="forged", lottery_session_id="s").encode()
    edit(house.engine, letter.id, body, operator="ada", reason="a look at it")
    assert foretell(house).counts["not vouched for"] == 2
    assert foretell(house, by_operator=True).counts["not vouched for"] == 0
    ended = replay_all(house, vouch=True)
    assert charged(house) == {"on-record", "forged"}
    with house.engine.connect() as connection:
        assert json.loads(replay.find(connection, ended.id).options) == {"vouch": True}


def test_what_was_parked_before_there_was_a_secret_needs_a_word(careful_house: House) -> None:
    house = careful_house
    (account_id,) = house.accounts(1)
    send(house, (DrawRequest(account_id=account_id, request_key="k"), {}))
    work(house)
    assert foretell(house).counts == {"not vouched for": 1}
    assert replay_all(house).refused == 1
    assert charged(house) == set()
    assert replay_all(house, vouch=True).settled == 1
    assert charged(house) == {"k"}


def test_headers_that_are_no_headers_vouch_for_nothing(careful_house: House) -> None:
    draw = DrawRequest(account_id=1, request_key="k")
    vouching = Vouching(Keyring((bytes.fromhex(SECRET),)))
    for headers in (None, "", "[]", "null", "{", '{"signature": 7}', '{"signature": null}', "\x00"):
        assert vouching.why_not(draw, headers)
    assert not vouching.why_not(draw, json.dumps({"signature": signed(draw)}))


# ---- Celery's task ---------------------------------------------------------------------------------------------------


class _Task:
    """What `tombola.draw` needs of Celery's task."""

    def __init__(self, house: House, task_id: str) -> None:
        self.app = self.request = self
        self.draw_settings = house.settings
        self.id = task_id


def by_task(house: House, task_id: str = "task-1", **fields: Any) -> dict[str, Any]:
    return tasks.draw(_Task(house, task_id), **fields)


def test_celerys_task_takes_a_signature(tmp_path: Path, redis_url: str) -> None:
    with house_of(tmp_path, redis_url, redis_url, SIGNED) as house:
        (account_id,) = house.accounts(1)
        draw = DrawRequest(account_id=account_id, request_key="k")
        for wrong in ({}, {"signature": signed(draw, WRONG)}, {"signature": 7}, {"signature": None}):
            with pytest.raises(NotSigned):
                by_task(house, account_id=account_id, request_key="k", **wrong)
        assert charged(house) == set()
        by_task(house, account_id=account_id, request_key="k", signature=signed(draw))
        # Without a key the task's id is the key, and what is signed.
        of_task = DrawRequest(account_id=account_id, request_key="task-2")
        with pytest.raises(NotSigned):
            by_task(house, "task-3", account_id=account_id, signature=signed(of_task))
        by_task(house, "task-2", account_id=account_id, signature=signed(of_task))
        assert charged(house) == {"k", "task-2"}


def test_celerys_task_draws_what_is_accepted(careful_house: House) -> None:
    house = careful_house
    (account_id,) = house.accounts(1)
    with pytest.raises(InvalidRequest, match="not accepted"):
        by_task(house, account_id=account_id, request_key="k")
    Entry(house.engine, relay_after_s=60).accept([Submission(DrawRequest(account_id=account_id, request_key="k"))])
    by_task(house, account_id=account_id, request_key="k")
    assert charged(house) == {"k"}


# ---- the doctor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("env", "status"), [({}, "warn"), (SIGNED, "ok"), (ACCEPTED_ONLY, "ok")], ids=str)
def test_the_doctor_says_so(env: dict[str, str], status: str) -> None:
    (check,) = (it for it in examine_settings(Settings.from_env(env)) if it.name == "message secret")
    assert check.status == status
    assert ("anyone who can write to the broker" in check.cure) == (status == "warn")
    (check,) = (it for it in examine_settings(Settings.from_env(env)) if it.name == "result secret")
    assert check.status == "warn"
