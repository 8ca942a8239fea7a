"""Parking: set a message aside with its cause, so that it never stops the others.

The row is committed first, then the message is acked. A message is known by its request's fingerprint, or by its
bytes if it is no request: the same one parked twice is one row, also when it was replayed in between. What nobody
vouches for (STRANGERS) has rows of its own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy import Connection, Engine, delete, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.brokers.streams import QUEUE
from tombola.producers.domain.causes import OPEN_STATES, STRANGERS, Cause, DeadReason, LetterState, Status, why_dead
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.errors import DrawError
from tombola.producers.storage import clock, requests
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.faults import Fault, explain, fault_of
from tombola.producers.storage.schema import api_idempotency_requests
from tombola.producers.storage.schema import dead_letters as table
from tombola.producers.storage.transactions import again_after_conflicts
from tombola.worker.deliveries import BODY_KEPT_BYTES_MAX, Delivery

log = logging.getLogger(__name__)

# A dead letter is parked until an operator replays or discards it; what is replayed settles, or is parked again.


# Messages that may be anybody's. What they ask for is perhaps an honest caller's as well, who must not suffer for it:
# they are known by another name than his request's, and nothing is given up for them.


HEADERS_KEPT_LENGTH_MAX: Final = 8 * 1024
ERROR_LENGTH_MAX: Final = 2000
TRACEBACK_LENGTH_MAX: Final = 12 * 1024  # in four bytes each it still fits a TEXT
ROWS_MAX: Final = 500  # dead letters in one statement: each brings its body along
TRIES_MAX: Final = 5
VERSION: Final = version("tombola")
INSTALLED_IN: Final = f"{Path(__file__).parents[2]}{os.sep}"


def here() -> str:
    """Which process this is: host:pid."""
    return f"{socket.gethostname()}:{os.getpid()}"[:80]


class Parking(NamedTuple):
    """A message to set aside. `request` is what it asks for, if it can be read."""

    delivery: Delivery
    cause: str
    error: str
    request: Request | None = None
    exception: BaseException | None = None
    # Not tried yet: what it asks for is not given up.
    is_tried: bool = True
    # The request was given up before: that was recorded then, with the cause that mattered.
    is_echo: bool = False

    @property
    def claims(self) -> tuple[str | None, str | None, int | None]:
        """The request key, session and account that it names, as far as they can be read and fit their columns."""
        if self.request is None:
            return _claims(self.delivery.body)
        return self.request.request_key, self.request.lottery_session_id, self.request.account_id

    @property
    def sha256(self) -> str:
        """What the message is known by."""
        name = self.delivery.sha256 if self.request is None else self.request.fingerprint()
        return hashlib.sha256(f"stranger:{name}".encode()).hexdigest() if self.is_strangers else name

    @property
    def is_strangers(self) -> bool:
        """Whether the message may be anybody's."""
        return self.cause in STRANGERS

    @property
    def gives_up(self) -> Request | None:
        """The request that is dead from here on, if it was accepted."""
        return self.request if self.is_tried and not self.is_strangers else None


class Unparkable(DrawError):
    """The database refuses to hold these messages, in any form; all others are parked. They must not be acked."""

    def __init__(self, parkings: Sequence[Parking], error: Exception) -> None:
        super().__init__(f"{len(parkings)} messages cannot be parked: {error}")
        self.parkings = list(parkings)


def park(engine: Engine, parkings: Sequence[Parking], *, worker: str) -> list[bool]:
    """Commit a row for each of these messages; whether each is newly parked.

    In the same transaction a request that was accepted is marked dead: the relay publishes it no more. A request with
    another content under the same key is left alone. Where the database refuses a row, it is parked alone, with the
    little that any database takes.

    Raises Unparkable when it refuses that as well, and ServiceUnavailable or ConfigurationError when it cannot be
    used: then nothing is known to be parked, and nothing is to be acked.
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
                log.warning("the database refuses a dead letter, parking it without what came beside it: %s", error)
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
        return _park(connection, parkings, worker, clock.now(connection), is_bare=is_bare)

    # Another worker parked one of them just now, or waits for us as we for it.
    return again_after_conflicts(engine, act, tries_max=TRIES_MAX)


def unpark(engine: Engine, parking: Parking) -> None:
    """Take back the row of a message that went through after all; one with a past is settled instead."""
    mine = table.c.body_sha256 == parking.sha256
    try:
        with engine.begin() as connection:
            row = connection.execute(select(table.c.replay_id, table.c.times_parked).where(mine)).first()
            if row is not None and row.replay_id is None and row.times_parked == 1:
                connection.execute(delete(table).where(mine))
            else:
                connection.execute(
                    update(table).where(mine).values(state=LetterState.SETTLED, state_at=clock.now(connection))
                )
    except SQLAlchemyError as error:
        raise explain(error) from error


def bury(connection: Connection, given_up: Sequence[Request], reason: str, *, worker: str) -> None:
    """Park requests that the relay has given up, in the transaction in which it does: nothing dies unseen."""
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
            _park(connection, parkings, worker, clock.now(connection), is_bare=is_bare)
    except Exception as error:
        if fault_of(error) is not Fault.REFUSED:
            raise
        return False
    return True


def bury_unseen_once(engine: Engine, *, worker: str, rows_max: int = ROWS_MAX) -> int:
    """Park up to rows_max requests that are dead and have no dead letter; return how many.

    A relay of the release before this one gives requests up and tells nobody.
    """
    book = api_idempotency_requests.c
    unseen = ~select(table.c.id).where(table.c.request_key == book.request_key).exists()
    try:
        with engine.begin() as connection:
            rows = connection.execute(
                select(book.request_key, book.lottery_session_id, book.account_id, book.campaign, book.reason)
                .where(book.status == Status.DEAD, unseen)
                .limit(rows_max)
            ).all()
            for reason in {row.reason for row in rows}:
                dead = [requests.request_of(row) for row in rows if row.reason == reason]
                bury(connection, dead, reason or "", worker=worker)
    except SQLAlchemyError as error:
        raise explain(error) from error
    return len(rows)


def follow_up_once(engine: Engine, *, rows_max: int = 10 * ROWS_MAX) -> int:
    """Mark up to rows_max replayed dead letters settled whose requests have settled meanwhile; return how many.

    With an edited copy its original is settled as well: what was asked for has happened.
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
                settle(connection, some, clock.now(connection))
    except SQLAlchemyError as error:
        raise explain(error) from error
    return len(ids)


def settle(connection: Connection, ids: Sequence[int], now: datetime) -> None:
    """replaying → settled for these, and for the originals of those that are edited copies."""
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


def _park(
    connection: Connection, parkings: Sequence[Parking], worker: str, now: datetime, *, is_bare: bool = False
) -> list[bool]:
    by_sha = {it.sha256: it for it in parkings}  # the same message twice at once is one row: the last one tells
    known = {
        row.body_sha256: row
        for row in connection.execute(
            select(table.c.body_sha256, table.c.id, table.c.state)
            .where(table.c.body_sha256.in_(sorted(by_sha)))
            .with_for_update()
        )
    }
    bare = _BARE if is_bare else {}
    new = [_row(it, worker, now) | {"body_sha256": sha} | bare for sha, it in by_sha.items() if sha not in known]
    for sha, row in known.items():
        again = _again(by_sha[sha], row.state, worker, now)
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


# What may be odd about a message, in a form that any database takes. Its body is kept: that is bytes.
_BARE: Final[dict[str, Any]] = {
    "headers": None,
    "error": "the database refused the whole of what was to be said: see the worker's log",
    "error_type": None,
    "traceback": None,
    "request_key": None,
    "lottery_session_id": None,
    "account_id": None,
    "deliveries": 1,
}


def _row(parking: Parking, worker: str, now: datetime) -> dict[str, Any]:
    delivery = parking.delivery
    key, session, account_id = parking.claims
    return {
        **_why(parking, worker, now),
        "state": LetterState.PARKED,
        "body": delivery.body[:BODY_KEPT_BYTES_MAX],
        "body_bytes": delivery.body_bytes,
        "headers": _headers(delivery.headers),
        "request_key": key,
        "lottery_session_id": session,
        "account_id": account_id,
        "queue": QUEUE,
        "deliveries": delivery.count,
        "times_parked": 1,
        "first_parked_at": now,
        "last_parked_at": now,
    }


def _again(parking: Parking, state: str, worker: str, now: datetime) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "times_parked": table.c.times_parked + 1,
        "deliveries": max(1, parking.delivery.count),
        "last_parked_at": now,
    }
    if not (parking.is_echo and state in OPEN_STATES):
        changes |= _why(parking, worker, now)
    if state != LetterState.PARKED:
        changes |= {"state": LetterState.PARKED_AGAIN, "state_at": now}
    return changes


def _why(parking: Parking, worker: str, now: datetime) -> dict[str, Any]:
    error, exception = _storable(parking.error)[:ERROR_LENGTH_MAX], parking.exception
    stack = None
    # Our own errors say all in their words, and are raised in the same few places.
    if exception is not None and not isinstance(exception, DrawError):
        stack = _storable("".join(traceback.format_exception(exception)))
        # Where it is installed is nobody's business, and a long word in every line.
        stack = stack.replace(f'File "{INSTALLED_IN}', 'File "')
    return {
        "cause": parking.cause,
        "error": error,
        "error_type": None if exception is None else type(exception).__name__.encode("ascii", "replace").decode()[:100],
        "traceback": None if stack is None else stack[-TRACEBACK_LENGTH_MAX:],
        "group_id": group_of(parking.cause, error, exception),
        "worker": worker[:100],
        "version": VERSION[:32],
        "state_at": now,
    }


def _storable(text: str) -> str:
    """Without what UTF-8 cannot say: a row that the database refuses would stop everybody."""
    return text.encode("utf-8", "backslashreplace").decode()


# ---- groups ----------------------------------------------------------------------------------------------------------

# What differs between two messages that died of the same: quoted words, keys and hashes, numbers.
_QUOTED: Final = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
_SOME: Final = re.compile(r"'#'(?:, '#')+")
_TOKEN: Final = re.compile(r"\b(?=\w*\d)[\w.\-]{6,}\b")
_NUMBER: Final = re.compile(r"\b0x[0-9a-f]+|\d+(?:,\d{3})*")
# What does not: the words in which the parser names our own fields, and JSON's types.
_OURS: Final = frozenset(
    f"`{word}`"
    for name in ("v", *DrawRequest.__struct_fields__)
    for word in (name, f"$.{name}", "str", "int", "float", "bool", "null", "array", "object")
)


def group_of(cause: str, error: str, exception: BaseException | None = None) -> str:
    """The group of a dead letter, 16 hex digits: alike in cause, and in the error's type and place or its words.

    Our own errors are told apart by their words, for they are all raised in the same few places; others by the
    functions they passed through, for their words quote the message.
    """
    if exception is None or isinstance(exception, DrawError):
        signature = normalised(error)
    else:
        frames = traceback.extract_tb(exception.__traceback__)
        signature = " ".join(f"{frame.filename.rpartition('/')[2]}:{frame.name}" for frame in frames)
    kind = "" if exception is None else type(exception).__qualname__
    return hashlib.sha256("\n".join((cause, kind, signature)).encode(errors="replace")).hexdigest()[:16]


def normalised(error: str) -> str:
    """`error` without what is one message's own."""
    words = _SOME.sub("'#'", _QUOTED.sub(lambda quoted: quoted[0] if quoted[0] in _OURS else "'#'", error))
    return _NUMBER.sub("#", _TOKEN.sub("#", words))


# ---- what a message says of itself -----------------------------------------------------------------------------------


def _claims(body: bytes) -> tuple[str | None, str | None, int | None]:
    """The request key, session and account id that a message names, as far as they fit their columns."""
    try:
        loose: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None, None, None
    if not isinstance(loose, dict):
        return None, None, None
    account_id = loose.get("account_id")
    id_fits = isinstance(account_id, int) and not isinstance(account_id, bool) and abs(account_id) < 2**63
    return (
        _fitting(loose.get("request_key"), 64),
        _fitting(loose.get("lottery_session_id"), 100),
        account_id if id_fits else None,
    )


def _fitting(text: Any, length_max: int) -> str | None:
    fits = isinstance(text, str) and 0 < len(text) <= length_max and text.isascii() and text.isprintable()
    return text if fits else None


def _headers(headers: Mapping[str, Any]) -> str | None:
    """The headers as a JSON object; what JSON cannot hold as its repr, what is too long cut off."""
    if not headers:
        return None
    kept: dict[str, Any] = {}
    room = HEADERS_KEPT_LENGTH_MAX
    for name, value in headers.items():
        try:
            text = msgspec.json.encode(value).decode()
        except (TypeError, ValueError, OverflowError, RecursionError):
            text = value = _shown(value)
        room -= len(text) + len(str(name))
        if room < 0:
            kept["…"] = "too long: the rest was left out"
            break
        kept[_storable(str(name))] = value
    return msgspec.json.encode(kept).decode()


def _shown(value: Any) -> str:
    """What a value looks like, of whatever kind a stranger sent it."""
    try:
        return _storable(repr(value))
    except RecursionError:
        return f"a {type(value).__name__} nested too deep"
