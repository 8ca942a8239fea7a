"""Policies of operators that make RabbitMQ let draws go: losses, which the relay makes good, never dead letters."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import amqp
import pytest
from sqlalchemy import update

from tests import poison, servers
from tests.dead_letters.test_parking import bury_in_rabbitmq, consume_all, left, letters
from tests.processes import House, draws, wait_for
from tests.relay.test_outbox import age, statuses
from tombola.producers.brokers.quorum_queues import QueueBroker
from tombola.producers.brokers.rabbitmq import open_amqp
from tombola.producers.brokers.streams import DEAD_QUEUE, QUEUE
from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import PublishFailed
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.worker.deliveries.losses import PUBLISHED_MAX
from tombola.worker.relay.relay import Relay

ALL_QUEUES = ".*"
OURS_ALONE = "^draws$"


@pytest.fixture
def house(tmp_path: Path, rabbitmq_url: str, redis_url: str) -> Iterator[House]:
    more = {"TOMBOLA_PUBLISH_TIMEOUT_S": "2", "TOMBOLA_RELAY_AFTER_S": "1"}
    with House(f"sqlite:///{tmp_path}/ledger.db", rabbitmq_url, redis_url, **more) as house:
        yield house


@pytest.fixture
def url(house: House) -> str:
    return house.settings.need("broker_url")


def accepted(house: House, count: int) -> list[DrawRequest]:
    asked = draws(house.accounts(3), count)
    poison.accept(house.engine, asked)
    return asked


def wait_left(url: str, name: str, count: int) -> None:
    wait_for(lambda: left(url, name) == count, within_s=20, what=lambda: f"{left(url, name)} in {name}")


def relayed_and_settled(house: House, asked: Sequence[DrawRequest]) -> None:
    """As ever: what was lost is published again, settles, and nothing is a dead letter."""
    age(house.engine)
    with closing(Relay.from_settings(house.settings)) as relay:
        assert relay.run_once() == len(asked)
    consume_all(house)
    assert set(statuses(house.engine).values()) == {"completed"}
    assert letters(house.engine) == []
    assert house.violations() == []


@pytest.mark.parametrize("pattern", [ALL_QUEUES, OURS_ALONE])
def test_what_expires_is_left_to_the_relay(
    house: House, url: str, rabbitmq_server: servers.RabbitMQ, pattern: str
) -> None:
    asked = accepted(house, 20)
    with rabbitmq_server.policy(url, pattern, message_ttl=100):
        house.enqueue(asked)
        wait_left(url, QUEUE, 0)
        if pattern == OURS_ALONE:
            wait_left(url, DEAD_QUEUE, 20)
        consume_all(house)
        assert left(url, DEAD_QUEUE) == 0
    assert set(statuses(house.engine).values()) == {"accepted"}
    assert letters(house.engine) == []
    relayed_and_settled(house, asked)


def test_what_was_never_accepted_and_expires_is_a_dead_letter(house: House, url: str) -> None:
    """Nothing else knows of it. And a stranger's reasons are data."""
    (draw, *_) = accepted(house, 2)
    unknown = DrawRequest(account_id=1, request_key="unknown")
    other = DrawRequest(account_id=2, request_key=draw.request_key)  # not what was accepted under that key
    bodies = [unknown.encode(), other.encode(), b"junk"]
    bury_in_rabbitmq(url, [*bodies, draw.encode()], {"x-first-death-reason": "expired"})
    bury_in_rabbitmq(url, [draw.encode()], {"x-first-death-reason": "maxlen"})
    wait_left(url, DEAD_QUEUE, 5)
    consume_all(house)
    assert left(url, DEAD_QUEUE) == 0
    found = letters(house.engine)
    assert {it.body for it in found} == set(bodies)
    assert {(it.cause, it.error) for it in found} == {(Cause.TOO_MANY_DELIVERIES, "RabbitMQ gave it up: expired")}
    assert set(statuses(house.engine).values()) == {"accepted"}


def test_a_delivery_limit_of_theirs_makes_no_dead_letter_of_an_accepted_draw(
    house: House, url: str, rabbitmq_server: servers.RabbitMQ
) -> None:
    asked = accepted(house, 5)
    with rabbitmq_server.policy(url, OURS_ALONE, delivery_limit=1):
        house.enqueue(asked)
        with open_amqp(url) as connection:  # workers that are stopped again and again
            channel = connection.channel()
            deadline = time.monotonic() + 20
            while left(url, DEAD_QUEUE) < len(asked):
                assert time.monotonic() < deadline
                while (message := channel.basic_get(QUEUE)) is not None:
                    channel.basic_reject(message.delivery_tag, requeue=True)
        consume_all(house)
    assert letters(house.engine) == []
    assert set(statuses(house.engine).values()) == {"accepted"}
    relayed_and_settled(house, asked)


def test_what_goes_beyond_a_delivery_limit_whenever_it_is_published_is_parked(house: House, url: str) -> None:
    (draw,) = accepted(house, 1)
    with house.engine.begin() as connection:
        connection.execute(update(requests).values(publish_attempts=PUBLISHED_MAX))
    bury_in_rabbitmq(url, [draw.encode()], {"x-first-death-reason": "delivery_limit"})
    wait_left(url, DEAD_QUEUE, 1)
    consume_all(house)
    assert [it.cause for it in letters(house.engine)] == [Cause.TOO_MANY_DELIVERIES]
    assert set(statuses(house.engine).values()) == {"dead"}


@pytest.mark.parametrize("reason", [["expired"], {"expired": 1}, 7, b"\xff", None])
def test_other_reasons_are_what_they_were(house: House, url: str, reason: object) -> None:
    (draw,) = accepted(house, 1)
    bury_in_rabbitmq(url, [draw.encode()], {"x-first-death-reason": reason})
    wait_left(url, DEAD_QUEUE, 1)
    consume_all(house)
    assert len(letters(house.engine)) == 1
    assert set(statuses(house.engine).values()) == {"dead"}


def test_what_has_settled_and_then_expires_is_forgotten(house: House, url: str) -> None:
    asked = accepted(house, 3)
    house.enqueue(asked)
    consume_all(house)
    bury_in_rabbitmq(url, [draw.encode() for draw in asked], {"x-first-death-reason": "expired"})
    wait_left(url, DEAD_QUEUE, 3)
    consume_all(house)
    assert left(url, DEAD_QUEUE) == 0
    assert letters(house.engine) == []
    assert set(statuses(house.engine).values()) == {"completed"}


def test_a_queue_of_limited_length_refuses_and_loses_nothing(
    house: House, url: str, rabbitmq_server: servers.RabbitMQ
) -> None:
    asked = accepted(house, 20)
    with (
        rabbitmq_server.policy(url, OURS_ALONE, max_length=3),
        closing(QueueBroker(url, publish_timeout_s=5)) as broker,
    ):
        with pytest.raises(PublishFailed, match="the queue is full"):
            until_it_raises(broker, [draw.encode() for draw in asked])
        consume_all(house)
    assert letters(house.engine) == []
    consume_all(house)
    pending = [key for key, status in statuses(house.engine).items() if status == "accepted"]
    assert pending
    age(house.engine)
    with closing(Relay.from_settings(house.settings)) as relay:
        assert relay.run_once() == len(pending)
    consume_all(house)
    assert set(statuses(house.engine).values()) == {"completed"}


def until_it_raises(broker: QueueBroker, bodies: Sequence[bytes]) -> None:
    for body in bodies:
        broker.publish([body])
        time.sleep(0.02)  # the queue says that it is full to those who come a moment later


def test_a_queue_that_expires_is_declared_again(house: House, url: str, rabbitmq_server: servers.RabbitMQ) -> None:
    asked = accepted(house, 3)
    house.enqueue(asked)
    with rabbitmq_server.policy(url, ALL_QUEUES, expires=300):
        wait_for(lambda: not exists(url), within_s=20, what=lambda: "the queue is still there")
    relayed_and_settled(house, asked)


def exists(url: str) -> bool:
    with open_amqp(url) as connection:
        try:
            connection.channel().queue_declare(QUEUE, passive=True)
        except amqp.NotFound:
            return False
    return True
