"""Checks of the members: the processes that show a pulse, their releases and their clocks."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from importlib.metadata import version
from typing import Final

from tombola.producers.telemetry.pulse import Member, members
from tombola.worker.doctor.checks import (
    CLOCK_FAIL_S,
    CLOCK_WARN_S,
    Check,
    Facts,
    Verdict,
    attempt,
    fail,
    ok,
    skipped,
    warn,
)
from tombola.worker.doctor.streams import open_impatient
from tombola.worker.host import housekeeping

NAMED_MAX: Final = 5


def examine_release() -> Check:
    """The releases of tombola, Python and the main libraries here."""
    parts = ", ".join(f"{name} {version(name)}" for name in ("celery", "kombu", "redis", "SQLAlchemy", "PyMySQL"))
    return Check("release", "ok", f"tombola {version('tombola')}, Python {platform.python_version()}, {parts}")


def examine_members(url: str, found: Facts, *, has_beat: bool = True) -> Iterator[Check]:
    """Every check of the live processes, by their pulses in the result store.

    Without `has_beat` beat is not expected: `tombola up` runs without it.
    """
    names = [name for name, _ in LOOKS]
    if url in found.away:
        yield from skipped(["members", *names], "the result store does not answer")
        return
    alive: list[Member] = []

    def look() -> Verdict:
        with closing(open_impatient(url)) as client:
            alive.extend(members(client))
        found.workers = sum(member.role == "worker" for member in alive)
        return _roles(alive)

    yield attempt("members", look)
    if not alive:
        yield from skipped(names, "no process shows a pulse")
        return
    for name, verdict in LOOKS:
        if name == "beat" and not has_beat:
            yield from skipped([name], "SQLite")
            continue
        yield attempt(name, lambda verdict=verdict: verdict(alive))  # type: ignore[misc]


def _roles(alive: Sequence[Member]) -> Verdict:
    if not alive:
        return warn("no process shows a pulse", "start a worker, `tombola relay` and `tombola gateway`")
    counted = Counter(member.role for member in alive)
    return ok(", ".join(f"{role}: {count}" for role, count in sorted(counted.items())))


def _releases(alive: Sequence[Member]) -> Verdict:
    others = [member for member in alive if member.version != version("tombola")]
    if not others:
        return ok(f"all run {version('tombola')}")
    named = _some([f"{member.role} {member.name} runs {member.version}" for member in others])
    return warn(f"{named}; this is {version('tombola')}", "bring all machines to one release, when the update is over")


def _clocks(alive: Sequence[Member]) -> Verdict:
    def off_s(member: Member) -> float:
        return abs(member.clock_offset_ms) / 1000

    off = sorted((member for member in alive if off_s(member) > CLOCK_WARN_S), key=off_s, reverse=True)
    if not off:
        return ok(f"within {max(map(off_s, alive)):.3f} s of the result store's")
    named = _some([f"{it.role} {it.name} is {it.clock_offset_ms / 1000:+,.1f} s from Redis" for it in off])
    cure = "run an NTP client on these machines: requests that they accept are published too early or late by as much"
    return fail(named, cure) if off_s(off[0]) > CLOCK_FAIL_S else warn(named, cure)


def _relays(alive: Sequence[Member]) -> Verdict:
    lapse = housekeeping.of_relay([member.role for member in alive])
    relays = sum(member.role == "relay" for member in alive)
    return warn(*lapse) if lapse else ok(f"{relays} at work" if relays else "none; beat and the workers do it")


def _beat(alive: Sequence[Member]) -> Verdict:
    lapse = housekeeping.of_beat([member.role for member in alive])
    return warn(*lapse) if lapse else ok("it shows a pulse")


def _some(found: list[str]) -> str:
    more = f" and {len(found) - NAMED_MAX} more" if len(found) > NAMED_MAX else ""
    return ", ".join(found[:NAMED_MAX]) + more


LOOKS: Final[tuple[tuple[str, Callable[[Sequence[Member]], Verdict]], ...]] = (
    ("releases of members", _releases),
    ("clocks of members", _clocks),
    ("relays", _relays),
    ("beat", _beat),
)
