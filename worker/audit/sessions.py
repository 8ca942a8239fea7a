"""I1, I2, I10, I11: every request beside the ledger rows of its session.

What I1, I2 and I11 ask of one request is said by its operation (`check` in producers.domain.operations). Sessions are
streamed in the order of their ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from decimal import Decimal
from itertools import groupby
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, func, select

from tombola.producers.domain import operations
from tombola.producers.domain.campaigns.pulls import CONSUME
from tombola.producers.domain.campaigns.record import read_draw_notes
from tombola.producers.domain.campaigns.scene import Versions
from tombola.producers.domain.contract import Request, Row, parse_result_head
from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.errors import DrawError
from tombola.producers.domain.operations.operation import Rejection, Written
from tombola.producers.storage.requests import request_of
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.audit.issued import PrizeName
from tombola.worker.audit.report import Report, Violation
from tombola.worker.audit.stored import FETCH_SIZE, amount_of, stored
from tombola.worker.ledger.old_rows import OldRows

_REQUEST: Final = [
    stored(requests.c[name])
    for name in (
        *("request_key", "lottery_session_id", "account_id", "campaign", "fingerprint", "status", "reason", "result"),
        *("publish_at", "balance_told", "kind", "terms"),
    )
]
_LEDGER: Final = [
    stored(transactions.c[name], "row_")
    for name in (
        *("transaction_id", "account_id", "idempotency_key", "business_type", "asset_code", "delta_amount"),
        *("balance_before", "balance_after", "notes"),
    )
]


class Drawings(NamedTuple):
    """What draws are recomputed by; `granted` counts the stocked prizes of completed draws."""

    wheels: Wheels
    versions: Versions
    granted: Counter[PrizeName]


def check_sessions(connection: Connection, report: Report, drawings: Drawings, old: OldRows) -> Iterator[Violation]:
    """Check every request beside the rows of its session. Counts the requests and ledger rows in `report`."""
    report.requests = connection.execute(select(func.count()).select_from(requests)).scalar_one()
    report.rows = connection.execute(select(func.count()).select_from(transactions)).scalar_one()
    pairs = connection.execution_options(yield_per=FETCH_SIZE).execute(
        select(*_REQUEST, *_LEDGER)
        .join(transactions, transactions.c.lottery_session_id == requests.c.lottery_session_id, isouter=True)
        .order_by(requests.c.lottery_session_id, requests.c.request_key, transactions.c.transaction_id)
    )
    for _, session in groupby(pairs, key=lambda pair: (pair.lottery_session_id, pair.request_key)):
        yield from _Session(connection, list(session), drawings, old).check()
    # Charges without a request. Old code had no requests.
    of_requests = transactions.c.business_type.in_(sorted(operations.business_types()))
    orphans = connection.execute(
        select(transactions.c.lottery_session_id)
        .join(requests, transactions.c.lottery_session_id == requests.c.lottery_session_id, isouter=True)
        .where(requests.c.request_key.is_(None), of_requests, old.new_rows())
        .distinct()
    )
    for (session_id,) in orphans:
        yield Violation("I1", f"session {session_id}", "was charged without a request")


class _Row:
    """The ledger's half of a pair, as operations read it. Reading a value that is no amount raises Unreadable."""

    __slots__ = ("_connection", "_pair")

    def __init__(self, connection: Connection, pair: Any) -> None:
        self._connection = connection
        self._pair = pair

    @property
    def account_id(self) -> int:
        return self._pair.row_account_id  # type: ignore[no-any-return]

    @property
    def idempotency_key(self) -> str:
        return self._pair.row_idempotency_key  # type: ignore[no-any-return]

    @property
    def business_type(self) -> str:
        return self._pair.row_business_type  # type: ignore[no-any-return]

    @property
    def asset_code(self) -> str:
        return self._pair.row_asset_code  # type: ignore[no-any-return]

    @property
    def delta(self) -> Decimal:
        return amount_of(self._connection, self._pair.row_delta_amount)

    @property
    def before(self) -> Decimal:
        return amount_of(self._connection, self._pair.row_balance_before)

    @property
    def after(self) -> Decimal:
        return amount_of(self._connection, self._pair.row_balance_after)

    @property
    def notes(self) -> str:
        return self._pair.row_notes  # type: ignore[no-any-return]


class _Session:
    """A request and all ledger rows of its session. A check yields what is wrong, and may raise any error."""

    def __init__(self, connection: Connection, pairs: list[Any], drawings: Drawings, old: OldRows) -> None:
        self._connection = connection
        self.request = pairs[0]
        pairs = [pair for pair in pairs if pair.row_transaction_id is not None]
        self._granted = drawings.granted
        rows = [_Row(connection, pair) for pair in pairs]
        self.written = Written(self.request.status, rows, drawings.wheels, drawings.versions, self._rows_of)
        # A request that old code has charged: answered from its rows, which do not say how it was drawn.
        self.is_old = bool(pairs) and all(
            old.wrote(pair.row_transaction_id, pair.row_idempotency_key, pair.row_notes) for pair in pairs
        )

    def _rows_of(self, ledger_key: str) -> Sequence[Row]:
        """The ledger rows under a ledger key, of whatever session; a query for each request that asks."""
        key = transactions.c.idempotency_key
        asked = select(*_LEDGER).where(key > f"{ledger_key}:", key < f"{ledger_key};")
        # On a connection of its own: this one has a stream under way.
        with self._connection.engine.connect().execution_options(read_only=True) as connection:
            rows = connection.execute(asked.order_by(transactions.c.transaction_id)).all()
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
        yield "I10", self._answered(asked)
        needs = operation.needs(asked, self.written.wheels)
        # Prizes of a campaign may go to further accounts of the user: worker.audit.issued checks whose they are. The
        # operation itself checks the accounts of requests that read the rows of others.
        yield "I11", self._whole(None if needs.campaign or needs.rows_of else needs.accounts, asked.ledger_key)
        if needs.campaign and self.written.is_completed:
            yield "I7", self._count_prizes(needs.campaign)

    def _count_prizes(self, campaign: str) -> Iterator[str]:
        """Count the stocked prizes in the charge's notes. Yields nothing."""
        versions = self.written.versions
        for row in self.written.rows:
            if row.business_type == CONSUME and versions is not None:
                try:
                    notes = read_draw_notes(row.notes)
                except DrawError:  # I2 says so
                    continue
                odds = versions.version(notes.odds_hash)
                prizes = {} if odds is None else odds.by_code
                self._granted.update((campaign, it) for it in notes.prizes if it in prizes and prizes[it].is_stocked)
        yield from ()

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
        """I10: the kept result is what the ledger says, and belongs to this request."""
        request = self.request
        if asked.fingerprint() != request.fingerprint:
            yield "its row does not match its fingerprint"
        if request.status in ("accepted", "dead"):
            return
        result = operations.operation_of(asked).result
        rebuilt = None
        if self.written.is_completed:
            if not self.written.rows:
                yield "its result cannot be rebuilt: the ledger has no rows of it"
                return
            rebuilt = result(asked, self.written.rows).decode()
        if request.result is None and request.publish_at is None:  # archived: rebuilt at each request for it
            balance = None if request.balance_told is None else amount_of(self._connection, request.balance_told)
            kept = rebuilt or result(asked, Rejection(request.reason, balance)).decode()
        else:
            kept = request.result or ""
        if rebuilt is not None and rebuilt != kept:
            yield "its kept result is not what the ledger says"
        try:
            said = parse_result_head(kept.encode())
        except DrawError as error:
            yield str(error)
            return
        if (said.status, said.reason) != (request.status, request.reason):
            yield f"is {request.status}, its kept result says {said.status}"


def _cannot_be_checked(error: Exception) -> str:
    return f"cannot be checked: {type(error).__name__}: {error!s:.200}"
