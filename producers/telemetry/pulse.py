"""The pulse of a deployment: its running processes, and its work per minute, in the result store's Redis.

    tombola:minute:{minute}         a hash: accepted, settled, rejected, repeats, parked in that minute
    tombola:member:{role}:{name}    JSON, renewed every few seconds, expires soon after its process ends
    tombola:members                 the members' keys, by the time of their last beat: no scan of the keyspace

For charts and for `tombola doctor`, not for the books: counts made while Redis is away are dropped. A thread of each
process beats; the hot paths only add to a number in memory. Minutes follow the clock of Redis, so that machines whose
clocks differ count into the same minutes; each member has its clock's difference.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Final, NamedTuple, Self

import msgspec
import redis

from tombola.producers.brokers.redis_clients import open_redis
from tombola.producers.settings import Settings

log = logging.getLogger(__name__)

MINUTE_PREFIX: Final = "tombola:minute:"
MEMBER_PREFIX: Final = "tombola:member:"
MEMBERS_KEY: Final = "tombola:members"
COUNTED: Final = ("accepted", "settled", "rejected", "repeats", "parked")

FLUSH_EVERY_S: Final = 1.0
BEAT_EVERY_S: Final = 5.0
MEMBER_TTL_S: Final = 20
MINUTES_TTL_S: Final = 3 * 3600
MINUTES_MAX: Final = MINUTES_TTL_S // 60
MEMBERS_MAX: Final = 1000
TIMEOUT_S: Final = 3.0
VERSION: Final = version("tombola")


class Minute(NamedTuple):
    """Counts of the minute that began at `at`: `settled` draws were charged, `rejected` draws were not."""

    at: datetime
    accepted: int = 0
    settled: int = 0
    rejected: int = 0
    repeats: int = 0
    parked: int = 0


class Member(NamedTuple):
    """A running process. Its clock is `clock_offset_ms` ahead of the clock of Redis."""

    role: str
    name: str
    host: str
    pid: int
    version: str
    started_at: datetime
    clock_offset_ms: float
    at: datetime


class Pulse:
    """One process's pulse: `start()` it, `add()` to it from any thread, `stop()` it.

    `role` is worker, relay, gateway or beat. Start it after a fork, in the child: threads do not survive a fork.
    """

    def __init__(self, client: redis.Redis, role: str, name: str = "") -> None:
        self._client = client
        self._role = role
        self._name = name or f"{socket.gethostname()}:{os.getpid()}"
        self._started_at = datetime.now(UTC)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._offset_s = 0.0
        self._is_away = False
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    @classmethod
    def open(cls, settings: Settings, role: str, name: str = "") -> Self | None:
        """Start the pulse of this process; None without a result store. Never raises for a Redis that is away."""
        if not settings.has("result_url"):
            return None
        return cls(open_redis(settings.need("result_url"), timeout_s=TIMEOUT_S), role, name).start()

    def start(self) -> Self:
        """Beat until `stop`; return self."""
        self._thread.start()
        return self

    def add(self, what: str, count: int = 1) -> None:
        """Add `count` to `what`, one of COUNTED. Only in memory."""
        if count:
            with self._lock:
                self._counts[what] += count

    def stop(self) -> None:
        """Flush the counts, and remove this member at once instead of after MEMBER_TTL_S."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(TIMEOUT_S)
        with suppress(redis.RedisError):
            if not self._is_away and not self._thread.is_alive():
                self._client.delete(self._key)
            self._client.close()

    def beat_once(self) -> None:
        """Write this member, with the offset of its clock. Raises redis.RedisError."""
        asked_at, asked = time.time(), time.monotonic()
        seconds, microseconds = self._client.time()
        half_way_s = (time.monotonic() - asked) / 2
        self._offset_s = asked_at + half_way_s - (seconds + microseconds / 1e6)
        now = datetime.now(UTC)
        member = Member(
            self._role,
            self._name,
            socket.gethostname(),
            os.getpid(),
            VERSION,
            self._started_at,
            round(self._offset_s * 1000, 3),
            now,
        )
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.set(self._key, msgspec.json.encode(member._asdict()), ex=MEMBER_TTL_S)
            pipeline.zadd(MEMBERS_KEY, {self._key: seconds})
            pipeline.zremrangebyscore(MEMBERS_KEY, 0, seconds - 2 * MEMBER_TTL_S)
            pipeline.expire(MEMBERS_KEY, MINUTES_TTL_S)
            pipeline.execute()

    def flush_once(self) -> None:
        """Add the counts to this minute. Raises redis.RedisError, and drops the counts then."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        if not counts:
            return
        key = f"{MINUTE_PREFIX}{int(time.time() - self._offset_s) // 60}"
        with self._client.pipeline(transaction=False) as pipeline:
            for what, count in counts.items():
                pipeline.hincrby(key, what, count)
            pipeline.expire(key, MINUTES_TTL_S)
            pipeline.execute()

    @property
    def _key(self) -> str:
        return f"{MEMBER_PREFIX}{self._role}:{self._name}"

    def _run(self) -> None:
        next_beat = 0.0
        while True:
            is_last = self._stopping.wait(FLUSH_EVERY_S) if next_beat else False
            try:
                if time.monotonic() >= next_beat and not is_last:
                    next_beat = time.monotonic() + BEAT_EVERY_S
                    self.beat_once()
                self.flush_once()
                self._is_away = False
            except Exception as error:  # the thread must survive: no draw depends on it
                if not self._is_away:
                    log.warning("no pulse, charts will have a gap: %s", error)
                self._is_away = True
            if is_last:
                return


def minutes(client: redis.Redis, count: int) -> list[Minute]:
    """The last `count` minutes, at most MINUTES_MAX, oldest first; the last minute has not ended.

    Raises redis.RedisError.
    """
    now: Any = client.time()
    last = int(now[0]) // 60
    numbers = range(last - min(count, MINUTES_MAX) + 1, last + 1)
    with client.pipeline(transaction=False) as pipeline:
        for number in numbers:
            pipeline.hmget(f"{MINUTE_PREFIX}{number}", COUNTED)
        rows = pipeline.execute()
    return [
        Minute(datetime.fromtimestamp(number * 60, UTC), *(int(value or 0) for value in row))
        for number, row in zip(numbers, rows, strict=True)
    ]


def members(client: redis.Redis) -> list[Member]:
    """The running processes, at most MEMBERS_MAX, sorted by role and name. Raises redis.RedisError."""
    keys: Any = client.zrevrange(MEMBERS_KEY, 0, MEMBERS_MAX - 1)
    found: Any = client.mget(keys) if keys else []
    known = []
    for value in found:
        # A member that has ended meanwhile, or was written by another program, is left out.
        with suppress(msgspec.DecodeError, msgspec.ValidationError):
            if value is not None:
                known.append(_decode_member(value))
    return sorted(known, key=lambda member: (member.role, member.name))


class _Wire(msgspec.Struct):
    role: str
    name: str
    host: str
    pid: int
    version: str
    started_at: datetime
    clock_offset_ms: float
    at: datetime


def _decode_member(value: bytes) -> Member:
    return Member(*msgspec.structs.astuple(msgspec.json.decode(value, type=_Wire)))
