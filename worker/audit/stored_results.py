"""I6: the result store says what the ledger says.

A sample of the results in each part is compared; those that the store does not have any more are rebuilt from the
database when they are asked for, and are right by I10.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Final

from tombola.producers.domain.errors import DrawError
from tombola.producers.results import ResultStore
from tombola.worker.audit.report import Report, Violation

SAMPLE: Final = 100  # results of each part


class StoredResults:
    """Compares results with the store. A store that is away is no violation: I6 is not looked at then."""

    def __init__(self, store: ResultStore | None, report: Report) -> None:
        self._store = store
        self._report = report
        if store is None:
            report.obstacles["I6"] = "no result store was named: set TOMBOLA_RESULT_URL"

    def compare(self, kept: Mapping[str, str]) -> Iterator[Violation]:
        """Compare some of these results, which the database has kept, by session id."""
        if self._store is None or "I6" in self._report.obstacles or not kept:
            return
        sessions = random.sample(list(kept), min(SAMPLE, len(kept)))
        try:
            stored = self._store.peek_many(sessions)
        except DrawError as error:
            self._report.obstacles["I6"] = str(error)
            return
        for session_id, body in zip(sessions, stored, strict=True):
            if body is not None:
                self._report.results += 1
                if body != kept[session_id].encode():
                    what = "the result store has another result than the database"
                    yield Violation("I6", f"session {session_id}", what)
