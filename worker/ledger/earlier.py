"""Rows that requests read beside their own: a draw that is refunded, a hold that ends, what an account has earned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Final

from tombola.producers.domain.operations import OPERATIONS
from tombola.producers.domain.operations.expire import RETURNED
from tombola.producers.domain.operations.operation import Lifetime, Needs
from tombola.producers.storage.faults import RowsChanged
from tombola.producers.storage.ledger import Posting
from tombola.producers.storage.transactions import Transaction
from tombola.worker.ledger.post import of_sessions

_NOTHING: Final = Lifetime(Decimal("0.00"), Decimal("0.00"))
_PROOFS: Final = tuple(dict.fromkeys(next(iter(it.TYPES)) for it in OPERATIONS.values()))
_RETURNED: Final = ", ".join(f"'{it}'" for it in sorted(RETURNED))
_LIFETIMES: Final = (
    "SELECT account_id, "
    f"SUM(CASE WHEN delta_amount > 0 AND business_type NOT IN ({_RETURNED}) AND created_at < '{{until}}' "
    "THEN delta_amount ELSE 0 END), "
    f"SUM(CASE WHEN delta_amount < 0 OR business_type IN ({_RETURNED}) THEN -delta_amount ELSE 0 END) "
    "FROM asset_transactions WHERE account_id IN (??) GROUP BY account_id"
)


def is_asked(needs: Iterable[Needs]) -> bool:
    """Whether any of these requests reads other rows: no draw does."""
    return any(need.rows_of or need.earned_until for need in needs)


def rows_of(transaction: Transaction, ledger_keys: Iterable[str]) -> dict[str, list[Posting]]:
    """The ledger rows under each of these ledger keys, in their order: two statements."""
    wanted: dict[str, list[Posting]] = {key: [] for key in sorted(set(ledger_keys))}
    if not wanted:
        return {}
    # A request's rows are found by its session, and its session by the row that proves it.
    sessions = transaction.select(
        "SELECT DISTINCT lottery_session_id FROM asset_transactions WHERE idempotency_key IN (??)",
        [f"{key}:{entry_type}" for key in wanted for entry_type in _PROOFS],
    )
    if not sessions:
        return wanted
    for posting in of_sessions(transaction, [session_id for (session_id,) in sessions]):
        if posting.ledger_key in wanted:
            wanted[posting.ledger_key].append(posting)
    return wanted


def widened(needs: Sequence[Needs], rows: Mapping[str, Sequence[Posting]]) -> list[Needs]:
    """The needs with the accounts of the rows that were asked for: the request may touch them."""
    return [
        need._replace(
            accounts=tuple(
                dict.fromkeys((*need.accounts, *(row.account_id for key in need.rows_of for row in rows[key])))
            )
        )
        if need.rows_of
        else need
        for need in needs
    ]


def must_be_locked(rows: Mapping[str, Sequence[Posting]], needs: Sequence[Needs]) -> None:
    """Raise RowsChanged if rows on further accounts have come since `needs` were widened by the rows of that moment."""
    for need in needs:
        for key in need.rows_of:
            if any(row.account_id not in need.accounts for row in rows[key]):
                raise RowsChanged(f"rows under {key} have come since its accounts were locked")


def lifetimes(transaction: Transaction, needs: Iterable[Needs]) -> dict[tuple[int, str], Lifetime]:
    """What accounts have earned and spent, by account and moment: a statement for each moment that is asked for."""
    asked: dict[str, set[int]] = {}
    for need in needs:
        if need.earned_until:
            asked.setdefault(need.earned_until, set()).update(need.accounts)
    found: dict[tuple[int, str], Lifetime] = {}
    for until, account_ids in asked.items():
        found |= {(account_id, until): _NOTHING for account_id in account_ids}
        for account_id, earned, taken in transaction.select(_LIFETIMES.format(until=until), sorted(account_ids)):
            found[account_id, until] = Lifetime(transaction.amount(earned), transaction.amount(taken))
    return found
