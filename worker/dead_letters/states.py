"""The states of dead letters: the only writer of their table.

    parked ──► replaying ──► settled
      │ ▲          └───────► parked again ──► replaying …
      ▼ │
    discarded

A message has one row, found by its SHA-256 (`Parking.sha256`), also when it was replayed in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Engine, delete, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.causes import OPEN_STATES, LetterState, Status
from tombola.producers.storage import clock
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.faults import RowsChanged, explain
from tombola.producers.storage.schema import api_idempotency_requests
from tombola.producers.storage.schema import dead_letters as table
from tombola.worker.dead_letters.message import BARE, Parking, death, new_row

ROWS_MAX: Final = 500  # dead letters in one statement: each brings its body along


def park(
    connection: Connection, parkings: Sequence[Parking], worker: str, now: datetime, *, is_bare: bool = False
) -> list[bool]:
    """Write a row for each of these messages; return whether each is newly parked.

    With `is_bare` the rows hold only values that any database takes.
    """
    by_sha = {it.sha256: it for it in parkings}  # the same message twice at once is one row: the last one's
    known = {
        row.body_sha256: row
        for row in connection.execute(
            select(table.c.body_sha256, table.c.id, table.c.state)
            .where(table.c.body_sha256.in_(sorted(by_sha)))
            .with_for_update()
        )
    }
    bare = BARE if is_bare else {}
    new = [new_row(it, worker, now) | {"body_sha256": sha} | bare for sha, it in by_sha.items() if sha not in known]
    for sha, row in known.items():
        again = _parked_again(by_sha[sha], row.state, worker, now)
        again |= {name: value for name, value in bare.items() if name in again}
        connection.execute(update(table).where(table.c.id == row.id).values(again))
    if new:
        connection.execute(insert(table), new)
    unseen = {sha for sha in by_sha if sha not in known or known[sha].state not in OPEN_STATES}
    news = []
    for it in parkings:
        sha = it.sha256
        news.append(sha in unseen)
        unseen.discard(sha)
    return news


def _parked_again(parking: Parking, state: str, worker: str, now: datetime) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "times_parked": table.c.times_parked + 1,
        "deliveries": max(1, parking.delivery.count),
        "last_parked_at": now,
    }
    if not (parking.is_echo and state in OPEN_STATES):
        changes |= death(parking, worker, now)
    if state != LetterState.PARKED:
        changes |= {"state": LetterState.PARKED_AGAIN, "state_at": now}
    return changes


def take_back(connection: Connection, sha256: str, now: datetime) -> None:
    """Delete the row of a message that went through after all; a row that was parked or replayed before is settled."""
    mine = table.c.body_sha256 == sha256
    row = connection.execute(select(table.c.replay_id, table.c.times_parked).where(mine)).first()
    if row is not None and row.replay_id is None and row.times_parked == 1:
        connection.execute(delete(table).where(mine))
    else:
        connection.execute(update(table).where(mine).values(state=LetterState.SETTLED, state_at=now))


def add_copy(connection: Connection, values: Mapping[str, Any], now: datetime) -> int:
    """Park an edited copy with these values, by column name; return its id. Raises the driver's error if it exists."""
    row = {
        **values,
        "state": LetterState.PARKED,
        "state_at": now,
        "deliveries": 0,
        "times_parked": 1,
        "first_parked_at": now,
        "last_parked_at": now,
    }
    (copy_id,) = connection.execute(insert(table).values(row)).inserted_primary_key or (0,)
    return int(copy_id)


def move(connection: Connection, ids: Sequence[int], to: LetterState, now: datetime) -> None:
    """Discard or restore rows that are locked."""
    for some in chunks(ids):
        connection.execute(update(table).where(table.c.id.in_(some)).values(state=to, state_at=now))


def mark_replayed(
    connection: Connection, ids: Sequence[int], replay_id: int, state: LetterState, now: datetime
) -> None:
    """parked → `state`, replaying or settled, for the dead letters of one step of a replay.

    Raises RowsChanged if another replay was quicker, or an operator has discarded some.
    """
    if not ids:
        return
    marked = connection.execute(
        update(table)
        .where(table.c.id.in_(ids), table.c.state.in_(OPEN_STATES))
        .values(state=state, state_at=now, replay_id=replay_id)
    ).rowcount
    if marked != len(ids):
        raise RowsChanged


def mark_settled(connection: Connection, ids: Sequence[int], now: datetime) -> None:
    """replaying → settled for these, and parked → settled for the originals of edited copies among them."""
    connection.execute(
        update(table)
        .where(table.c.id.in_(ids), table.c.state.in_((LetterState.REPLAYING, *OPEN_STATES)))
        .values(state=LetterState.SETTLED, state_at=now)
    )
    originals = [
        it
        for it in connection.execute(select(table.c.edited_from).where(table.c.id.in_(ids)).distinct()).scalars()
        if it is not None
    ]
    if originals:
        connection.execute(
            update(table)
            .where(table.c.id.in_(originals), table.c.state.in_(OPEN_STATES))
            .values(state=LetterState.SETTLED, state_at=now)
        )


def follow_up_once(engine: Engine, *, rows_max: int = 10 * ROWS_MAX) -> int:
    """Mark up to `rows_max` replayed dead letters settled whose requests have settled since; return how many.

    With an edited copy its original is settled as well: what it asked for has happened. Raises ServiceUnavailable or
    ConfigurationError when the database cannot be used.
    """
    book = api_idempotency_requests
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            ids = list(
                connection.execute(
                    select(table.c.id)
                    .join(book, book.c.request_key == table.c.request_key)
                    .where(
                        table.c.state == LetterState.REPLAYING, book.c.status.in_((Status.COMPLETED, Status.REJECTED))
                    )
                    .limit(rows_max)
                ).scalars()
            )
        for some in chunks(ids, ROWS_MAX):
            with engine.begin() as connection:
                mark_settled(connection, some, clock.now(connection))
    except SQLAlchemyError as error:
        raise explain(error) from error
    return len(ids)
