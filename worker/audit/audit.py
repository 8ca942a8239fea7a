"""The audit: prove the invariants (ARCHITECTURE, Invariants) from the database. Each check yields what violates it.

    I1   one charge per completed request, none for the others
    I2   what was written is what the request decides: a reward if and only if the draw, recomputed, says so
    I3   the balance of every account, with or without rows, is the sum of its deltas from zero
    I4   the chain of balances begins at zero and has no gap
    I5   no balance is negative
    I10  one key, one answer: every kept result is rebuilt from the ledger and compared byte by byte
    I11  all rows of a session, or none
    I12  every operator action is on record: replays, and what moved money or keys (worker.audit.record)

What I1, I2 and I11 ask of one request is its operation's to say (`check` in producers.domain.operations).
Sessions are streamed in the order of their ids, so memory does not grow with the ledger. A row that cannot be read is a
violation of what it was read for, and the audit goes on with the next one.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import groupby
from typing import Any, Final, Literal

from sqlalchemy import Column, ColumnElement, Connection, Engine, func, null, select, type_coerce
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.types import NullType

from tombola.producers.domain import operations
from tombola.producers.domain.contract import Request, parse_result_head
from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.errors import DrawError
from tombola.producers.domain.operations.operation import Rejection, Written
from tombola.producers.storage.faults import explain
from tombola.producers.storage.requests import request_of
from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.audit import record as audit_record
from tombola.worker.ledger.old_rows import OldRows, old_accounts_until

INVARIANTS: Final = {
    "I1": "one charge per completed request, none for the others",
    "I2": "a reward if and only if the draw says so",
    "I3": "every balance is what the ledger adds up to",
    "I4": "every chain of balances is without a gap",
    "I5": "no balance is negative",
    "I10": "one key, one answer, byte for byte",
    "I11": "all rows of a draw, or none",
    "I12": "every operator action is on record",
}
VIOLATIONS_KEPT_MAX: Final = 1000  # of each invariant; all are counted, but a broken ledger should not fill the memory
FETCH_SIZE: Final = 2000

State = Literal["holds", "violated", "not looked at"]


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that should not be."""

    invariant: str
    subject: str
    what: str

    def __str__(self) -> str:
        return f"{self.invariant} {self.subject}: {self.what}"


@dataclass(slots=True)
class Report:
    """What was looked at, and what is wrong with it.

    `violations` are the first VIOLATIONS_KEPT_MAX of each invariant, `counts` counts all of them: 0 where nothing was
    found. Only what is in `completed` was looked at to its end; `obstacles` says why the rest was not.
    """

    requests: int = 0
    rows: int = 0
    accounts: int = 0
    violations: list[Violation] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(INVARIANTS, 0))
    completed: set[str] = field(default_factory=set)
    obstacles: dict[str, str] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Whether every invariant was looked at, and holds."""
        return all(state == "holds" for state in self.states.values())

    @property
    def states(self) -> dict[str, State]:
        """How each invariant stands."""
        return {it: self._state(it) for it in INVARIANTS}

    @property
    def is_cut(self) -> bool:
        """Whether there are more violations than are kept."""
        return sum(self.counts.values()) > len(self.violations)

    def add(self, violation: Violation) -> None:
        """Count a violation, and keep it if there is room."""
        self.counts[violation.invariant] += 1
        if self.counts[violation.invariant] <= VIOLATIONS_KEPT_MAX:
            self.violations.append(violation)

    def told(self) -> dict[str, Any]:
        """The report without its violations, for machines: JSON, the nightly task's result."""
        return {
            "is_clean": self.is_clean,
            "states": self.states,
            "violated": self.counts,
            "not_looked_at": self.obstacles,
            "requests": self.requests,
            "rows": self.rows,
            "accounts": self.accounts,
        }

    def _state(self, invariant: str) -> State:
        if self.counts[invariant]:
            return "violated"
        return "holds" if invariant in self.completed else "not looked at"


def audit(engine: Engine, wheels: Wheels) -> Report:
    """Check everything; raises ServiceUnavailable or ConfigurationError when the database cannot be read.

    What alone cannot be read, such as a table that this user may not see, is in the report as not looked at.
    """
    report = Report()
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            if engine.dialect.name != "sqlite":
                # One moment for all checks, while the workers go on.
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            old = OldRows.of(connection)
            recorded = (Violation("I12", subject, what) for subject, what in audit_record.check(connection))
            errors = [
                _look(report, ("I3", "I4", "I5"), _accounts(connection, report, old)),
                _look(report, ("I1", "I2", "I10", "I11"), _sessions(connection, report, wheels, old)),
                _look(report, ("I12",), recorded),
            ]
            if errors[0] is not None and not report.completed:
                raise errors[0]
    except SQLAlchemyError as error:
        raise explain(error) from error
    return report


def _look(report: Report, invariants: tuple[str, ...], found: Iterator[Violation]) -> DBAPIError | None:
    """Report what is `found`; the error that was in the way, if one was and the connection has outlived it."""
    try:
        for violation in found:
            report.add(violation)
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        report.obstacles |= dict.fromkeys(invariants, str(explain(error)))
        return error
    report.completed.update(invariants)
    return None


# ---- accounts and their chains ---------------------------------------------------------------------------------------


class _Unreadable(Exception):
    """A stored value that is none of its kind."""


def _stored(column: Column[Any], prefix: str = "") -> ColumnElement[Any]:
    """A column as the driver gives it: reading it must not fail, whatever somebody has written into it."""
    return type_coerce(column, NullType()).label(f"{prefix}{column.name}")


def _amount(connection: Connection, stored: Any) -> Decimal:
    """The amount behind a stored one; raises _Unreadable."""
    is_sqlite = connection.dialect.name == "sqlite"
    if not isinstance(stored, int if is_sqlite else Decimal):
        raise _Unreadable(f"{stored!r:.60} is no amount")
    return Decimal(stored).scaleb(-2) if is_sqlite else Decimal(stored)


def _accounts(connection: Connection, report: Report, old: OldRows) -> Iterator[Violation]:
    """I3, I4, I5: walk every account's chain, in the order given under its lock.

    What old code wrote is as it is (`tombola legacy inspect` tells): a chain begins anew where one of its rows does,
    and an account from before the contract begins with what it held.
    """
    balances: dict[int, Decimal | None] = {}
    begin_anyhow = set() if old is OldRows.NONE else _old_accounts(connection)
    for account_id, stored in connection.execute(select(accounts.c.id, _stored(accounts.c.balance))):
        report.accounts += 1
        try:
            balances[account_id] = balance = _amount(connection, stored)
        except _Unreadable as error:
            balances[account_id] = None
            for invariant in ("I3", "I5"):
                yield Violation(invariant, f"account {account_id}", f"its balance cannot be read: {error}")
            continue
        if balance < 0:
            yield Violation("I5", f"account {account_id}", f"its balance is {balance}")
    rows = connection.execution_options(yield_per=FETCH_SIZE).execute(
        select(
            transactions.c.account_id,
            transactions.c.transaction_id,
            transactions.c.idempotency_key,
            (transactions.c.notes if old is OldRows.BY_NOTES else null()).label("notes"),
            _stored(transactions.c.delta_amount),
            _stored(transactions.c.balance_before),
            _stored(transactions.c.balance_after),
        ).order_by(transactions.c.account_id, transactions.c.transaction_id)
    )
    unseen = set(balances)
    for account_id, chain in groupby(rows, key=lambda row: row.account_id):
        unseen.discard(account_id)
        begins_at = None if account_id in begin_anyhow else Decimal(0)
        sum_ = yield from _chain(connection, account_id, chain, begins_at, old)
        if account_id not in balances:
            yield Violation("I3", f"account {account_id}", f"there is no such account, its rows say {sum_}")
        elif sum_ is None:
            yield Violation("I3", f"account {account_id}", "its rows cannot be added up")
        elif balances[account_id] not in (None, sum_):
            yield Violation("I3", f"account {account_id}", f"holds {balances[account_id]}, its rows say {sum_}")
    for account_id in sorted(unseen - begin_anyhow):
        if balances[account_id]:  # 0.00 and the unreadable ones are told already
            yield Violation("I3", f"account {account_id}", f"holds {balances[account_id]}, and has no rows")


def _chain(
    connection: Connection, account_id: int, chain: Iterator[Any], begins_at: Decimal | None, old: OldRows
) -> Generator[Violation, None, Decimal | None]:
    """I4 and I5 of one account; returns what its rows add up to, None if that cannot be told.

    `begins_at` None: as its first row does.
    """
    sum_: Decimal | None = begins_at
    last, is_first, is_readable = begins_at, True, True
    for _, transaction_id, key, notes, *stored in chain:
        subject = f"account {account_id}, transaction {transaction_id}"
        try:
            delta, before, after = (_amount(connection, it) for it in stored)
        except _Unreadable as error:
            is_readable, last, is_first = False, None, False
            for invariant in ("I4", "I5"):
                yield Violation(invariant, subject, f"cannot be read: {error}")
            continue
        if old.hold(transaction_id, key, notes):
            last, sum_, is_first = after, after, False
            continue
        if before + delta != after:
            yield Violation("I4", subject, f"{before} {delta:+} is not {after}")
        if last is not None and last != before:
            what = "and is its account's first row" if is_first else f"the one before ended at {last}"
            yield Violation("I4", subject, f"begins at {before}, {what}")
        if before < 0 or after < 0:
            yield Violation("I5", subject, f"goes from {before} to {after}")
        sum_ = (before if sum_ is None else sum_) + delta
        last, is_first = after, False
    return sum_ if is_readable else None


def _old_accounts(connection: Connection) -> set[int]:
    """The accounts of a legacy ledger that old code may have opened, with whatever it put into them."""
    until = old_accounts_until(connection)
    query = select(accounts.c.id)
    return set(connection.execute(query if until is None else query.where(accounts.c.created_at < until)).scalars())


# ---- requests and their sessions -------------------------------------------------------------------------------------

_REQUEST: Final = [
    _stored(requests.c[name])
    for name in (
        *("request_key", "lottery_session_id", "account_id", "campaign", "fingerprint", "status", "reason", "result"),
        *("publish_at", "balance_told"),
    )
]
_LEDGER: Final = [
    _stored(transactions.c[name], "row_")
    for name in (
        *("transaction_id", "account_id", "idempotency_key", "business_type", "asset_code", "delta_amount"),
        *("balance_before", "balance_after", "notes"),
    )
]


def _sessions(connection: Connection, report: Report, wheels: Wheels, old: OldRows) -> Iterator[Violation]:
    """I1, I2, I10, I11: every request beside the rows of its session."""
    report.requests = connection.execute(select(func.count()).select_from(requests)).scalar_one()
    report.rows = connection.execute(select(func.count()).select_from(transactions)).scalar_one()
    pairs = connection.execution_options(yield_per=FETCH_SIZE).execute(
        select(*_REQUEST, *_LEDGER)
        .join(transactions, transactions.c.lottery_session_id == requests.c.lottery_session_id, isouter=True)
        .order_by(requests.c.lottery_session_id, requests.c.request_key, transactions.c.transaction_id)
    )
    for _, session in groupby(pairs, key=lambda pair: (pair.lottery_session_id, pair.request_key)):
        yield from _Session(connection, list(session), wheels, old).check()
    # Charges that no request stands for; old code had none.
    of_requests = transactions.c.business_type.in_(sorted(operations.business_types()))
    orphans = connection.execute(
        select(transactions.c.lottery_session_id)
        .join(requests, transactions.c.lottery_session_id == requests.c.lottery_session_id, isouter=True)
        .where(requests.c.request_key.is_(None), of_requests, old.others())
        .distinct()
    )
    for (session_id,) in orphans:
        yield Violation("I1", f"session {session_id}", "was charged without a request")


class _Row:
    """The ledger's half of a pair, as operations read it. Reading an amount raises _Unreadable where it is none."""

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
        return _amount(self._connection, self._pair.row_delta_amount)

    @property
    def before(self) -> Decimal:
        return _amount(self._connection, self._pair.row_balance_before)

    @property
    def after(self) -> Decimal:
        return _amount(self._connection, self._pair.row_balance_after)

    @property
    def notes(self) -> str:
        return self._pair.row_notes  # type: ignore[no-any-return]


class _Session:
    """A request and all ledger rows of its session. Each check says what is wrong, and may raise whatever it likes."""

    def __init__(self, connection: Connection, pairs: list[Any], wheels: Wheels, old: OldRows) -> None:
        self._connection = connection
        self.request = pairs[0]
        pairs = [pair for pair in pairs if pair.row_transaction_id is not None]
        self.written = Written(self.request.status, [_Row(connection, pair) for pair in pairs], wheels)
        # A request that old code had charged: answered from its rows; how it was drawn nobody can say.
        self.is_old = bool(pairs) and all(
            old.hold(pair.row_transaction_id, pair.row_idempotency_key, pair.row_notes) for pair in pairs
        )

    def check(self) -> Iterator[Violation]:
        subject = f"request {self.request.request_key}"
        for invariant, wrong in self._checks():
            try:
                for what in wrong:
                    yield Violation(invariant, subject, what)
            except Exception as error:  # of all that may stand in a row, nothing may keep us from looking at the next
                yield Violation(invariant, subject, _cannot_be_told(error))

    def _checks(self) -> Iterator[tuple[str, Iterator[str]]]:
        try:
            asked = request_of(self.request)
        except Exception as error:
            yield "I10", iter([_cannot_be_told(error)])
            yield "I11", self._whole(None)
            return
        operation = operations.operation_of(asked)
        for invariant, wrong in operation.check(asked, self.written).items():
            if invariant == "I1" or not self.is_old:
                yield invariant, wrong
        yield "I10", self._answered(asked)
        yield "I11", self._whole(operation.needs(asked, self.written.wheels).accounts)

    def _whole(self, accounts: Collection[int] | None) -> Iterator[str]:
        """What holds for requests of all kinds; the rest is for the operation to check.

        `accounts` are those that it may touch, None where its request cannot be read.
        """
        rows = self.written.rows
        if not self.written.is_completed:
            if rows:
                yield f"is {self.request.status} and has {len(rows)} ledger rows"
            return
        if accounts is not None and any(row.account_id not in accounts for row in rows):
            yield "its session moves another account"
        keys = [row.idempotency_key for row in rows]
        if not self.is_old and any(key is None or not key.startswith(f"{self.request.request_key}:") for key in keys):
            yield f"its session holds foreign rows: {keys}"

    def _answered(self, asked: Request) -> Iterator[str]:
        """What we answered is what the ledger says, and belongs to this request."""
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
        if request.result is None and request.publish_at is None:  # archived: it is rebuilt whenever it is asked for
            told = None if request.balance_told is None else _amount(self._connection, request.balance_told)
            kept = rebuilt or result(asked, Rejection(request.reason, told)).decode()
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


def _cannot_be_told(error: Exception) -> str:
    return f"cannot be told: {type(error).__name__}: {error!s:.200}"
