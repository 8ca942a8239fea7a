"""What a story shows beside a draw's rows: a request's own fields, and what later requests did to a draw or a hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from tombola.producers.domain import operations
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage import ledger


def fields_of(row: Mapping[str, Any] | None) -> Sequence[tuple[str, Any]]:
    """The fields of a request's own kind, by its row, without empty ones; none of an unreadable row."""
    if row is None or row["kind"] is None:
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
    others = (it for it in ledger.rows_under(connection, request_key) if it["lottery_session_id"] != lottery_session_id)
    # An opening under the same key is no request's: its row is a session of its own, with the colon of a ledger key.
    return [row for row in others if ":" not in row["lottery_session_id"]]
