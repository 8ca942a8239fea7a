"""Read the states of sessions, with their results; and archive: drop the text of results that older releases kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import Connection, select, update

from tombola.producers.domain import operations
from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import Request, parse_result_head
from tombola.producers.domain.operations.operation import Rejection
from tombola.producers.storage.ledger import Posting, postings_of_request, postings_of_sessions
from tombola.producers.storage.requests.records import request_of
from tombola.producers.storage.schema import api_idempotency_requests as table


class SessionState(NamedTuple):
    """The state of one session's request: `result` are the first result's bytes, None before the request settles."""

    request: Request
    caller: str
    status: str
    reason: str | None
    result: bytes | None
    settled_at: datetime | None


def state_of_session(connection: Connection, lottery_session_id: str) -> SessionState | None:
    """The state of this session's request; None for no such session."""
    row = connection.execute(select(table).where(table.c.lottery_session_id == lottery_session_id)).first()
    return None if row is None else _state(connection, row, {})


def _state(connection: Connection, row: Any, found: Mapping[str, Sequence[Posting]]) -> SessionState:
    """The state in this row; its ledger rows are in `found`, by session, or are read."""
    request = request_of(row)
    body = None if row.result is None else row.result.encode()
    if body is None and row.status == Status.COMPLETED:
        own = [it for it in found.get(row.lottery_session_id, ()) if it.ledger_key == request.ledger_key]
        own = own or postings_of_request(connection, row.lottery_session_id, request.ledger_key)
        body = operations.operation_of(request).result(request, own)
    elif body is None and row.status == Status.REJECTED:
        body = operations.operation_of(request).result(request, Rejection(row.reason, row.balance_told))
    return SessionState(request, row.caller, row.status, row.reason, body, row.settled_at)


def states_of_sessions(connection: Connection, lottery_session_ids: Sequence[str]) -> dict[str, SessionState]:
    """The states of these sessions by session id, without sessions that are accepted or unknown.

    At most IN_LIST_MAX at once (producers.storage.chunks).
    """
    rows = connection.execute(
        select(table).where(table.c.lottery_session_id.in_(lottery_session_ids), table.c.status != Status.ACCEPTED)
    ).all()
    completed = [it.lottery_session_id for it in rows if it.status == Status.COMPLETED and it.result is None]
    found = postings_of_sessions(connection, completed)
    return {row.lottery_session_id: _state(connection, row, found) for row in rows}


def archive(connection: Connection, settled_before: datetime, *, rows_max: int) -> int:
    """Drop the result's text of up to `rows_max` requests that older releases settled before then; return how many.

    An answer is rebuilt from the ledger, which keeps its rows for ever, or from the few columns of a rejection.
    """
    rows = connection.execute(
        select(table.c.request_key, table.c.status, table.c.result)
        .where(
            table.c.status.in_((Status.COMPLETED, Status.REJECTED)),
            table.c.settled_at < settled_before,
            # The index leads to the oldest rows; a row without this time is archived already.
            table.c.publish_at < settled_before,
        )
        .limit(rows_max)
        .with_for_update(skip_locked=True)
    ).all()
    kept = {
        row.request_key: parse_result_head(row.result.encode()).balance_after
        for row in rows
        if row.status == Status.REJECTED
    }
    for balance in set(kept.values()):
        keys = [key for key, told in kept.items() if told == balance]
        connection.execute(
            update(table)
            .where(table.c.request_key.in_(keys))
            .values(result=None, publish_at=None, balance_told=None if balance is None else Decimal(balance))
        )
    keys = [row.request_key for row in rows if row.status == Status.COMPLETED]
    if keys:
        connection.execute(update(table).where(table.c.request_key.in_(keys)).values(result=None, publish_at=None))
    return len(rows)
