"""The record of operators' actions: who, when, what, why and how many. Rows are only added.

ARCHITECTURE, Invariants: I12.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, insert, select

from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage import clock
from tombola.producers.storage.schema import operator_actions as table

REASON_LENGTH_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class Action:
    """One row of the record; `details` is a JSON object."""

    id: int
    at: datetime
    operator: str
    action: str
    reason: str
    count: int
    details: dict[str, Any]
    replay_id: int | None


def record(
    connection: Connection,
    *,
    operator: str,
    action: str,
    reason: str,
    count: int,
    details: Mapping[str, Any],
    replay_id: int | None = None,
) -> None:
    """Put an action on record, in the transaction of the action. Raises the driver's errors."""
    connection.execute(
        insert(table).values(
            at=clock.now(connection),
            operator=operator,
            action=action,
            reason=reason,
            count=count,
            details=msgspec.json.encode(details).decode(),
            replay_id=replay_id,
        )
    )


def recent(
    connection: Connection,
    *,
    rows_max: int,
    before_id: int | None = None,
    replay_id: int | None = None,
    action: str | None = None,
) -> list[Action]:
    """Up to `rows_max` actions, newest first; from below `before_id` on, of one replay alone, or of one name alone."""
    query = select(table).order_by(table.c.id.desc()).limit(rows_max)
    if before_id is not None:
        query = query.where(table.c.id < before_id)
    if replay_id is not None:
        query = query.where(table.c.replay_id == replay_id)
    if action is not None:
        query = query.where(table.c.action == action)
    return [
        Action(**{**row._mapping, "details": msgspec.json.decode(row.details)}) for row in connection.execute(query)
    ]


def checked_reason(reason: str) -> str:
    """`reason` with single blanks; raises InvalidRequest if it is empty or too long."""
    text = " ".join(reason.split())
    if not text:
        raise InvalidRequest("say why: a reason is put on record with every action")
    if len(text) > REASON_LENGTH_MAX:
        raise InvalidRequest(f"a reason has at most {REASON_LENGTH_MAX:,} characters, this one has {len(text):,}")
    return text


def shell_operator() -> str:
    """The operator of this shell, for the record: shell:account@host."""
    try:
        account = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        account = "?"
    return f"shell:{account}@{socket.gethostname()}"[:100]
