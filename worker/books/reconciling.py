"""Reconciling: a payment provider's file beside the recharges of the ledger, by their references.

A recharge keeps its reference in its row's notes, `channel=NAME reference=REFERENCE`. The file is CSV with a header.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Final, NamedTuple

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.books.house import channel_of
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.operations.recharge import RECHARGE
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.operators import actions

RECONCILE: Final = "books reconcile"  # its name among the actions on record
REFERENCE_PREFIX: Final = "reference="
IDS_AT_ONCE: Final = 100_000
RECORDED_MAX: Final = 20  # references of each kind
LINES_MAX: Final = 10_000_000


class Payment(NamedTuple):
    """A payment: of the provider, or a recharge of the ledger, which has an account."""

    reference: str
    amount: Decimal
    account_id: int | None = None


class Reconciled(NamedTuple):
    """Payments by where they were found. `differing` are pairs of one reference and two amounts: there, here.

    `repeated` are references that are in the file, or in the ledger, more than once.
    """

    matched: int
    only_here: Sequence[Payment]
    only_there: Sequence[Payment]
    differing: Sequence[tuple[Payment, Payment]]
    repeated: Sequence[str]

    @property
    def unmatched(self) -> int:
        """How many references did not match."""
        return len(self.only_here) + len(self.only_there) + len(self.differing) + len(self.repeated)

    @property
    def is_complete(self) -> bool:
        """Whether everything matched."""
        return not self.unmatched


class Wanted(NamedTuple):
    """The recharges to look at: of a channel (empty: all), from `since` to `until`, both included, in UTC."""

    channel: str = ""
    since: date | None = None
    until: date | None = None


def record(engine: Engine, found: Reconciled, *, file: str, by: str) -> None:
    """Put the outcome on record, for the console. Raises ServiceUnavailable, ConfigurationError or InternalError."""
    some = {
        "only_here": [it.reference for it in found.only_here[:RECORDED_MAX]],
        "only_there": [it.reference for it in found.only_there[:RECORDED_MAX]],
        "differing": [it.reference for it, _ in found.differing[:RECORDED_MAX]],
        "repeated": found.repeated[:RECORDED_MAX],
    }
    details = {"matched": found.matched} | {name: it for name, it in some.items() if it}
    try:
        with engine.begin() as connection:
            actions.record(
                connection, operator=by, action=RECONCILE, reason=file, count=found.unmatched, details=details
            )
    except SQLAlchemyError as error:
        raise explain(error) from error


def read_file(path: Path, *, reference: str, amount: str) -> list[Payment]:
    """The payments in a provider's file; `reference` and `amount` are the names of its columns.

    Raises InvalidRequest for a file that cannot be read, naming the line.
    """
    payments = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file)
            missing = {reference, amount} - set(lines.fieldnames or ())
            if missing:
                known = ", ".join(lines.fieldnames or ()) or "none"
                raise InvalidRequest(f"{path}: there is no column {' or '.join(sorted(missing))}; there are {known}")
            for line in lines:
                payments.append(Payment((line[reference] or "").strip(), _amount(line[amount], path, lines.line_num)))
                if len(payments) > LINES_MAX:
                    raise InvalidRequest(f"{path} has more than {LINES_MAX:,} lines: reconcile a part of it")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from None
    return payments


def _amount(text: str | None, path: Path, line: int) -> Decimal:
    try:
        amount = Decimal((text or "").strip())
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite():
        raise InvalidRequest(f"{path}, line {line}: not an amount: {text!r:.40}")
    return amount


def recharges(engine: Engine, wanted: Wanted, on_progress: Callable[[int, int], None]) -> Iterator[Payment]:
    """The recharges of the ledger that have a reference, each with its account.

    The ledger is read in parts; `on_progress` gets the ids that were read, and the highest one. Raises
    ServiceUnavailable or ConfigurationError when the database cannot be read.
    """
    rows = transactions.c
    conditions = [rows.business_type == RECHARGE, rows.notes.contains(REFERENCE_PREFIX, autoescape=True)]
    if wanted.since is not None:
        conditions.append(rows.created_at >= _begin(wanted.since))
    if wanted.until is not None:
        conditions.append(rows.created_at < _begin(wanted.until + timedelta(days=1)))
    query = select(rows.account_id, rows.delta_amount, rows.notes).where(*conditions).order_by(rows.transaction_id)
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            highest: int = connection.execute(select(func.max(rows.transaction_id))).scalar() or 0
        for first in range(1, highest + 1, IDS_AT_ONCE):
            part = query.where(rows.transaction_id.between(first, first + IDS_AT_ONCE - 1))
            with engine.connect().execution_options(read_only=True) as connection:
                found = connection.execute(part).all()
            for account_id, amount, notes in found:
                reference = _reference_of(notes)
                if reference and wanted.channel in ("", channel_of(notes)):
                    yield Payment(reference, amount, account_id)
            on_progress(min(first + IDS_AT_ONCE - 1, highest), highest)
    except SQLAlchemyError as error:
        raise explain(error) from error


def _begin(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


def _reference_of(notes: str) -> str:
    """The reference in a recharge's notes; empty where they have none."""
    found = next((it for it in notes.split(" ") if it.startswith(REFERENCE_PREFIX)), "")
    return found[len(REFERENCE_PREFIX) :]


def reconcile(there: Sequence[Payment], here: Sequence[Payment]) -> Reconciled:
    """Compare a provider's payments with the recharges, by reference."""
    counts = [Counter(it.reference for it in side) for side in (there, here)]
    repeated = {reference for count in counts for reference, times in count.items() if times > 1}
    theirs, ours = ({it.reference: it for it in side if it.reference not in repeated} for side in (there, here))
    both = theirs.keys() & ours.keys()
    differing = [(theirs[it], ours[it]) for it in sorted(both) if theirs[it].amount != ours[it].amount]
    return Reconciled(
        matched=len(both) - len(differing),
        only_here=[ours[it] for it in sorted(ours.keys() - both)],
        only_there=[theirs[it] for it in sorted(theirs.keys() - both)],
        differing=differing,
        repeated=sorted(repeated),
    )
