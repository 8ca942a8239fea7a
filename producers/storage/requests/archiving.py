"""Read the states of sessions, with their results; and archive: drop the text of results that older releases kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, select, update

from tombola.producers.domain import keys, operations
from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import Request, parse_result_head
from tombola.producers.domain.operations.operation import Rejection
from tombola.producers.storage.ledger import Posting, postings_of_request, postings_of_sessions
from tombola.producers.storage.requests.records import request_of
from tombola.producers.storage.schema import api_idempotency_requests as table

NOTHING_READ: Final[Mapping[str, Sequence[Posting]]] = MappingProxyType({})


class SessionState(NamedTuple):
    """The state of one session's request: `result` are the first result's bytes, None before the request settles.

    `accepted_at` is None where the request came by the broker alone, `odds_hash` for the built-in campaign, and
    `seed_epoch` (the number of its epoch) where a draw was not bound before it settled.
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
    """The state of this session's request; None for no such session."""
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


def _state(connection: Connection, row: Any, found: Mapping[str, Sequence[Posting]] = NOTHING_READ) -> SessionState:
    """The state in this row; its ledger rows are in `found`, by session, or are read."""
    request = request_of(row)
    body = None if row.result is None else row.result.encode()
    if body is None and row.status == Status.COMPLETED:
        own = [it for it in found.get(row.lottery_session_id, ()) if it.ledger_key == request.ledger_key]
        own = own or postings_of_request(connection, row.lottery_session_id, request.ledger_key)
        body = operations.operation_of(request).result(request, own)
    elif body is None and row.status == Status.REJECTED:
        body = operations.operation_of(request).result(request, Rejection(row.reason, row.balance_told))
    outcome = (row.status, row.reason, body, row.settled_at)
    return SessionState(request, row.caller, *outcome, row.accepted_at, row.odds_hash, row.seed_epoch)


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
    archived = _archive(connection, Status.COMPLETED, settled_before, rows_max)
    return archived + _archive(connection, Status.REJECTED, settled_before, rows_max - archived)


def _archive(connection: Connection, status: Status, settled_before: datetime, rows_max: int) -> int:
    """`archive` of the requests with this status, the oldest first.

    Requests with a text are older than those of this release, but for the days on which two releases settle side by
    side. So rows without a text end the search; beside rows with a text they count as archived, too.
    """
    rows = connection.execute(
        select(table.c.request_key, table.c.result)
        # The index leads to the oldest rows; a row without `publish_at` is archived already.
        .where(table.c.status == status, table.c.publish_at < settled_before, table.c.settled_at < settled_before)
        .order_by(table.c.publish_at)
        .limit(rows_max)
        .with_for_update(skip_locked=True)
    ).all()
    texts = {row.request_key: row.result for row in rows if row.result is not None}
    if not texts:
        return 0
    if status == Status.REJECTED:
        told = {key: parse_result_head(text.encode()).balance_after for key, text in texts.items()}
        for balance in set(told.values()):
            keys_told = [key for key, it in told.items() if it == balance]
            connection.execute(
                update(table)
                .where(table.c.request_key.in_(keys_told))
                .values(balance_told=None if balance is None else Decimal(balance))
            )
    looked_at = [row.request_key for row in rows]
    connection.execute(update(table).where(table.c.request_key.in_(looked_at)).values(result=None, publish_at=None))
    return len(texts)
