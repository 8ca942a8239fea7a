"""The state of each request, in `api_idempotency_requests`: this module is the only writer of that table.

    accepted ──► completed      the draw went through, its first result is kept
        └──────► rejected       it was told no, and will be told no again

A request that reaches the worker without having been accepted gets its row when it settles.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final, Literal, NamedTuple

from sqlalchemy import Connection, select

from producers.contract import DrawRequest
from producers.database import Transaction, time_text
from producers.schema import api_idempotency_requests

ACCEPTED: Final = "accepted"

_TABLE: Final = api_idempotency_requests.name
_OUTCOME: Final = ("status", "reason", "result", "settled_at")
_COLUMNS: Final = (
    "request_key", "lottery_session_id", "account_id", "campaign", "fingerprint", "created_at", *_OUTCOME
)  # fmt: skip


class Known(NamedTuple):
    """What is on record of a request; `result` and `settled_at` are None while it is only accepted."""

    fingerprint: str
    status: str
    result: str | None
    settled_at: datetime | None


class Finished(NamedTuple):
    """A request and what became of it."""

    request: DrawRequest
    fingerprint: str
    status: Literal["completed", "rejected"]
    reason: str | None
    result: str
    is_accepted: bool


def look_up(transaction: Transaction, request_keys: Sequence[str]) -> dict[str, Known]:
    """What is on record of these requests, by request key; unknown ones are absent."""
    rows = transaction.select(
        f"SELECT request_key, fingerprint, status, result, settled_at FROM {_TABLE} WHERE request_key IN (??)",
        request_keys,
    )
    return {
        key: Known(fingerprint, status, result, None if settled_at is None else transaction.moment(settled_at))
        for key, fingerprint, status, result, settled_at in rows
    }


def finish(transaction: Transaction, finished: Sequence[Finished], now: datetime) -> None:
    """Record outcomes: new rows in one statement, rows accepted before in another."""
    moment = time_text(now)
    transaction.insert(
        _TABLE,
        _COLUMNS,
        [
            (
                it.request.request_key,
                it.request.lottery_session_id,
                it.request.account_id,
                it.request.campaign,
                it.fingerprint,
                moment,
                it.status,
                it.reason,
                it.result,
                moment,
            )
            for it in finished
            if not it.is_accepted
        ],
    )
    transaction.update(
        _TABLE,
        "request_key",
        _OUTCOME,
        [(it.request.request_key, it.status, it.reason, it.result, moment) for it in finished if it.is_accepted],
    )


def result_of_session(connection: Connection, lottery_session_id: str) -> tuple[bytes, datetime] | None:
    """The first result of a session and when it settled; None while there is none."""
    table = api_idempotency_requests
    row = connection.execute(
        select(table.c.result, table.c.settled_at).where(
            table.c.lottery_session_id == lottery_session_id, table.c.result.is_not(None)
        )
    ).first()
    return None if row is None else (row.result.encode(), row.settled_at)
