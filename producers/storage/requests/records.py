"""The row of one request: its columns, and how it is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

from tombola.producers.domain import operations
from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import Request
from tombola.producers.storage.schema import api_idempotency_requests as table
from tombola.producers.storage.transactions import Transaction, joined

# The columns that describe the request itself, in the order of `request_values`.
REQUEST_COLUMNS: Final = ("request_key", "lottery_session_id", "account_id", "campaign", "fingerprint", "created_at")
# Further columns, written only for a batch that has such a request, so that a draw of contract v1 sends no more bytes.
KIND_COLUMNS: Final = ("kind", "terms")
EPOCH_COLUMN: Final = ("seed_epoch",)
# What `request_of` needs of a row.
DESCRIBED: Final = (
    table.c.request_key, table.c.lottery_session_id, table.c.account_id, table.c.campaign, table.c.kind, table.c.terms,
)  # fmt: skip
_KNOWN: Final = ("request_key", "fingerprint", "caller", "status")
# Times as text: the driver takes longer to decode a time than all other columns of a row together.
_IF_KNOWN: Final = (
    *("result", "CAST(settled_at AS CHAR)", "reason", "balance_told", "CAST(accepted_at AS CHAR)", "seed_epoch"),
)
_WITH_ODDS: Final = (*_IF_KNOWN, "odds_hash", "CAST(created_at AS CHAR)")


class RequestRecord(NamedTuple):
    """The row of a request; `result` is None but for a request that an older release has settled, and that is not
    archived: it is rebuilt from the ledger, or for a rejection from `reason` and `balance_told`.

    `seed_epoch` is the number of the epoch that a draw is bound to, None before it binds. `odds_hash` and `created_at`
    are set where they are asked for.
    """

    fingerprint: str
    caller: str
    status: str
    result: bytes | None = None
    settled_at: datetime | None = None
    reason: str | None = None
    balance_told: Decimal | None = None
    accepted_at: datetime | None = None
    seed_epoch: int | None = None
    odds_hash: str | None = None
    created_at: datetime | None = None

    @property
    def is_settled(self) -> bool:
        return self.status in (Status.COMPLETED, Status.REJECTED)


def look_up(
    transaction: Transaction, request_keys: Sequence[str], *, lock: bool = False, with_odds: bool = False
) -> dict[str, RequestRecord]:
    """The rows of these requests, by request key; a request without a row is not in the result.

    `with_odds`: also the version of its campaign that each is bound to, and since when.
    """
    nullable = _WITH_ODDS if with_odds else _IF_KNOWN
    found_by = f"FROM {table.name} WHERE request_key IN (??)"
    rows: Sequence[Sequence[Any]] | None = None
    if not lock:
        rows = transaction.select_joined(f"SELECT {joined(*_KNOWN, nullable=nullable)} {found_by}", request_keys)
    if rows is None:
        keys = sorted(request_keys) if lock else request_keys
        rows = transaction.select(f"SELECT {', '.join((*_KNOWN, *nullable))} {found_by}", keys, lock=lock)
    return {
        key: RequestRecord(
            fingerprint,
            caller,
            status,
            None if result is None else result.encode(),
            None if settled_at is None else _moment(settled_at),
            reason,
            None if balance is None else transaction.amount(balance),
            None if accepted_at is None else _moment(accepted_at),
            None if epoch is None else int(epoch),
            *((odds[0], _moment(odds[1])) if odds else ()),
        )
        for key, fingerprint, caller, status, result, settled_at, reason, balance, accepted_at, epoch, *odds in rows
    }


def _moment(utc: str) -> datetime:
    return datetime.fromisoformat(f"{utc}+00:00")


def request_values(request: Request, fingerprint: str, moment: str) -> tuple[str | int, ...]:
    """The values of REQUEST_COLUMNS; `moment` is a time as text."""
    return (
        request.request_key,
        request.lottery_session_id,
        request.account_id,
        getattr(request, "campaign", ""),  # of a draw, or of a refund
        fingerprint,
        moment,
    )


def kind_columns(requests: Iterable[Request]) -> tuple[str, ...]:
    """KIND_COLUMNS if any of the requests is other than a draw of contract v1, else none."""
    return KIND_COLUMNS if any(request.terms is not None for request in requests) else ()


def kind_values(request: Request, columns: Sequence[str]) -> tuple[str | None, ...]:
    """The values of `columns`, which are KIND_COLUMNS or none."""
    if not columns:
        return ()
    terms = request.terms
    return (None, None) if terms is None else (request.kind, terms)


def request_of(row: Any) -> Request:
    """The request that a row with the columns DESCRIBED describes. Raises as operations.restore does."""
    return operations.restore(
        row.request_key, row.lottery_session_id, row.account_id, row.campaign, row.kind, row.terms
    )
