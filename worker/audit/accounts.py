"""I3, I4, I5 of each account: its balance beside its chain, at one moment.

Every account is looked at by every audit, with or without rows. The chains (worker.audit.chains) stand at a ledger row
up to which no row can appear any more. In one part, for some accounts: how many rows the ledger has up to there, which
an index alone says; then the chains walk on over the newer rows; then they are compared with the balances. An account
that differs is walked from its first row, so that a violation names the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from sqlalchemy import Connection, func, select

from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.audit import lines
from tombola.worker.audit.chains import BAND_SIZE, Chains
from tombola.worker.audit.report import Report, Violation
from tombola.worker.audit.stored import shown, texts

CHUNK: Final = 40 * BAND_SIZE  # ids of accounts in one part
WALK_ROWS_MAX: Final = 100_000  # of one account whose rows are read once more, to name what is wrong


class Held(NamedTuple):
    """An account as it stands; `balance` in hundredths, None if it cannot be read."""

    balance: int | None
    asset: str


def next_chunk(connection: Connection, chains: Chains, from_id: int) -> range | None:
    """The next ids of accounts to look at, from `from_id` on; None where there is no further account or row."""
    found = (
        connection.execute(select(func.min(accounts.c.id)).where(accounts.c.id >= from_id)).scalar(),
        connection.execute(
            select(func.min(transactions.c.account_id)).where(transactions.c.account_id >= from_id)
        ).scalar(),
        chains.next_account(from_id),
    )
    ids = [it for it in found if it is not None]
    if not ids:
        return None
    start = max(from_id, min(ids) // BAND_SIZE * BAND_SIZE)
    return range(start, (start // BAND_SIZE) * BAND_SIZE + CHUNK)


def check_accounts(
    connection: Connection, report: Report, chains: Chains, at_id: int, chunk: range
) -> Iterator[Violation]:
    """Check the accounts with these ids, and count them in `report`.

    The chains stand at the ledger row `at_id`, and stay there.
    """
    held: dict[int, Held] = {}
    yield from _read_balances(connection, chunk, held)
    report.accounts += len(held)
    counted = _counted(connection, at_id, chunk)
    miscounted: dict[int, str] = {}
    for account_id in counted.keys() | set(chains.accounts_in(chunk)):
        standing, (rows, last_id) = chains.of(account_id), counted.get(account_id, (0, 0))
        if (rows, last_id) != (standing.rows, standing.last_id):
            miscounted[account_id] = (
                f"has {rows:,} ledger rows up to transaction {at_id}, the last of them {last_id}; there were "
                f"{standing.rows:,}, the last of them {standing.last_id}: rows were deleted or inserted since"
            )
    now = chains.copy_of(chunk)
    newer = lines.read_of_accounts(connection, chunk, at_id)
    yield from now.walk(connection, newer, lines.read_odd(connection, newer))
    doubtful = set(miscounted)
    for account_id in sorted(held.keys() | set(now.accounts_in(chunk))):
        for violation in _compare(account_id, held.get(account_id), now):
            yield violation
            doubtful.add(account_id)
    for account_id in sorted(doubtful):
        if account_id in miscounted:
            yield Violation("I4", f"account {account_id}", miscounted[account_id])
        yield from _walk_again(connection, account_id, held.get(account_id), chains)


def _walk_again(connection: Connection, account_id: int, held: Held | None, chains: Chains) -> Iterator[Violation]:
    """Walk an account's chain from its first row: nothing that was known before counts."""
    fresh = chains.afresh()
    own = range(account_id, account_id + 1)
    rows = lines.read_of_accounts(connection, own, lines.BEFORE_ALL_IDS, rows_max=WALK_ROWS_MAX)
    if len(rows) == WALK_ROWS_MAX:
        return
    yield from fresh.walk(connection, rows, lines.read_odd(connection, rows))
    yield from _compare(account_id, held, fresh)


def _compare(account_id: int, held: Held | None, chains: Chains) -> Iterator[Violation]:
    """I3 of one account: its balance beside the end of its chain."""
    subject, standing = f"account {account_id}", chains.of(account_id)
    if held is None:
        told = "cannot be added up" if standing.sum is None else f"say {shown(standing.sum)}"
        yield Violation("I3", subject, f"there is no such account, its rows {told}")
        return
    if not standing.rows:
        if held.balance and not chains.begins_anywhere(account_id):  # 0.00 is right, and None is reported already
            yield Violation("I3", subject, f"holds {shown(held.balance)}, and has no rows")
    elif standing.sum is None:
        yield Violation("I3", subject, "its rows cannot be added up")
    elif held.balance not in (None, standing.sum):
        yield Violation("I3", subject, f"holds {shown(held.balance)}, its rows say {shown(standing.sum)}")
    if standing.asset and standing.asset != held.asset:
        yield Violation("I3", subject, f"is of {held.asset}, its rows are of {standing.asset}")


def _read_balances(connection: Connection, chunk: range, held: dict[int, Held]) -> Iterator[Violation]:
    """Read the accounts into `held`; yield what is wrong with a balance alone."""
    is_sqlite = connection.dialect.name == "sqlite"
    balance_text = f"COALESCE({lines.amount_text('balance', is_sqlite=is_sqlite)}, '')"
    told = lines.joined(["id", "COALESCE(asset_code, '')", balance_text], is_sqlite=is_sqlite)
    rest = f"FROM account_asset_balances WHERE id >= {chunk.start:d} AND id < {chunk.stop:d}"
    for text in texts(connection, told, rest):
        account, _, others = text.partition(lines.SEPARATOR)
        asset, _, value = others.rpartition(lines.SEPARATOR)
        account_id = int(account)
        try:
            balance = lines.cents(value)
        except ValueError:
            held[account_id] = Held(None, asset)
            for invariant in ("I3", "I5"):
                yield Violation(invariant, f"account {account_id}", "its balance cannot be read: it is no amount")
            continue
        held[account_id] = Held(balance, asset)
        if balance < 0:
            yield Violation("I5", f"account {account_id}", f"its balance is {shown(balance)}")


def _counted(connection: Connection, at_id: int, chunk: range) -> dict[int, tuple[int, int]]:
    """How many rows each account has up to `at_id`, and the last one's id: from the index by account alone."""
    is_sqlite = connection.dialect.name == "sqlite"
    hint, column = ("", "+transaction_id") if is_sqlite else (" IGNORE INDEX (PRIMARY)", "transaction_id")
    counted = (
        f"SELECT account_id, COUNT(*) AS row_count, MAX(transaction_id) AS last_id FROM asset_transactions{hint} "
        f"WHERE account_id >= {chunk.start:d} AND account_id < {chunk.stop:d} AND {column} <= {at_id:d} "
        "GROUP BY account_id"
    )
    told = lines.joined(["account_id", "row_count", "last_id"], is_sqlite=is_sqlite)
    found = (map(int, text.split(lines.SEPARATOR)) for text in texts(connection, told, f"FROM ({counted}) AS counted"))
    return {account_id: (rows, last_id) for account_id, rows, last_id in found}
