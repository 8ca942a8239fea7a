"""I3, I4, I5: the balances of accounts, and the chain of ledger rows behind each."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from decimal import Decimal
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, null, select

from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.audit.report import Report, Violation
from tombola.worker.audit.stored import FETCH_SIZE, Unreadable, amount_of, stored
from tombola.worker.ledger.old_rows import OldRows, old_accounts_until


def check_chains(connection: Connection, report: Report, old: OldRows) -> Iterator[Violation]:
    """Walk every account's chain, in the order given under the account's lock. Counts the accounts in `report`.

    Rows of old code are taken as they are (`tombola legacy inspect` examines them): a chain begins anew at each of
    these rows, and an account from before the contract step begins with the balance that it held.
    """
    balances: dict[int, Decimal | None] = {}
    begin_anyhow = set() if old is OldRows.NONE else _old_accounts(connection)
    for account_id, value in connection.execute(select(accounts.c.id, stored(accounts.c.balance))):
        report.accounts += 1
        try:
            balances[account_id] = balance = amount_of(connection, value)
        except Unreadable as error:
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
            stored(transactions.c.delta_amount),
            stored(transactions.c.balance_before),
            stored(transactions.c.balance_after),
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
        if balances[account_id]:  # 0.00 is right, and None is reported already
            yield Violation("I3", f"account {account_id}", f"holds {balances[account_id]}, and has no rows")


def _chain(
    connection: Connection, account_id: int, chain: Iterator[Any], begins_at: Decimal | None, old: OldRows
) -> Generator[Violation, None, Decimal | None]:
    """I4 and I5 of one account; returns the sum of its rows, None if one of them cannot be read.

    `begins_at` None: the chain begins where its first row does.
    """
    sum_: Decimal | None = begins_at
    last, is_first, is_readable = begins_at, True, True
    for _, transaction_id, key, notes, *values in chain:
        subject = f"account {account_id}, transaction {transaction_id}"
        try:
            delta, before, after = (amount_of(connection, it) for it in values)
        except Unreadable as error:
            is_readable, last, is_first = False, None, False
            for invariant in ("I4", "I5"):
                yield Violation(invariant, subject, f"cannot be read: {error}")
            continue
        if old.wrote(transaction_id, key, notes):
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
    """The accounts of a legacy ledger that old code may have opened, with any balance."""
    until = old_accounts_until(connection)
    query = select(accounts.c.id)
    return set(connection.execute(query if until is None else query.where(accounts.c.created_at < until)).scalars())
