"""What only RabbitMQ does to us: properties of strangers, alarms, idle and dead connections, and one broker shared."""

import json
import resource
import struct
import subprocess
import sys
import time
from contextlib import closing
from typing import Any, Final

import amqp
import pytest
from amqp import spec

from tests import processes
from tests.dead_letters.test_parking import consume_all, left, letters
from tests.processes import House, draws
from tests.relay.test_outbox import statuses
from tombola.producers.brokers.quorum_queues import QueueBroker, declare_queues
from tombola.producers.brokers.rabbitmq import open_amqp
from tombola.producers.brokers.streams import DEAD_QUEUE, QUEUE
from tombola.producers.domain.causes import Cause
from tombola.worker.deliveries import Delivery
from tombola.worker.deliveries.queues import QueueDeliveries

DEADLINE_S = 20.0
PROPERTIES: Final = [name for name, _ in amqp.Message.PROPERTIES]
MINE: Final = "application_headers"


class Raw(amqp.Message):  # type: ignore[misc]
    """A message whose properties are written as they are given, however wrong."""

    def __init__(self, body: bytes, properties: bytes) -> None:
        super().__init__(body)
        self._raw = properties

    def _serialize_properties(self) -> bytes:
        return self._raw


def short(text: bytes) -> bytes:
    return struct.pack("B", len(text)) + text


def long(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def only(name: str, value: bytes) -> bytes:
    """Properties of which there is but one."""
    return struct.pack(">H", 1 << (15 - PROPERTIES.index(name))) + value


def header(value: bytes, name: bytes = b"h") -> bytes:
    """Properties with but one header: a type's letter and what follows it."""
    return only(MINE, long(short(name) + value))


def nested(depth: int, *, array: bool) -> bytes:
    value = b"V"
    for _ in range(depth):
        value = b"A" + long(value) if array else b"F" + long(short(b"n") + value)
    return value


def table_of_cases() -> dict[str, bytes]:
    """Properties by name: every property and every type of header, with honest and with garbage bytes."""
    texts = [name for name, kind in amqp.Message.PROPERTIES if kind == "s"]
    cases = {"nothing": b"\x00\x00"}
    cases |= {f"{name} honest": only(name, short(b"text")) for name in texts if name not in ("user_id", "expiration")}
    cases |= {f"{name} garbage": only(name, short(b"\xff\xfe")) for name in texts}
    cases |= {f"{name} surrogate": only(name, short(b"\xed\xa0\x80")) for name in texts}
    cases |= {
        "user_id honest": only("user_id", short(b"guest")),
        "expiration honest": only("expiration", short(b"3600000")),
        "delivery_mode 255": only("delivery_mode", b"\xff"),
        "priority 255": only("priority", b"\xff"),
        "timestamp max": only("timestamp", b"\xff" * 8),
        "more flags": b"\x00\x01\xff\xff",
        "cut short": only("content_type", b"\xffab"),
        "headers cut short": only(MINE, b"\x00\x00\xff\xff"),
        "no headers": only(MINE, long(b"")),
    }
    values = {
        "text": b"S" + long("größer".encode()), "no text": b"S" + long(b"\xff\xfe"), "bytes": b"x" + long(b"\x00\xff"),
        "empty": b"S" + long(b""), "bool": b"t\x02", "void": b"V", "b": b"b\x80", "B": b"B\xff", "s": b"s\x80\x00",
        "u": b"u\xff\xff", "I": b"I\x80\x00\x00\x00", "i": b"i\xff\xff\xff\xff", "l": b"l" + b"\x80" + b"\x00" * 7,
        "L": b"L" + b"\xff" * 8, "f": b"f\x3f\xc0\x00\x00", "d": b"d\x3f\xf0" + b"\x00" * 6, "nan": b"d" + b"\xff" * 8,
        "decimal": b"D\x02\x00\x00\x00\x01", "decimal 255": b"D\xff\x80\x00\x00\x00",
        "decimal up": b"D\x00\x00\x00\x03\xe8",
        "time": b"T\x00\x00\x00\x00\x60\x00\x00\x00", "time max": b"T" + b"\xff" * 8,
        "time far": b"T\x00\x01" + b"\x00" * 6,
        "table": b"F" + long(short(b"a") + b"I\x00\x00\x00\x01"), "array": b"A" + long(b"VVV"), "unknown": b"Z\x00",
        "no type": b"", "table 900": nested(900, array=False), "table 3000": nested(3_000, array=False),
        "array 900": nested(900, array=True), "array 3000": nested(3_000, array=True),
        "long": b"S" + long(b"x" * 100_000), "array of garbage": b"A" + long(b"S" + long(b"\xff") + b"T" + b"\xff" * 8),
    }  # fmt: skip
    cases |= {f"header: {name}": header(value) for name, value in values.items()}
    for theirs in ("x-death", "x-delivery-count"):  # which RabbitMQ itself writes
        cases |= {
            f"{theirs}: {name}": header(value, theirs.encode()) for name, value in values.items() if name != "unknown"
        }
    cases |= {
        "name garbage": header(b"V", b"\xff\xfe"),
        "name empty": header(b"V", b""),
        "name long": header(b"V", b"n" * 255),
        "twice": only(MINE, long(2 * (short(b"h") + b"V"))),
        "traceparent a number": header(b"I\x00\x00\x00\x01", b"traceparent"),
        "first death a table": header(b"F" + long(b""), b"x-first-death-reason"),
    }
    return cases


class Stranger:
    """Publishes anything. RabbitMQ refuses some of it, by ending the connection: then the next one is another."""

    def __init__(self, url: str, exchange: str = QUEUE) -> None:
        self._url = url
        self._exchange = exchange
        self._connection: Any = None

    def publish(self, body: bytes, properties: bytes) -> bool:
        """Whether RabbitMQ took it."""
        try:
            if self._connection is None:
                self._connection = open_amqp(self._url)
                self._channel = self._connection.channel()
                self._channel.confirm_select()
            self._channel.basic_publish(Raw(body, properties), exchange=self._exchange, routing_key=QUEUE)
            self._channel.wait(spec.Basic.Ack)
        except (amqp.AMQPError, OSError):
            self.close()
            return False
        return True

    def close(self) -> None:
        if self._connection is not None:
            self._connection.collect()
        self._connection = None


def fetch_all(consumer: QueueDeliveries, count: int) -> list[Delivery]:
    fetched: list[Delivery] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(fetched) < count and time.monotonic() < deadline:
        fetched += consumer.fetch(count - len(fetched), wait_s=0.2)
    return fetched


@pytest.fixture
def url(rabbitmq_url: str) -> str:
    with open_amqp(rabbitmq_url) as connection:
        declare_queues(connection.channel())
    return rabbitmq_url


# ---- what strangers write --------------------------------------------------------------------------------------------


def test_whatever_stands_in_properties_every_message_comes_once(url: str) -> None:
    """One that cannot be decoded says so; all others are ordinary ones, and the good draws among them come as well."""
    cases = table_of_cases()
    producer, stranger = QueueBroker(url, publish_timeout_s=5), Stranger(url)
    taken = []
    for number, (name, properties) in enumerate(cases.items()):
        producer.publish([b"good %d" % number])
        if stranger.publish(name.encode(), properties):
            taken.append(name)
    producer.close()
    stranger.close()
    assert len(taken) > len(cases) / 2
    assert {"content_type garbage", "header: time max", "header: table 3000"} <= set(taken)
    sent = sorted([name.encode() for name in taken] + [b"good %d" % number for number in range(len(cases))])
    with closing(QueueDeliveries(url, prefetch=1000)) as consumer:
        fetched = fetch_all(consumer, len(sent))
        assert sorted(delivery.body for delivery in fetched) == sent
        assert {delivery.count for delivery in fetched} == {1}
        problems = {delivery.body.decode(): delivery.problem for delivery in fetched if delivery.problem}
        assert {"content_type garbage", "reply_to garbage", "header: time max", "header: table 3000"} <= set(problems)
        assert not any(name.startswith("good") or "honest" in name or name == "nothing" for name in problems)
        assert all(problem.startswith("its properties cannot be decoded: ") for problem in problems.values())
        # Of what can be decoded a copy can be made, whatever its headers hold.
        consumer.requeue([delivery for delivery in fetched if not delivery.problem])
        consumer.ack([delivery for delivery in fetched if delivery.problem])
        again = fetch_all(consumer, len(sent) - len(problems))
        assert sorted(delivery.body for delivery in again) == sorted(it.body for it in fetched if not it.problem)
        consumer.ack(again)
        assert consumer.fetch(1, wait_s=0.3) == []


def test_good_draws_settle_whatever_stands_beside_them_and_the_others_are_parked_once(
    mariadb_url: str, url: str, redis_url: str
) -> None:
    """Each body is a good draw. What cannot be decoded is parked, whatever its body says, and can be replayed."""
    cases = table_of_cases()
    with House(mariadb_url, url, redis_url) as house, closing(Stranger(url)) as stranger:
        asked = dict(zip(cases, draws(house.accounts(3), len(cases)), strict=True))
        taken = {name for name, properties in cases.items() if stranger.publish(asked[name].encode(), properties)}
        with closing(Stranger(url, DEAD_QUEUE)) as burier:
            assert burier.publish(b"deep", header(nested(500, array=True), b"x-first-death-reason"))
        consume_all(house)
        parked = {it.request_key: it for it in letters(house.engine) if it.body != b"deep"}
        settled = {key for key, status in statuses(house.engine).items() if status == "completed"}
        assert parked.keys() | settled == {asked[name].request_key for name in taken}
        assert not parked.keys() & settled
        assert {asked["content_type garbage"].request_key, asked["header: table 3000"].request_key} <= parked.keys()
        assert asked["x-delivery-count: L"].request_key in settled
        assert {(it.cause, it.times_parked) for it in parked.values()} == {(Cause.INVALID, 1)}
        assert all(it.error.startswith("its properties cannot be decoded: ") for it in parked.values())
        assert left(url) == left(url, DEAD_QUEUE) == 0
        assert house.violations() == []


def test_headers_of_every_kind_are_kept_with_what_is_parked(mariadb_url: str, url: str, redis_url: str) -> None:
    cases = {name: it for name, it in table_of_cases().items() if "header" in name or "name" in name or "x-" in name}
    with House(mariadb_url, url, redis_url) as house, closing(Stranger(url)) as stranger:
        taken = {name for name, properties in cases.items() if stranger.publish(b"junk: " + name.encode(), properties)}
        consume_all(house)
        kept = {it.body.decode().removeprefix("junk: "): it for it in letters(house.engine)}
        assert kept.keys() == taken
        assert {it.times_parked for it in kept.values()} == {1}
        assert json.loads(kept["header: text"].headers or "")["h"] == "größer"
        assert all(json.loads(it.headers) is not None for it in kept.values() if it.headers)
        assert left(url) == 0


def test_the_brokers_dead_letters_may_hold_anything_as_well(url: str) -> None:
    cases = {name: it for name, it in table_of_cases().items() if name.startswith(("reply_to", "x-death", "name"))}
    with closing(Stranger(url, DEAD_QUEUE)) as stranger:
        taken = [name for name, it in cases.items() if stranger.publish(name.encode(), it)]
    with closing(QueueDeliveries(url, prefetch=10)) as consumer:
        found = consumer.fetch_dead(len(taken) + 1)
        assert [delivery.body.decode() for delivery in found] == taken
        assert any(delivery.problem for delivery in found)
        consumer.ack_dead(found)
        assert consumer.fetch_dead(1) == []


def test_a_body_is_bytes_whatever_its_content_encoding(url: str) -> None:
    bodies = ["größer".encode("utf-16"), b"\xff\xfe", "größer".encode("latin-1")]
    with closing(Stranger(url)) as stranger:
        for encoding in (b"utf-16", b"latin-1", b"rot13", b"zlib", b"no such thing"):
            for body in bodies:
                assert stranger.publish(body, only("content_encoding", short(encoding)))
    with closing(QueueDeliveries(url, prefetch=1000)) as consumer:
        assert [delivery.body for delivery in fetch_all(consumer, 15)] == 5 * bodies


def test_names_that_are_no_text_are_no_reason_to_stop(url: str) -> None:
    """An exchange of a stranger's own, which takes any routing key, bound to our queue."""
    with open_amqp(url) as connection:
        channel: Any = connection.channel()
        channel.exchange_declare("theirs", "fanout", auto_delete=False)
        for queue in (QUEUE, DEAD_QUEUE):
            channel.queue_bind(queue, "theirs")
        channel.confirm_select()
        channel.basic_publish(amqp.Message(b"odd"), exchange="theirs", routing_key=b"\xff\xfe")
        channel.wait(spec.Basic.Ack)
    with closing(QueueDeliveries(url, prefetch=10)) as consumer:
        assert [delivery.body for delivery in fetch_all(consumer, 1)] == [b"odd"]
        assert [delivery.body for delivery in consumer.fetch_dead(10)] == [b"odd"]


@pytest.mark.parametrize("claimed", [2**40, -3, "many", None, True, [1], {"a": 1}, 7])
def test_a_publishers_own_count_is_not_the_brokers(url: str, claimed: Any) -> None:
    with open_amqp(url) as connection:
        channel: Any = connection.channel()
        message = amqp.Message(b"draw", application_headers={"x-delivery-count": claimed})
        channel.basic_publish(message, exchange=QUEUE, routing_key=QUEUE)
    for count in (1, 2, 3):
        with closing(QueueDeliveries(url, prefetch=10)) as consumer:
            (delivery,) = fetch_all(consumer, 1)
            assert delivery.count == count


SHORT_OF_MEMORY = """
import re, sys
from pathlib import Path
from tombola.worker.deliveries.queues import QueueDeliveries
consumer = QueueDeliveries(sys.argv[1], prefetch=200)
good = large = 0
while good < int(sys.argv[2]):
    fetched = consumer.fetch(100, wait_s=1)
    consumer.ack(fetched)
    good += sum(delivery.whole is None for delivery in fetched)
    large += sum(delivery.whole is not None for delivery in fetched)
# Not ru_maxrss, which begins with what the parent held when it forked.
peak_kib = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]
print(good, large, int(peak_kib) // 1024)
"""


def test_large_messages_by_the_dozen_take_no_more_memory_than_a_few(url: str) -> None:
    """600 MiB, of which a process may have 350."""
    producer = QueueBroker(url, publish_timeout_s=60)
    for number in range(60):
        producer.publish([b"x" * (10 * 1024 * 1024)])
        producer.publish([b"good %d" % number])
    producer.close()
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, url, "60"],
        cwd=processes.PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (350 * 1024 * 1024,) * 2),
    )
    assert done.returncode == 0, done.stderr
    good, large, peak_mib = map(int, done.stdout.split())
    assert (good, large) == (60, 60)
    assert peak_mib < 200
