"""The ledger as it is written: lock accounts, post entries, move balances. Reading is producers.ledger's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Engine, inspect, text

from producers.contract import LedgerRow
from producers.database import Transaction, WhenHeld, time_text
from producers.ledger import CONSUME
from worker.accounts import AMOUNT_MAX as AMOUNT_MAX
from worker.accounts import open_account as open_account
from worker.accounts import recharge as recharge

# What a draw's rows are called in their derived keys.
CONSUME_TYPE: Final = "consume"
REWARD_TYPE: Final = "reward"

_COLUMNS: Final = (
    "account_id", "lottery_session_id", "idempotency_key", "business_type", "asset_code",
    "delta_amount", "balance_before", "balance_after", "notes", "created_at",
)  # fmt: skip
_COPIES: Final = {"business_id": "lottery_session_id", "updated_at": "created_at"}


class Account(NamedTuple):
    """A locked account as the batch sees it."""

    asset_code: str
    balance: Decimal


class Entry(NamedTuple):
    """One ledger row to post."""

    account_id: int
    lottery_session_id: str
    idempotency_key: str
    business_type: str
    asset_code: str
    delta: Decimal
    before: Decimal
    after: Decimal
    notes: str

    def shown(self) -> LedgerRow:
        """The row as a result shows it."""
        return LedgerRow(
            self.idempotency_key,
            self.business_type,
            self.asset_code,
            str(self.delta),
            str(self.before),
            str(self.after),
        )


def lock_accounts(
    transaction: Transaction, account_ids: Iterable[int], *, wait_s_max: float = 0, lock: bool = True
) -> dict[int, Account]:
    """Lock these accounts in the order of their ids, so that no two batches wait for each other in a circle.

    Missing accounts are not in the result. One lock after the other may keep us waiting: after `wait_s_max` in all, the
    server ends the statement (1969, 3024). `lock=False` reads only, for forecasts.
    """
    query = transaction.within(wait_s_max, _ACCOUNTS) if lock else _ACCOUNTS
    return _accounts(transaction, transaction.select(query, sorted(account_ids), lock=lock))


def lock_free_accounts(transaction: Transaction, account_ids: Iterable[int]) -> tuple[dict[int, Account], set[int]]:
    """Lock those of these accounts that can be had at once; the others' ids are the second part of the result."""
    ids = sorted(account_ids)
    free = _accounts(transaction, transaction.select(_ACCOUNTS, ids, lock=True, when_held=WhenHeld.SKIP))
    missing = [account_id for account_id in ids if account_id not in free]
    if not missing or transaction.is_sqlite:
        return free, set()
    return free, {row[0] for row in transaction.select(_ACCOUNTS, missing)}


_ACCOUNTS: Final = "SELECT id, asset_code, balance FROM account_asset_balances WHERE id IN (??) ORDER BY id"


def _accounts(transaction: Transaction, rows: Sequence[tuple[Any, ...]]) -> dict[int, Account]:
    return {account_id: Account(asset_code, transaction.amount(balance)) for account_id, asset_code, balance in rows}


class Charged(NamedTuple):
    """A draw that the ledger holds: whose it is, and its rows in their order."""

    account_id: int
    lottery_session_id: str
    rows: list[LedgerRow]


def charged_draws(transaction: Transaction, request_keys: Sequence[str]) -> dict[str, Charged]:
    """Those of these requests that the ledger has charged, by request key."""
    if not request_keys:
        return {}
    found = transaction.select(
        "SELECT idempotency_key, account_id, lottery_session_id FROM asset_transactions WHERE idempotency_key IN (??)",
        [f"{key}:{CONSUME_TYPE}" for key in request_keys],
    )
    if not found:
        return {}
    charged = {
        consume_key.partition(":")[0]: Charged(account_id, session_id, [])
        for consume_key, account_id, session_id in found
    }
    for *values, delta, before, after in transaction.select(
        "SELECT idempotency_key, business_type, asset_code, delta_amount, balance_before, balance_after "
        "FROM asset_transactions WHERE lottery_session_id IN (??) ORDER BY transaction_id",
        sorted({session_id for _, _, session_id in found}),
    ):
        draw = charged.get(values[0].partition(":")[0])
        if draw is not None:  # else a row of that session under another key
            draw.rows.append(
                LedgerRow(*values, *(str(transaction.amount(amount)) for amount in (delta, before, after)))
            )
    return charged


def busy(transaction: Transaction, request_keys: Sequence[str]) -> set[str]:
    """Those of these requests whose ledger rows another open transaction holds; see Transaction.held."""
    keys = [f"{key}:{entry_type}" for key in request_keys for entry_type in (CONSUME_TYPE, REWARD_TYPE)]
    held = transaction.held("asset_transactions", "uk_idempotency_key", "idempotency_key", keys)
    return {key.partition(":")[0] for key in held}


# ---- rows of old code, where a legacy ledger became ours ------------------------------------------------------------


def holds_old_rows(database: Engine | Connection) -> bool:
    """Whether this ledger was old code's before (`tombola legacy`): then its draws are known by their session alone."""
    # Only MySQL and MariaDB have them.
    return database.dialect.name != "sqlite" and inspect(database).has_table("legacy_migration")


def old_accounts_until(connection: Connection) -> datetime | None:
    """Until when old code may have opened accounts in a legacy ledger; None: it may still do so.

    That is until the contract, after which old code cannot write. It had clocks of any time zone: hence a day more.
    """
    ended_at: datetime | None = connection.execute(
        text("SELECT ended_at FROM legacy_migration WHERE step = 'contract' AND status = 'done'")
    ).scalar()
    return None if ended_at is None else ended_at.replace(tzinfo=UTC) + timedelta(days=1)


def old_draws(transaction: Transaction, names: Sequence[str], *, adopt: bool) -> dict[str, Charged]:
    """Draws by old code whose `business_id`, which was request key and session in one, is among `names`.

    Rows that have no key yet are read as the backfill will leave them, and with `adopt` get their key here and now.
    """
    if not names:
        return {}
    amounts = "business_type, asset_code, delta_amount, balance_before, balance_after"
    found = list(
        transaction.select(
            f"SELECT transaction_id, account_id, lottery_session_id, {amounts} FROM asset_transactions "
            "WHERE lottery_session_id IN (??) AND idempotency_key = CONCAT('tx_', transaction_id)",
            names,
        )
    )
    # After the contract no row is without a key, and the server knows that without looking.
    late = [
        row
        for row in transaction.select(
            f"SELECT transaction_id, account_id, business_id, {amounts}, created_at, updated_at "
            "FROM asset_transactions WHERE business_id IN (??) AND idempotency_key IS NULL",
            names,
        )
        if row[2] in names  # old columns may hold `ABC` and `abc` for equal
    ]
    if late and adopt:
        transaction.update(
            "asset_transactions",
            "transaction_id",
            # The times, as some servers set them by themselves.
            ("idempotency_key", "lottery_session_id", "created_at", "updated_at"),
            [(row[0], f"tx_{row[0]}", row[2], str(row[8]), str(row[9])) for row in late],
        )
    draws: dict[str, Charged] = {}
    for transaction_id, account_id, session_id, kind, asset, delta, before, after in sorted(
        [*found, *(row[:8] for row in late)]
    ):
        if kind == CONSUME:
            draws.setdefault(session_id, Charged(account_id, session_id, []))
        if session_id in draws:
            shown = [str(transaction.amount(amount)) for amount in (delta, before, after)]
            draws[session_id].rows.append(LedgerRow(f"tx_{transaction_id}", kind, asset, *shown))
    return draws


# ---- writing ---------------------------------------------------------------------------------------------------------


def post(transaction: Transaction, entries: Sequence[Entry], now: datetime) -> None:
    """Insert `entries` in one statement.

    In the order in which the draws were made: under an account's lock the auto-increment id is then the order of its
    chain of balances, which is what old readers and the audit go by.
    """
    money, moment = transaction.money, time_text(now)
    transaction.insert(
        "asset_transactions",
        _COLUMNS,
        [
            (
                entry.account_id,
                entry.lottery_session_id,
                entry.idempotency_key,
                entry.business_type,
                entry.asset_code,
                money(entry.delta),
                money(entry.before),
                money(entry.after),
                entry.notes,
                moment,
            )
            for entry in entries
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
