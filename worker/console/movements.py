"""What a story shows of other requests than draws: their fields, and what later requests did to a draw or a hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, select

from tombola.producers.domain import operations
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.operations.refund import REFUND_TYPE
from tombola.producers.domain.operations.void import POST_TYPE, VOID_TYPE
from tombola.producers.storage import ledger
from tombola.producers.storage.schema import asset_transactions as transactions

# The types of rows that a later request writes under the ledger key of a draw or a hold.
LATER_TYPES: Final = (REFUND_TYPE, POST_TYPE, VOID_TYPE)


def fields_of(row: Mapping[str, Any] | None) -> Sequence[tuple[str, Any]]:
    """The fields of a request's own kind, by its row, without empty ones; none of a draw, or of an unreadable row."""
    if row is None or row["kind"] in (None, "draw"):
        return ()
    described = ("request_key", "lottery_session_id", "account_id", "campaign", "kind", "terms")
    try:
        request = operations.restore(*(row[name] for name in described))
    except InvalidRequest:
        return ()
    names = [name for name in request.__struct_fields__ if name not in Request.__struct_fields__ and name != "campaign"]
    return [(name, value) for name in names if (value := getattr(request, name)) not in ("", None)]


def later_rows(connection: Connection, request_key: str, lottery_session_id: str) -> list[dict[str, Any]]:
    """The ledger rows by which other requests took this one back or ended it, in their order."""
    keys = [f"{request_key}:{it}" for it in LATER_TYPES]
    sessions = connection.execute(
        select(transactions.c.lottery_session_id).where(transactions.c.idempotency_key.in_(keys)).distinct()
    ).scalars()
    return [
        row
        for session in sorted(set(sessions) - {lottery_session_id})
        for row in ledger.session_rows(connection, session)
        if row["idempotency_key"].partition(":")[0] == request_key
    ]
