"""The requests without a ledger row: rejected, accepted, dead, or completed and charged no more. Their sessions.

A request with rows is met with its rows (worker.audit.walk).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import Connection, Select, and_, exists, or_, select, true

from tombola.producers.domain.causes import Status
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.audit.parts import Parts

REQUESTS: Final = 20_000  # that one part looks through

Found = tuple[Connection, Sequence[str]]

_HAS_ROWS: Final = exists().where(transactions.c.lottery_session_id == requests.c.lottery_session_id)


def unposted(parts: Parts, since: datetime | None) -> Iterator[Found]:
    """The sessions of requests without ledger rows, some at a time, each time in a part of its own.

    `since` is a time before which no request that has changed was to be published (Mark.publish_at); None: of all
    requests. Accepted requests are met in any case.
    """
    if since is None:
        yield from _of_all(parts)
        return
    for status in (Status.COMPLETED, Status.REJECTED, Status.DEAD):
        yield from _of_status(parts, status, since)
    yield from _of_status(parts, Status.ACCEPTED, None)


def _of_all(parts: Parts) -> Iterator[Found]:
    """Along the index by session."""
    session, after = requests.c.lottery_session_id, ""
    while True:
        with parts.part() as connection:
            last = connection.execute(
                select(session).where(session > after).order_by(session).offset(REQUESTS - 1).limit(1)
            ).scalar()
            query = select(session).where(session > after, ~_HAS_ROWS)
            yield connection, _sessions(connection, query if last is None else query.where(session <= last))
        if last is None:
            return
        after = last


def _of_status(parts: Parts, status: Status, since: datetime | None) -> Iterator[Found]:
    """Along the index by status and time of publication."""
    at, key = requests.c.publish_at, requests.c.request_key
    query = select(requests.c.lottery_session_id).where(requests.c.status == status, ~_HAS_ROWS)
    bounds = select(at, key).where(requests.c.status == status, at.is_not(None)).order_by(at, key)
    after: tuple[datetime, str] | None = None if since is None else (since, "")
    while True:
        with parts.part() as connection:
            from_here = true() if after is None else and_(at >= after[0], or_(at > after[0], key > after[1]))
            last = connection.execute(bounds.where(from_here).offset(REQUESTS - 1).limit(1)).first()
            some = query.where(from_here)
            if last is not None:
                some = some.where(at <= last.publish_at, or_(at < last.publish_at, key <= last.request_key))
            yield connection, _sessions(connection, some)
        if last is None:
            return
        after = (last.publish_at, last.request_key)


def _sessions(connection: Connection, query: Select[str]) -> Sequence[str]:
    return connection.execute(query).scalars().all()
