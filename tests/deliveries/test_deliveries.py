"""What a source of deliveries promises, on a real Redis and a real RabbitMQ: one contract, asked of both."""

import hashlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from threading import Thread
from typing import Any, ClassVar

import amqp
import pytest
from redis import Redis

from tests import servers
from tombola.producers.brokers.quorum_queues import declare_queues
from tombola.producers.brokers.rabbitmq import open_amqp
from tombola.producers.brokers.redis_clients import open_redis
from tombola.producers.brokers.registry import Broker, open_broker
from tombola.producers.brokers.streams import DEAD_QUEUE, GROUP, QUEUE, declare_group
from tombola.producers.domain.errors import PublishFailed, ServiceUnavailable
from tombola.worker.deliveries import BODY_KEPT_BYTES_MAX, HELD_BYTES_MAX, Deliveries, Delivery, open_deliveries
from tombola.worker.deliveries.queues import QueueDeliveries
from tombola.worker.deliveries.streams import StreamDeliveries, forget_consumers

CLAIM_AFTER_S = 0.5
NEVER_S = 3600.0
DEADLINE_S = 20.0
PREFETCH = 100


class Source:
    """One broker with the queue `draws` on it, and everything that was opened on it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._opened: list[Deliveries | Broker] = []

    def consumer(self, *, claim_after_s: float = NEVER_S, prefetch: int = PREFETCH) -> Deliveries:
        opened = open_deliveries(self.url, claim_after_s=claim_after_s, prefetch=prefetch)
        self._opened.append(opened)
        return opened

    def producer(self, *, publish_timeout_s: float = 5.0) -> Broker:
        opened = open_broker(self.url, publish_timeout_s=publish_timeout_s)
        self._opened.append(opened)
        return opened

    def publish(self, *bodies: bytes) -> None:
        producer = open_broker(self.url, publish_timeout_s=5)
        producer.publish(bodies)
        producer.close()

    def close(self) -> None:
        for opened in self._opened:
            with suppress(Exception):
                opened.close()


def bodies(count: int, start: int = 0) -> list[bytes]:
    return [b"draw %d" % number for number in range(start, start + count)]


def said(deliveries: Sequence[Delivery]) -> list[bytes]:
    return [delivery.body for delivery in deliveries]


def fetch_all(consumer: Deliveries, count: int, *, within_s: float = DEADLINE_S) -> list[Delivery]:
    """`count` deliveries, however many fetches and connections they take; fewer when the time is up."""
    fetched: list[Delivery] = []
    deadline = time.monotonic() + within_s
    while len(fetched) < count and time.monotonic() < deadline:
        with suppress(ServiceUnavailable):
            fetched += consumer.fetch(count - len(fetched), wait_s=0.2)
    return fetched


def fetch_until_it_raises(consumer: Deliveries) -> None:
    """What was pushed ahead may still be handed out; a consumer that is deaf returns from here."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        consumer.fetch(1, wait_s=0.1)


def eventually(condition: Callable[[], bool], *, within_s: float = DEADLINE_S) -> bool:
    deadline = time.monotonic() + within_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return met


def nothing_comes(consumer: Deliveries, *, for_s: float) -> bool:
    deadline = time.monotonic() + for_s
    while time.monotonic() < deadline:
        if consumer.fetch(10, wait_s=0.1):
            return False
    return True


class DeliveriesContract:
    """Subclasses say which broker, and how a process dies on it."""

    # What a claim takes on this broker at most, once its consumer is dead.
    claim_after_s: ClassVar[float]

    @pytest.fixture
    def source(self) -> Iterator[Source]:
        raise NotImplementedError

    @pytest.fixture
    def own_server(self) -> Iterator[servers.Server]:
        raise NotImplementedError

    def kill(self, consumer: Deliveries) -> None:
        """Take the process away from under a consumer: nobody closes anything."""
        raise NotImplementedError

    def declare_as_worker(self, url: str) -> None:
        raise NotImplementedError

    # ---- fetch

    def test_fetch_takes_what_is_waiting_up_to_its_limit(self, source: Source) -> None:
        source.publish(*bodies(5))
        consumer = source.consumer()
        first = fetch_all(consumer, 3)
        assert said(first) == bodies(3)
        assert len(consumer.fetch(3, wait_s=5)) == 2
        assert [delivery.count for delivery in first] == [1, 1, 1]

    def test_fetch_does_not_wait_for_a_batch_to_fill(self, source: Source) -> None:
        consumer = source.consumer()
        assert consumer.fetch(10, wait_s=0) == []
        source.publish(*bodies(2))
        began = time.monotonic()
        assert said(fetch_all(consumer, 2)) == bodies(2)
        assert consumer.fetch(10, wait_s=0) == []
        assert time.monotonic() - began < 4

    def test_fetch_of_a_few_returns_long_before_its_wait_is_over(self, source: Source) -> None:
        consumer = source.consumer()
        consumer.fetch(1, wait_s=0)
        source.publish(b"only one")
        began = time.monotonic()
        assert said(consumer.fetch(100, wait_s=10)) == [b"only one"]
        assert time.monotonic() - began < 5

    def test_fetch_waits_for_the_first_to_come(self, source: Source) -> None:
        consumer = source.consumer()
        consumer.fetch(1, wait_s=0)
        fetched: list[Delivery] = []
        thread = Thread(target=lambda: fetched.extend(consumer.fetch(10, wait_s=15)), daemon=True)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive(), "it returned before anything came"
        source.publish(b"late")
        thread.join(5)
        assert said(fetched) == [b"late"]

    def test_fetch_gives_up_when_nothing_comes(self, source: Source) -> None:
        consumer = source.consumer()
        consumer.fetch(1, wait_s=0)
        began = time.monotonic()
        assert consumer.fetch(10, wait_s=0.3) == []
        assert 0.25 < time.monotonic() - began < 5

    def test_bodies_arrive_byte_for_byte(self, source: Source) -> None:
        odd = [b"\x00\xff\xfe not UTF-8", "größer 🎟".encode(), b"x" * BODY_KEPT_BYTES_MAX, b"", b'{"v":1}']
        source.publish(*odd)
        assert said(fetch_all(source.consumer(), len(odd))) == odd

    def test_of_a_body_that_is_too_large_the_beginning_is_kept(self, source: Source) -> None:
        large = b"".join(b"%07d " % number for number in range(125_000))
        source.publish(b"before", large, b"after")
        taken = fetch_all(source.consumer(), 3)
        assert said(taken) == [b"before", large[:BODY_KEPT_BYTES_MAX], b"after"]
        assert taken[1].whole == (1_000_000, hashlib.sha256(large).hexdigest())

    # ---- headers

    def test_headers_come_with_the_body_they_were_sent_with(self, source: Source) -> None:
        producer = source.producer()
        producer.publish([b"one", b"two"], [{"traceparent": "00-1-2-01", "empty": ""}, {}])
        producer.publish([b"three"])
        one, two, three = fetch_all(source.consumer(), 3)
        assert dict(one.headers) == {"traceparent": "00-1-2-01", "empty": ""}
        assert (dict(two.headers), dict(three.headers)) == ({}, {})

    def test_headers_stay_when_a_message_comes_again(self, source: Source) -> None:
        source.producer().publish([b"one"], [{"traceparent": "00-1-2-01"}])
        first = source.consumer()
        (fetched,) = fetch_all(first, 1)
        first.close()
        (again,) = fetch_all(source.consumer(), 1)
        assert (again.body, again.count) == (fetched.body, 2)
        assert again.headers["traceparent"] == "00-1-2-01"

    def test_where_the_broker_gave_nothing_up_there_is_nothing_dead(self, source: Source) -> None:
        source.publish(*bodies(3))
        consumer = source.consumer()
        assert consumer.fetch_dead(10) == []
        consumer.ack_dead([])
        fetched = fetch_all(consumer, 3)
        assert consumer.fetch_dead(10) == []
        consumer.ack(fetched)
        assert nothing_comes(source.consumer(claim_after_s=CLAIM_AFTER_S), for_s=2 * CLAIM_AFTER_S)

    # ---- ack, keep, requeue, release

    def test_what_was_acked_never_comes_back(self, source: Source) -> None:
        source.publish(*bodies(4))
        consumer = source.consumer(claim_after_s=self.claim_after_s)
        taken = fetch_all(consumer, 4)
        consumer.ack(taken[:2])
        consumer.close()
        other = source.consumer(claim_after_s=self.claim_after_s)
        again = fetch_all(other, 2)
        assert sorted(said(again)) == sorted(said(taken[2:]))
        other.ack(again)
        assert nothing_comes(other, for_s=3 * self.claim_after_s)

    @pytest.mark.parametrize("acked", [[0, 1, 2, 3, 4, 5], [3, 4, 5], [0, 2, 4], [5, 3, 1], [0, 1, 5], [2]])
    def test_an_ack_leaves_the_others_in_hand(self, source: Source, acked: list[int]) -> None:
        """The consumer holds some draws aside, fetches others and acks these, in any order of their tags."""
        source.publish(*bodies(6))
        consumer = source.consumer(claim_after_s=NEVER_S)
        taken = fetch_all(consumer, 6)
        consumer.ack([taken[number] for number in acked])
        source.publish(b"later")
        consumer.ack(fetch_all(consumer, 1))
        consumer.close()
        other = source.consumer(claim_after_s=self.claim_after_s)
        left = [body for number, body in enumerate(bodies(6)) if number not in acked]
        again = fetch_all(other, len(left))
        assert sorted(said(again)) == sorted(left)
        other.ack(again)
        assert nothing_comes(other, for_s=2 * self.claim_after_s)

    def test_what_was_held_back_can_be_acked_later(self, source: Source) -> None:
        source.publish(*bodies(5))
        consumer = source.consumer(claim_after_s=self.claim_after_s)
        taken = fetch_all(consumer, 5)
        for some in (taken[3:], taken[1:2], taken[:1], taken[2:3]):
            consumer.ack(some)
        consumer.close()
        assert nothing_comes(source.consumer(claim_after_s=self.claim_after_s), for_s=3 * self.claim_after_s)

    def test_what_is_kept_is_not_taken_over(self, source: Source) -> None:
        source.publish(*bodies(2))
        consumer = source.consumer(claim_after_s=self.claim_after_s)
        taken = fetch_all(consumer, 2)
        other = source.consumer(claim_after_s=self.claim_after_s)
        deadline = time.monotonic() + 4 * self.claim_after_s
        while time.monotonic() < deadline:
            consumer.keep(taken)
            assert other.fetch(10, wait_s=0.05) == []
        self.kill(consumer)
        again = fetch_all(other, 2)
        assert [delivery.count for delivery in again] == [2, 2]  # to keep is no delivery

    def test_what_is_requeued_comes_behind_what_waits_and_is_new(self, source: Source) -> None:
        source.producer().publish([b"busy", b"other", b"third"], [{"traceparent": "00-1-2-01"}, {}, {}])
        consumer = source.consumer(prefetch=1)
        (busy,) = fetch_all(consumer, 1)
        consumer.requeue([busy])
        again = []
        for _ in range(3):
            (delivery,) = fetch_all(consumer, 1)
            again.append(delivery)
            consumer.ack([delivery])
        assert said(again) == [b"other", b"third", b"busy"]
        assert [delivery.count for delivery in again] == [1, 1, 1]
        assert again[2].headers["traceparent"] == "00-1-2-01"
        assert nothing_comes(consumer, for_s=0.3)
        consumer.close()
        assert nothing_comes(source.consumer(claim_after_s=self.claim_after_s), for_s=2 * self.claim_after_s)

    def test_what_is_requeued_is_another_consumers_as_well(self, source: Source) -> None:
        source.publish(*bodies(3))
        consumer = source.consumer(claim_after_s=NEVER_S)
        taken = fetch_all(consumer, 3)
        consumer.requeue(taken[1:])
        consumer.ack(taken[:1])
        consumer.close()
        other = source.consumer(claim_after_s=NEVER_S)
        again = fetch_all(other, 2)
        assert sorted(said(again)) == sorted(said(taken[1:]))
        other.ack(again)
        assert nothing_comes(other, for_s=0.3)

    def test_what_is_released_comes_to_others_at_once(self, source: Source) -> None:
        source.publish(*bodies(4))
        consumer = source.consumer(claim_after_s=NEVER_S)
        taken = fetch_all(consumer, 2)  # the others may have been fetched ahead
        consumer.release()
        other = source.consumer(claim_after_s=NEVER_S)
        again = fetch_all(other, 4, within_s=10)
        assert sorted(said(again)) == bodies(4)
        assert {delivery.body: delivery.count for delivery in again}[taken[0].body] == 2
        other.ack(again)
        other.close()
        source.publish(b"afterwards")  # and the next fetch begins anew
        assert said(fetch_all(consumer, 1)) == [b"afterwards"]

    def test_what_was_released_is_acked_in_vain_and_does_no_harm(self, source: Source) -> None:
        source.publish(*bodies(2))
        consumer = source.consumer(claim_after_s=NEVER_S)
        stale = fetch_all(consumer, 2)
        consumer.release()
        first = fetch_all(consumer, 1)  # one by one, until the first ack
        consumer.keep([])
        consumer.ack(first)
        other = fetch_all(consumer, 1)
        assert sorted(said(first + other)) == bodies(2)
        source.publish(b"fresh")
        fresh = fetch_all(consumer, 1)
        assert said(fresh) == [b"fresh"]
        self.ack_stale(consumer, stale)
        consumer.close()
        left = fetch_all(source.consumer(claim_after_s=NEVER_S), 2)
        assert sorted(said(left)) == sorted([other[0].body, b"fresh"])

    def ack_stale(self, consumer: Deliveries, stale: Sequence[Delivery]) -> None:
        """Where tags name messages for ever, an ack of what another fetch holds now is a true one."""

    def test_release_again_and_unused_is_no_error(self, source: Source) -> None:
        consumer = source.consumer()
        consumer.release()
        consumer.release()
        assert consumer.fetch(1, wait_s=0) == []
        consumer.release()

    def test_nothing_to_ack_keep_or_requeue_is_no_error(self, source: Source) -> None:
        consumer = source.consumer()
        for _ in range(2):
            consumer.ack([])
            consumer.keep([])
            consumer.requeue([])
            consumer.fetch(1, wait_s=0)

    def test_no_fetch_takes_in_more_bytes_than_may_be_held(self, source: Source) -> None:
        """Eight bodies of a quarter of it each: they come over two fetches or more, and all of them come."""
        large = [bytes([65 + number]) * (HELD_BYTES_MAX // 4) for number in range(8)]
        for body in large:
            source.publish(body)
        consumer = source.consumer()
        fetched: list[Delivery] = []
        deadline = time.monotonic() + DEADLINE_S
        while len(fetched) < 8 and time.monotonic() < deadline:
            some = consumer.fetch(100, wait_s=1)
            assert sum(delivery.body_bytes for delivery in some) <= HELD_BYTES_MAX + HELD_BYTES_MAX // 4
            consumer.ack(some)
            fetched += some
        assert [delivery.body[:1] for delivery in fetched] == [body[:1] for body in large]

    # ---- consumers that end

    def test_what_a_closed_consumer_held_comes_to_another_at_once(self, source: Source) -> None:
        source.publish(*bodies(3))
        consumer = source.consumer(claim_after_s=60)
        other = source.consumer(claim_after_s=60)
        taken = fetch_all(consumer, 3)
        consumer.ack(taken[:1])
        consumer.close()
        again = fetch_all(other, 2, within_s=10)
        assert sorted(said(again)) == sorted(said(taken[1:]))
        assert [delivery.count for delivery in again] == [2, 2]

    def test_close_again_and_close_unused_are_no_error(self, source: Source) -> None:
        consumer = source.consumer()
        consumer.close()
        consumer.close()

    def test_what_a_killed_consumer_held_comes_back_with_its_count(self, source: Source) -> None:
        source.publish(*bodies(3))
        for count in (1, 2, 3):
            consumer = source.consumer(claim_after_s=self.claim_after_s)
            taken = fetch_all(consumer, 3)
            assert sorted(said(taken)) == bodies(3)
            assert [delivery.count for delivery in taken] == [count] * 3
            self.kill(consumer)

    def test_what_is_in_hand_is_not_taken_from_the_living(self, source: Source) -> None:
        source.publish(*bodies(3))
        consumer = source.consumer(claim_after_s=NEVER_S)
        taken = fetch_all(consumer, 3)
        assert nothing_comes(source.consumer(claim_after_s=NEVER_S), for_s=0.5)
        consumer.ack(taken)

    def test_consumers_share_without_overlap(self, source: Source) -> None:
        source.publish(*bodies(100))
        pair = [source.consumer(prefetch=10), source.consumer(prefetch=10)]
        got: list[list[bytes]] = [[], []]
        deadline = time.monotonic() + DEADLINE_S
        while sum(map(len, got)) < 100 and time.monotonic() < deadline:
            for mine, consumer in zip(got, pair, strict=True):
                taken = consumer.fetch(7, wait_s=0.1)
                mine += said(taken)
                consumer.ack(taken)
        assert sorted(got[0] + got[1]) == sorted(bodies(100))
        assert len(got[0]) > 7
        assert len(got[1]) > 7

    # ---- topology

    @pytest.mark.parametrize("order", ["producer first", "worker first"])
    def test_either_side_may_declare_first(self, source: Source, order: str) -> None:
        consumer, producer = source.consumer(), source.producer()
        if order == "worker first":
            assert consumer.fetch(1, wait_s=0) == []
            producer.publish([b"hello"])
        else:
            producer.publish([b"hello"])
        assert said(fetch_all(consumer, 1)) == [b"hello"]
        # And again on what is there already.
        self.declare_as_worker(source.url)
        producer.publish([b"again"])
        assert said(fetch_all(consumer, 1)) == [b"again"]

    # ---- outages

    def test_a_broker_that_is_not_there(self) -> None:
        with socket.socket() as holder:
            holder.bind((servers.HOST, 0))  # bound, and nobody listens
            source = Source(self.url_at(holder.getsockname()[1]))
            consumer, producer = source.consumer(), source.producer()
            with pytest.raises(ServiceUnavailable):
                consumer.fetch(1, wait_s=0.1)
            with pytest.raises(PublishFailed):
                producer.publish([b"x"])
            consumer.close()
            producer.close()

    def url_at(self, port: int) -> str:
        raise NotImplementedError

    def test_a_broker_that_restarts_loses_nothing(self, own_server: servers.Server) -> None:
        source = Source(own_server.url)
        try:
            consumer, producer = source.consumer(claim_after_s=CLAIM_AFTER_S), source.producer()
            producer.publish(bodies(6))
            taken = fetch_all(consumer, 4)
            consumer.ack(taken[:2])
            own_server.stop()
            with pytest.raises(ServiceUnavailable):
                fetch_until_it_raises(consumer)
            with pytest.raises(PublishFailed):
                producer.publish([b"lost, and said so"])
            own_server.restart()
            producer.publish(bodies(2, start=6))
            again = fetch_all(consumer, 6)
            assert sorted(said(again)) == bodies(6, start=2)
            assert {delivery.body: delivery.count for delivery in again}[taken[2].body] >= 2
            consumer.ack(again)
            assert nothing_comes(consumer, for_s=3 * CLAIM_AFTER_S)
        finally:
            source.close()

    def test_an_ack_on_a_broken_connection_says_so_or_leaves_it_queued(self, own_server: servers.Server) -> None:
        source = Source(own_server.url)
        try:
            consumer = source.consumer(claim_after_s=CLAIM_AFTER_S)
            source.publish(b"kept")
            taken = fetch_all(consumer, 1)
            own_server.stop()
            # A write into a dying socket may still succeed: only the redelivery tells.
            with suppress(ServiceUnavailable):
                consumer.ack(taken)
            own_server.restart()
            again = fetch_all(consumer, 1)
            assert said(again) == [b"kept"]
        finally:
            source.close()


class TestStreams(DeliveriesContract):
    claim_after_s = CLAIM_AFTER_S

    @pytest.fixture
    def source(self, redis_url: str) -> Iterator[Source]:
        source = Source(redis_url)
        yield source
        source.close()

    @pytest.fixture
    def own_server(self) -> Iterator[servers.Server]:
        with servers.redis(private=True, appendonly=True, appendfsync="always") as server:
            yield server

    @pytest.fixture
    def client(self, redis_url: str) -> Iterator[Redis]:
        with Redis.from_url(redis_url) as client:
            yield client

    def kill(self, consumer: Deliveries) -> None:
        assert isinstance(consumer, StreamDeliveries)
        consumer._client.connection_pool.disconnect()

    def declare_as_worker(self, url: str) -> None:
        with open_redis(url) as client:
            declare_group(client)

    def url_at(self, port: int) -> str:
        return f"redis://{servers.HOST}:{port}/0"

    def test_flushall_takes_the_group_and_it_is_made_anew(self, source: Source, client: Redis) -> None:
        consumer, producer = source.consumer(), source.producer()
        producer.publish([b"before"])
        assert len(fetch_all(consumer, 1)) == 1
        client.flushdb()
        producer.publish([b"after"])  # its XADD makes a Stream that has no group
        with pytest.raises(ServiceUnavailable, match="NOGROUP"):
            consumer.fetch(1, wait_s=0.1)
        assert said(fetch_all(consumer, 1)) == [b"after"]

    def test_an_entry_without_a_body_is_taken_whole(self, source: Source, client: Redis) -> None:
        source.publish(b"good")
        client.xadd(QUEUE, {b"something": b"else", b"and": b"more"})
        client.xadd(QUEUE, {b"other": b"x", b"body": b"behind another field"})
        taken = fetch_all(source.consumer(), 3)
        assert said(taken) == [b"good", b"something: else\nand: more", b"behind another field"]

    def test_the_stream_forgets_what_was_acked(self, source: Source, client: Redis) -> None:
        source.publish(*bodies(10))
        consumer = source.consumer()
        consumer.ack(fetch_all(consumer, 10))
        assert client.xlen(QUEUE) == 0
        assert self.pending(client) == 0

    def test_a_closed_consumer_is_forgotten(self, source: Source, client: Redis) -> None:
        source.publish(b"x")
        consumer = source.consumer()
        consumer.ack(fetch_all(consumer, 1))
        assert len(self.consumers(client)) == 1
        consumer.close()
        assert self.consumers(client) == {}

    def test_a_consumer_that_holds_messages_is_never_forgotten(self, source: Source, client: Redis) -> None:
        """XGROUP DELCONSUMER would take its pending list along: the messages would never be delivered again."""
        source.publish(b"held")
        consumer = source.consumer(claim_after_s=60)
        fetch_all(consumer, 1)
        assert forget_consumers(client, idle_s=0) == 0
        consumer.close()
        assert forget_consumers(client, idle_s=0) == 0
        assert self.pending(client) == 1
        other = source.consumer(claim_after_s=60)
        other.ack(fetch_all(other, 1))
        assert self.pending(client) == 0

    def test_idle_consumers_that_hold_nothing_are_forgotten(self, source: Source, client: Redis) -> None:
        source.publish(*bodies(3))
        for number in range(3):
            killed = source.consumer()
            taken = fetch_all(killed, 1)
            if number:
                killed.ack(taken)
            self.kill(killed)
        assert len(self.consumers(client)) == 3
        assert forget_consumers(client, idle_s=3600) == 0
        assert forget_consumers(client, idle_s=0) == 2
        assert self.pending(client) == 1

    def test_to_forget_consumers_where_there_is_no_stream(self, client: Redis) -> None:
        assert forget_consumers(client, idle_s=0) == 0

    def test_more_than_a_batch_of_abandoned_messages_is_claimed(self, source: Source, client: Redis) -> None:
        source.publish(*bodies(25))
        dead = source.consumer(claim_after_s=CLAIM_AFTER_S)
        assert len(fetch_all(dead, 25)) == 25
        self.kill(dead)
        heir = source.consumer(claim_after_s=CLAIM_AFTER_S)
        taken: list[Delivery] = []
        deadline = time.monotonic() + DEADLINE_S
        while len(taken) < 25 and time.monotonic() < deadline:
            batch = heir.fetch(10, wait_s=0.1)
            assert len(batch) <= 10
            heir.ack(batch)
            taken += batch
        assert sorted(said(taken)) == sorted(bodies(25))
        assert {delivery.count for delivery in taken} == {2}
        assert self.pending(client) == 0

    def test_two_heirs_never_claim_the_same(self, source: Source) -> None:
        source.publish(*bodies(40))
        dead = source.consumer(claim_after_s=CLAIM_AFTER_S)
        fetch_all(dead, 40)
        self.kill(dead)
        taken: list[Delivery] = []

        def claim() -> None:
            # Its claims stay fresh for longer than this test takes.
            heir = source.consumer(claim_after_s=CLAIM_AFTER_S)
            deadline = time.monotonic() + DEADLINE_S
            while len(taken) < 40 and time.monotonic() < deadline:
                batch = heir.fetch(5, wait_s=0.05)
                heir.ack(batch)
                taken.extend(batch)

        heirs = [Thread(target=claim) for _ in range(2)]
        for heir in heirs:
            heir.start()
        for heir in heirs:
            heir.join()
        assert sorted(said(taken)) == sorted(bodies(40))

    def test_a_redis_that_is_out_of_memory_is_a_failed_publish(self, own_server: servers.Server) -> None:
        with Redis.from_url(own_server.url) as client:
            client.config_set("maxmemory", "1mb")
        producer = open_broker(own_server.url, publish_timeout_s=5)
        with pytest.raises(PublishFailed):
            producer.publish([b"x" * 2_000_000] * 4)
        producer.close()

    def test_a_silent_redis_is_a_failed_publish_in_time(self, own_server: servers.Server) -> None:
        producer = open_broker(own_server.url, publish_timeout_s=0.5)
        producer.publish([b"declared"])
        with Redis.from_url(own_server.url) as client:
            client.execute_command("CLIENT", "PAUSE", 20_000, "ALL")
        began = time.monotonic()
        with pytest.raises(PublishFailed):
            producer.publish([b"x"])
        assert time.monotonic() - began < 10
        producer.close()

    def consumers(self, client: Redis) -> dict[Any, Any]:
        found: Any = client.xinfo_consumers(QUEUE, GROUP)
        return {consumer["name"]: consumer["pending"] for consumer in found}

    def pending(self, client: Redis) -> int:
        summary: Any = client.xpending(QUEUE, GROUP)
        return int(summary["pending"])


class TestQueues(DeliveriesContract):
    claim_after_s = CLAIM_AFTER_S  # the broker sees a broken connection at once; here only a measure of patience

    @pytest.fixture
    def source(self, rabbitmq_url: str) -> Iterator[Source]:
        source = Source(rabbitmq_url)
        yield source
        source.close()

    @pytest.fixture
    def own_server(self) -> Iterator[servers.Server]:
        with servers.rabbitmq(private=True) as server:
            yield server

    def kill(self, consumer: Deliveries) -> None:
        assert isinstance(consumer, QueueDeliveries)
        assert consumer._wire is not None
        consumer._wire.transport.sock.shutdown(socket.SHUT_RDWR)

    def ack_stale(self, consumer: Deliveries, stale: Sequence[Delivery]) -> None:
        consumer.ack(stale)  # on each connection RabbitMQ counts from 1: the same numbers name others now

    def declare_as_worker(self, url: str) -> None:
        with open_amqp(url) as connection:
            declare_queues(connection.channel())

    def url_at(self, port: int) -> str:
        return f"amqp://guest:guest@{servers.HOST}:{port}//"

    def test_a_queue_that_is_gone_is_a_failed_publish(self, source: Source) -> None:
        producer = source.producer()
        producer.publish([b"declared"])
        with open_amqp(source.url) as connection:
            connection.channel().queue_delete(QUEUE)
        with pytest.raises(PublishFailed, match="could not be routed"):
            producer.publish([b"into the void"])
        # The next one declares it again.
        producer.publish([b"arrives"])
        assert said(fetch_all(source.consumer(), 1)) == [b"arrives"]

    def test_an_exchange_that_is_gone_is_a_failed_publish(self, source: Source) -> None:
        producer = source.producer()
        producer.publish([b"declared"])
        with open_amqp(source.url) as connection:
            connection.channel().exchange_delete(QUEUE)
        with pytest.raises(PublishFailed):
            producer.publish([b"into the void"])
        producer.publish([b"arrives"])
        assert said(fetch_all(source.consumer(), 2)) == [b"declared", b"arrives"]

    def test_a_queue_that_is_deleted_under_a_consumer_is_declared_again(self, source: Source) -> None:
        consumer = source.consumer()
        consumer.fetch(1, wait_s=0)
        with open_amqp(source.url) as connection:
            connection.channel().queue_delete(QUEUE)
        # Not a consumer that is deaf from now on: it hears of it, and the next fetch declares the queue anew.
        with pytest.raises(ServiceUnavailable):
            fetch_until_it_raises(consumer)
        consumer.fetch(1, wait_s=0)
        source.publish(b"to the new queue")
        taken = fetch_all(consumer, 1)
        assert said(taken) == [b"to the new queue"]

    def test_a_large_publish_is_confirmed_whole(self, source: Source) -> None:
        sent = bodies(3000)
        source.producer().publish(sent)
        assert self.depth(source.url) == 3000

    def test_messages_are_persistent(self, source: Source) -> None:
        source.publish(b"x")
        with open_amqp(source.url) as connection:
            message = connection.channel().basic_get(QUEUE)
            assert message.properties["delivery_mode"] == 2

    def test_the_broker_pushes_no_more_than_the_prefetch(self, source: Source) -> None:
        source.publish(*bodies(50))
        consumer = source.consumer(prefetch=10)
        first = fetch_all(consumer, 5)
        assert eventually(lambda: self.depth(source.url) == 40)
        consumer.ack(first)
        assert eventually(lambda: self.depth(source.url) == 35)

    def test_a_closed_connection_is_said_and_opened_again(self, source: Source) -> None:
        source.publish(*bodies(2))
        consumer = source.consumer()
        taken = fetch_all(consumer, 1)
        self.kill(consumer)
        with pytest.raises(ServiceUnavailable):
            fetch_until_it_raises(consumer)
        consumer.ack(taken)  # their channel is gone: no error, and no ack of anything on the next one
        again = fetch_all(consumer, 2)
        assert sorted(said(again)) == bodies(2)

    def depth(self, url: str) -> int:
        with open_amqp(url) as connection:
            return int(connection.channel().queue_declare(QUEUE, passive=True).message_count)

    def test_what_the_broker_gave_up_is_fetched_until_it_is_acked(self, source: Source) -> None:
        publish_dead(source, *bodies(5), headers={"x-first-death-reason": "delivery_limit"})
        first = source.consumer()
        assert eventually(lambda: len(first.fetch_dead(1)) == 1)
        first.close()  # and it is back
        second = source.consumer()
        fetched = fetch_all_dead(second, 3)
        assert all(delivery.headers["x-first-death-reason"] == "delivery_limit" for delivery in fetched)
        second.ack_dead(fetched)
        rest = fetch_all_dead(second, 2)
        assert sorted(said([*fetched, *rest])) == bodies(5)
        second.ack_dead(rest)
        second.close()
        assert source.consumer().fetch_dead(10) == []

    def test_what_is_dead_and_what_is_alive_are_acked_apart(self, source: Source) -> None:
        """Both are numbered from 1 on: an ack of one must not reach the other."""
        publish_dead(source, b"dead")
        source.publish(*bodies(3))
        consumer = source.consumer()
        alive = fetch_all(consumer, 3)
        consumer.ack_dead(fetch_all_dead(consumer, 1))
        consumer.close()
        other = source.consumer()
        assert sorted(said(fetch_all(other, 3))) == sorted(said(alive))
        other.close()
        publish_dead(source, b"dead again")
        source.publish(b"alive again")
        both = source.consumer()
        assert said(fetch_all_dead(both, 1)) == [b"dead again"]
        both.ack(fetch_all(both, 4))
        both.close()
        assert eventually(lambda: said(source.consumer().fetch_dead(10)) == [b"dead again"])


def fetch_all_dead(consumer: Deliveries, count: int) -> list[Delivery]:
    """`count` of the broker's dead letters: it takes a moment until it has put them there."""
    fetched: list[Delivery] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(fetched) < count and time.monotonic() < deadline:
        fetched += consumer.fetch_dead(count - len(fetched))
    return fetched


def publish_dead(source: Source, *bodies: bytes, headers: dict[str, Any] | None = None) -> None:
    """As the broker itself does, into its dead-letter exchange."""
    with open_amqp(source.url) as connection:
        channel: Any = connection.channel()
        declare_queues(channel)
        for body in bodies:
            message = amqp.Message(body, delivery_mode=2, application_headers=headers or {})
            channel.basic_publish(message, exchange=DEAD_QUEUE, routing_key=QUEUE)
