"""I6: the result store says what the ledger says.

Of the results in each part a sample is rebuilt, and compared with the store. A result that the store does not have any
more is rebuilt by the same code when it is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.errors import DrawError
from tombola.producers.results import ResultStore
from tombola.producers.storage.requests import SessionState, states_of_sessions
from tombola.worker.audit.report import Report, Violation

SAMPLE: Final = 100  # results of each part


class StoredResults:
    """Compares results with the store. A store that is away is no violation: I6 is not looked at then."""

    def __init__(self, store: ResultStore | None, report: Report) -> None:
        self._store = store
        self._report = report
        if store is None:
            report.obstacles["I6"] = "no result store was named: set TOMBOLA_RESULT_URL"

    def compare(self, connection: Connection, settled: Sequence[str]) -> Iterator[Violation]:
        """Compare the results of some of these sessions, whose requests are settled."""
        if self._store is None or "I6" in self._report.obstacles or not settled:
            return
        sessions = random.sample(settled, min(SAMPLE, len(settled)))
        try:
            stored = dict(zip(sessions, self._store.peek_many(sessions), strict=True))
        except DrawError as error:
            self._report.obstacles["I6"] = str(error)
            return
        states = _states(connection, [it for it, body in stored.items() if body is not None])
        for session_id, state in states.items():
            self._report.results += 1
            if state.result != stored[session_id]:
                what = "the result store has another result than the database"
                yield Violation("I6", f"session {session_id}", what)


def _states(connection: Connection, session_ids: Sequence[str]) -> Mapping[str, SessionState]:
    """The states of these sessions, without those whose rows are broken: other invariants report them."""
    if not session_ids:
        return {}
    try:
        return states_of_sessions(connection, session_ids)
    except SQLAlchemyError:
        raise
    except Exception:
        some = session_ids if len(session_ids) > 1 else ()
        return {key: state for it in some for key, state in _states(connection, [it]).items()}
