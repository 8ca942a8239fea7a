"""Bad messages among good ones: a worker parks the bad ones, each once and with its cause, and settles the others."""

from collections.abc import Callable, Iterator, Mapping

import pytest
from redis import Redis

from tests import poison, processes
from tests.books import assert_books
from tests.processes import House, draws, wait_for
from tombola.producers.brokers.rabbitmq import open_amqp
from tombola.producers.brokers.streams import DEAD_QUEUE, QUEUE

SETTLED_WITHIN_S = 90.0


@pytest.fixture(params=["redis", "rabbitmq"])
def house(request: pytest.FixtureRequest, mariadb_url: str, redis_url: str) -> Iterator[House]:
    broker_url = redis_url if request.param == "redis" else request.getfixturevalue("rabbitmq_url")
    with House(mariadb_url, broker_url, redis_url) as house:
        yield house


def left(house: House) -> int:
    """How many messages wait anywhere: on a Stream also those in somebody's hands."""
    url = house.settings.need("broker_url")
    if url.startswith("redis"):
        with Redis.from_url(url) as client:
            return int(client.xlen(QUEUE))
    with open_amqp(url) as connection:
        channel = connection.channel()
        return sum(int(channel.queue_declare(name, passive=True).message_count) for name in (QUEUE, DEAD_QUEUE))


def test_the_corpus_is_large_and_its_messages_differ() -> None:
    """`corpus` itself insists that no two have the same name or content."""
    bad = poison.corpus(draws(range(1, 6), poison.TAKEN_MIN), other_account=9)
    assert len(bad) >= 200
    assert len({it.cause for it in bad}) == 5
    assert len({it.kind for it in bad}) >= 40


def test_bad_messages_are_parked_once_and_take_no_good_one_along(house: House) -> None:
    settle_among_poison(house, 1000)


Strange = Mapping[bytes, tuple[str, ...]]


def settle_among_poison(
    house: House,
    count: int,
    *,
    within_s: float = SETTLED_WITHIN_S,
    publish_strange: Callable[[House], Strange] = lambda _house: poison.NOTHING_STRANGE,
) -> None:
    """`count` good draws with the whole corpus among them, and a worker process.

    `publish_strange` adds, in the middle of them, what only this broker carries, and says how it is to be parked.
    """
    *accounts, other = house.accounts(21)
    good = draws(accounts, count)
    bad = poison.corpus(good[: poison.TAKEN_MIN], other_account=other)
    poison.accept(house.engine, good[: poison.TAKEN_MIN])
    messages = poison.mixed(good, bad, seed=count)
    middle = len(messages) // 2
    poison.publish(house.settings.need("broker_url"), messages[:middle])
    strange = publish_strange(house)
    poison.publish(house.settings.need("broker_url"), messages[middle:])
    bad_count = len(bad) + len(strange)
    with processes.worker(house.env) as worker:
        house.wait_settled(count, within_s=within_s, log=worker.log)
        wait_for(
            lambda: left(house) == 0 and house.dead() >= bad_count,
            within_s=60,
            what=lambda: f"{left(house)} left, {house.dead()} of {bad_count} parked\n{worker.log()[-4000:]}",
        )
        assert worker.is_alive
        assert worker.stop() == 0, worker.log()
    assert left(house) == 0  # nor did it give anything back
    poison.assert_parked_once(house.engine, bad, strange)
    assert house.results().keys() == {draw.request_key for draw in good}
    assert house.violations() == []
    assert_books(house.engine)
