"""Accounts, their rows and statements as answers: JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgspec

from tombola.producers.domain.contract import shown
from tombola.producers.gateway.messages import AccountRow, AccountView, StatementView
from tombola.producers.storage import ledger
from tombola.producers.storage.ledger import Account
from tombola.producers.storage.statements import Statement, session_of

CSV_TYPE: Final = "text/csv"
CSV_COLUMNS: Final = (
    "transaction_id", "created_at", "business_type", "asset_code", "delta_amount", "balance_after",
    "lottery_session_id", "idempotency_key",
)  # fmt: skip


class Period(NamedTuple):
    """From `since` until before `until`; None: until now."""

    since: datetime
    until: datetime | None


def account(found: Account) -> AccountView:
    """An account as answers show it."""
    return AccountView(found.account_id, found.user_id, found.asset_code, f"{found.balance:.2f}", f"{found.held:.2f}")


def page(rows: Sequence[dict[str, Any]], rows_max: int) -> tuple[list[AccountRow], int | None]:
    """The page of up to `rows_max` rows; where there are more, the second value is the `after` of the next page."""
    some = [row_of(it) for it in rows[:rows_max]]
    return some, some[-1].transaction_id if len(rows) > rows_max else None


def row_of(row: dict[str, Any]) -> AccountRow:
    """A ledger row of an account, by column name, as answers show it."""
    return AccountRow(
        **msgspec.structs.asdict(shown(ledger.posting_of(row))),
        transaction_id=row["transaction_id"],
        account_id=row["account_id"],
        created_at=row["created_at"].isoformat(),
        lottery_session_id=session_of(row),
    )


def statement(
    of: Account, period: Period, found: Statement, rows: list[AccountRow], next_after: int | None
) -> StatementView:
    """A page of a statement."""
    return StatementView(
        account_id=of.account_id,
        user_id=of.user_id,
        asset_code=of.asset_code,
        from_=period.since.isoformat(),
        until=None if period.until is None else period.until.isoformat(),
        opening_balance=f"{found.opening:.2f}",
        closing_balance=f"{found.closing:.2f}",
        is_final=found.is_final,
        transactions=rows,
        next_after=next_after,
    )


def csv_begin(of: Account, period: Period, found: Statement) -> str:
    """The names of the columns, and a line with the opening balance."""
    opening = ("", period.since.isoformat(), "opening balance", of.asset_code, "", f"{found.opening:.2f}", "", "")
    return _lines([CSV_COLUMNS, opening])


def csv_rows(rows: Iterable[AccountRow]) -> str:
    """A line for each row."""
    return _lines([[getattr(row, name) for name in CSV_COLUMNS] for row in rows])


def csv_end(of: Account, period: Period, found: Statement) -> str:
    """A line with the closing balance."""
    until = "" if period.until is None else period.until.isoformat()
    return _lines([("", until, "closing balance", of.asset_code, "", f"{found.closing:.2f}", "", "")])


def _lines(rows: Iterable[Sequence[object]]) -> str:
    written = io.StringIO()
    csv.writer(written).writerows(rows)
    return written.getvalue()
