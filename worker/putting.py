"""Putting results where frontends look, without ever holding up the settling.

A result that the store does not take is put later, by a thread of its own. How many are kept for that is bounded: what
is dropped is rebuilt from the database when it is asked for. So a store that is full, hung or away costs waiting
frontends a moment, and the books nothing.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Final

from producers.errors import ServiceUnavailable
from producers.results import ResultStore, StoredResult
from worker import metrics

log = logging.getLogger(__name__)

OWED_MAX: Final = 20_000  # some 15 MB
PUT_SIZE_MAX: Final = 500
AGAIN_AFTER_S: Final = 1.0


class Putting:
    """Puts results now, or else later. `put` may be called from any thread."""

    def __init__(self, store: ResultStore) -> None:
        self.store = store
        self._owed: deque[StoredResult] = deque()
        self._is_away = False
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, results: Sequence[StoredResult]) -> None:
        """Store and announce `results`. Never raises, and does not wait for a store that is known to be away."""
        with self._changed:
            if self._is_away:
                self._owe(results)
                return
        try:
            self.store.put(results)
        except ServiceUnavailable as error:
            metrics.RESULT_OUTAGES.inc()
            log.warning("%s; draws go on settling, their results are put later", error)
            with self._changed:
                self._is_away = True
                self._owe(results)
                self._changed.notify()
                if self._thread is None and not self._is_closed:
                    self._thread = threading.Thread(target=self._run, name="put-later", daemon=True)
                    self._thread.start()

    def close(self) -> None:
        """Make one more attempt at what is owed, and end."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(2 * AGAIN_AFTER_S)

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
