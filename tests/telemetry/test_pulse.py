"""The pulse: counts reach their minute, members show while they live, and nobody notices that Redis is away."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import fakeredis
import pytest
from redis import Redis

from tests import processes, servers
from tests.processes import House, draws, wait_for
from tombola.producers.brokers.redis_clients import open_redis
from tombola.producers.telemetry import pulse
from tombola.producers.telemetry.pulse import COUNTED, Member, Minute, Pulse, members, minutes


@pytest.fixture(params=[pytest.param("redis", marks=pytest.mark.process), "fakeredis"])
def client(request: pytest.FixtureRequest) -> Iterator[Redis]:
    if request.param == "fakeredis":
        yield fakeredis.FakeRedis()
        return
    client = open_redis(request.getfixturevalue("redis_url"))
    yield client
    client.close()


def total(found: list[Minute]) -> dict[str, int]:
    """What was counted in all of them: a test may run across the end of a minute."""
    return {name: sum(getattr(minute, name) for minute in found) for name in COUNTED}


# ---- minutes ---------------------------------------------------------------------------------------------------------


def test_what_is_added_is_in_its_minute(client: Redis) -> None:
    one, other = Pulse(client, "worker", "one"), Pulse(client, "gateway", "other")
    one.add("settled", 3)
    one.add("settled", 4)
    one.add("parked")
    one.add("repeats", 0)
    other.add("accepted", 5)
    assert total(minutes(client, 2)) == dict.fromkeys(COUNTED, 0), "nothing is written by whoever adds"
    one.flush_once()
    other.flush_once()
    one.flush_once()  # nothing new: nothing twice
    assert total(minutes(client, 2)) == {"accepted": 5, "settled": 7, "rejected": 0, "repeats": 0, "parked": 1}


def test_minutes_come_oldest_first_with_zeros_where_nothing_was(client: Redis) -> None:
    now = int(client.time()[0]) // 60
    client.hset(f"tombola:minute:{now - 2}", mapping={"settled": 7, "somebody": 1})
    found = minutes(client, 5)
    assert len(found) == 5
    assert [it.at for it in found] == [found[0].at + timedelta(minutes=number) for number in range(5)]
    assert abs(found[-1].at - datetime.now(UTC)) < timedelta(minutes=2)
    seen = {it.at: it for it in found}[datetime.fromtimestamp((now - 2) * 60, UTC)]
    assert seen == Minute(seen.at, settled=7)
    assert total(found) == {**dict.fromkeys(COUNTED, 0), "settled": 7}
    assert minutes(client, 0) == []
    assert len(minutes(client, 1_000_000)) == pulse.MINUTES_MAX


def test_minutes_do_not_pile_up(client: Redis) -> None:
    it = Pulse(client, "worker", "w")
    it.add("settled")
    it.flush_once()
    (key,) = client.keys("tombola:minute:*")
    assert 0 < client.ttl(key) <= pulse.MINUTES_TTL_S


def test_adding_from_many_threads_loses_nothing() -> None:
    client = fakeredis.FakeRedis()
    it = Pulse(client, "worker", "w")
    stopping = threading.Event()

    def flush() -> None:
        while not stopping.is_set():
            it.flush_once()

    flushing = threading.Thread(target=flush)
    flushing.start()

    def add() -> None:
        for _ in range(5000):
            it.add("settled")

    adding = [threading.Thread(target=add) for _ in range(4)]
    for thread in adding:
        thread.start()
    for thread in adding:
        thread.join()
    stopping.set()
    flushing.join()
    it.flush_once()
    assert total(minutes(client, 3))["settled"] == 20_000


# ---- members ---------------------------------------------------------------------------------------------------------


def test_a_member_says_who_it_is(client: Redis) -> None:
    before = datetime.now(UTC)
    for role, name in (("worker", "w2"), ("relay", "r"), ("worker", "w1")):
        Pulse(client, role, name).beat_once()
    found = members(client)
    assert [(it.role, it.name) for it in found] == [("relay", "r"), ("worker", "w1"), ("worker", "w2")]
    one = found[0]
    assert isinstance(one, Member)
    assert (one.pid, one.version) == (os.getpid(), pulse.VERSION)
    assert before - timedelta(seconds=1) < one.started_at <= one.at <= datetime.now(UTC)
    assert abs(one.clock_offset_ms) < 1000, "the same machine, the same clock"


def test_a_clock_that_is_ahead_is_told_and_counts_into_redis_minutes(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = SimpleNamespace(time=lambda: time.time() + 600, monotonic=time.monotonic)
    monkeypatch.setattr(pulse, "time", ahead)
    it = Pulse(client, "worker", "ahead")
    it.beat_once()
    it.add("settled", 2)
    it.flush_once()
    (member,) = members(client)
    assert member.clock_offset_ms == pytest.approx(600_000, abs=1000)
    assert total(minutes(client, 2))["settled"] == 2


def test_who_gives_no_sign_of_life_is_gone(client: Redis) -> None:
    it = Pulse(client, "worker", "w")
    it.beat_once()
    assert 0 < client.ttl("tombola:member:worker:w") <= pulse.MEMBER_TTL_S
    client.delete("tombola:member:worker:w")  # what time does
    assert members(client) == []


def test_what_is_not_ours_is_left_out(client: Redis) -> None:
    Pulse(client, "worker", "w").beat_once()
    for name, value in (("bad", b"\xff"), ("other", b'{"role": 1}'), ("list", b"[]")):
        client.set(f"tombola:member:worker:{name}", value)
        client.zadd(pulse.MEMBERS_KEY, {f"tombola:member:worker:{name}": time.time()})
    assert [it.name for it in members(client)] == ["w"]


@pytest.mark.parametrize("client", [pytest.param("redis", marks=pytest.mark.process)], indirect=True)
def test_members_are_found_among_very_many_results(client: Redis) -> None:
    """The result store holds a key for each draw of a day: a look for members does not go through all keys."""
    client.mset({f"celery-task-meta-{number}": b"x" for number in range(50_000)})
    Pulse(client, "worker", "w").beat_once()
    members(client)
    began = time.perf_counter()
    assert [it.name for it in members(client)] == ["w"]
    assert time.perf_counter() - began < 0.05


# ---- the thread ------------------------------------------------------------------------------------------------------


def test_it_beats_by_itself_and_is_gone_when_it_stops(client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "FLUSH_EVERY_S", 0.05)
    it = Pulse(client, "gateway", "g").start()
    it.add("accepted", 3)
    wait_for(lambda: total(minutes(client, 2))["accepted"] == 3, within_s=10, what=lambda: "no flush")
    assert [member.name for member in members(client)] == ["g"]
    it.add("accepted", 4)
    it.stop()
    assert total(minutes(client, 2))["accepted"] == 7, "what is left is flushed"
    assert members(client) == []


def test_redis_away_and_back_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(pulse, "FLUSH_EVERY_S", 0.05)
    monkeypatch.setattr(pulse, "BEAT_EVERY_S", 0.1)
    server = fakeredis.FakeServer()
    client = fakeredis.FakeRedis(server=server)
    server.connected = False
    it = Pulse(client, "worker", "w").start()
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            it.add("settled")
            time.sleep(0.02)
    assert caplog.text.count("no pulse") == 1, "said once, not every second"
    server.connected = True
    wait_for(lambda: bool(members(client)), within_s=10, what=lambda: "no beat after the outage")
    it.add("settled", 100)
    wait_for(lambda: total(minutes(client, 2))["settled"] >= 100, within_s=10, what=lambda: "no flush")
    it.stop()


def test_it_stops_soon_while_redis_is_away() -> None:
    it = Pulse(Redis.from_url(f"redis://{servers.HOST}:{servers._free_port()}"), "worker", "w").start()
    it.add("settled")
    began = time.monotonic()
    it.stop()
    assert time.monotonic() - began < 5


def test_add_costs_next_to_nothing() -> None:
    it = Pulse(fakeredis.FakeRedis(), "worker", "w")
    began = time.perf_counter()
    for _ in range(10_000):
        it.add("settled", 800)
    assert (time.perf_counter() - began) / 10_000 < 20e-6


# ---- where it is hooked in -------------------------------------------------------------------------------------------


def test_a_worker_shows_a_pulse(tmp_path: Path, redis_url: str) -> None:
    with House(f"sqlite:///{tmp_path}/ledger.db", redis_url, redis_url) as house:
        house.accounts(1, balance=2)
        asked = draws([1], 4)  # two are paid for unless a prize comes in between; the rest is told no
        with processes.worker(house.env) as worker, Redis.from_url(redis_url) as client:
            house.enqueue([*asked, asked[0]])
            house.publish(b"no draw at all")
            wait_for(
                lambda: sum(total(minutes(client, 3)).values()) == 6,
                within_s=30,
                what=lambda: f"{total(minutes(client, 3))}\n{worker.log()[-2000:]}",
            )
            found = total(minutes(client, 3))
            assert (found["settled"] + found["rejected"], found["repeats"], found["parked"]) == (4, 1, 1)
            assert found["rejected"] == sum('"rejected"' in result for result in house.results().values())
            assert [it.role for it in members(client)] == ["worker"]
            assert worker.stop() == 0
            assert members(client) == []
