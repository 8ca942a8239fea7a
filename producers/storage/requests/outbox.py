"""The outbox: the accepted requests that the relay publishes, gives up, or leaves to a worker for a while."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, Engine, and_, func, or_, select, update

from tombola.producers.domain.causes import DeadReason, Status
from tombola.producers.domain.contract import Request
from tombola.producers.storage import clock
from tombola.producers.storage.requests.records import DESCRIBED, request_of
from tombola.producers.storage.schema import api_idempotency_requests as table

PUBLISH_ERROR_LENGTH_MAX: Final = 200


def is_any_overdue(connection: Connection, now: datetime) -> bool:
    """Whether any accepted request is due to be published."""
    return connection.execute(select(table.c.request_key).where(_is_overdue(now)).limit(1)).first() is not None


def last_settled_publish(connection: Connection) -> datetime | None:
    """The latest publish among the requests that settled after their first publish; None where there is none.

    A queue is first in, first out: a request that was published well before that, and has not settled, is in no queue.
    """
    moments = [
        connection.execute(
            select(table.c.published_at)
            .where(table.c.status == status, table.c.publish_at.is_not(None), table.c.publish_attempts == 1)
            .order_by(table.c.publish_at.desc())
            .limit(1)
        ).scalar()
        for status in (Status.COMPLETED, Status.REJECTED)  # a query each, along the index
    ]
    return max((moment for moment in moments if moment is not None), default=None)


def overtaken_before(connection: Connection, after_s: float) -> datetime | None:
    """A request that was published before this moment, and has not settled, is in no queue; None: not known yet."""
    settled_up_to = last_settled_publish(connection)
    return None if settled_up_to is None else settled_up_to - timedelta(seconds=after_s)


class Lease(NamedTuple):
    """The requests that one pass of the relay took: `due` are to be published, `dead` were given up."""

    due: list[Request]
    dead: list[Request]


def lease(
    connection: Connection,
    now: datetime,
    *,
    rows_max: int,
    tries_max: int,
    delay_after: Callable[[int], timedelta],
    published_before: datetime | None,
) -> Lease:
    """Take up to `rows_max` overdue requests: `due` have tries left and are postponed, the others are dead now.

    No other relay takes a due request before `delay_after(attempts)`, so a relay that dies now costs only time.
    With `published_before` a request that was published at that time or later is left in the queue.
    """
    condition = _is_overdue(now)
    if published_before is not None:
        condition = and_(condition, or_(table.c.published_at.is_(None), table.c.published_at < published_before))
        # Usually no request was overtaken: look before each row of a backlog is locked for nothing.
        if connection.execute(select(table.c.request_key).where(condition).limit(1)).first() is None:
            return Lease([], [])
    rows = connection.execute(
        select(*DESCRIBED, table.c.publish_attempts)
        .where(condition)
        .order_by(table.c.publish_at)
        .limit(rows_max)
        .with_for_update(skip_locked=True)
    ).all()
    dead = [request_of(row) for row in rows if row.publish_attempts >= tries_max]
    _mark_dead(connection, dead, DeadReason.NEVER_SETTLED)
    due = [row for row in rows if row.publish_attempts < tries_max]
    for attempts in {row.publish_attempts for row in due}:
        keys = [row.request_key for row in due if row.publish_attempts == attempts]
        connection.execute(
            update(table)
            .where(table.c.request_key.in_(keys))
            .values(
                publish_attempts=attempts + 1,
                publish_error=None,
                published_at=now,
                publish_at=now + delay_after(attempts + 1),
            )
        )
    return Lease([request_of(row) for row in due], dead)


def put_off(connection: Connection, request_keys: Sequence[str], error: str, publish_at: datetime) -> None:
    """Undo the attempt that `lease` counted: the broker did not take these requests, which is no fault of theirs."""
    connection.execute(
        update(table)
        .where(table.c.request_key.in_(request_keys), table.c.status == Status.ACCEPTED)
        .values(
            publish_attempts=table.c.publish_attempts - 1,
            publish_error=error[:PUBLISH_ERROR_LENGTH_MAX],
            published_at=None,
            publish_at=publish_at,
        )
    )


def postpone(engine: Engine, request_keys: Sequence[str], delay: timedelta) -> None:
    """Keep the relay from publishing these requests for `delay`: a worker has them in hand. Locked rows are skipped.

    Raises the driver's errors.
    """
    if not request_keys:
        return
    with engine.begin() as connection:
        free = connection.execute(
            select(table.c.request_key)
            .where(table.c.request_key.in_(request_keys), table.c.status == Status.ACCEPTED)
            .with_for_update(skip_locked=True)
        ).scalars()
        connection.execute(
            update(table).where(table.c.request_key.in_(list(free))).values(publish_at=clock.now(connection) + delay)
        )


def time_out(connection: Connection, accepted_before: datetime, *, rows_max: int) -> list[Request]:
    """accepted → dead for up to `rows_max` requests that were accepted before then; return them."""
    rows = connection.execute(
        select(*DESCRIBED)
        .where(table.c.status == Status.ACCEPTED, table.c.accepted_at < accepted_before)
        .limit(rows_max)
        .with_for_update(skip_locked=True)
    ).all()
    dead = [request_of(row) for row in rows]
    _mark_dead(connection, dead, DeadReason.TIMED_OUT)
    return dead


def oldest_accepted(connection: Connection) -> datetime | None:
    """When the oldest accepted request was accepted; None where no request is accepted."""
    oldest: datetime | None = connection.execute(
        select(func.min(table.c.accepted_at)).where(table.c.status == Status.ACCEPTED)
    ).scalar()
    return oldest


def count_accepted_once(connection: Connection) -> int:
    """`count_accepted` up to 1: the cheapest proof that the table can be read."""
    return count_accepted(connection, count_max=1)


def count_accepted(connection: Connection, *, count_max: int) -> int:
    """The number of accepted requests, counted up to `count_max`."""
    some = select(table.c.request_key).where(table.c.status == Status.ACCEPTED).limit(count_max).subquery()
    return int(connection.execute(select(func.count()).select_from(some)).scalar_one())


def count_accepted_by_caller(connection: Connection) -> dict[str, int]:
    """The number of accepted requests by caller, for callers that have any. Reads the row of each of these requests."""
    rows = connection.execute(
        select(table.c.caller, func.count()).where(table.c.status == Status.ACCEPTED).group_by(table.c.caller)
    )
    return {str(caller): int(count) for caller, count in rows}


def _is_overdue(now: datetime) -> ColumnElement[bool]:
    return and_(table.c.status == Status.ACCEPTED, table.c.publish_at <= now)


def _mark_dead(connection: Connection, dead: Sequence[Request], reason: str) -> None:
    if dead:
        keys = [request.request_key for request in dead]
        connection.execute(update(table).where(table.c.request_key.in_(keys)).values(status=Status.DEAD, reason=reason))
