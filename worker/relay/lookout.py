"""Gauges that the relay reads from the database: dead letters, replays, fulfilments, holds, audits, the books."""

from __future__ import annotations

import logging
from typing import Final

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.storage import clock
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import dead_letters, replays
from tombola.producers.telemetry.metrics import Throttle
from tombola.worker.audit import audits
from tombola.worker.books.standing import standing
from tombola.worker.conformity import nightly
from tombola.worker.fulfilments import fulfilments
from tombola.worker.metrics import (
    AUDIT_VIOLATIONS,
    CONFORMITY_DEVIATIONS,
    DEAD_LETTERS,
    FULFILMENTS_DEAD,
    FULFILMENTS_OLDEST,
    FULFILMENTS_PENDING,
    FULFILMENTS_WITHOUT_WEBHOOK,
    HOLDS_OVERDUE,
    LAST_ANCHOR,
    LAST_AUDIT,
    LAST_AUDIT_OF_EVERYTHING,
    LAST_BLOCK,
    LAST_CONFORMITY,
    OUTCOMES,
    REPLAYED,
    SEALING_LAG,
)
from tombola.worker.movements.holds import count_overdue

log = logging.getLogger(__name__)

HOLDS_COUNTED_MAX: Final = 10_000


class OperatorsLookout:
    """Gauges of dead letters, fulfilments, holds, the books, the last audit and the last conformity reports, and a
    counter of replays' outcomes.

    Replays run in shells and in the console, which Prometheus does not scrape: their outcomes are counted from their
    rows, from the first `look` on.
    """

    def __init__(self, throttle: Throttle | None = None) -> None:
        self._throttle = throttle or Throttle()
        self._known: set[tuple[str, str]] = set()
        self._outcomes: dict[str, int] | None = None

    def look(self, engine: Engine) -> None:
        """Set the gauges and move the counter on, if it is time. A state and cause without dead letters is set to 0.

        Call it often. Never raises; logs when the database is away.
        """
        if not self._throttle.is_due():
            return
        try:
            with engine.connect().execution_options(read_only=True) as connection:
                rows = connection.execute(
                    select(dead_letters.c.state, dead_letters.c.cause, func.count()).group_by(
                        dead_letters.c.state, dead_letters.c.cause
                    )
                ).all()
                sums = connection.execute(select(*(func.sum(replays.c[name]).label(name) for name in OUTCOMES))).one()
                audit = audits.last(connection)
                conformity = nightly.last(connection)
                waiting, now = fulfilments.counts(connection), clock.now(connection)
                holds_overdue = count_overdue(connection, count_max=HOLDS_COUNTED_MAX)
                books = standing(connection)
        except SQLAlchemyError as error:
            log.warning(
                "the metrics of dead letters, fulfilments, holds, books, audit and conformity are out of date: %s",
                explain(error),
            )
            return
        finally:
            self._throttle.done()
        counts = {(row[0], row[1]): row[2] for row in rows}
        self._known |= set(counts)
        for labels in self._known:
            DEAD_LETTERS.labels(*labels).set(counts.get(labels, 0))
        outcomes = {name: int(getattr(sums, name) or 0) for name in OUTCOMES}
        for name, before in (self._outcomes or outcomes).items():
            REPLAYED.labels(name).inc(max(0, outcomes[name] - before))
        self._outcomes = outcomes
        LAST_AUDIT.set(0 if audit is None else audit.at.timestamp())
        everything_at = None if audit is None else audit.everything_at
        LAST_AUDIT_OF_EVERYTHING.set(0 if everything_at is None else everything_at.timestamp())
        AUDIT_VIOLATIONS.set(0 if audit is None else audit.violations + len(audit.not_looked_at))
        LAST_CONFORMITY.set(0 if conformity is None else conformity.at.timestamp())
        CONFORMITY_DEVIATIONS.set(0 if conformity is None else conformity.deviations)
        HOLDS_OVERDUE.set(holds_overdue)
        SEALING_LAG.set(books.lag_s)
        LAST_BLOCK.set(books.blocks)
        LAST_ANCHOR.set(0 if books.anchored_at is None else books.anchored_at.timestamp())
        FULFILMENTS_PENDING.set(waiting.pending)
        FULFILMENTS_WITHOUT_WEBHOOK.set(waiting.without_webhook)
        FULFILMENTS_DEAD.set(waiting.dead)
        FULFILMENTS_OLDEST.set(0 if waiting.oldest_at is None else max(0.0, (now - waiting.oldest_at).total_seconds()))
