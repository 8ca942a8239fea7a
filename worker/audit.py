"""The audit: prove the invariants of FAULTS.md from the database. Each check yields what violates it.

    I1   one consume row per completed request, none for the others
    I2   a reward if and only if the draw says so: every draw is recomputed
    I3   the balance is the initial one plus all deltas
    I4   the chain of balances has no gap
    I5   no balance is negative
    I10  one key, one answer: every kept result is rebuilt from the ledger and compared byte by byte
    I11  all rows of a session, or none
    I12  every replay is on record: who, why, and when it ended

Sessions are streamed in the order of their ids, so memory does not grow with the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, Engine, func, select, true
from sqlalchemy.exc import SQLAlchemyError

from producers.contract import parse_result
from producers.database import explain
from producers.errors import DrawError
from producers.ledger import CONSUME, REWARD, completed, rejected, shown
from producers.requests import request_of
from producers.schema import account_asset_balances as accounts
from producers.schema import api_idempotency_requests as requests
from producers.schema import asset_transactions as transactions
from worker.batch import Wheels
from worker.ledger import holds_old_rows
from worker.schema import dead_letters, operator_actions, replays

INVARIANTS: Final = {
    "I1": "one charge per completed request, none for the others",
    "I2": "a reward if and only if the draw says so",
    "I3": "every balance is what the ledger adds up to",
    "I4": "every chain of balances is without a gap",
    "I5": "no balance is negative",
    "I10": "one key, one answer, byte for byte",
    "I11": "all rows of a draw, or none",
    "I12": "every replay is on record",
}
VIOLATIONS_MAX: Final = 1000  # a broken ledger should not fill the memory as well
FETCH_SIZE: Final = 2000


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
    """What was looked at, and what is wrong with it."""

    requests: int = 0
    rows: int = 0
    accounts: int = 0
    violations: list[Violation] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.violations

    @property
    def counts(self) -> dict[str, int]:
        """Violations by invariant, 0 where all is well."""
        counted = Counter(violation.invariant for violation in self.violations)
        return {invariant: counted[invariant] for invariant in INVARIANTS}


def audit(engine: Engine, wheels: Wheels) -> Report:
    """Check everything; raises ServiceUnavailable or ConfigurationError when the database cannot be read."""
    report = Report()
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            if engine.dialect.name != "sqlite":
                # One moment for all checks, while the workers go on.
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            is_legacy = holds_old_rows(connection)
            checks = (
                _accounts(connection, report, is_legacy),
                _sessions(connection, report, wheels, is_legacy),
                _replays(connection),
            )
            for check in checks:
                for violation in check:
                    report.violations.append(violation)
                    if len(report.violations) >= VIOLATIONS_MAX:
                        return report
    except SQLAlchemyError as error:
        raise explain(error) from error
    return report


def _accounts(connection: Connection, report: Report, is_legacy: bool) -> Iterator[Violation]:
    """I3, I4, I5: walk every account's chain, in the order given under its lock.

    What old code wrote is as it is (`tombola legacy inspect` tells): a chain begins anew where one of its rows does.
    """
    balances = {row.id: row.balance for row in connection.execute(select(accounts.c.id, accounts.c.balance))}
    report.accounts = len(balances)
    for account_id, balance in balances.items():
        if balance < 0:
            yield Violation("I5", f"account {account_id}", f"its balance is {balance}")
    rows = connection.execution_options(yield_per=FETCH_SIZE).execute(
        select(
            transactions.c.account_id,
            transactions.c.transaction_id,
            transactions.c.idempotency_key,
            transactions.c.delta_amount,
            transactions.c.balance_before,
            transactions.c.balance_after,
        ).order_by(transactions.c.account_id, transactions.c.transaction_id)
    )
    last: dict[int, Decimal] = {}
    total: dict[int, Decimal] = {}
    for account_id, transaction_id, key, delta, before, after in rows:
        if is_legacy and _is_old(key, transaction_id):
            last[account_id] = total[account_id] = after
            continue
        subject = f"account {account_id}, transaction {transaction_id}"
        if before + delta != after:
            yield Violation("I4", subject, f"{before} {delta:+} is not {after}")
        if account_id in last and last[account_id] != before:
            yield Violation("I4", subject, f"begins at {before}, the one before ended at {last[account_id]}")
        if before < 0 or after < 0:
            yield Violation("I5", subject, f"goes from {before} to {after}")
        last[account_id] = after
        total[account_id] = total.get(account_id, before) + delta
    for account_id, expected in total.items():
        if balances.get(account_id) != expected:
            yield Violation("I3", f"account {account_id}", f"holds {balances.get(account_id)}, its rows say {expected}")


def _is_old(key: str | None, transaction_id: int) -> bool:
    """Whether old code wrote this row of a legacy ledger; it has no key before the backfill comes to it."""
    return key is None or key == f"tx_{transaction_id}"


def _sessions(connection: Connection, report: Report, wheels: Wheels, is_legacy: bool) -> Iterator[Violation]:
    """I1, I2, I10, I11: every request beside the rows of its session."""
    report.requests = connection.execute(select(func.count()).select_from(requests)).scalar_one()
    report.rows = connection.execute(select(func.count()).select_from(transactions)).scalar_one()
    pairs = connection.execution_options(yield_per=FETCH_SIZE).execute(
        select(requests, *_LEDGER)
        .join(transactions, transactions.c.lottery_session_id == requests.c.lottery_session_id, isouter=True)
        .order_by(requests.c.lottery_session_id, transactions.c.transaction_id)
    )
    request: Any = None
    rows: list[Any] = []
    for pair in pairs:
        if request is not None and pair.lottery_session_id != request.lottery_session_id:
            yield from _session(request, rows, wheels, is_legacy)
            rows = []
        request = pair
        if pair.row_idempotency_key is not None:
            rows.append(pair)
    if request is not None:
        yield from _session(request, rows, wheels, is_legacy)
    # Charges that no request stands for; old code had none.
    by_new_code = (
        transactions.c.idempotency_key != func.concat("tx_", transactions.c.transaction_id) if is_legacy else true()
    )
    orphans = connection.execute(
        select(transactions.c.lottery_session_id)
        .join(requests, transactions.c.lottery_session_id == requests.c.lottery_session_id, isouter=True)
        .where(requests.c.request_key.is_(None), transactions.c.business_type.in_((CONSUME, REWARD)), by_new_code)
        .distinct()
    )
    for (session_id,) in orphans:
        yield Violation("I1", f"session {session_id}", "was charged without a request")


_LEDGER: Final = [
    transactions.c.transaction_id.label("row_transaction_id"),
    transactions.c.account_id.label("row_account_id"),
    transactions.c.idempotency_key.label("row_idempotency_key"),
    transactions.c.business_type.label("row_business_type"),
    transactions.c.asset_code.label("row_asset_code"),
    transactions.c.delta_amount.label("row_delta_amount"),
    transactions.c.balance_before.label("row_balance_before"),
    transactions.c.balance_after.label("row_balance_after"),
    transactions.c.notes.label("row_notes"),
]


def _session(request: Any, rows: list[Any], wheels: Wheels, is_legacy: bool) -> Iterator[Violation]:
    subject = f"request {request.request_key}"
    charges = [row for row in rows if row.row_business_type == CONSUME]
    rewards = [row for row in rows if row.row_business_type == REWARD]
    expected_charges = 1 if request.status == "completed" else 0
    if len(charges) != expected_charges:
        yield Violation("I1", subject, f"is {request.status} and has {len(charges)} charges")
        return
    if request.status != "completed":
        if rows:
            yield Violation("I11", subject, f"is {request.status} and has {len(rows)} ledger rows")
        yield from _answer(request, None)
        return
    if is_legacy and all(_is_old(row.row_idempotency_key, row.row_transaction_id) for row in rows):
        yield from _old_session(request, rows)
        return
    wheel = wheels.get(request.campaign)
    if wheel is None:
        yield Violation("I2", subject, f"campaign {request.campaign} is not known here: it cannot be recomputed")
        return
    if charges[0].row_notes != wheel.notes:
        yield Violation("I2", subject, "was drawn with other odds or another seed: it cannot be recomputed")
    else:
        prize = wheel.draw(request.account_id, request.request_key)
        paid = sum((row.row_delta_amount for row in rewards), Decimal(0))
        if paid != prize.amount:
            yield Violation("I2", subject, f"was paid {paid}, its draw says {prize.amount}")
        if len(rows) != (2 if prize.amount else 1):
            yield Violation("I11", subject, f"has {len(rows)} ledger rows")
    keys = [row.row_idempotency_key for row in rows]
    if any(not key.startswith(f"{request.request_key}:") for key in keys):
        yield Violation("I11", subject, f"its session holds foreign rows: {keys}")
    if any(row.row_account_id != request.account_id for row in rows):
        yield Violation("I11", subject, "its session moves another account")
    yield from _answer(
        request, completed(request_of(request), [shown(_ledger_row(row)) for row in rows]).encode().decode()
    )


def _old_session(request: Any, rows: list[Any]) -> Iterator[Violation]:
    """A request that old code had charged: answered from its rows; how it was drawn nobody can say."""
    if any(row.row_account_id != request.account_id for row in rows):
        yield Violation("I11", f"request {request.request_key}", "its session moves another account")
    yield from _answer(
        request, completed(request_of(request), [shown(_ledger_row(row)) for row in rows]).encode().decode()
    )


def _answer(request: Any, rebuilt: str | None) -> Iterator[Violation]:
    """I10: what we answered is what the ledger says, and belongs to this request."""
    subject = f"request {request.request_key}"
    if request_of(request).fingerprint() != request.fingerprint:
        yield Violation("I10", subject, "its row does not match its fingerprint")
    if request.status in ("accepted", "dead"):
        return
    if request.result is None and request.publish_at is None:  # archived: it is rebuilt whenever it is asked for
        kept = rebuilt or rejected(request_of(request), request.reason, request.balance_told).encode().decode()
    else:
        kept = request.result or ""
    if rebuilt is not None and rebuilt != kept:
        yield Violation("I10", subject, "its kept result is not what the ledger says")
    try:
        result = parse_result(kept.encode())
    except DrawError as error:
        yield Violation("I10", subject, str(error))
        return
    if (result.status, result.reason) != (request.status, request.reason):
        yield Violation("I10", subject, f"is {request.status}, its kept result says {result.status}")


def _ledger_row(pair: Any) -> dict[str, Any]:
    """The ledger's half of a pair, by column name."""
    return {name.removeprefix("row_"): value for name, value in pair._mapping.items() if name.startswith("row_")}


def _replays(connection: Connection) -> Iterator[Violation]:
    """I12: a dead letter that was replayed names its replay, which somebody began, and which ended on record."""
    begun = {row.id: row.ended_at for row in connection.execute(select(replays.c.id, replays.c.ended_at))}
    recorded: dict[str, set[int | None]] = {}
    for action, replay_id in connection.execute(
        select(operator_actions.c.action, operator_actions.c.replay_id).where(operator_actions.c.replay_id.is_not(None))
    ):
        recorded.setdefault(action, set()).add(replay_id)
    for replay_id, ended_at in begun.items():
        if replay_id not in recorded.get("replay", ()):
            yield Violation("I12", f"replay {replay_id}", "nobody is on record for it")
        if ended_at is not None and replay_id not in recorded.get("replay ended", ()):
            yield Violation("I12", f"replay {replay_id}", "its end is not on record")
    named = connection.execute(
        select(dead_letters.c.replay_id).where(dead_letters.c.replay_id.is_not(None)).distinct()
    ).scalars()
    for replay_id in named:
        if replay_id not in begun:
            yield Violation("I12", f"replay {replay_id}", "dead letters name it, and it is not on record")
