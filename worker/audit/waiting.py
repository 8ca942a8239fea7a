"""I8: nothing accepted waits beyond its time: the relay gives up a request after TOMBOLA_REQUEST_TIMEOUT_S."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from sqlalchemy import Connection, func, select

from tombola.producers.domain.causes import Status
from tombola.producers.storage import clock
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.worker.audit.report import Violation

GRACE_S: Final = 300.0  # the relay looks every minute, and takes many requests one batch after the other


def check_waiting(connection: Connection, request_timeout_s: float) -> Iterator[Violation]:
    """The accepted requests that should have been settled or given up by now."""
    now = clock.now(connection)
    accepted_at = func.coalesce(requests.c.accepted_at, requests.c.created_at, type_=requests.c.accepted_at.type)
    rows = connection.execute(
        select(requests.c.request_key, accepted_at).where(
            requests.c.status == Status.ACCEPTED,
            accepted_at < now - timedelta(seconds=request_timeout_s + GRACE_S),
        )
    )
    for request_key, since in rows:
        hours = (now - since).total_seconds() / 3600
        what = f"was accepted {hours:,.1f} hours ago, and is neither settled nor dead"
        yield Violation("I8", f"request {request_key}", what)
