"""The walk over the ledger: rows, accounts, newest rows, requests without rows, holds; part by part.

The chains of accounts walk up to the row up to which no further row can appear (`Walk.at_id`). What is newer is walked
over in one moment with the balances (worker.audit.accounts), and its sessions are checked; the next audit meets it
again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import Final, NamedTuple

from tombola.worker.audit import lines, parts
from tombola.worker.audit.accounts import check_accounts, next_chunk
from tombola.worker.audit.chains import Chains
from tombola.worker.audit.holds import check_holds, next_holds
from tombola.worker.audit.issued import PrizeName
from tombola.worker.audit.lines import Line, id_of
from tombola.worker.audit.parts import Parts, newest_id, settled_id
from tombola.worker.audit.report import Report, Violation
from tombola.worker.audit.sessions import Sessions
from tombola.worker.audit.unposted import unposted

PART_ROWS: Final = 5_000
ACCOUNT_ID_MIN: Final = -(2**63)  # whatever an account's id is


class Provable(NamedTuple):
    """How far the walk had come when it met the first draw that cannot be proven yet; what it had met until then."""

    at_id: int
    chains: Chains
    granted: Counter[PrizeName]


class Walk:
    """A walk from the ledger row `at_id` on, at which `chains` stand.

    `provable` is where a mark must stop: the next audit meets the draws behind it again. None: nothing stops it.
    """

    def __init__(self, parts: Parts, report: Report, chains: Chains, sessions: Sessions, at_id: int) -> None:
        self.at_id = at_id
        self.chains = chains
        self.provable: Provable | None = None
        self._parts = parts
        self._report = report
        self._sessions = sessions

    def run(self, publish_at: datetime | None, changed_since: datetime | None) -> Iterator[Violation]:
        """Walk to the end. The times are those of the mark that the audit goes on from, None for everything."""
        yield from self._settled_rows(rows_min=0)
        yield from self._accounts()
        yield from self._newest_rows()
        for connection, sessions in unposted(self._parts, publish_at):
            yield from self._sessions.check(connection, sessions, is_counting=False)
        yield from self._holds(changed_since)

    def _settled_rows(self, *, rows_min: int) -> Iterator[Violation]:
        """Walk up to where no row can appear any more, again and again, as long as that is `rows_min` rows away."""
        while True:
            with self._parts.part() as connection:
                until = settled_id(connection, parts.HORIZON_S)
            if until - self.at_id <= rows_min:
                return
            while self.at_id < until:
                with self._parts.part() as connection:
                    rows = lines.read(connection, self.at_id, until, rows_max=PART_ROWS)
                    is_last = len(rows) < PART_ROWS
                    rows = rows if is_last else _without_last_session(rows)
                    granted = self._sessions.granted.copy()
                    wrong = list(self._sessions.check_lines(connection, rows, is_counting=True))
                    if self._report.unproven and self.provable is None:
                        self.provable = Provable(self.at_id, self.chains.copy(), granted)
                    yield from self.chains.walk(connection, rows, lines.read_odd(connection, rows))
                    yield from wrong
                self._report.rows += len(rows)
                self.at_id = until if is_last else id_of(rows[-1])
            rows_min = max(rows_min, PART_ROWS)

    def _accounts(self) -> Iterator[Violation]:
        from_id = ACCOUNT_ID_MIN
        while True:
            # So that the part of a chunk of accounts never has many newer rows to walk over.
            yield from self._settled_rows(rows_min=PART_ROWS)
            with self._parts.part() as connection:
                chunk = next_chunk(connection, self.chains, from_id)
                if chunk is None:
                    return
                yield from check_accounts(connection, self._report, self.chains, self.at_id, chunk)
            from_id = chunk.stop

    def _newest_rows(self) -> Iterator[Violation]:
        """The sessions of the rows that the chains have not met."""
        with self._parts.part() as connection:
            until = self._report.up_to_id = max(self.at_id, newest_id(connection))
        after = self.at_id
        while after < until:
            with self._parts.part() as connection:
                rows = lines.read(connection, after, until, rows_max=PART_ROWS)
                is_last = len(rows) < PART_ROWS
                rows = rows if is_last else _without_last_session(rows)
                yield from self._sessions.check_lines(connection, rows, is_counting=False)
            self._report.rows += len(rows)
            after = until if is_last else id_of(rows[-1])

    def _holds(self, changed_since: datetime | None) -> Iterator[Violation]:
        after = ""
        while True:
            with self._parts.part() as connection:
                some = next_holds(connection, after, changed_since)
                yield from check_holds(connection, some)
            if not some:
                return
            after = some[-1]


def _without_last_session(rows: list[Line]) -> list[Line]:
    """The rows without those of the last session, which may go on in the next part; all rows if there is one session.

    The rows of one request are written by one statement, and have ids next to each other.
    """
    session = rows[-1][lines.SESSION] if not lines.is_odd(rows[-1]) else None
    end = len(rows)
    while end and session is not None and not lines.is_odd(rows[end - 1]) and rows[end - 1][lines.SESSION] == session:
        end -= 1
    return rows[:end] or rows
