"""One step of a replay, in one transaction: accept the requests of some dead letters, and mark those `replaying`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection

from tombola.producers.domain.causes import OPEN_STATES, LetterState, Status
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage import clock, requests
from tombola.producers.storage.requests import RequestRecord, Submission
from tombola.producers.storage.seeds import open_at
from tombola.producers.storage.transactions import Transaction
from tombola.worker.dead_letters import states
from tombola.worker.replays import replay
from tombola.worker.replays.selected import Letter, letters_of, originals_settled
from tombola.worker.replays.vouching import Vouching


@dataclass(frozen=True, slots=True)
class Step:
    """What one transaction did: `revived` requests were dead before, and are in `to_publish` as well."""

    sent: int
    to_publish: list[Request]
    revived: list[Request]


def accept_once(
    connection: Connection, replay_id: int, ids: Sequence[int], vouching: Vouching, *, relay_after: timedelta
) -> Step:
    """Accept the requests of these dead letters; the relay publishes them after `relay_after`, if that is still needed.

    Requests are locked before their dead letters, as everywhere. Raises RowsChanged, which calls for another try, and
    the driver's errors.
    """
    now = clock.now(connection)
    letters = [it for it in letters_of(connection, ids) if it.state in OPEN_STATES]
    asked = _asked(connection, letters)
    joined = Transaction(connection.connection.driver_connection, is_sqlite=connection.dialect.name == "sqlite")
    known = requests.look_up(joined, sorted({it.request_key for it in asked.values()}), lock=True) if asked else {}
    mine = {
        it: request
        for it, request in asked.items()
        if request.request_key not in known or known[request.request_key].fingerprint == request.fingerprint()
    }
    settled = [it for it, request in mine.items() if _is_settled(known.get(request.request_key))]
    headers = {it.id: it.headers for it in letters}
    new = {
        it: request
        for it, request in mine.items()
        if request.request_key not in known and not vouching.why_not(request, headers[it])
    }
    mine = {it: request for it, request in mine.items() if it in new or request.request_key in known}
    publish_at = now + relay_after
    epoch = open_at(connection, now) if new else None
    taken = _accept_new(joined, new, now, publish_at, None if epoch is None else epoch.id)
    dead = [
        request
        for request in mine.values()
        if (found := known.get(request.request_key)) is not None and found.status == Status.DEAD
    ]
    if dead:
        keys = [request.request_key for request in dead]
        requests.revive(connection, keys, now, publish_at=publish_at, is_published=True)
    sent = [it for it in mine if it not in taken and it not in settled]
    states.mark_replayed(connection, sent, replay_id, LetterState.REPLAYING, now)
    states.mark_replayed(connection, settled, replay_id, LetterState.SETTLED, now)
    states.mark_settled(connection, settled, now)
    done = len(sent) + len(settled)
    replay.count_step(connection, replay_id, sent=done, refused=len(letters) - done, now=now)
    to_publish = dead + [request for it, request in new.items() if it not in taken]
    return Step(len(sent), to_publish, dead)


def _asked(connection: Connection, letters: Sequence[Letter]) -> dict[int, Request]:
    """The requests in these dead letters, by id; without unreadable ones, and without copies that come too late."""
    too_late = originals_settled(connection, letters)
    asked: dict[int, Request] = {}
    for it in letters:
        if it.edited_from in too_late:
            continue
        try:
            asked[it.id] = it.request()
        except InvalidRequest:
            continue
    return asked


def _accept_new(
    joined: Transaction, new: Mapping[int, Request], now: datetime, publish_at: datetime, epoch: int | None
) -> set[int]:
    """Accept requests that are not on record; return the ids of dead letters whose key or session is taken."""
    if not new:
        return set()
    asked = [Submission(request) for request in new.values()]
    answers = requests.accept(joined, asked, now, publish_at=publish_at, is_published=True, seed_epoch=epoch)
    return {it for it, answer in zip(new, answers, strict=True) if answer.is_conflict}


def _is_settled(known: RequestRecord | None) -> bool:
    return known is not None and known.is_settled
