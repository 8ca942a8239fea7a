"""Parking: set a message aside with its cause, so that it never stops the others.

The row is committed first, then the message is acked.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.causes import Cause, DeadReason, Status, why_dead
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import DrawError
from tombola.producers.storage import clock, requests
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.faults import Fault, explain, fault_of
from tombola.producers.storage.schema import api_idempotency_requests
from tombola.producers.storage.schema import dead_letters as table
from tombola.producers.storage.transactions import again_after_conflicts
from tombola.worker.dead_letters import states
from tombola.worker.dead_letters.message import Parking
from tombola.worker.dead_letters.states import ROWS_MAX
from tombola.worker.deliveries import Delivery

log = logging.getLogger(__name__)

TRIES_MAX: Final = 5


def here() -> str:
    """The name of this process, for the record: host:pid."""
    return f"{socket.gethostname()}:{os.getpid()}"[:80]


class Unparkable(DrawError):
    """The database refuses these messages, in any form; all others are parked. These must not be acked."""

    def __init__(self, parkings: Sequence[Parking], error: Exception) -> None:
        super().__init__(f"{len(parkings)} messages cannot be parked: {error}")
        self.parkings = list(parkings)


def park(engine: Engine, parkings: Sequence[Parking], *, worker: str) -> list[bool]:
    """Commit a row for each of these messages; return whether each is newly parked.

    The same transaction marks the message's request dead if it was accepted, so that the relay publishes it no more. A
    request with another content under the same key is left alone. A row that the database refuses is parked alone, with
    only the values that any database takes.

    Raises Unparkable when the database refuses those as well, and ServiceUnavailable or ConfigurationError when the
    database cannot be used: then it is unknown what is parked, and no message may be acked.
    """
    news: dict[int, bool] = {}
    refused: list[Parking] = []
    last_error: Exception | None = None
    todo = [(positions, False) for positions in chunks(range(len(parkings)), ROWS_MAX)]
    while todo:
        positions, is_bare = todo.pop(0)
        some = [parkings[position] for position in positions]
        try:
            are_new = _park_at_once(engine, some, worker, is_bare=is_bare)
        except Exception as error:
            if fault_of(error) is not Fault.REFUSED:
                raise explain(error) from error
            if len(some) > 1:
                middle = len(some) // 2
                todo[:0] = [(positions[:middle], False), (positions[middle:], False)]
            elif not is_bare:
                log.warning("the database refuses a dead letter, parking it without its details: %s", error)
                todo[:0] = [(positions, True)]
            else:
                log.error("a message cannot be parked and stays in the queue: %s", error, exc_info=error)
                refused += some
                last_error = error
            continue
        news |= zip(positions, are_new, strict=True)
    if last_error is not None:
        raise Unparkable(refused, last_error)
    return [news[position] for position in range(len(parkings))]


def _park_at_once(engine: Engine, parkings: Sequence[Parking], worker: str, *, is_bare: bool) -> list[bool]:
    """Park these in one transaction, which runs again after conflicts. Raises the driver's errors."""
    given_up = [request for it in parkings if (request := it.gives_up) is not None]

    def act(connection: Connection) -> list[bool]:
        requests.give_up_all(connection, given_up, DeadReason.PARKED)
        return states.park(connection, parkings, worker, clock.now(connection), is_bare=is_bare)

    # A conflict: another worker has parked one of these just now, or each of the two waits for the other.
    return again_after_conflicts(engine, act, tries_max=TRIES_MAX)


def unpark(engine: Engine, parking: Parking) -> None:
    """Take back the row of a message that went through after all; a row with a past is settled instead.

    Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    try:
        with engine.begin() as connection:
            states.take_back(connection, parking.sha256, clock.now(connection))
    except SQLAlchemyError as error:
        raise explain(error) from error


def bury(connection: Connection, given_up: Sequence[Request], reason: str, *, worker: str) -> None:
    """Park requests that the relay gives up, in the transaction that gives them up: each dead request is seen.

    Raises the driver's errors. A dead letter that the database refuses is left out, and logged.
    """
    why = why_dead(reason) or reason
    parkings = [Parking(Delivery(it.encode(), 0, 0), Cause.NEVER_SETTLED, why, it) for it in given_up]
    for some in chunks(parkings, ROWS_MAX):
        if not _bury_some(connection, some, worker):
            for it in some:
                if not _bury_some(connection, [it], worker) and not _bury_some(connection, [it], worker, is_bare=True):
                    log.error("the database refuses a dead letter: %s is dead without one", it.claims[0])


def _bury_some(connection: Connection, parkings: Sequence[Parking], worker: str, *, is_bare: bool = False) -> bool:
    """Park these in the open transaction, all or none; False if the database refuses one of them."""
    try:
        with connection.begin_nested():
            states.park(connection, parkings, worker, clock.now(connection), is_bare=is_bare)
    except Exception as error:
        if fault_of(error) is not Fault.REFUSED:
            raise
        return False
    return True


def bury_unseen_once(engine: Engine, *, worker: str, rows_max: int = ROWS_MAX) -> int:
    """Park up to `rows_max` requests that are dead and have no dead letter; return how many.

    A relay of the previous release gives requests up without a dead letter. Raises ServiceUnavailable or
    ConfigurationError when the database cannot be used.
    """
    book = api_idempotency_requests.c
    unseen = ~select(table.c.id).where(table.c.request_key == book.request_key).exists()
    try:
        with engine.begin() as connection:
            rows = connection.execute(
                select(*requests.DESCRIBED, book.reason).where(book.status == Status.DEAD, unseen).limit(rows_max)
            ).all()
            for reason in {row.reason for row in rows}:
                dead = [requests.request_of(row) for row in rows if row.reason == reason]
                bury(connection, dead, reason or "", worker=worker)
    except SQLAlchemyError as error:
        raise explain(error) from error
    return len(rows)
