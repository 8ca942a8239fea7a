"""What is particular to a Redis Stream: entries kept, requeued and released, odd entries, odd groups, large entries."""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from redis import Redis

from tests import servers
from tests.processes import PROJECT, House, draws
from tombola.producers.brokers.redis_clients import open_redis
from tombola.producers.brokers.registry import open_broker
from tombola.producers.brokers.streams import BODY_FIELD, GROUP, QUEUE
from tombola.producers.domain.errors import ServiceUnavailable
from tombola.worker.deliveries import Delivery
from tombola.worker.deliveries.streams import HEADERS_KEPT_BYTES_MAX, TAGS_PER_COMMAND, StreamDeliveries
from tombola.worker.settle.consumer import Consumer

CLAIM_AFTER_S = 0.4
NEVER_S = 3600.0
DEADLINE_S = 20.0
MIB = 2**20

Open = Callable[..., StreamDeliveries]


@pytest.fixture(params=[2, 3], ids=["RESP2", "RESP3"])
def url(request: pytest.FixtureRequest, redis_url: str) -> str:
    return f"{redis_url}?protocol={request.param}"


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def open_consumer(url: str) -> Iterator[Open]:
    opened = []

    def open_one(claim_after_s: float = NEVER_S) -> StreamDeliveries:
        opened.append(StreamDeliveries(url, claim_after_s=claim_after_s))
        return opened[-1]

    yield open_one
    for consumer in opened:
        consumer.close()


def publish(url: str, *bodies: bytes) -> None:
    with closing(open_broker(url, publish_timeout_s=10)) as broker:
        broker.publish(bodies)


def fetch_all(consumer: StreamDeliveries, count: int, *, within_s: float = DEADLINE_S) -> list[Delivery]:
    fetched: list[Delivery] = []
    deadline = time.monotonic() + within_s
    while len(fetched) < count and time.monotonic() < deadline:
        fetched += consumer.fetch(count - len(fetched), wait_s=0.1)
    return fetched


def numbered(count: int, start: int = 0) -> list[bytes]:
    return [b"draw %d" % number for number in range(start, start + count)]


def said(deliveries: list[Delivery]) -> list[bytes]:
    return [delivery.body for delivery in deliveries]


def pending(client: Redis) -> int:
    summary: Any = client.xpending(QUEUE, GROUP)
    return int(summary["pending"])


# ---- keep


def test_what_is_kept_is_not_taken_over_and_its_count_stays(url: str, open_consumer: Open) -> None:
    publish(url, *numbered(3))
    holder, other = open_consumer(CLAIM_AFTER_S), open_consumer(CLAIM_AFTER_S)
    held = fetch_all(holder, 3)
    until = time.monotonic() + 3 * CLAIM_AFTER_S
    while time.monotonic() < until:
        holder.keep(held)
        assert other.fetch(10, wait_s=0.05) == []
    again = fetch_all(other, 3)  # it holds them no longer
    assert sorted(said(again)) == numbered(3)
    assert [delivery.count for delivery in again] == [2, 2, 2]


def test_keeping_takes_nothing_back_from_others(url: str, client: Redis, open_consumer: Open) -> None:
    publish(url, *numbered(3))
    slow = open_consumer(CLAIM_AFTER_S)
    held = fetch_all(slow, 3)
    client.xdel(QUEUE, held[0].tag)
    time.sleep(CLAIM_AFTER_S)
    heir = open_consumer(CLAIM_AFTER_S)
    taken = fetch_all(heir, 2)
    slow.keep(held)
    entries: Any = client.xpending_range(QUEUE, GROUP, "-", "+", 10)
    assert {entry["consumer"] for entry in entries} == {heir.consumer.encode()}
    heir.ack(taken)
    slow.keep(held)
    slow.ack(held)
    assert pending(client) == 0


def test_there_is_nothing_to_keep_where_the_group_is_gone(url: str, client: Redis, open_consumer: Open) -> None:
    publish(url, b"x")
    consumer = open_consumer()
    held = fetch_all(consumer, 1)
    client.flushdb()
    consumer.keep(held)
    consumer.keep([])


def test_any_number_is_kept(url: str, client: Redis, open_consumer: Open) -> None:
    count = 2 * TAGS_PER_COMMAND + 3
    publish(url, *numbered(count))
    consumer = open_consumer()
    held = fetch_all(consumer, count)
    time.sleep(0.3)
    consumer.keep(random.Random(1).sample(held, count))
    assert client.xpending_range(QUEUE, GROUP, "-", "+", count, idle=250) == []


# ---- requeue


def test_what_is_requeued_comes_last_and_whole(url: str, client: Redis, open_consumer: Open) -> None:
    large = bytes(range(256)) * 1024
    client.xadd(QUEUE, {b"\xff\xfe": b"\x00\x01", BODY_FIELD: large, b"traceparent": b"00-1-2-01", b"empty": b""})
    publish(url, *numbered(3))
    consumer = open_consumer()
    held = fetch_all(consumer, 2)
    consumer.requeue(held)
    consumer.requeue(held)  # as after a lost reply
    rest = fetch_all(consumer, 4)
    assert said(rest)[:2] == numbered(2, start=1)
    assert said(rest)[3] == b"draw 0"
    copy = rest[2]
    assert (copy.count, copy.body_bytes, copy.sha256, copy.headers) == (
        1,
        len(large),
        held[0].sha256,
        held[0].headers,
    )
    assert copy.headers["\\xff\\xfe"] == "\x00\x01"
    consumer.ack(rest)
    assert (client.xlen(QUEUE), pending(client)) == (0, 0)


def test_what_is_requeued_while_redis_is_full_stays_in_hand(client: Redis) -> None:
    with servers.redis(private=True) as server:
        publish(server.url, *numbered(2))
        consumer = StreamDeliveries(server.url, claim_after_s=CLAIM_AFTER_S)
        held = fetch_all(consumer, 2)
        with Redis.from_url(server.url) as full:
            full.config_set("maxmemory", "1mb")
            with pytest.raises(ServiceUnavailable):
                consumer.requeue(held)
            # Claims and reads go on; an ack makes room.
            again = fetch_all(consumer, 2)
            assert sorted(said(again)) == numbered(2)
            consumer.ack(again)
            assert full.xlen(QUEUE) == 0
        consumer.close()


# ---- release


def test_any_number_that_is_released_comes_to_others_at_once(url: str, open_consumer: Open) -> None:
    count = 12 * TAGS_PER_COMMAND + 5
    publish(url, *numbered(count))
    holder, other = open_consumer(), open_consumer()
    held = fetch_all(holder, count)
    assert other.fetch(10, wait_s=0) == []
    holder.release()
    again = fetch_all(other, count)
    assert sorted(said(again)) == sorted(said(held))
    assert {delivery.count for delivery in again} == {2}
    other.ack(again)
    publish(url, b"next")
    assert said(fetch_all(holder, 1)) == [b"next"]


@pytest.mark.process
def test_release_never_raises() -> None:
    with servers.redis(private=True) as server:
        publish(server.url, *numbered(2))
        consumer = StreamDeliveries(server.url, claim_after_s=NEVER_S)
        consumer.release()
        fetch_all(consumer, 2)
        server.stop()
        consumer.release()
        consumer.close()


# ---- fetch: claimed ones and new ones


def test_claimed_ones_do_not_starve_new_ones(url: str, open_consumer: Open) -> None:
    publish(url, *numbered(100))
    dead = open_consumer()
    fetch_all(dead, 100)
    dead.release()
    publish(url, *numbered(20, start=100))
    heir = open_consumer()
    first = heir.fetch(20, wait_s=0)
    assert len(first) == 20
    assert [delivery.count for delivery in first].count(1) == 10
    second = heir.fetch(20, wait_s=0)
    assert [delivery.count for delivery in second].count(1) == 10
    rest = fetch_all(heir, 80, within_s=5)
    assert sorted(said(first + second + rest)) == sorted(numbered(120))


# ---- what an entry can look like


def odd_entries() -> list[tuple[bytes, ...]]:
    """Names and values, as XADD takes them; none of them is a draw."""
    draw = b'{"v":1,"request_key":"odd","account_id":1}'
    many = [part for number in range(500) for part in (b"field%d" % number, b"value")]
    return [
        (b"something", b"else"),
        (b"", b""),
        (b"Body", draw),
        (b"body ", draw),
        (b"body\x00", draw),
        (b"body", b""),
        (b"body", draw, b"body", draw),
        (b"body", draw, b"a", b"b", b"body", b""),
        (b"body", b"", b"body", draw),
        (b"body", b"{", *many),
        (*many, b"body", b"[]"),
        (*many,),
        (b"\xff\xfe", b"\xff", b"body", b"\xff"),
        (b"\xff\xfe" * 100, b"\x00" * 100),
        (b"x" * MIB, b"y" * MIB, b"body", b"huge headers"),
        (b"body", b"z" * MIB),
        (b"traceparent", b"\xff\x00", b"body", b"not a trace", b"tracestate", b"\r\n"),
        (b"x-delivery-count", b"9" * 400, b"body", b"counts"),
        *[(b"body", bytes(random.Random(seed).randbytes(seed))) for seed in range(1, 40)],
    ]


def test_odd_entries_are_parked_once_and_good_draws_flow(url: str, client: Redis, tmp_path: Path) -> None:
    with House(f"sqlite:///{tmp_path}/ledger.db", url, url) as house:
        good = draws(house.accounts(5), 100)
        bad = odd_entries()
        entries: list[tuple[bytes, ...]] = [(BODY_FIELD, draw.encode()) for draw in good]
        for entry in bad:
            entries.insert(random.Random(len(entries)).randrange(len(entries)), entry)
        for entry in entries:
            client.execute_command("XADD", QUEUE, "*", *entry)
        consumer = Consumer.open(house.settings, house.engine, house.wheels)
        # Some are claimed from a consumer that died with them in hand.
        dead = StreamDeliveries(url, claim_after_s=NEVER_S)
        fetch_all(dead, 40)
        dead.release()
        deadline = time.monotonic() + 30
        while client.xlen(QUEUE) and time.monotonic() < deadline:
            consumer.consume_once(wait_s=0.1)
        assert client.xlen(QUEUE) == 0
        assert pending(client) == 0
        assert house.settled() == len(good)
        assert house.dead() == len(bad)
        assert set(house.causes()) <= {"invalid", "unparsable"}
        assert house.violations() == []
        consumer.deliveries.close()


def test_entries_without_one_body_say_so(url: str, client: Redis, open_consumer: Open) -> None:
    client.execute_command("XADD", QUEUE, "*", "a", "b")
    client.execute_command("XADD", QUEUE, "*", "body", "1", "body", "2")
    client.execute_command("XADD", QUEUE, "*", "x" * HEADERS_KEPT_BYTES_MAX, "y", "body", "{}")
    none, two, long = fetch_all(open_consumer(), 3)
    assert none.problem.endswith("has one field `body`, this one has 0")
    assert two.problem.endswith("has one field `body`, this one has 2")
    assert dict(long.headers) == {"…": "too long: the rest was left out"}
    assert long.problem == ""


def test_entries_that_were_deleted_in_hand_are_no_longer_pending(url: str, client: Redis, open_consumer: Open) -> None:
    publish(url, *numbered(10))
    dead = open_consumer()
    held = fetch_all(dead, 10)
    client.xdel(QUEUE, *[delivery.tag for delivery in held[::2]])
    dead.release()
    heir = open_consumer()
    again = fetch_all(heir, 5)
    assert said(again) == said(held[1::2])
    assert pending(client) == 5
    heir.ack(again)
    assert heir.fetch(10, wait_s=0) == []
    assert pending(client) == 0


# ---- what may become of the key and of the group


def test_another_programs_key_is_told_and_after_its_repair_draws_flow(
    url: str, client: Redis, open_consumer: Open
) -> None:
    client.set(QUEUE, "somebody else's")
    consumer = open_consumer()
    for _ in range(3):
        with pytest.raises(ServiceUnavailable, match="`draws` is not a Stream"):
            consumer.fetch(10, wait_s=0)
    with (
        closing(open_broker(url, publish_timeout_s=5)) as broker,
        pytest.raises(ServiceUnavailable, match="not a Stream"),
    ):
        broker.publish([b"x"])
    client.delete(QUEUE)
    publish(url, b"draw 0")
    assert said(fetch_all(consumer, 1)) == [b"draw 0"]
    client.delete(QUEUE)
    client.lpush(QUEUE, "a list")
    with pytest.raises(ServiceUnavailable, match="`draws` is not a Stream"):
        fetch_all(consumer, 1)
    client.delete(QUEUE)
    publish(url, b"draw 1")
    assert said(fetch_until(consumer)) == [b"draw 1"]


@pytest.mark.parametrize("how", ["group destroyed", "key deleted", "key replaced", "unblocked"])
def test_a_consumer_outlives_whatever_wakes_it(how: str, url: str, client: Redis, open_consumer: Open) -> None:
    publish(url, b"in hand")
    consumer = open_consumer()
    fetch_all(consumer, 1)
    fetched: list[Delivery] = []

    def wait() -> None:
        fetched.extend(fetch_until(consumer, wait_s=5))

    thread = Thread(target=wait, daemon=True)
    thread.start()
    deadline = time.monotonic() + DEADLINE_S
    while not (blocked := [it for it in client.client_list() if "b" in it["flags"] and it["cmd"] == "xreadgroup"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    match how:
        case "group destroyed":
            client.xgroup_destroy(QUEUE, GROUP)
        case "key deleted":
            client.delete(QUEUE)
        case "key replaced":
            client.set(QUEUE, "x")
            client.delete(QUEUE)
        case _:
            client.execute_command("CLIENT", "UNBLOCK", blocked[0]["id"], "ERROR")
    publish(url, b"after")
    thread.join(DEADLINE_S)
    # What was in hand comes again where only the group was lost: twice is right, never is not.
    assert b"after" in said(fetched + fetch_all(consumer, 1, within_s=1))


def fetch_until(consumer: StreamDeliveries, *, wait_s: float = 0.1) -> list[Delivery]:
    """The first that come, as a consumer's loop finds them: it goes on after each error."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            if fetched := consumer.fetch(10, wait_s=wait_s):
                return fetched
        except ServiceUnavailable:
            time.sleep(0.05)
    return []


# ---- large entries

_READ_ALL = """
import sys
from tombola.worker.deliveries.streams import StreamDeliveries

def peak_mib():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

url, count = sys.argv[1], int(sys.argv[2])
consumer = StreamDeliveries(url, claim_after_s=2)
before = peak_mib()
done = good = again = 0
while done < count:
    fetched = consumer.fetch(800, wait_s=1)
    done += len(fetched)
    again += sum(delivery.count == 2 for delivery in fetched)
    good += sum(delivery.body_bytes < 1000 for delivery in fetched)
    consumer.ack(fetched)
print(good, again, peak_mib() - before)
"""


# By a consumer that dies with them in hand; their bodies stay in Redis.
_READ_IN_REDIS = """
redis.call('XREADGROUP', 'GROUP', ARGV[1], 'dead', 'COUNT', 1, 'STREAMS', KEYS[1], '>')
"""


@pytest.mark.process
@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process's peak of memory apart from its parent's"
)
def test_a_stream_larger_than_memory_flows_on() -> None:
    read_large_entries(40, grown_mib_max=250)


def read_large_entries(count: int, *, grown_mib_max: int) -> None:
    """`count` entries of 10 MiB, a good one after each; a dead consumer left half of them behind. One reads it all."""
    with servers.redis(private=True) as server, open_redis(server.url) as client:
        client.xgroup_create(QUEUE, GROUP, id="0", mkstream=True)
        large = b"x" * (10 * MIB)
        for number in range(count):
            client.xadd(QUEUE, {BODY_FIELD: large})
            client.xadd(QUEUE, {BODY_FIELD: b"draw %d" % number})
        for _ in range(count):
            client.eval(_READ_IN_REDIS, 1, QUEUE, GROUP)
        time.sleep(2)
        command = [sys.executable, "-c", _READ_ALL, server.url, str(2 * count)]
        run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        good, again, grown_mib = map(int, run.stdout.split())
        assert (good, again) == (count, count)
        assert grown_mib < grown_mib_max
        assert (client.xlen(QUEUE), pending(client)) == (0, 0)


def test_where_the_size_may_not_be_asked_for_all_is_read_in_slices(url: str, client: Redis) -> None:
    client.execute_command("ACL", "SETUSER", "modest", "on", ">secret", "~*", "&*", "+@all", "-memory")
    try:
        publish(url, *numbered(50))
        consumer = StreamDeliveries(url.replace("redis://", "redis://modest:secret@"), claim_after_s=NEVER_S)
        first = fetch_all(consumer, 30)
        assert said(first + fetch_all(consumer, 20)) == numbered(50)
        consumer.ack(first)
        assert pending(client) == 20
        consumer.close()
    finally:
        client.execute_command("ACL", "DELUSER", "modest")
