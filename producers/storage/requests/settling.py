"""How a request leaves the status `accepted`: it settles, or it is given up; and how a replay revives a dead one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Final

import msgspec
from sqlalchemy import Connection, Engine, case, or_, update
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.storage.faults import explain
from tombola.producers.storage.requests.records import (
    EPOCH_COLUMN,
    REQUEST_COLUMNS,
    kind_columns,
    kind_values,
    request_values,
)
from tombola.producers.storage.schema import api_idempotency_requests as table
from tombola.producers.storage.seeds import open_at
from tombola.producers.storage.transactions import Transaction, Value, time_text

# Not the result: it is rebuilt from this row and the ledger rows, equal to the byte.
_OUTCOME_COLUMNS: Final = ("status", "reason", "balance_told", "deliveries", "settled_by")
# A request without a row gets one as it settles. `publish_at` is set, too: audits find settled rows along its index.
_COPIES: Final = {"settled_at": "created_at", "publish_at": "created_at"}


class RequestOutcome(msgspec.Struct, frozen=True):
    """A request that settles now, and its outcome. `is_accepted` says that the request has a row already.

    `balance_told` is the balance in the answer of a rejected request, which has no ledger rows.

    `seed_epoch` is the epoch that a draw binds to now, None where it was bound when it was accepted.
    """

    request: Request
    fingerprint: str
    status: Status
    reason: str | None
    balance_told: Decimal | None
    is_accepted: bool
    deliveries: int = 1
    seed_epoch: int | None = None


def finish(
    transaction: Transaction, outcomes: Sequence[RequestOutcome], now: datetime, *, settled_by: str | None = None
) -> None:
    """Record outcomes: one statement inserts the rows of requests without one, another updates accepted rows.

    Accepted draws that bind to an epoch only now take one statement more.

    Raises RowsChanged when a row is no longer accepted.
    """
    moment = time_text(now)
    new = [it for it in outcomes if not it.is_accepted]
    kind = kind_columns(it.request for it in new)
    epoch = EPOCH_COLUMN if any(it.seed_epoch is not None for it in new) else ()
    transaction.insert(
        table.name,
        (*REQUEST_COLUMNS, *_OUTCOME_COLUMNS, *kind, *epoch),
        [
            (
                *request_values(it.request, it.fingerprint, moment),
                *_outcome_values(transaction, it, settled_by),
                *kind_values(it.request, kind),
                *((it.seed_epoch,) if epoch else ()),
            )
            for it in new
        ],
        copies=_COPIES,
    )
    binding = [(it.request.request_key, it.seed_epoch) for it in outcomes if it.is_accepted and it.seed_epoch]
    transaction.update(table.name, "request_key", EPOCH_COLUMN, binding)
    transaction.update(
        table.name,
        "request_key",
        (*_OUTCOME_COLUMNS, "settled_at"),
        [
            (it.request.request_key, *_outcome_values(transaction, it, settled_by), moment)
            for it in outcomes
            if it.is_accepted
        ],
        # The rows were read without a lock: a request that was given up meanwhile is dead and must not be charged.
        where=f"status = '{Status.ACCEPTED}'",
    )


def _outcome_values(transaction: Transaction, it: RequestOutcome, settled_by: str | None) -> tuple[Value, ...]:
    """The values of _OUTCOME_COLUMNS."""
    told = None if it.balance_told is None else transaction.money(it.balance_told)
    return it.status, it.reason, told, it.deliveries, settled_by


def give_up(connection: Connection, request_key: str, fingerprint: str, reason: str) -> bool:
    """accepted → dead for the request with this key and fingerprint; return whether there was one."""
    return bool(
        connection.execute(
            update(table)
            .where(
                table.c.request_key == request_key,
                table.c.status == Status.ACCEPTED,
                table.c.fingerprint == fingerprint,
            )
            .values(status=Status.DEAD, reason=reason)
        ).rowcount
    )


def give_up_all(connection: Connection, given_up: Sequence[Request], reason: str) -> None:
    """accepted → dead for each of these requests whose row is accepted and has the same content.

    At most IN_LIST_MAX at once (producers.storage.chunks).
    """
    if not given_up:
        return
    # A fingerprint covers the key as well: a row that has one of these fingerprints is one of these requests.
    connection.execute(
        update(table)
        .where(
            table.c.request_key.in_(sorted({it.request_key for it in given_up})),
            table.c.fingerprint.in_(sorted({it.fingerprint() for it in given_up})),
            table.c.status == Status.ACCEPTED,
        )
        .values(status=Status.DEAD, reason=reason)
    )


def revive(
    connection: Connection,
    request_keys: Sequence[str],
    now: datetime,
    *,
    publish_at: datetime | None = None,
    is_published: bool = False,
) -> int:
    """dead → accepted, for an operator's replay; return how many requests were dead.

    `publish_at` (default: now) and `is_published` have the same meaning as in `accept`. Draws bind to the epoch of now:
    the secret of their former one may be public.
    """
    epoch = open_at(connection, now)
    is_draw = or_(table.c.kind.is_(None), table.c.kind == DrawRequest.kind)
    return connection.execute(
        update(table)
        .where(table.c.request_key.in_(request_keys), table.c.status == Status.DEAD)
        .values(
            status=Status.ACCEPTED,
            reason=None,
            publish_attempts=1 if is_published else 0,
            publish_error=None,
            published_at=now if is_published else None,
            publish_at=publish_at or now,
            accepted_at=now,  # the request's time begins anew; otherwise the relay would time it out at once
            seed_epoch=None if epoch is None else case((is_draw, epoch.id)),
        )
    ).rowcount


def try_writing(engine: Engine) -> None:
    """Run the statement that records an outcome, on no row.

    Raises ServiceUnavailable or ConfigurationError when the database cannot record outcomes: away, read-only.
    """
    try:
        with engine.begin() as connection:
            connection.execute(update(table).where(table.c.request_key == "").values(status=Status.DEAD))
    except SQLAlchemyError as error:
        raise explain(error) from error
