"""I1, I2, I10, I11, I13, I14: every request beside the ledger rows of its session, and every row beside its request.

What is asked of one request is said by its operation (`check` in producers.domain.operations). Draws that are certainly
right (worker.audit.certain) are passed on the lines of the ledger alone; all other sessions are read in full.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, select

from tombola.producers.domain import operations
from tombola.producers.domain.campaigns.pulls import CONSUME
from tombola.producers.domain.campaigns.scene import Versions
from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import Request, Row, parse_result_head
from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.errors import DrawError
from tombola.producers.domain.operations.operation import Rejection, Written
from tombola.producers.domain.operations.recharge import RECHARGE
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.ledger import users_of
from tombola.producers.storage.requests import request_of
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.audit.certain import CertainDraws
from tombola.worker.audit.holds import HOLDS, check_holds, hold_key
from tombola.worker.audit.issued import HandedOut, PrizeName, check_handed_out, code_in, granted_by
from tombola.worker.audit.lines import (
    BUSINESS_TYPE,
    KEY,
    NOTES,
    SESSION,
    TRANSACTION_ID,
    Line,
    id_of,
    is_odd,
)
from tombola.worker.audit.report import Report, Violation
from tombola.worker.audit.seeds import NotedSeeds, moment_text
from tombola.worker.audit.stored import amount_of, stored
from tombola.worker.audit.stored_results import StoredResults
from tombola.worker.ledger.old_rows import OldRows
from tombola.worker.seeds.binding import seed_noted

_REQUEST: Final = [
    stored(requests.c[name])
    for name in (
        *("request_key", "lottery_session_id", "account_id", "campaign", "fingerprint", "status", "reason", "result"),
        *("balance_told", "kind", "terms", "seed_epoch", "accepted_at", "created_at"),
    )
]
_LEDGER: Final = [
    stored(transactions.c[name], "row_")
    for name in (
        *("transaction_id", "account_id", "lottery_session_id", "idempotency_key", "business_type", "asset_code"),
        *("delta_amount", "balance_before", "balance_after", "notes", "created_at"),
    )
]


class Drawings(NamedTuple):
    """What draws are recomputed by."""

    wheels: Wheels
    versions: Versions
    seeds: NotedSeeds


class Sessions:
    """Checks the sessions of ledger rows, and counts them in `report`.

    `granted` counts the stocked prizes of completed draws that were checked with `is_counting`.
    """

    def __init__(self, report: Report, drawings: Drawings, old: OldRows, results: StoredResults) -> None:
        self.granted: Counter[PrizeName] = Counter()
        self._report = report
        self._drawings = drawings
        self._old = old
        self._results = results
        self._certain = CertainDraws(drawings.wheels, drawings.seeds)
        self._known_types = operations.house_accounts().keys()

    def check_lines(self, connection: Connection, lines: Sequence[Line], *, is_counting: bool) -> Iterator[Violation]:
        """Check the sessions of these rows. A session with further rows is read in full."""
        sessions: dict[str, list[Line]] = {}
        holds: set[str] = set()
        doubtful: list[str] = []
        for line in lines:
            if len(line) == 1:  # odd
                continue
            sessions.setdefault(line[SESSION], []).append(line)
            business_type = line[BUSINESS_TYPE]
            if business_type not in self._known_types and not self._is_old(line):
                yield Violation("I13", f"transaction {line[TRANSACTION_ID]}", _unknown(business_type))
            elif business_type in HOLDS:
                holds.add(hold_key(line[KEY]))
        is_right = self._certain.is_right
        for session_id, some in sessions.items():
            if not is_right(some):
                doubtful.append(session_id)
        self._report.requests += len(sessions) - len(doubtful)
        yield from self._results.compare(connection, [it[SESSION] for it in lines if it[0] == "1"])
        doubtful += self._odd_sessions(connection, [id_of(line) for line in lines if is_odd(line)])
        yield from self.check(connection, doubtful, is_counting=is_counting)
        if holds:
            yield from check_holds(connection, holds)

    def check(self, connection: Connection, session_ids: Sequence[str], *, is_counting: bool) -> Iterator[Violation]:
        """Check these sessions, with all of their rows."""
        for some in chunks(session_ids):
            rows = defaultdict(list)
            for row in connection.execute(
                select(*_LEDGER)
                .where(transactions.c.lottery_session_id.in_(some))
                .order_by(transactions.c.transaction_id)
            ):
                rows[row.row_lottery_session_id].append(row)
            found = {
                row.lottery_session_id: row
                for row in connection.execute(select(*_REQUEST).where(requests.c.lottery_session_id.in_(some)))
            }
            elsewhere: list[tuple[str, int, int]] = []
            handed_out: list[HandedOut] = []
            for session_id in some:
                if session_id not in found:
                    yield from self._without_request(connection, session_id, rows[session_id])
                    continue
                self._report.requests += 1
                session = _Session(connection, found[session_id], rows[session_id], self._drawings, self._old)
                yield from session.check()
                self._report.unproven += session.is_unproven
                if is_counting:
                    self.granted += session.granted()
                elsewhere += session.prizes_elsewhere()
                handed_out += session.codes()
            yield from _strangers(connection, elsewhere)
            yield from check_handed_out(connection, handed_out)
            settled = [it for it, row in found.items() if row.status in (Status.COMPLETED, Status.REJECTED)]
            yield from self._results.compare(connection, settled)

    def _without_request(self, connection: Connection, session_id: str, rows: Sequence[Any]) -> Iterator[Violation]:
        """Rows that no request has written: openings and recharges from the shell, and what old code wrote."""
        for row in rows:
            subject = f"transaction {row.row_transaction_id}"
            if self._old.wrote(row.row_transaction_id, row.row_idempotency_key, row.row_notes):
                continue
            if row.row_business_type == RECHARGE:
                yield from _check_recharge(connection, subject, row)
            elif row.row_business_type in self._known_types:
                yield Violation("I1", f"session {session_id}", "was charged without a request")
                return

    def _odd_sessions(self, connection: Connection, ids: Sequence[int]) -> list[str]:
        """The sessions of rows that make no line; such a row may have none in a legacy ledger."""
        query = select(stored(transactions.c.lottery_session_id))
        return [
            session_id
            for some in chunks(ids)
            for session_id in connection.execute(
                query.where(transactions.c.transaction_id.in_(some)).distinct()
            ).scalars()
            if isinstance(session_id, str)
        ]

    def _is_old(self, line: Line) -> bool:
        return self._old is not OldRows.NONE and self._old.wrote(id_of(line), line[KEY], line[NOTES])


def _unknown(business_type: str) -> str:
    return f"its business type {business_type!r:.60} is unknown: it has no other side"


def _check_recharge(connection: Connection, subject: str, row: Any) -> Iterator[Violation]:
    """I14 of a recharge without a request: it pays in, and its session is its own key."""
    if row.row_lottery_session_id != row.row_idempotency_key:
        yield Violation("I14", subject, f"is a recharge of another's session, {row.row_lottery_session_id}")
    try:
        if amount_of(connection, row.row_delta_amount) < 0:
            yield Violation("I14", subject, f"is a recharge of {amount_of(connection, row.row_delta_amount)}")
    except Exception as error:  # I4 says so as well
        yield Violation("I14", subject, _cannot_be_checked(error))


def _strangers(connection: Connection, elsewhere: Sequence[tuple[str, int, int]]) -> Iterator[Violation]:
    """Prizes on the account of another user than the one who paid: request key, account that paid, other account."""
    ids = sorted({account_id for _, *accounts in elsewhere for account_id in accounts})
    users: Mapping[int, int] = {k: v for some in chunks(ids) for k, v in users_of(connection, some).items()}
    for request_key, payer, account_id in elsewhere:
        if users.get(payer) != users.get(account_id):
            yield Violation("I11", f"request {request_key}", f"its prize went to account {account_id} of another user")


class _Row:
    """A ledger row as operations read it. Reading a value that is no amount raises Unreadable."""

    __slots__ = ("_connection", "_row")

    def __init__(self, connection: Connection, row: Any) -> None:
        self._connection = connection
        self._row = row

    @property
    def account_id(self) -> int:
        return self._row.row_account_id  # type: ignore[no-any-return]

    @property
    def idempotency_key(self) -> str:
        return self._row.row_idempotency_key  # type: ignore[no-any-return]

    @property
    def business_type(self) -> str:
        return self._row.row_business_type  # type: ignore[no-any-return]

    @property
    def asset_code(self) -> str:
        return self._row.row_asset_code  # type: ignore[no-any-return]

    @property
    def delta(self) -> Decimal:
        return amount_of(self._connection, self._row.row_delta_amount)

    @property
    def before(self) -> Decimal:
        return amount_of(self._connection, self._row.row_balance_before)

    @property
    def after(self) -> Decimal:
        return amount_of(self._connection, self._row.row_balance_after)

    @property
    def notes(self) -> str:
        return self._row.row_notes  # type: ignore[no-any-return]


class _Session:
    """A request and all ledger rows of its session. A check yields what is wrong, and may raise any error."""

    def __init__(
        self, connection: Connection, request: Any, rows: Sequence[Any], drawings: Drawings, old: OldRows
    ) -> None:
        self._connection = connection
        self.request = request
        own = [_Row(connection, row) for row in rows]
        charge = next((row for row in rows if row.row_business_type == CONSUME), None)
        self._noted = None if charge is None else drawings.seeds.of(seed_noted(str(charge.row_notes)))
        self._drawn_at = "" if charge is None else moment_text(charge.row_created_at)
        seed = None if self._noted is None else self._noted.seed
        self.written = Written(request.status, own, drawings.wheels, drawings.versions, self._rows_of, seed)
        # A request that old code has charged: answered from its rows, which do not say how it was drawn.
        self.is_old = bool(rows) and all(
            old.wrote(row.row_transaction_id, row.row_idempotency_key, row.row_notes) for row in rows
        )
        self._campaign = ""  # of an operator, once the request is read

    @property
    def is_unproven(self) -> bool:
        """Whether the secret of its epoch is not known here, so that what was drawn cannot be recomputed yet."""
        return self.written.is_completed and not self.written.is_provable

    def _rows_of(self, ledger_key: str) -> Sequence[Row]:
        """The ledger rows under a ledger key, of whatever session; a query for each request that asks."""
        key = transactions.c.idempotency_key
        asked = select(*_LEDGER).where(key > f"{ledger_key}:", key < f"{ledger_key};")
        rows = self._connection.execute(asked.order_by(transactions.c.transaction_id)).all()
        return [_Row(self._connection, row) for row in rows]

    def check(self) -> Iterator[Violation]:
        subject = f"request {self.request.request_key}"
        for invariant, wrong in self._checks():
            try:
                for what in wrong:
                    yield Violation(invariant, subject, what)
            except Exception as error:  # a row may hold anything; no row may keep the audit from the next one
                yield Violation(invariant, subject, _cannot_be_checked(error))

    def _checks(self) -> Iterator[tuple[str, Iterator[str]]]:
        try:
            asked = request_of(self.request)
        except Exception as error:
            yield "I10", iter([_cannot_be_checked(error)])
            yield "I11", self._whole(None, self.request.request_key)
            return
        operation = operations.operation_of(asked)
        for invariant, wrong in operation.check(asked, self.written).items():
            if invariant == "I1" or not self.is_old:
                yield invariant, wrong
        yield "I2", self._of_its_epoch()
        yield "I10", self._answered(asked)
        needs = operation.needs(asked, self.written.wheels)
        # Prizes of a campaign may go to further accounts of the user: _strangers checks whose they are. The operation
        # itself checks the accounts of requests that read the rows of others.
        yield "I11", self._whole(None if needs.campaign or needs.rows_of else needs.accounts, asked.ledger_key)
        self._campaign = needs.campaign

    def _of_its_epoch(self) -> Iterator[str]:
        if self._noted is not None and self.written.is_completed and not self.is_old:
            request = self.request
            bound_to = "" if request.seed_epoch is None else str(request.seed_epoch)
            accepted_at = moment_text(request.created_at if request.accepted_at is None else request.accepted_at)
            if why_not := self._noted.window.why_not(bound_to, accepted_at, self._drawn_at):
                yield why_not

    def granted(self) -> Counter[PrizeName]:
        """The stocked prizes in the charge's notes, after `check`."""
        granted: Counter[PrizeName] = Counter()
        if not (self._campaign and self.written.is_completed):
            return granted
        for row in self.written.rows:
            if row.business_type == CONSUME:
                granted += granted_by(self.written.versions, self._campaign, row.notes)
        return granted

    def prizes_elsewhere(self) -> list[tuple[str, int, int]]:
        """The rows of a campaign's draw on other accounts than the one that paid, after `check`."""
        payer = self.request.account_id
        return [
            (self.request.request_key, payer, row.account_id)
            for row in self.written.rows
            if self._campaign and row.account_id != payer and isinstance(row.account_id, int)
        ]

    def codes(self) -> list[HandedOut]:
        """The codes that the rows of a campaign's draw hand out, after `check`."""
        if not self._campaign:
            return []
        found = []
        for row in self.written.rows:
            code = code_in(row.notes)
            if code:
                found.append(HandedOut(row.idempotency_key, self._campaign, code))
        return found

    def _whole(self, accounts: Collection[int] | None, ledger_key: str) -> Iterator[str]:
        """I11 for requests of every kind; the operation checks the rest.

        `accounts` are the accounts that the request may touch, None where the request cannot be read.
        """
        rows = self.written.rows
        if not self.written.is_completed:
            if rows:
                yield f"is {self.request.status} and has {len(rows)} ledger rows"
            return
        if accounts is not None and any(row.account_id not in accounts for row in rows):
            yield "its session moves another account"
        keys = [row.idempotency_key for row in rows]
        if not self.is_old and any(key is None or not key.startswith(f"{ledger_key}:") for key in keys):
            yield f"its session holds foreign rows: {keys}"

    def _answered(self, asked: Request) -> Iterator[str]:
        """I10: the result belongs to this request; a text that an older release kept is what the ledger says."""
        request = self.request
        if asked.fingerprint() != request.fingerprint:
            yield "its row does not match its fingerprint"
        if request.status in ("accepted", "dead"):
            return
        result = operations.operation_of(asked).result
        if self.written.is_completed:
            if not self.written.rows:
                yield "its result cannot be rebuilt: the ledger has no rows of it"
                return
            rebuilt = result(asked, self.written.rows).decode()
        else:
            balance = None if request.balance_told is None else amount_of(self._connection, request.balance_told)
            rebuilt = result(asked, Rejection(request.reason, balance)).decode()
        kept = rebuilt if request.result is None else request.result
        if self.written.is_completed and rebuilt != kept:
            yield "its kept result is not what the ledger says"
        try:
            said = parse_result_head(kept.encode())
        except DrawError as error:
            yield str(error)
            return
        if (said.status, said.reason) != (request.status, request.reason):
            yield f"is {_outcome(request)}, its result says {_outcome(said)}"


def _outcome(told: Any) -> str:
    return f"{told.status} {told.reason or ''}".strip()


def _cannot_be_checked(error: Exception) -> str:
    return f"cannot be checked: {type(error).__name__}: {error!s:.200}"
