"""Rows that old code wrote into a ledger that was its own before `tombola legacy`: all of legacy in `worker/`.

OldDraws keeps the draws of old code from being charged again; OldRows tells the audit which rows cannot be recomputed.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any, NamedTuple, Self

from sqlalchemy import ColumnElement, Connection, Engine, func, text, true

from tombola.migrations.legacy.tables import has_table
from tombola.producers.domain.contract import Request
from tombola.producers.domain.draw import NOTES_PREFIX
from tombola.producers.domain.operations.draw import CONSUME
from tombola.producers.storage.ledger import Posting
from tombola.producers.storage.requests import owners_of_sessions
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.transactions import Transaction
from tombola.worker.ledger.post import Charged, read_posting


def holds_old_rows(database: Engine | Connection) -> bool:
    """Whether old code has written this ledger (`tombola legacy`): its draws are found by their session alone."""
    if database.dialect.name == "sqlite":  # legacy ledgers are on MySQL or MariaDB
        return False
    if isinstance(database, Engine):
        with database.connect() as connection:
            return holds_old_rows(connection)
    # Not SQLAlchemy's has_table: of a table that does not exist, the server says "denied" to a user with few rights.
    return has_table(database, "legacy_migration")


def is_adopted(connection: Connection) -> bool:
    """Whether a legacy ledger had keys already when it was taken over (`tombola legacy adopt`): then its rows have keys
    of any form, and the owner's code may go on writing such rows."""
    found = connection.execute(text("SELECT details FROM legacy_migration WHERE step = 'expand'")).scalar()
    return found is not None and json.loads(found).get("shape", "a") != "a"


def old_accounts_until(connection: Connection) -> datetime | None:
    """The time until which old code may have opened accounts in a legacy ledger; None if it still may.

    This is the end of the contract step: after it old code cannot write rows without keys. One day is added, because
    old code's clock may be of any time zone.
    """
    if is_adopted(connection):
        return None
    ended_at: datetime | None = connection.execute(
        text("SELECT ended_at FROM legacy_migration WHERE step = 'contract' AND status = 'done'")
    ).scalar()
    return None if ended_at is None else ended_at.replace(tzinfo=UTC) + timedelta(days=1)


def may_still_change(connection: Connection) -> bool:
    """Whether the rows of a legacy ledger may still get other values: until the contract step is done."""
    query = text("SELECT 1 FROM legacy_migration WHERE step = 'contract' AND status = 'done'")
    return holds_old_rows(connection) and connection.execute(query).first() is None


class Met(NamedTuple):
    """What old code has charged of a batch: the owners of its sessions, by session; its draws, by request key."""

    owners: dict[str, str]
    charged: dict[str, Charged]


class OldDraws:
    """The draws that old code has charged, and their sessions. Made once, at the start of a worker.

    With `adopts`, rows without a key get the key that the backfill would give them. A forecast does not adopt rows.
    """

    def __init__(self, *, adopts: bool = True) -> None:
        self._adopts = adopts

    @classmethod
    def of(cls, database: Engine | Connection, *, adopts: bool = True) -> Self | None:
        """The old draws of this ledger; None if old code has never written it."""
        return cls(adopts=adopts) if holds_old_rows(database) else None

    def meet(self, transaction: Transaction, asking: Sequence[Request]) -> Met:
        """The old draws and sessions that these requests name. Raises the driver's errors."""
        names = sorted({name for it in asking for name in (it.request_key, it.lottery_session_id)})
        old = _charged(transaction, names, adopts=self._adopts)
        if not old:
            return Met({}, {})
        # A session in which a request of ours was drawn belongs to that request, whatever the session's name.
        owners = {session_id: session_id for session_id in old} | {
            session_id: key
            for session_id, key in owners_of_sessions(transaction, list(old)).items()
            if any(row.idempotency_key.startswith(f"{key}:") for row in old[session_id].rows)
        }
        charged = {it.request_key: old[it.request_key] for it in asking if owners.get(it.request_key) == it.request_key}
        return Met(owners, charged)


def _charged(transaction: Transaction, names: Sequence[str], *, adopts: bool) -> dict[str, Charged]:
    """Charged draws whose session is among `names`, by session, with all rows of the session in their order.

    A draw is found by its session and its `lottery_consume` row, whatever the form of its keys: old code had one name
    for request key and session. Rows without a key or a session are read as the backfill will leave them; with `adopts`
    they get both now.
    """
    if not names:
        return {}
    wanted = frozenset(names)
    columns = (
        "SELECT transaction_id, account_id, {session}, idempotency_key, business_type, asset_code, delta_amount, "
        "balance_before, balance_after, notes, lottery_session_id, created_at, updated_at "
        "FROM asset_transactions WHERE "
    )
    found = [
        *transaction.select(f"{columns.format(session='lottery_session_id')} lottery_session_id IN (??)", names),
        # After the contract step no row is without a session; the server knows this from the column's definition.
        *transaction.select(
            f"{columns.format(session='business_id')} business_id IN (??) AND lottery_session_id IS NULL", names
        ),
    ]
    # Old columns may compare `ABC` and `abc` as equal.
    rows = sorted((row for row in found if row[2] in wanted), key=itemgetter(0))
    to_fill = [row for row in rows if row[3] is None or row[10] is None]
    if to_fill and adopts:
        transaction.update(
            "asset_transactions",
            "transaction_id",
            # The times as well, because some servers would set them to now.
            ("idempotency_key", "lottery_session_id", "created_at", "updated_at"),
            [(row[0], row[3] or f"tx_{row[0]}", row[2], str(row[11]), str(row[12])) for row in to_fill],
        )
    sessions: dict[str, list[Posting]] = {}
    draws: dict[str, Charged] = {}
    for transaction_id, account_id, session_id, key, *others in (row[:10] for row in rows):
        posting = read_posting(transaction, (account_id, session_id, key or f"tx_{transaction_id}", *others))
        postings = sessions.setdefault(session_id, [])
        postings.append(posting)
        if posting.business_type == CONSUME:
            draws.setdefault(session_id, Charged(account_id, session_id, postings))
    return draws


class OldRows(enum.Enum):
    """How rows of old code are recognised in a ledger."""

    NONE = enum.auto()
    BY_KEY = enum.auto()  # by the backfill's key, or by no key before the backfill
    BY_NOTES = enum.auto()  # by their notes: keys may be of any form, and only our workers note the odds

    @classmethod
    def of(cls, connection: Connection) -> OldRows:
        """How rows of old code are recognised in this ledger."""
        if not holds_old_rows(connection):
            return cls.NONE
        return cls.BY_NOTES if is_adopted(connection) else cls.BY_KEY

    def wrote(self, transaction_id: int, key: str | None, notes: Any) -> bool:
        """Whether old code wrote this row; `key` is None before the backfill."""
        if self is OldRows.NONE:
            return False
        if key is None or key == f"tx_{transaction_id}":
            return True
        return self is OldRows.BY_NOTES and not str(notes or "").startswith(NOTES_PREFIX)

    def new_rows(self) -> ColumnElement[bool]:
        """The SQL condition for rows that our workers wrote."""
        if self is OldRows.NONE:
            return true()
        if self is OldRows.BY_NOTES:
            return transactions.c.notes.startswith(NOTES_PREFIX)
        return transactions.c.idempotency_key != func.concat("tx_", transactions.c.transaction_id)
