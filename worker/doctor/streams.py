"""Checks of Redis: as the broker, which must not evict or lose its Stream, and as the result store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tombola.producers.brokers.redis_clients import NotPrimary, UnsupportedRedis, open_redis
from tombola.producers.brokers.streams import GROUP, QUEUE
from tombola.producers.domain.contract import BODY_BYTES_MAX
from tombola.worker.doctor.checks import (
    ANSWER_TIMEOUT_S,
    CannotLook,
    Check,
    Facts,
    Verdict,
    attempt,
    clock_ahead,
    clock_verdict,
    fail,
    ok,
    release_verdict,
    skip,
    skipped,
    warn,
)

VERSION_MIN: Final = (6, 2)
MEMORY_WARN: Final = 0.8
MEMORY_FAIL: Final = 0.95
NAMED_MAX: Final = 3

Info = dict[str, Any]


def open_impatient(url: str) -> redis.Redis:
    """A client that tries once, and waits ANSWER_TIMEOUT_S for an answer."""
    client = open_redis(url, timeout_s=ANSWER_TIMEOUT_S)
    client.set_retry(Retry(NoBackoff(), 0))
    return client


def examine_stream(url: str, found: Facts) -> Iterator[Check]:
    """Every check of a Redis that queues draws."""
    with closing(open_impatient(url)) as client:
        info: Info = {}
        yield (first := attempt("broker", lambda: _server(client, info)))
        if first.status == "fail" and not info:
            yield from skipped([name for name, _ in BROKER_LOOKS], "the broker does not answer")
            yield from skipped(["stream", "consumer group"], "the broker does not answer")
            found.away.add(url)
            return
        for name, look in BROKER_LOOKS:
            yield attempt(name, lambda look=look: look(client, info))  # type: ignore[misc]
        yield (stream := attempt("stream", lambda: _stream(client, found)))
        if stream.status != "ok" and not found.queued:
            yield from skipped(["consumer group"], "there is no Stream")
            return
        yield attempt("consumer group", lambda: _group(client, found))


def examine_consumers(url: str, found: Facts, *, claim_after_s: float) -> Iterator[Check]:
    """The check of the consumers that hold draws; after `examine_members`, which counts the workers."""
    if not found.has_group:
        yield from skipped(["consumers"], "no group is known")
        return
    with closing(open_impatient(url)) as client:
        yield attempt("consumers", lambda: _consumers(client, found, claim_after_s=claim_after_s))


def examine_results(url: str, found: Facts) -> Iterator[Check]:
    """Every check of a Redis that keeps only results: a result that it loses is rebuilt from the database."""
    with closing(open_impatient(url)) as client:
        info: Info = {}
        yield (first := attempt("result store", lambda: _server(client, info)))
        if first.status == "fail" and not info:
            yield from skipped([name for name, _ in RESULT_LOOKS], "the result store does not answer")
            found.away.add(url)
            return
        for name, look in RESULT_LOOKS:
            yield attempt(name, lambda look=look: look(client, info))  # type: ignore[misc]


def _server(client: redis.Redis, info: Info) -> Verdict:
    try:
        client.ping()
    except NotPrimary as error:
        return fail(str(error), "let its address lead to the primary: after a failover it may lead to the old primary")
    except UnsupportedRedis as error:
        return fail(str(error), "")
    try:
        info |= client.info()
    except redis.ResponseError as error:
        return skip(f"it answers; not allowed to look at the rest: {error}")
    if "valkey_version" in info:  # every Valkey is new enough: its first release continued Redis 7.2
        return ok(f"Valkey {info['valkey_version']}")
    return release_verdict("Redis", str(info["redis_version"]), VERSION_MIN)


def _known(info: Info, name: str) -> Any:
    if name not in info:
        raise CannotLook(f"not allowed to look: INFO has no {name}")
    return info[name]


def _persistence(client: redis.Redis, info: Info) -> Verdict:
    if int(_known(info, "aof_enabled")):
        try:
            fsync = client.config_get("appendfsync").get("appendfsync", "")
        except redis.ResponseError:
            return ok("append-only file; not allowed to look how often it is synced")
        if fsync == "no":
            return warn(
                "append-only file, synced when the operating system chooses",
                "set `appendfsync everysec`: a power cut loses half a minute of queued draws",
            )
        return ok(f"append-only file, synced {fsync}")
    # Accepted draws are in the database, and are published again. Draws that were not accepted are in the broker alone.
    if client.config_get("save").get("save", ""):
        return warn(
            "snapshots only",
            "set `appendonly yes`: a crash loses draws that were queued since the last snapshot and not accepted",
        )
    return fail("none: a restart loses queued draws", "set `appendonly yes` and `appendfsync everysec`")


def _broker_eviction(_client: redis.Redis, info: Info) -> Verdict:
    policy = str(_known(info, "maxmemory_policy"))
    if policy != "noeviction":
        return fail(policy, "set `maxmemory-policy noeviction`: a full Redis must refuse draws, not drop queued ones")
    return ok(policy)


def _result_eviction(_client: redis.Redis, info: Info) -> Verdict:
    policy = str(_known(info, "maxmemory_policy"))
    if policy.startswith("allkeys"):
        return warn(
            policy,
            "set `maxmemory-policy volatile-ttl`: results expire, other keys in there may not",
        )
    return ok(policy)


def _memory(_client: redis.Redis, info: Info) -> Verdict:
    used, most = int(_known(info, "used_memory")), int(info.get("maxmemory", 0))
    whose = "maxmemory"
    if not most:
        whose, most = "the machine's, no maxmemory", int(info.get("total_system_memory", 0))
    if not most:
        return ok(f"{used / 2**20:,.0f} MiB, no limit")
    found = f"{used / 2**20:,.0f} of {most / 2**20:,.0f} MiB ({whose})"
    cure = "give it more, or find out what fills it: a full Redis refuses draws and results"
    if used > most * MEMORY_FAIL:
        return fail(found, cure)
    return warn(found, cure) if used > most * MEMORY_WARN else ok(found)


def _clock(client: redis.Redis, _info: Info) -> Verdict:
    def ask() -> datetime:
        seconds, microseconds = client.time()
        return datetime.fromtimestamp(seconds, UTC).replace(microsecond=microseconds)

    return clock_verdict(*clock_ahead(ask))


def _stream(client: redis.Redis, found: Facts) -> Verdict:
    kind = _text(client.type(QUEUE))
    if kind == "none":
        found.queued = found.consumers = 0
        return warn(f"no key `{QUEUE}` yet", "start a worker, or enqueue a draw: the first one makes it")
    if kind != "stream":
        return fail(
            f"the key `{QUEUE}` is a {kind}, not a Stream: it belongs to another program",
            "give tombola a database of its own: redis://host/NUMBER in TOMBOLA_BROKER_URL",
        )
    found.queued = int(client.xlen(QUEUE))
    entries = f"{found.queued:,} entries, those in hand included"
    entry_bytes = 0.0
    with suppress(redis.ResponseError):  # the server may lack the command, or the user the privilege
        entry_bytes = int(client.memory_usage(QUEUE) or 0) / max(1, found.queued)
    if entry_bytes > BODY_BYTES_MAX:
        return warn(
            f"{entries}, of {entry_bytes / 1024:,.0f} KiB each",
            f"a draw request has at most {BODY_BYTES_MAX:,} bytes: find out who else writes to `{QUEUE}`",
        )
    return ok(entries)


def _group(client: redis.Redis, found: Facts) -> Verdict:
    for group in client.xinfo_groups(QUEUE):
        if _text(group["name"]) == GROUP:
            found.has_group = True
            waiting = int(client.xlen(QUEUE)) - int(group["pending"])  # acked entries are deleted
            return ok(f"{max(0, waiting):,} waiting, {group['pending']:,} in hand, {group['consumers']} consumers")
    return fail(f"the Stream has no group `{GROUP}`", "start or restart a worker: it makes the group, from the start")


def _consumers(client: redis.Redis, found: Facts, *, claim_after_s: float) -> Verdict:
    consumers = client.xinfo_consumers(QUEUE, GROUP)
    # Before Redis 7.2 only a read that returns draws is a sign of life: idle workers are known by their pulses.
    alive = [it for it in consumers if it["idle"] <= claim_after_s * 1000]
    found.consumers = len(alive)
    stuck = [it for it in consumers if it["pending"] and it["idle"] > 2 * claim_after_s * 1000]
    if stuck:
        named = ", ".join(
            f"{_text(it['name'])} holds {it['pending']:,}, silent for {it['idle'] / 1000:,.0f} s"
            for it in stuck[:NAMED_MAX]
        )
        if not alive and not found.workers:
            return fail(named, "start a worker: it takes over what they hold")
        return warn(named, "another consumer should have claimed these long ago: look into the workers' logs")
    return ok(f"{len(consumers)} on record, none silent with draws in hand")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


BROKER_LOOKS: Final[tuple[tuple[str, Callable[[redis.Redis, Info], Verdict]], ...]] = (
    ("broker persistence", _persistence),
    ("broker eviction", _broker_eviction),
    ("broker memory", _memory),
    ("clock of the broker", _clock),
)
RESULT_LOOKS: Final[tuple[tuple[str, Callable[[redis.Redis, Info], Verdict]], ...]] = (
    ("result eviction", _result_eviction),
    ("result memory", _memory),
    ("clock of the result store", _clock),
)
