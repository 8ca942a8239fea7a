"""A message that was delivered too often is handled alone; an outage meanwhile must not make a dead letter of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from msgspec.structs import replace

from tests.processes import House, draws
from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.results import ResultStore
from tombola.worker.dead_letters import parking
from tombola.worker.deliveries import Delivery
from tombola.worker.settle import tries
from tombola.worker.settle.consumer import Consumer
from tombola.worker.settle.outages import Stopping
from tombola.worker.settle.rules import Rules


class Handed:
    """Hands out what it was given, once, and remembers what was acked."""

    def __init__(self, *waiting: Delivery) -> None:
        self.waiting = list(waiting)
        self.acked: list[Delivery] = []
        self.given = list(waiting)
        self.is_released = False

    def fetch(self, count_max: int, *, wait_s: float) -> list[Delivery]:
        taken, self.waiting = self.waiting[:count_max], self.waiting[count_max:]
        return taken

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        self.acked += deliveries

    def keep(self, deliveries: Sequence[Delivery]) -> None:
        pass

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        raise AssertionError

    def release(self) -> None:
        """What was not acked comes again."""
        self.is_released = True
        self.waiting = [replace(it, count=it.count + 1) for it in self.given if it not in self.acked]

    def fetch_dead(self, count_max: int) -> list[Delivery]:
        return []

    def ack_dead(self, deliveries: Sequence[Delivery]) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def house(tmp_path: Path, redis_url: str) -> Iterator[House]:
    with House(f"sqlite:///{tmp_path}/ledger.db", redis_url, redis_url) as house:
        yield house


@pytest.fixture
def consumer(house: House) -> Iterator[Consumer]:
    results = ResultStore.open(house.settings.need("result_url"), ttl_s=60)
    rules = Rules.of(house.settings, house.engine, house.wheels)
    yield Consumer(Handed(), house.engine, results, rules, house.settings)
    results.close()


def suspect(house: House) -> Delivery:
    (draw,) = draws(house.accounts(1), 1)
    return Delivery(draw.encode(), 1, count=house.settings.deliveries_max + 1)


def test_a_suspect_with_nothing_wrong_settles_and_is_no_dead_letter(house: House, consumer: Consumer) -> None:
    delivery = suspect(house)
    consumer.deliveries = source = Handed(delivery)
    consumer.consume_once(wait_s=0)
    assert source.acked == [delivery]
    assert (house.settled(), house.causes()) == (1, [])


def test_a_shutdown_while_the_database_is_away_parks_no_suspect(
    house: House, consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = suspect(house)

    def settle(*_args: object, **_options: object) -> NoReturn:
        consumer._stopping.set()
        raise ServiceUnavailable("the database does not answer")

    with monkeypatch.context() as away:
        away.setattr(tries, "settle_unread", settle)
        consumer.deliveries = source = Handed(delivery)
        with pytest.raises(Stopping):
            consumer.consume_once(wait_s=0)
        assert source.acked == []
    consumer.deliveries = source = Handed(delivery)
    consumer.consume_once(wait_s=0)
    assert source.acked == [delivery]
    assert (house.settled(), house.causes()) == (1, [])


def test_an_outage_that_lasts_parks_no_suspect(
    house: House, consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This worker parked it before it tried: that it is known now is no reason to give it up."""
    delivery = suspect(house)
    settle, failures = tries.settle_unread, 0

    def settle_later(*args: Any, **options: Any) -> Any:
        nonlocal failures
        failures += 1
        if failures < 6:
            raise ServiceUnavailable("the database does not answer")
        return settle(*args, **options)

    monkeypatch.setattr(tries, "settle_unread", settle_later)
    unpark = parking.unpark

    def unpark_later(*args: Any) -> None:
        if failures < 6:
            raise ServiceUnavailable("the database does not answer")
        unpark(*args)

    monkeypatch.setattr(parking, "unpark", unpark_later)
    consumer.deliveries = source = Handed(delivery)
    consumer.consume_once(wait_s=0)
    assert (source.is_released, source.acked) == (True, [])
    while not source.acked:
        consumer.consume_once(wait_s=0)
    assert (house.settled(), house.causes()) == (1, [])
