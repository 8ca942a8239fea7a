"""What Prometheus is told of settling and of dead letters, and what a consumer tells while it works.

Names and labels are a contract with worker/monitoring/. No label is ever a key or an account.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pymysql
from prometheus_client import Counter, Gauge, Histogram
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from producers import tracing
from producers.database import explain, utc_now
from producers.metrics import Throttle
from producers.pulse import Pulse
from worker.deliveries import Delivery
from worker.parking import CAUSES
from worker.schema import dead_letters

if TYPE_CHECKING:
    from worker.batch import Settled

log = logging.getLogger(__name__)

DRAWS: Final = Counter("tombola_draws", "draws answered: settled, rejected or repeat", ["outcome"])
PARKED: Final = Counter("tombola_parked", "messages parked as dead letters, by cause", ["cause"])
DEFERRED: Final = Counter("tombola_deferred", "draws left for later, because somebody held a lock for too long")
REDELIVERED: Final = Counter("tombola_redelivered", "deliveries that were not the first of their message")
RETRIES: Final = Counter(
    "tombola_transaction_retries", "transactions rolled back and run again or split, by error code", ["code"]
)
OUTAGES: Final = Counter("tombola_worker_outages", "times that a consumer had to wait for one of its servers")
BATCH_DRAWS: Final = Histogram(
    "tombola_batch_draws", "messages fetched at once", buckets=(1, 2, 5, 10, 25, 50, 100, 200, 400, 800, 900)
)
BATCH_SECONDS: Final = Histogram(
    "tombola_batch_seconds",
    "how long a batch took, from fetched to acked",
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
LATENCY: Final = Histogram(
    "tombola_accept_to_settle_seconds",
    "from a request's accept until it is settled and its result stored",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
)
DEAD_LETTERS: Final = Gauge(
    "tombola_dead_letters", "dead letters, by state and cause", ["state", "cause"], multiprocess_mode="mostrecent"
)
REPLAYED: Final = Counter(
    "tombola_replayed", "dead letters replayed: settled, parked_again, or refused by the forecast", ["outcome"]
)

# The rest are `other`: a label has few values.
CODES: Final = frozenset({1020, 1062, 1180, 1205, 1213, 3101})

SETTLED, REJECTED, REPEATS = (DRAWS.labels(outcome) for outcome in ("settled", "rejected", "repeat"))

# There from the beginning, at 0: an increase from nothing to one would not be seen.
for _cause in CAUSES:
    PARKED.labels(_cause)
for _code in (*map(str, sorted(CODES)), "other"):
    RETRIES.labels(_code)
for _outcome in ("settled", "parked_again", "refused"):
    REPLAYED.labels(_outcome)


class Watch:
    """What a consumer tells of its work: metrics, a span per batch, and the pulse.

    `with_latency` looks at every single draw, for which it takes one in a hundred parts of settling it.
    """

    def __init__(self, pulse: Pulse | None = None, *, with_latency: bool = False) -> None:
        self._pulse = pulse
        self._with_latency = with_latency

    @contextmanager
    def batch(self, fetched: Sequence[Delivery]) -> Iterator[None]:
        """Around all that is done with one batch."""
        began = time.perf_counter()
        BATCH_DRAWS.observe(len(fetched))
        REDELIVERED.inc(sum(delivery.count > 1 for delivery in fetched))
        with tracing.settling((delivery.headers for delivery in fetched), len(fetched)):
            yield
        BATCH_SECONDS.observe(time.perf_counter() - began)

    def tell(self, settled: Sequence[Settled], deferred: int) -> None:
        """These draws are settled, and their results stored."""
        repeats = sum(it.is_repeat for it in settled)
        rejected = sum(it.is_rejected for it in settled)
        counts = {"settled": len(settled) - repeats - rejected, "rejected": rejected, "repeats": repeats}
        for counter, count in zip((SETTLED, REJECTED, REPEATS), counts.values(), strict=True):
            counter.inc(count)
        DEFERRED.inc(deferred)
        if self._pulse is not None:
            for what, count in counts.items():
                self._pulse.add(what, count)
        if self._with_latency:
            now = utc_now()
            for it in settled:
                if it.accepted_at is not None:
                    LATENCY.observe((now - it.accepted_at).total_seconds())

    def tell_parked(self, cause: str) -> None:
        """A message is parked."""
        PARKED.labels(cause).inc()
        if self._pulse is not None:
            self._pulse.add("parked")


def tell_retry(error: BaseException) -> None:
    """This error undid a transaction, which is run again or split."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    code = error.args[0] if isinstance(error, pymysql.MySQLError) and error.args else None
    RETRIES.labels(str(code) if code in CODES else "other").inc()


class DeadLetterCount:
    """Counts the dead letters for their gauge. Call it often: it looks when it is time."""

    def __init__(self) -> None:
        self._throttle = Throttle()
        self._known: set[tuple[str, str]] = set()

    def look(self, engine: Engine) -> None:
        """Set the gauge if it is time; what has no dead letter left is set to 0."""
        if not self._throttle.is_due():
            return
        try:
            with engine.connect().execution_options(read_only=True) as connection:
                rows = connection.execute(
                    select(dead_letters.c.state, dead_letters.c.cause, func.count()).group_by(
                        dead_letters.c.state, dead_letters.c.cause
                    )
                ).all()
        except SQLAlchemyError as error:
            log.warning("how many dead letters there are is not known: %s", explain(error))
            return
        finally:
            self._throttle.done()
        counts = {(row[0], row[1]): row[2] for row in rows}
        self._known |= set(counts)
        for labels in self._known:
            DEAD_LETTERS.labels(*labels).set(counts.get(labels, 0))
