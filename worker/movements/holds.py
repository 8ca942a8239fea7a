"""Holds that nobody has ended in time: each is voided by a request of tombola's own, which a worker settles.

Such a void is accepted like any request, in the outbox: the relay publishes it, and after a lost message publishes it
again. Its key follows from the hold, so any number of relays accept it once.
"""

from __future__ import annotations

import hashlib
import logging
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, Engine, and_, func, or_, select

from tombola.producers.domain.keys import EXPIRY_PREFIX
from tombola.producers.domain.operations.operation import HoldState
from tombola.producers.domain.operations.void import VoidRequest
from tombola.producers.storage import clock, requests
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.schema import account_holds as holds
from tombola.producers.storage.transactions import Transaction
from tombola.worker.operators.once import explained, once

log = logging.getLogger(__name__)

ROWS_MAX: Final = 500
REASON: Final = "expired"
OVERDUE_S: Final = 300.0  # a void takes seconds where relay and workers run


def void_request(hold_key: str, account_id: int) -> VoidRequest:
    """The request that voids an expired hold: always the same one."""
    digest = hashlib.sha256(hold_key.encode()).hexdigest()
    return VoidRequest(
        account_id=account_id, request_key=f"{EXPIRY_PREFIX}hold-{digest[:32]}", hold=hold_key, reason=REASON
    )


def void_expired_once(engine: Engine, *, rows_max: int = ROWS_MAX, pages_max: int = 20) -> int:
    """Accept voids for open holds that have expired, `rows_max` in a transaction; return how many are new.

    A hold whose void was rejected, as its account is full, stays open until an operator ends it: `tombola doctor`
    counts it. Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    accepted = 0
    after: tuple[datetime, str] | None = None
    for _ in range(pages_max):
        with explained(), engine.connect().execution_options(read_only=True) as connection:
            now = clock.now(connection)
            page = _expired(connection, now, after, rows_max)
        if not page:
            break
        voids = [void_request(row.hold_key, row.account_id) for row in page]
        accepted += once(engine, lambda connection, voids=voids: _accept(connection, voids))  # type: ignore[misc]
        if len(page) < rows_max:
            break
        after = (page[-1].expires_at, page[-1].hold_key)
    return accepted


def count_overdue(connection: Connection, *, count_max: int) -> int:
    """The number of open holds that expired OVERDUE_S ago or earlier, counted up to `count_max`."""
    before = clock.now(connection) - timedelta(seconds=OVERDUE_S)
    some = (
        select(holds.c.hold_key)
        .where(holds.c.state == HoldState.OPEN, holds.c.expires_at <= before)
        .limit(count_max)
        .subquery()
    )
    return int(connection.execute(select(func.count()).select_from(some)).scalar_one())


def _expired(connection: Connection, now: datetime, after: tuple[datetime, str] | None, rows_max: int) -> list[Any]:
    query = select(holds.c.hold_key, holds.c.account_id, holds.c.expires_at).where(
        holds.c.state == HoldState.OPEN, holds.c.expires_at <= now
    )
    if after is not None:
        later = and_(holds.c.expires_at == after[0], holds.c.hold_key > after[1])
        query = query.where(holds.c.expires_at >= after[0], or_(holds.c.expires_at > after[0], later))
    return list(connection.execute(query.order_by(holds.c.expires_at, holds.c.hold_key).limit(rows_max)))


def _accept(connection: Connection, voids: list[VoidRequest]) -> int:
    """Accept those of the voids that are not on record, to be published by the relay at once."""
    transaction = Transaction.joining(connection)
    known = requests.look_up(transaction, [it.request_key for it in voids])
    for it in voids:
        record = known.get(it.request_key)
        if record is not None and record.fingerprint != it.fingerprint():
            log.error("hold %s cannot expire: its void's key %s is another request's", it.hold, it.request_key)
    new = [Submission(it) for it in voids if it.request_key not in known]
    if not new:
        return 0
    now = clock.now(connection)
    answers = requests.accept(transaction, new, now, publish_at=now, is_published=False)
    return sum(answer.is_new for answer in answers)
