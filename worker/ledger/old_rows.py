"""Which rows of a legacy ledger (`tombola legacy`) old code wrote: for the audit, which cannot recompute those."""

from __future__ import annotations

import enum
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, true

from tombola.producers.domain.draw import NOTES_PREFIX
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.ledger.post import holds_old_rows, is_adopted


class OldRows(enum.Enum):
    """By what they are known."""

    NONE = enum.auto()
    BY_KEY = enum.auto()  # the backfill's, or none yet
    BY_NOTES = enum.auto()  # old code may have given keys of any form: only our workers note the odds

    @classmethod
    def of(cls, connection: Connection) -> OldRows:
        """What holds for this ledger."""
        if not holds_old_rows(connection):
            return cls.NONE
        return cls.BY_NOTES if is_adopted(connection) else cls.BY_KEY

    def hold(self, transaction_id: int, key: str | None, notes: Any) -> bool:
        """Whether old code wrote this row; it has no key before the backfill comes to it."""
        if self is OldRows.NONE:
            return False
        if key is None or key == f"tx_{transaction_id}":
            return True
        return self is OldRows.BY_NOTES and not str(notes or "").startswith(NOTES_PREFIX)

    def others(self) -> ColumnElement[bool]:
        """The condition for rows of new code."""
        if self is OldRows.NONE:
            return true()
        if self is OldRows.BY_NOTES:
            return transactions.c.notes.startswith(NOTES_PREFIX)
        return transactions.c.idempotency_key != func.concat("tx_", transactions.c.transaction_id)
