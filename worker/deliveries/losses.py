"""What RabbitMQ let go by itself because an operator's policy told it to, and the relay will publish again.

A delivery limit is such a policy, too, where it is lower than ours: each stop of a worker counts as a delivery. So a
request is believed for the first few times that RabbitMQ gives its message up, and parked after that.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import api_idempotency_requests as table
from tombola.worker.deliveries import Delivery
from tombola.worker.metrics import BROKER_LOST, LOST_REASONS

log = logging.getLogger(__name__)

REASON_HEADER: Final = "x-first-death-reason"
DELIVERY_LIMIT: Final = "delivery_limit"
PUBLISHED_MAX: Final = 3  # a request that was published so often and went beyond a limit each time may be to blame


def left_to_relay(engine: Engine, dead: Sequence[Delivery]) -> list[Delivery]:
    """Those of the broker's dead letters that are but lost messages of requests which are on record, and not given up.

    They can be acked: the request's row is the promise, and the relay keeps it. A message that was never accepted is
    not among them, as nothing else knows of it; nor is one that went beyond a delivery limit again and again.
    Raises ServiceUnavailable or ConfigurationError when the database cannot tell.
    """
    lost = [(delivery, request) for delivery in dead if (request := _lost(delivery)) is not None]
    found = []
    for some in chunks(lost):
        promised = _promised(engine, [request for _, request in some])
        found += [
            delivery
            for delivery, request in some
            if (published := promised.get(request.fingerprint())) is not None
            and (_reason(delivery) != DELIVERY_LIMIT or published < PUBLISHED_MAX)
        ]
    for reason in {_reason(delivery) for delivery in found}:
        count = sum(_reason(delivery) == reason for delivery in found)
        BROKER_LOST.labels(reason).inc(count)
        log.warning(
            "RabbitMQ lost %d draws (%s), by a policy on its queues: the relay publishes them again", count, reason
        )
    return found


def _reason(delivery: Delivery) -> str:
    reason = delivery.headers.get(REASON_HEADER)
    return reason if isinstance(reason, str) else ""


def _lost(delivery: Delivery) -> Request | None:
    """What a message asks for that was lost, if it can be read."""
    if _reason(delivery) in LOST_REASONS:
        with suppress(InvalidRequest):
            return delivery.request()
    return None


def _promised(engine: Engine, requests: Sequence[Request]) -> dict[str, int]:
    """How often those were published that were accepted, or have settled already, by fingerprint."""
    keys = sorted({request.request_key for request in requests})
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            told = connection.execute(
                select(table.c.fingerprint, table.c.publish_attempts).where(
                    table.c.request_key.in_(keys), table.c.status != Status.DEAD
                )
            )
            return {row.fingerprint: row.publish_attempts for row in told}
    except SQLAlchemyError as error:
        raise explain(error) from error
