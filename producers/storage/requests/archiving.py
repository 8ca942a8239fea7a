"""Read the state of a session, and archive: drop the text of old results, which can be rebuilt."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import Connection, select, update

from tombola.producers.domain import keys, operations
from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import Request, parse_result_head
from tombola.producers.domain.operations.operation import Rejection
from tombola.producers.storage.ledger import postings_of_request
from tombola.producers.storage.requests.records import request_of
from tombola.producers.storage.schema import api_idempotency_requests as table


class SessionState(NamedTuple):
    """The state of one session's request: `result` are the first result's bytes, None before the request settles.

    `accepted_at` is None where the request came by the broker alone, `odds_hash` for the built-in campaign, and
    `seed_epoch` (the id of its epoch) where a draw was not bound before it settled.
    """

    request: Request
    caller: str
    status: str
    reason: str | None
    result: bytes | None
    settled_at: datetime | None
    accepted_at: datetime | None = None
    odds_hash: str | None = None
    seed_epoch: int | None = None


def state_of_session(connection: Connection, lottery_session_id: str) -> SessionState | None:
    """The state of this session's request, with the result rebuilt if its row is archived; None for no such session."""
    row = connection.execute(select(table).where(table.c.lottery_session_id == lottery_session_id)).first()
    return None if row is None else _state(connection, row)


def state_of_request(connection: Connection, request_key: str, caller: str) -> SessionState | None:
    """The state of the request that `caller` calls by this key, as state_of_session; None for no such request.

    Where another caller holds the key, it is the request under the caller's alias; otherwise it may be another
    caller's.
    """
    own = keys.alias(caller, request_key)
    rows = connection.execute(select(table).where(table.c.request_key.in_((request_key, own)))).all()
    found = {row.request_key: row for row in rows}
    row = found.get(own) or found.get(request_key)
    return None if row is None else _state(connection, row)


def _state(connection: Connection, row: Any) -> SessionState:
    request, session_id = request_of(row), row.lottery_session_id
    body = None if row.result is None else row.result.encode()
    if body is None and row.status == Status.COMPLETED:
        rows = postings_of_request(connection, session_id, request.ledger_key)
        body = operations.operation_of(request).result(request, rows)
    elif body is None and row.status == Status.REJECTED:
        body = operations.operation_of(request).result(request, Rejection(row.reason, row.balance_told))
    return _state_with(row, request, body)


def _state_with(row: Any, request: Request, body: bytes | None) -> SessionState:
    return SessionState(
        request, row.caller, row.status, row.reason, body, row.settled_at, row.accepted_at, row.odds_hash
    )


def states_of_sessions(connection: Connection, lottery_session_ids: Sequence[str]) -> dict[str, SessionState]:
    """The states of these sessions by session id, without sessions that are accepted or unknown.

    At most IN_LIST_MAX at once (producers.storage.chunks). The result of an archived row is None here, and rebuilt
    by state_of_session.
    """
    rows = connection.execute(
        select(table).where(table.c.lottery_session_id.in_(lottery_session_ids), table.c.status != Status.ACCEPTED)
    )
    return {
        row.lottery_session_id: _state_with(row, request_of(row), None if row.result is None else row.result.encode())
        for row in rows
    }


def archive(connection: Connection, settled_before: datetime, *, rows_max: int) -> int:
    """Drop the result's text of up to `rows_max` requests that settled before then; return how many.

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
