"""Dead letters as operators see them: select, count, group, edit a copy, discard, restore.

Each act of an operator is one transaction with its row in the record of actions. worker.dead_letters.parking parks,
worker.replays replays, worker.dead_letters.states has the states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Connection, Engine, and_, false, func, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.causes import OPEN_STATES, Cause, LetterState, Status
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import DeadLetterNotFound, InvalidRequest
from tombola.producers.domain.operations import parse_request
from tombola.producers.storage import clock
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.faults import explain, is_duplicate_key
from tombola.producers.storage.schema import api_idempotency_requests
from tombola.producers.storage.schema import dead_letters as table
from tombola.worker.dead_letters import states
from tombola.worker.dead_letters.message import VERSION
from tombola.worker.operators import actions

__all__ = ["DeadLetter", "Group", "Selection"]

SHOWN_IDS_MAX: Final = 100
ID_MAX: Final = 2**63 - 1
AGE_S_MAX: Final = 36_500 * 86_400.0


class Selection(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which dead letters: all that meet every condition given here; by default those that are parked.

    Ages are in seconds since the message was last parked. Raises InvalidRequest for a value out of range.
    """

    ids: tuple[int, ...] = ()
    states: tuple[str, ...] = OPEN_STATES
    cause: str | None = None
    group_id: str | None = None
    account_id: int | None = None
    request_key: str | None = None
    older_than_s: float | None = None
    newer_than_s: float | None = None

    def __post_init__(self) -> None:
        for state in self.states:
            if state not in tuple(LetterState):
                raise InvalidRequest(f"there is no state {state!r}: {', '.join(tuple(LetterState))}")
        if self.cause is not None and self.cause not in tuple(Cause):
            raise InvalidRequest(f"there is no cause {self.cause!r}: {', '.join(tuple(Cause))}")
        for number in (*self.ids, self.account_id or 0):
            if abs(number) > ID_MAX:
                raise InvalidRequest(f"an id is at most {ID_MAX}, not {number}")
        for age_s in (self.older_than_s, self.newer_than_s):
            if age_s is not None and not 0 <= age_s <= AGE_S_MAX:
                raise InvalidRequest(f"an age is at most {AGE_S_MAX / 86_400:,.0f} days, not {age_s / 86_400:,.0f}")

    def condition(self, now: datetime) -> ColumnElement[bool]:
        """The selection as SQL. `now` is by the database's clock (producers.storage.clock)."""
        parts: list[ColumnElement[bool]] = [table.c.state.in_(self.states)]
        if self.ids:
            parts.append(table.c.id.in_(self.ids))
        for column, value in (
            (table.c.cause, self.cause),
            (table.c.group_id, self.group_id),
            (table.c.account_id, self.account_id),
            (table.c.request_key, self.request_key),
        ):
            if isinstance(value, str) and not value.isascii():
                parts.append(false())  # no such name exists, and MariaDB refuses the comparison
            elif value is not None:
                parts.append(column == value)
        if self.older_than_s is not None:
            parts.append(table.c.last_parked_at < now - timedelta(seconds=self.older_than_s))
        if self.newer_than_s is not None:
            parts.append(table.c.last_parked_at >= now - timedelta(seconds=self.newer_than_s))
        return and_(*parts)

    def described(self) -> Mapping[str, Any]:
        """The selection for the record: its conditions, with the states also when they are the default."""
        said: dict[str, Any] = msgspec.to_builtins(self)
        return {**said, "states": list(self.states)}


class DeadLetter(NamedTuple):
    """One dead letter: the columns of its row. `body` may be only the beginning of a body of `body_bytes`."""

    id: int
    body_sha256: str
    state: str
    state_at: datetime | None
    cause: str
    error: str
    error_type: str | None
    traceback: str | None
    group_id: str
    body: bytes
    body_bytes: int
    headers: str | None
    request_key: str | None
    lottery_session_id: str | None
    account_id: int | None
    queue: str
    deliveries: int
    times_parked: int
    first_parked_at: datetime
    last_parked_at: datetime
    worker: str | None
    version: str | None
    edited_from: int | None
    replay_id: int | None

    @property
    def is_whole(self) -> bool:
        """Whether the whole body was kept."""
        return len(self.body) == self.body_bytes

    def request(self) -> Request:
        """The request in the body; raises InvalidRequest if it cannot be read, or was not kept whole."""
        return request_in(self.body, self.body_bytes)


def request_in(body: bytes, body_bytes: int) -> Request:
    """The request in a body that was kept; raises InvalidRequest if it cannot be read, or was not kept whole."""
    if len(body) != body_bytes:
        raise InvalidRequest(f"only the first {len(body):,} of {body_bytes:,} bytes were kept")
    return parse_request(body)


@dataclass(frozen=True, slots=True)
class Group:
    """Dead letters that are alike. `title`, `error_type` and `sample_id` are the error, its type and the id of the
    latest."""

    group_id: str
    cause: str
    title: str
    count: int
    first_parked_at: datetime
    last_parked_at: datetime
    sample_id: int
    error_type: str | None


# ---- read ------------------------------------------------------------------------------------------------------------


def some(
    connection: Connection, selection: Selection, *, rows_max: int, before_id: int | None = None
) -> list[DeadLetter]:
    """Up to `rows_max` of the selected dead letters, the latest first, from below `before_id` on."""
    query = select(table).where(selection.condition(clock.now(connection))).order_by(table.c.id.desc()).limit(rows_max)
    if before_id is not None:
        query = query.where(table.c.id < before_id)
    return [DeadLetter(**row._mapping) for row in connection.execute(query)]


def get(connection: Connection, dead_letter_id: int) -> DeadLetter:
    """One dead letter; raises DeadLetterNotFound."""
    row = None
    if abs(dead_letter_id) <= ID_MAX:
        row = connection.execute(select(table).where(table.c.id == dead_letter_id)).first()
    if row is None:
        raise DeadLetterNotFound(f"there is no dead letter {dead_letter_id}")
    return DeadLetter(**row._mapping)


def copies(connection: Connection, dead_letter_id: int) -> list[int]:
    """The ids of the edited copies of a dead letter, ascending."""
    return list(
        connection.execute(
            select(table.c.id).where(table.c.edited_from == dead_letter_id).order_by(table.c.id)
        ).scalars()
    )


def count(connection: Connection, selection: Selection) -> int:
    """The number of selected dead letters."""
    return int(
        connection.execute(
            select(func.count()).select_from(table).where(selection.condition(clock.now(connection)))
        ).scalar_one()
    )


def counts(connection: Connection) -> dict[tuple[str, str], int]:
    """The number of dead letters, by state and cause."""
    rows = connection.execute(select(table.c.state, table.c.cause, func.count()).group_by(table.c.state, table.c.cause))
    return {(state, cause): int(number) for state, cause, number in rows}


def groups(connection: Connection, selection: Selection) -> list[Group]:
    """The selected dead letters by group, the largest group first."""
    found = connection.execute(
        select(
            table.c.group_id,
            table.c.cause,
            func.count().label("number"),
            func.max(table.c.last_parked_at).label("last"),
            # Ids ascend in the order of first parking. The index has the ids, and not that time.
            func.min(table.c.id).label("oldest"),
            func.max(table.c.id).label("sample"),
        )
        .where(selection.condition(clock.now(connection)))
        .group_by(table.c.group_id, table.c.cause)
        .order_by(func.count().desc(), table.c.group_id)
    ).all()
    shown: dict[int, Any] = {}
    ids = sorted({it for row in found for it in (row.oldest, row.sample)})
    for some in chunks(ids):
        some_of_them = select(table.c.id, table.c.error, table.c.error_type, table.c.first_parked_at).where(
            table.c.id.in_(some)
        )
        shown |= {row.id: row for row in connection.execute(some_of_them)}
    return [
        Group(
            row.group_id,
            row.cause,
            shown[row.sample].error,
            row.number,
            shown[row.oldest].first_parked_at,
            row.last,
            row.sample,
            shown[row.sample].error_type,
        )
        for row in found
        if row.oldest in shown and row.sample in shown  # otherwise deleted since the first query
    ]


# ---- act -------------------------------------------------------------------------------------------------------------


def discard(engine: Engine, selection: Selection, *, operator: str, reason: str) -> int:
    """Discard the selected dead letters: they can no longer be replayed, but restored. Returns how many.

    Raises InvalidRequest without a reason, and ServiceUnavailable or ConfigurationError when the database cannot be
    used.
    """
    asked = _in_states(selection, tuple(state for state in selection.states if state in OPEN_STATES))
    return _move(engine, asked, LetterState.DISCARDED, action="discard", operator=operator, reason=reason)


def restore(engine: Engine, selection: Selection, *, operator: str, reason: str) -> int:
    """discarded → parked for the selected dead letters; return how many. Raises as `discard` does."""
    asked = _in_states(selection, (LetterState.DISCARDED,))
    return _move(engine, asked, LetterState.PARKED, action="restore", operator=operator, reason=reason)


def _in_states(selection: Selection, these: tuple[str, ...]) -> Selection:
    return msgspec.structs.replace(selection, states=these)


def _move(engine: Engine, asked: Selection, to: LetterState, *, action: str, operator: str, reason: str) -> int:
    why = actions.checked_reason(reason)
    try:
        with engine.begin() as connection:
            now = clock.now(connection)
            ids = list(
                connection.execute(
                    select(table.c.id).where(asked.condition(now)).order_by(table.c.id).with_for_update()
                ).scalars()
            )
            states.move(connection, ids, to, now)
            details = {"selection": asked.described(), "ids": ids[:SHOWN_IDS_MAX]}
            actions.record(connection, operator=operator, action=action, reason=why, count=len(ids), details=details)
    except SQLAlchemyError as error:
        raise explain(error) from error
    return len(ids)


def edit(engine: Engine, dead_letter_id: int, body: bytes, *, operator: str, reason: str) -> int:
    """Park an edited copy of a dead letter, to be replayed in its place; return the copy's id.

    Raises InvalidRequest if the copy is no draw request, names another request key or account than its original, or
    comes too late because the original's request has settled; otherwise as `discard` does.
    """
    why = actions.checked_reason(reason)
    request = parse_request(body)
    try:
        with engine.begin() as connection:
            now = clock.now(connection)
            original = get(connection, dead_letter_id)
            _refuse_other_claims(original, request)
            refuse_if_settled(connection, original, request)
            copy = {
                "body_sha256": request.fingerprint(),
                "cause": original.cause,
                "error": original.error,
                "group_id": original.group_id,
                "body": request.encode(),
                "body_bytes": len(request.encode()),
                "request_key": request.request_key,
                "lottery_session_id": request.lottery_session_id,
                "account_id": request.account_id,
                "queue": original.queue,
                "worker": operator[:100],
                "version": VERSION,
                "edited_from": original.id,
            }
            copy_id = states.add_copy(connection, copy, now)
            details = {"id": original.id, "copy": copy_id, "before": _text(original.body), "after": _text(body)}
            actions.record(connection, operator=operator, action="edit", reason=why, count=1, details=details)
    except SQLAlchemyError as error:
        if is_duplicate_key(error):
            raise InvalidRequest("this very message is among the dead letters already: replay that one") from None
        raise explain(error) from error
    return copy_id


def _refuse_other_claims(original: DeadLetter, request: Request) -> None:
    for name in ("request_key", "account_id"):
        before, after = getattr(original, name), getattr(request, name)
        if before is not None and before != after:
            raise InvalidRequest(
                f"{name} cannot be edited: it is {before}, not {after}. For another one make a new draw."
            )


def refuse_if_settled(connection: Connection, original: DeadLetter, request: Request) -> None:
    """Raise InvalidRequest if the original, or the request under its key, has settled."""
    settled = original.state == LetterState.SETTLED or bool(settled_keys(connection, [request.request_key]))
    if settled:
        raise InvalidRequest(f"dead letter {original.id} has settled meanwhile: an edited copy would be another draw")


def settled_keys(connection: Connection, request_keys: Sequence[str]) -> set[str]:
    """The keys among `request_keys` whose requests are completed or rejected."""
    book = api_idempotency_requests
    return set(
        connection.execute(
            select(book.c.request_key).where(
                book.c.request_key.in_(sorted(request_keys)),
                book.c.status.in_((Status.COMPLETED, Status.REJECTED)),
            )
        ).scalars()
    )


def _text(body: bytes) -> str:
    return body[:2000].decode(errors="backslashreplace")
