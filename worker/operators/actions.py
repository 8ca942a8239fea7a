"""The record of operators' actions: who, when, what, why and how many. Rows are only added.

An act that moves money or keys happens once under its key (`act_once`): a repeat changes nothing, and gets what the
first one came to. ARCHITECTURE, Invariants: I12.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy import Connection, Engine, insert, select

from tombola.producers.domain.errors import IdempotencyKeyReused, InvalidRequest
from tombola.producers.domain.keys import check_request_key, make_act_key
from tombola.producers.storage import clock
from tombola.producers.storage.schema import operator_actions as table
from tombola.worker.operators.once import once

REASON_LENGTH_MAX: Final = 1000
# The names of acts on users; the audit compares the record with the users (worker.audit.on_record).
USER_ADD: Final = "user add"
USER_REMOVE: Final = "user remove"
USER_ROLE: Final = "user role"
USER_PASSWORD: Final = "user password"


@dataclass(frozen=True, slots=True)
class Action:
    """One row of the record; `details` is a JSON object, `act_key` the key under which it happened once."""

    id: int
    at: datetime
    operator: str
    action: str
    reason: str
    count: int
    details: dict[str, Any]
    replay_id: int | None
    act_key: str | None = None


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


class Act(NamedTuple):
    """An act of an operator: its name, and what is asked for, as JSON; who asks for it and why; and its key."""

    name: str
    asked: Mapping[str, Any]
    operator: str
    reason: str
    key: str

    @classmethod
    def of(cls, name: str, asked: Mapping[str, Any], *, by: str | None = None, reason: str = "", key: str = "") -> Act:
        """An act by the operator of this shell, if not `by` another one; without a `key` one is made.

        Raises InvalidRequest for a reason that is too long, and InvalidKey.
        """
        return cls(
            name,
            asked,
            by or shell_operator(),
            checked_reason(reason) if reason else "",
            check_request_key(key) if key else make_act_key(name.replace(" ", "_")),
        )


class Done(NamedTuple):
    """What an act came to, now or, if it `is_repeat`, the first time: what was asked for, and what `do` added."""

    details: Mapping[str, Any]
    is_repeat: bool = False


def act_once(engine: Engine, act: Act, do: Callable[[Connection], Mapping[str, Any] | None]) -> Done:
    """Do something and put it on record in one transaction, once under the act's key.

    `do` returns what came of it, for the record; None where nothing had to be changed, which is not recorded. Raises
    what `do` raises; IdempotencyKeyReused if the key belongs to another act; ServiceUnavailable or ConfigurationError
    when the database cannot be used: then the same act under the same key finds out what has happened.
    """

    def run(connection: Connection) -> Done:
        known = connection.execute(select(table).where(table.c.act_key == act.key)).first()
        if known is not None:
            details = msgspec.json.decode(known.details)
            if (known.action, {**details, **act.asked}) != (act.name, details):
                raise IdempotencyKeyReused(f"the key {act.key} was used for another act: nothing is changed")
            return Done(details, is_repeat=True)
        came_to = do(connection)
        if came_to is None:
            return Done(act.asked)
        connection.execute(
            insert(table).values(
                at=clock.now(connection),
                operator=act.operator,
                action=act.name,
                reason=act.reason,
                count=1,
                details=msgspec.json.encode({**act.asked, **came_to}).decode(),
                act_key=act.key,
            )
        )
        return Done({**act.asked, **came_to})

    return once(engine, run)


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
