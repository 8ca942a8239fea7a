"""Checks of the draws: is a draw stuck, do workers run, and do seed and odds agree with the ledger's last draw?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Final

from sqlalchemy import Connection, Engine, func, select

from tombola.producers.domain.causes import OPEN_STATES, Status
from tombola.producers.settings import Settings
from tombola.producers.storage import clock, requests
from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import api_idempotency_requests as requests_table
from tombola.producers.storage.schema import dead_letters
from tombola.worker.audit import audits
from tombola.worker.conformity import nightly
from tombola.worker.doctor.books import look_at_anchors, look_at_sealing
from tombola.worker.doctor.checks import (
    MIGRATE,
    CannotLook,
    Check,
    Facts,
    Verdict,
    attempt,
    fail,
    ok,
    skipped,
    warn,
)
from tombola.worker.doctor.database import is_migrated
from tombola.worker.doctor.fulfilments import look_at_fulfilments
from tombola.worker.doctor.holds import look_at_holds
from tombola.worker.doctor.receipts import look_at_receipt_keys
from tombola.worker.doctor.seeds import look_at_epochs, look_at_last_draw, look_at_revealing
from tombola.worker.host import housekeeping

WAITING_WARN_S: Final = 60.0
OVERDUE_FAIL_S: Final = 60.0
OVERDUE_COUNTED_MAX: Final = 10_000
BACKLOG_WARN: Final = 0.8
CAUSES_MAX: Final = 5

START_RELAY: Final = "start `tombola relay`"
START_WORKER: Final = "start a worker: celery -A tombola.worker worker"

Look = Callable[[Connection, Settings, Facts], Verdict]


def examine_draws(engine: Engine, settings: Settings, found: Facts) -> Iterator[Check]:
    """Every check of requests, dead letters, fulfilments, audits, conformity, books, receipts and the last draw."""
    names = [name for name, _ in LOOKS]
    if not found.has_database:
        yield from skipped(names, "the database does not answer")
        return
    if not is_migrated(engine):
        yield from skipped(names, f"no tables: {MIGRATE}")
        return
    for name, look in LOOKS:

        def asked(look: Look = look) -> Verdict:
            with engine.connect() as connection:
                return look(connection, settings, found)

        yield attempt(name, asked)


def examine_workers(found: Facts, *, is_stream: bool) -> Check:
    """Whether a worker consumes: RabbitMQ knows its consumers, Redis not all of them (worker.doctor.streams)."""

    def look() -> Verdict:
        if found.queued is None:
            raise CannotLook("skipped: the broker does not say who consumes")
        is_certain = found.workers is not None or not is_stream
        alive = found.consumers or 0
        if is_stream:
            alive = max(alive, found.workers or 0)
        if alive:
            return ok(f"{alive} at work")
        if not is_certain:
            raise CannotLook("skipped: the result store does not say who shows a pulse")
        waiting = f", and {found.queued:,} draws wait" if found.queued else ""
        return fail(f"no worker consumes{waiting}", START_WORKER)

    return attempt("workers", look)


def _backlog(connection: Connection, settings: Settings, found: Facts) -> Verdict:
    most = settings.backlog_max
    accepted = requests.count_accepted(connection, count_max=most + 1)
    more = "" if accepted <= most else "more than "
    queued = "" if found.queued is None else f"; {found.queued:,} in the queue"
    said = f"{more}{min(accepted, most):,} accepted and under way{queued}"
    if accepted > most:
        return fail(said, "the gateway turns draws away: start more workers, or find out why these settle nothing")
    if accepted > most * BACKLOG_WARN:
        return warn(said, f"the gateway turns draws away above {most:,}: start more workers")
    return ok(said)


def _oldest(connection: Connection, _settings: Settings, _found: Facts) -> Verdict:
    accepted_at = requests.oldest_accepted(connection)
    if accepted_at is None:
        return ok("nothing waits")
    age_s = (clock.now(connection) - accepted_at).total_seconds()
    said = f"waits for {age_s:,.0f} s"
    if age_s > WAITING_WARN_S:
        return warn(said, "see the checks of workers, relay and queue; `tombola doctor` again in a minute")
    return ok(said)


def _relay(connection: Connection, settings: Settings, found: Facts) -> Verdict:
    """Requests long overdue that a running relay would have published, by the rule of worker.relay.overdue."""
    conditions = [
        requests_table.c.status == Status.ACCEPTED,
        requests_table.c.publish_at <= clock.now(connection) - timedelta(seconds=OVERDUE_FAIL_S),
    ]
    if found.queued:
        # Most may just be queued: a relay publishes only requests that are overtaken.
        published, overtaken = (
            requests_table.c.published_at,
            requests.overtaken_before(connection, settings.relay_after_s),
        )
        conditions.append(published.is_(None) if overtaken is None else published.is_(None) | (published < overtaken))
    some = select(requests_table.c.request_key).where(*conditions).limit(OVERDUE_COUNTED_MAX).subquery()
    overdue = connection.execute(select(func.count()).select_from(some)).scalar_one()
    if not overdue:
        return ok("nothing is overdue")
    if found.queued is None:
        raise CannotLook(f"{overdue:,} are overdue; skipped: the broker does not say what is queued")
    at_least = "at least " if overdue == OVERDUE_COUNTED_MAX else ""
    return fail(f"{at_least}{overdue:,} draws overdue for longer than {OVERDUE_FAIL_S:.0f} s", START_RELAY)


def _dead_letters(connection: Connection, _settings: Settings, _found: Facts) -> Verdict:
    causes = connection.execute(
        select(dead_letters.c.cause, func.count().label("parked"))
        .where(dead_letters.c.state.in_(OPEN_STATES))
        .group_by(dead_letters.c.cause)
        .order_by(func.count().desc(), dead_letters.c.cause)
    ).all()
    if not causes:
        return ok("none")
    named = ", ".join(f"{cause}: {count:,}" for cause, count in causes[:CAUSES_MAX])
    return warn(f"{sum(count for _, count in causes):,} parked ({named})", "look at them: tombola dead-letters groups")


def _audit(connection: Connection, _settings: Settings, _found: Facts) -> Verdict:
    last = audits.last(connection)
    lapse = housekeeping.of_audit(last, clock.now(connection))
    if connection.dialect.name == "sqlite" and (last is None or last.is_clean):
        raise CannotLook("skipped: SQLite")  # where no beat runs to start it every night
    if lapse is None:
        assert last is not None
        return ok(f"{last.at:%Y-%m-%d %H:%M} UTC, by {last.by}: {last}")
    return warn(*lapse) if last is None or last.is_clean else fail(*lapse)


def _conformity(connection: Connection, _settings: Settings, _found: Facts) -> Verdict:
    last = nightly.last(connection)
    if connection.dialect.name == "sqlite" and (last is None or not last.deviations):
        raise CannotLook("skipped: SQLite")  # where no beat runs to ask for a report every night
    lapse = housekeeping.of_conformity(last, clock.now(connection))
    if lapse is None:
        assert last is not None
        return ok(f"{last.at:%Y-%m-%d %H:%M} UTC, by {last.by}: {last}")
    return warn(*lapse) if last is None or not last.deviations else fail(*lapse)


def _balances(connection: Connection, _settings: Settings, _found: Facts) -> Verdict:
    account = connection.execute(select(accounts.c.id, accounts.c.balance).where(accounts.c.balance < 0).limit(1))
    if (row := account.first()) is not None:
        return fail(
            f"account {row.id} holds {row.balance}",
            "run `tombola audit`: something wrote past the CHECK constraint",
        )
    return ok("none is negative")


LOOKS: Final[tuple[tuple[str, Look], ...]] = (
    ("seed of the ledger", look_at_last_draw),
    ("seed epochs", look_at_epochs),
    ("seed revealing", look_at_revealing),
    ("backlog", _backlog),
    ("oldest accepted", _oldest),
    ("relay", _relay),
    ("dead letters", _dead_letters),
    ("fulfilments", look_at_fulfilments),
    ("holds", look_at_holds),
    ("balances", _balances),
    ("audit", _audit),
    ("conformity", _conformity),
    ("sealing", look_at_sealing),
    ("anchors", look_at_anchors),
    ("receipt keys", look_at_receipt_keys),
)
