"""Writing the ledger: lock accounts, post rows, move balances. producers.storage.ledger reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

from tombola.producers.domain import operations
from tombola.producers.domain.contract import Request
from tombola.producers.domain.operations.operation import LockedAccount
from tombola.producers.storage.ledger import Posting
from tombola.producers.storage.transactions import Transaction, WhenHeld, joined, time_text

_COLUMNS: Final = (
    "account_id", "lottery_session_id", "idempotency_key", "business_type", "asset_code",
    "delta_amount", "balance_before", "balance_after", "notes", "created_at",
)  # fmt: skip
_COPIES: Final = {"business_id": "lottery_session_id", "updated_at": "created_at"}


def lock_accounts(
    transaction: Transaction, account_ids: Iterable[int], *, wait_s_max: float = 0, lock: bool = True
) -> dict[int, LockedAccount]:
    """Lock these accounts in the order of their ids, so that no two batches wait for each other in a circle.

    Missing accounts are not in the result. Each lock may have to be waited for: after `wait_s_max` in all, the server
    ends the statement (errors 1969, 3024). `lock=False` reads only, for forecasts.
    """
    return _accounts(transaction, sorted(account_ids), lock=lock, wait_s_max=wait_s_max if lock else 0)


def lock_free_accounts(
    transaction: Transaction, account_ids: Iterable[int]
) -> tuple[dict[int, LockedAccount], set[int]]:
    """Lock the accounts that no other transaction holds; the second part of the result are the ids of held accounts."""
    ids = sorted(account_ids)
    free = _accounts(transaction, ids, lock=True, when_held=WhenHeld.SKIP)
    missing = [account_id for account_id in ids if account_id not in free]
    if not missing or transaction.is_sqlite:
        return free, set()
    return free, {row[0] for row in transaction.select(_ACCOUNTS, missing)}


_ACCOUNTS: Final = "SELECT id, asset_code, balance FROM account_asset_balances WHERE id IN (??) ORDER BY id"
# Locked along the primary key: so the locks are taken in the order of the ids, as with ORDER BY.
_JOINED: Final = f"SELECT {joined('id', 'asset_code', 'balance')} FROM account_asset_balances WHERE id IN (??)"


def _accounts(
    transaction: Transaction,
    ids: Sequence[int],
    *,
    lock: bool,
    when_held: WhenHeld = WhenHeld.WAIT,
    wait_s_max: float = 0,
) -> dict[int, LockedAccount]:
    plain, one_value = (transaction.within(wait_s_max, it) if wait_s_max else it for it in (_ACCOUNTS, _JOINED))
    rows: Sequence[Sequence[Any]] | None = transaction.select_joined(one_value, ids, lock=lock, when_held=when_held)
    if rows is None:
        rows = transaction.select(plain, ids, lock=lock, when_held=when_held)
    return {
        int(account_id): LockedAccount(asset_code, transaction.amount(balance))
        for account_id, asset_code, balance in rows
    }


class Charged(NamedTuple):
    """A charged request: its account, its session, and its ledger rows in their order."""

    account_id: int
    lottery_session_id: str
    rows: list[Posting]


_POSTING: Final = (
    *("account_id", "lottery_session_id", "idempotency_key", "business_type", "asset_code"),
    *("delta_amount", "balance_before", "balance_after"),
)
# In a legacy ledger a row of old code may have no key yet.
_FOUND: Final = "FROM asset_transactions WHERE lottery_session_id IN (??) AND idempotency_key IS NOT NULL"
_OF_SESSIONS: Final = f"SELECT {', '.join(_POSTING)}, notes {_FOUND} ORDER BY transaction_id"
_OF_SESSIONS_JOINED: Final = f"SELECT {joined(*_POSTING, nullable=['notes'], order_by='transaction_id')} {_FOUND}"


def of_sessions(transaction: Transaction, session_ids: Iterable[str]) -> Iterator[Posting]:
    """The ledger rows of these sessions, in their order."""
    asked = sorted(set(session_ids))
    rows: Sequence[Sequence[Any]] | None = transaction.select_joined(_OF_SESSIONS_JOINED, asked)
    for row in transaction.select(_OF_SESSIONS, asked) if rows is None else rows:
        yield read_posting(transaction, row)


def read_posting(transaction: Transaction, row: Sequence[Any]) -> Posting:
    """The ledger row behind these values of its columns, in the order of Posting's fields."""
    account_id, session_id, key, business_type, asset_code, *amounts, notes = row
    delta, before, after = map(transaction.amount, amounts)
    return Posting(int(account_id), session_id, key, business_type, asset_code, delta, before, after, notes or "")


def charged(transaction: Transaction, requests: Sequence[Request]) -> dict[str, Charged]:
    """The requests among these that are charged, by request key."""
    if not requests:
        return {}
    found = transaction.select(
        "SELECT idempotency_key, account_id, lottery_session_id FROM asset_transactions WHERE idempotency_key IN (??)",
        [operations.proof_key(request) for request in requests],
    )
    if not found:
        return {}
    wrote = {proof_key: (account_id, session_id) for proof_key, account_id, session_id in found}
    charged: dict[str, Charged] = {}
    writers: dict[tuple[str, str], Charged] = {}
    for request in requests:
        account_id, session_id = wrote.get(operations.proof_key(request), (0, ""))
        if not account_id or (request.ledger_key != request.request_key and session_id != request.lottery_session_id):
            continue  # what can happen once was done by another request: the operation decides what that means
        it = writers.setdefault((session_id, request.ledger_key), Charged(account_id, session_id, []))
        charged[request.request_key] = it
    for posting in of_sessions(transaction, (session_id for _, _, session_id in found)):
        writer = writers.get((posting.lottery_session_id, posting.ledger_key))
        if writer is not None:  # otherwise a row of that session under another request key
            writer.rows.append(posting)
    return charged


def completed(transaction: Transaction, requests: Sequence[Request]) -> dict[str, Charged]:
    """The ledger rows of these requests, which have completed, by request key: one statement."""
    if not requests:
        return {}
    found: dict[str, list[Posting]] = {}
    for posting in of_sessions(transaction, [it.lottery_session_id for it in requests]):
        found.setdefault(posting.lottery_session_id, []).append(posting)
    return {
        it.request_key: Charged(it.account_id, it.lottery_session_id, own)
        for it in requests
        if (own := [row for row in found.get(it.lottery_session_id, ()) if row.ledger_key == it.ledger_key])
    }


def busy(transaction: Transaction, requests: Sequence[Request]) -> set[str]:
    """The keys of requests whose ledger rows another open transaction holds; see Transaction.held."""
    keys = [key for request in requests for key in operations.ledger_keys(request)]
    held = transaction.held("asset_transactions", "uk_idempotency_key", "idempotency_key", keys)
    return {key.partition(":")[0] for key in held}


# ---- writing ---------------------------------------------------------------------------------------------------------


def post(transaction: Transaction, postings: Sequence[Posting], now: datetime) -> None:
    """Insert `postings` in one statement, in the order of the draws.

    So under an account's lock the auto-increment ids are in the order of the account's chain of balances, on which old
    readers and the audit rely.
    """
    money, moment = transaction.money, time_text(now)
    transaction.insert(
        "asset_transactions",
        _COLUMNS,
        [
            (
                it.account_id,
                it.lottery_session_id,
                it.idempotency_key,
                it.business_type,
                it.asset_code,
                money(it.delta),
                money(it.before),
                money(it.after),
                it.notes,
                moment,
            )
            for it in postings
        ],
        copies=_COPIES,
    )


def move(transaction: Transaction, balances: Mapping[int, Decimal], now: datetime) -> None:
    """Set the balances of locked accounts, all in one statement."""
    moment = time_text(now)
    transaction.update(
        "account_asset_balances",
        "id",
        ("balance", "updated_at"),
        [(account_id, transaction.money(balance), moment) for account_id, balance in balances.items()],
    )
