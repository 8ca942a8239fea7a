"""Put results into the result store, without ever holding up the settling.

A result that the store does not take is put later, by a thread of its own. The number of results kept for this is
bounded: a result that is dropped is rebuilt from the database when a frontend asks for it. So a store that is full,
hung or away delays waiting frontends for a moment, and does nothing to the books.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection, Sequence
from typing import Final

from sqlalchemy import Engine, or_, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.causes import DeadReason, Status
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.results import ResultStore, StoredResult
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import api_idempotency_requests
from tombola.worker import metrics
from tombola.worker.dead_letters.message import Parking

log = logging.getLogger(__name__)

OWED_MAX: Final = 20_000  # some 15 MB
PUT_SIZE_MAX: Final = 500
AGAIN_AFTER_S: Final = 1.0


class Putting:
    """Puts results now, or later when the store is away. `put` may be called from any thread."""

    def __init__(self, store: ResultStore) -> None:
        self.store = store
        self._owed: deque[StoredResult] = deque()
        self._is_away = False
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, results: Sequence[StoredResult]) -> None:
        """Store and announce `results`. Never raises. Does not wait for a store that is known to be away."""
        with self._changed:
            if self._is_away:
                self._owe(results)
                return
        try:
            self.store.put(results)
        except ServiceUnavailable as error:
            self._begin_outage(error, results)

    def renew(self, lottery_session_ids: Sequence[str]) -> Collection[str]:
        """As ResultStore.renew. Never raises: a store that is away lacks all results."""
        if self._is_away or not lottery_session_ids:
            return lottery_session_ids
        try:
            return self.store.renew(lottery_session_ids)
        except ServiceUnavailable as error:
            self._begin_outage(error, ())
            return lottery_session_ids

    def put_dead(self, dead: Sequence[Request], reason: str) -> None:
        """Announce draws that were given up. While the store is away, only the database says so."""
        if self._is_away:
            return
        try:
            self.store.put_dead(dead, reason)
        except ServiceUnavailable as error:
            self._begin_outage(error, ())

    def close(self) -> None:
        """Try once more to put the owed results, and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(2 * AGAIN_AFTER_S)

    def _begin_outage(self, error: ServiceUnavailable, owed: Sequence[StoredResult]) -> None:
        metrics.RESULT_OUTAGES.inc()
        log.warning("%s; draws go on settling, their results are put later", error)
        with self._changed:
            self._is_away = True
            self._owe(owed)
            self._changed.notify()
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="put-later", daemon=True)
                self._thread.start()

    def _owe(self, results: Sequence[StoredResult]) -> None:
        self._owed.extend(results)
        dropped = max(0, len(self._owed) - OWED_MAX)
        for _ in range(dropped):
            self._owed.popleft()
        metrics.RESULTS_DROPPED.inc(dropped)
        metrics.RESULTS_OWED.set(len(self._owed))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_away or self._is_closed)
                some = [self._owed.popleft() for _ in range(min(PUT_SIZE_MAX, len(self._owed)))]
            try:
                self.store.put(some)
                was_put = True
            except ServiceUnavailable:
                was_put = False
            with self._changed:
                if not was_put:
                    self._owed.extendleft(reversed(some))
                self._owe(())
                if self._is_closed and not (was_put and self._owed):
                    return
                if was_put and not self._owed:
                    self._is_away = False
                    log.info("the result store answers again, and has all results")
                if not was_put:
                    self._changed.wait_for(lambda: self._is_closed, AGAIN_AFTER_S)


def announce_dead(engine: Engine, results: Putting, parkings: Sequence[Parking]) -> None:
    """Announce to waiting frontends that these parked draws are dead. Never raises; logs when a server is away.

    A message whose request key or session belongs to another request announces nothing: that request may be in order.
    """
    tried = {request.request_key: request for it in parkings if (request := it.gives_up) is not None}
    book = api_idempotency_requests.c
    dead = list(tried.values())
    try:
        for some in chunks(dead):
            with engine.connect().execution_options(read_only=True) as connection:
                rows = connection.execute(
                    select(book.request_key, book.lottery_session_id, book.fingerprint, book.status).where(
                        or_(
                            book.request_key.in_([it.request_key for it in some]),
                            book.lottery_session_id.in_([it.lottery_session_id for it in some]),
                        )
                    )
                ).all()
            gone = {row.fingerprint for row in rows if row.status == Status.DEAD}
            taken = {row.request_key for row in rows} | {row.lottery_session_id for row in rows}
            results.put_dead(
                [it for it in some if it.fingerprint() in gone or not {it.request_key, it.lottery_session_id} & taken],
                DeadReason.PARKED,
            )
    except SQLAlchemyError as error:
        log.warning("%d draws are parked, and waiting frontends were not told: %s", len(dead), explain(error))
