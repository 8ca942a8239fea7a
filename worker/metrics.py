"""The metrics of settling, of dead letters, of fulfilments, of the sealed books and of conformity.

Names and labels are a contract with worker/monitoring/. No label is ever a key or an account.
"""

from __future__ import annotations

from typing import Final

import pymysql
from prometheus_client import Counter, Gauge, Histogram
from sqlalchemy.exc import DBAPIError

from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.operations import OPERATIONS

DRAWS: Final = Counter("tombola_draws", "draws answered: settled, rejected or repeat", ["outcome"])
MOVEMENTS: Final = Counter(
    "tombola_movements",
    "requests of other kinds than draws, by kind: settled, rejected or repeat; they are among the draws as well",
    ["kind", "outcome"],
)
MESSAGES_PARKED: Final = Counter("tombola_parked", "messages parked as dead letters, by cause", ["cause"])
DEFERRED: Final = Counter("tombola_deferred", "draws set aside, because another transaction held a lock for too long")
REDELIVERED: Final = Counter("tombola_redelivered", "deliveries that were not the first of their message")
RETRIES: Final = Counter(
    "tombola_transaction_retries", "transactions rolled back and run again or split, by error code", ["code"]
)
OUTAGES: Final = Counter("tombola_worker_outages", "times that a consumer had to wait for one of its servers")
ASIDE: Final = Gauge(
    "tombola_aside", "draws in hand whose account or request another transaction holds", multiprocess_mode="livesum"
)
RESULT_OUTAGES: Final = Counter("tombola_result_outages", "times that the result store stopped taking results")
RESULTS_OWED: Final = Gauge(
    "tombola_results_owed", "results that the store did not take, to be put later", multiprocess_mode="livesum"
)
RESULTS_DROPPED: Final = Counter(
    "tombola_results_dropped", "results never put, as too many were owed: they are rebuilt when they are asked for"
)
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
LAST_AUDIT: Final = Gauge(
    "tombola_audit_last_timestamp_seconds",
    "when the last audit on record ended; 0: there is none",
    multiprocess_mode="mostrecent",
)
LAST_AUDIT_OF_EVERYTHING: Final = Gauge(
    "tombola_audit_everything_last_timestamp_seconds",
    "when the last audit on record ended that began at the first ledger row; 0: there is none",
    multiprocess_mode="mostrecent",
)
AUDIT_VIOLATIONS: Final = Gauge(
    "tombola_audit_violations",
    "violations that the last audit found, and invariants that it could not look at",
    multiprocess_mode="mostrecent",
)
LAST_CONFORMITY: Final = Gauge(
    "tombola_conformity_last_timestamp_seconds",
    "when the last conformity reports on record ended; 0: there are none",
    multiprocess_mode="mostrecent",
)
CONFORMITY_DEVIATIONS: Final = Gauge(
    "tombola_conformity_deviations",
    "deviations of draws from their odds in the last conformity reports on record",
    multiprocess_mode="mostrecent",
)
SEALING_LAG: Final = Gauge(
    "tombola_books_lag_seconds",
    "the age of the oldest ledger row that is not sealed",
    multiprocess_mode="mostrecent",
)
LAST_BLOCK: Final = Gauge("tombola_books_last_block", "the number of the last block", multiprocess_mode="mostrecent")
LAST_ANCHOR: Final = Gauge(
    "tombola_books_anchored_timestamp_seconds",
    "when a checkpoint was last written outside; 0: never",
    multiprocess_mode="mostrecent",
)
BROKER_LOST: Final = Counter(
    "tombola_broker_lost", "accepted draws that RabbitMQ let go by a policy, left to the relay", ["reason"]
)
REPLAYED: Final = Counter(
    "tombola_replayed", "dead letters replayed: settled, parked_again, or refused by the forecast", ["outcome"]
)
FULFILMENTS_DELIVERED: Final = Counter("tombola_fulfilments_delivered", "fulfilments that their receiver has taken")
FULFILMENTS_FAILED: Final = Counter("tombola_fulfilments_failed", "attempts to deliver a fulfilment that failed")
FULFILMENTS_PENDING: Final = Gauge(
    "tombola_fulfilments_pending", "fulfilments still to be delivered to a webhook", multiprocess_mode="mostrecent"
)
FULFILMENTS_WITHOUT_WEBHOOK: Final = Gauge(
    "tombola_fulfilments_without_webhook",
    "notifications that no webhook has subscribed to yet",
    multiprocess_mode="mostrecent",
)
FULFILMENTS_DEAD: Final = Gauge(
    "tombola_fulfilments_dead", "fulfilments that were given up", multiprocess_mode="mostrecent"
)
FULFILMENTS_OLDEST: Final = Gauge(
    "tombola_fulfilments_oldest_seconds",
    "the age of the oldest fulfilment still to be delivered to a webhook",
    multiprocess_mode="mostrecent",
)

HOLDS_OVERDUE: Final = Gauge(
    "tombola_holds_overdue",
    "open holds that expired more than five minutes ago, counted up to 10,000",
    multiprocess_mode="mostrecent",
)

OUTCOMES: Final = ("settled", "parked_again", "refused")

# RabbitMQ's reasons that are no fault of the message, or need not be. Our own consumers never reject: a stranger's do.
LOST_REASONS: Final = ("expired", "maxlen", "rejected", "delivery_limit")

# All other codes are counted as `other`: a label has few values.
CODES: Final = frozenset({1020, 1062, 1180, 1205, 1213, 3101})

DRAWS_SETTLED, DRAWS_REJECTED, DRAWS_REPEATED = (DRAWS.labels(outcome) for outcome in ("settled", "rejected", "repeat"))

# Each series exists from the start, at 0: Prometheus does not see an increase from no series to 1.
for _cause in Cause:
    MESSAGES_PARKED.labels(_cause)
for _kind in OPERATIONS.keys() - {DrawRequest.kind}:
    for _outcome in ("settled", "rejected", "repeat"):
        MOVEMENTS.labels(_kind, _outcome)
for _code in (*map(str, sorted(CODES)), "other"):
    RETRIES.labels(_code)
for _reason in LOST_REASONS:
    BROKER_LOST.labels(_reason)
for _outcome in OUTCOMES:
    REPLAYED.labels(_outcome)


def count_retry(error: BaseException) -> None:
    """Count a transaction that `error` undid, by the error's code; the transaction is run again or split."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    code = error.args[0] if isinstance(error, pymysql.MySQLError) and error.args else None
    RETRIES.labels(str(code) if code in CODES else "other").inc()
