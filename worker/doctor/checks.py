"""A check and its verdict. A check that fails to run has a verdict as well, never a traceback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal

import amqp
import redis
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from tombola.producers.brokers.rabbitmq import AMQP_ERRORS
from tombola.producers.domain.errors import ConfigurationError, DrawError
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.faults import explain

Status = Literal["ok", "warn", "fail", "skip"]
Verdict = tuple[Status, str, str]

ANSWER_TIMEOUT_S: Final = 5.0
MIGRATE: Final = "run `tombola migrate`"
NO_ANSWER: Final = "check that it runs, that this machine can reach it, and what its log says"
CLOCK_WARN_S: Final = 0.5
CLOCK_FAIL_S: Final = 5.0
_NOT_ALLOWED: Final = frozenset({1142, 1143, 1227})  # MySQL: no privilege for this table, column, statement


@dataclass(frozen=True)
class Check:
    """One check: its status, what it found, and what to do if that is not right."""

    name: str
    status: Status
    found: str
    cure: str = ""


@dataclass
class Facts:
    """Facts that one check has found and a later check needs. None: not found out."""

    has_database: bool = False
    away: set[str] = field(default_factory=set)  # URLs of servers that do not answer: reported once
    has_group: bool = False
    queued: int | None = None
    consumers: int | None = None  # that the broker knows to be alive
    workers: int | None = None  # that show a pulse


class CannotLook(Exception):
    """This check cannot be made here; the message says why."""


def ok(found: str) -> Verdict:
    return "ok", found, ""


def warn(found: str, cure: str) -> Verdict:
    return "warn", found, cure


def fail(found: str, cure: str) -> Verdict:
    return "fail", found, cure


def skip(found: str) -> Verdict:
    return "skip", found, ""


def skipped(names: Iterable[str], why: str) -> Iterator[Check]:
    """All of these checks, as skipped."""
    return (Check(name, *skip(f"skipped: {why}")) for name in names)


def attempt(name: str, look: Callable[[], Verdict]) -> Check:
    """The check that `look` returns. A server that is away fails the check; a missing privilege skips it."""
    try:
        return Check(name, *look())
    except Exception as error:  # any error: the other checks are still of use
        return Check(name, *verdict_on(error))


def verdict_on(error: Exception) -> Verdict:
    """The verdict of a check that raised `error`."""
    if isinstance(error, CannotLook):
        return skip(str(error))
    if isinstance(error, SQLAlchemyError):
        code = error.orig.args[0] if isinstance(error, DBAPIError) and error.orig and error.orig.args else None
        said = explain(error)
        if code in _NOT_ALLOWED:
            return skip(f"not allowed to look: {said}")
        # The tables are older than this release: the check `migrations` says so.
        return skip(str(said)) if isinstance(said, ConfigurationError) else fail(str(said), NO_ANSWER)
    if isinstance(error, redis.AuthenticationError):
        return fail(f"Redis refuses the login: {error}", "check the password in its URL")
    if isinstance(error, redis.ResponseError):  # the ACL forbids it, or a managed Redis does not have it
        return skip(f"not allowed to look: {error}")
    if isinstance(error, amqp.AccessRefused):
        return skip(f"not allowed to look: {error.reply_text}")
    if isinstance(error, redis.RedisError):
        return fail(f"Redis does not answer: {error}", NO_ANSWER)
    if isinstance(error, AMQP_ERRORS):
        return fail(f"RabbitMQ does not answer: {error or type(error).__name__}", NO_ANSWER)
    if isinstance(error, DrawError):
        return fail(str(error), "")
    return fail(f"this check failed: {type(error).__name__}: {error}", "this is a bug of tombola: report it")


def clock_ahead(ask: Callable[[], datetime], *, tries: int = 3) -> tuple[float, float]:
    """The seconds by which a server's clock is ahead of ours, and the error of this: half the quickest round trip."""
    measured = []
    for _ in range(tries):
        now, asked_at = utc_now(), time.monotonic()
        theirs = ask()
        trip_s = time.monotonic() - asked_at
        measured.append((trip_s / 2, (theirs - now).total_seconds() - trip_s / 2))
    uncertain_s, ahead_s = min(measured)
    return ahead_s, uncertain_s


def clock_verdict(ahead_s: float, uncertain_s: float) -> Verdict:
    """Whether two clocks agree. The database's clock decides; this machine's clock stands in logs and in keys."""
    found = f"{abs(ahead_s):.3f} s {'ahead' if ahead_s > 0 else 'behind'}, give or take {uncertain_s:.3f} s"
    surely_s = abs(ahead_s) - uncertain_s
    cure = "run an NTP client on both machines: logs, and the times in keys, are off by as much"
    if surely_s > CLOCK_FAIL_S:
        return fail(found, cure)
    return warn(found, cure) if surely_s > CLOCK_WARN_S else ok(found)


def numbers_of(version: str) -> tuple[int, ...]:
    """`7.0.15-alpine` as (7, 0, 15)."""
    numbers: list[int] = []
    for part in version.replace("-", ".").replace("+", ".").split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def release_verdict(product: str, version: str, minimum: tuple[int, ...], more: str = "") -> Verdict:
    """Whether a server's version is supported."""
    found = f"{product} {version}{more}"
    if numbers_of(version) < minimum:
        oldest = ".".join(map(str, minimum))
        return fail(found, f"upgrade it: tombola needs {product} {oldest} or newer")
    return ok(found)
