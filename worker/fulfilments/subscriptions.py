"""Subscriptions in memory, and the fulfilments that follow from a draw: rows of the transaction that settles it.

The batch (worker.settle) asks here what to write. Without a webhook and without a notification nothing is written and
no statement is sent. The webhooks are read at most once in REFRESH_S, before the transaction and on a connection of
their own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final, NamedTuple

import msgspec
from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.causes import FulfilmentState, Status
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.storage.faults import explain
from tombola.producers.storage.ledger import Posting
from tombola.producers.storage.schema import webhooks
from tombola.producers.storage.transactions import Transaction, time_text
from tombola.worker.fulfilments.events import DRAW_SETTLED, NOTICE, event_of
from tombola.worker.fulfilments.webhooks import LIVE_MAX, takes

log = logging.getLogger(__name__)

REFRESH_S: Final = 1.0
NO_WEBHOOK: Final = ""  # of a notification that no webhook has subscribed to yet

_COLUMNS: Final = (
    "idempotency_key", "webhook", "event", "campaign", "account_id", "lottery_session_id", "state", "created_at",
)  # fmt: skip
_COPIES: Final = {"next_at": "created_at"}


class Subscription(NamedTuple):
    """What one live webhook gets; `campaign` None is all campaigns."""

    webhook: str
    events: tuple[str, ...]
    campaign: str | None


class Row(NamedTuple):
    """A fulfilment to write: an event for one webhook."""

    idempotency_key: str
    webhook: str
    event: str
    campaign: str
    account_id: int
    lottery_session_id: str


class Subscriptions:
    """The live webhooks of a database as they were at most REFRESH_S ago. Safe to share between threads.

    Call `refresh` before a transaction, and `is_empty`, `rows` and then `insert` inside it: these read nothing.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._looked_at: float | None = None  # monotonic
        self._known: tuple[Subscription, ...] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no webhook subscribes to anything: then only draws with a notification have rows (`has_notice`)."""
        return not self._known

    def refresh(self) -> None:
        """Read the webhooks again if it is time. In an outage it keeps what it knows.

        Raises ServiceUnavailable or ConfigurationError while it has never read them: a draw that settled then would
        have no fulfilments.
        """
        with self._lock:
            if self._looked_at is not None and time.monotonic() < self._looked_at + REFRESH_S:
                return
            self._looked_at = time.monotonic()  # other threads go on with what is known
        try:
            self._known = self._read()
        except SQLAlchemyError as error:
            if self._known is None:
                self._looked_at = None
                raise explain(error) from error
            log.warning("the webhooks are as they were at the last look: %s", explain(error))

    def rows(self, draw: Request, status: Status, postings: Sequence[Posting]) -> list[Row]:
        """The fulfilments of a draw that settles now with this status and these ledger rows. Pure; never raises.

        For a repeat there are none: they were written when the draw settled. A notification without a webhook has a row
        too, which the relay hands over once a webhook subscribes.
        """
        if status not in (Status.COMPLETED, Status.REJECTED) or not isinstance(draw, DrawRequest):
            return []
        about = (draw.campaign, draw.account_id, draw.lottery_session_id)
        found = [
            Row(draw.request_key, webhook, DRAW_SETTLED, *about)
            for webhook in self._takers(DRAW_SETTLED, draw.campaign)
        ]
        for posting in postings:
            event = event_of(posting)
            if event is None:
                continue
            takers = list(self._takers(event, draw.campaign))
            if not takers and posting.business_type == NOTICE:
                takers = [NO_WEBHOOK]
            found += (Row(posting.idempotency_key, webhook, event, *about) for webhook in takers)
        return found

    def _takers(self, event: str, campaign: str) -> Iterator[str]:
        return (it.webhook for it in self._known or () if takes(it.events, it.campaign, event, campaign))

    def _read(self) -> tuple[Subscription, ...]:
        query = (
            select(webhooks.c.name, webhooks.c.events, webhooks.c.campaign)
            .where(webhooks.c.removed_at.is_(None))
            .order_by(webhooks.c.created_at, webhooks.c.name)
            .limit(LIVE_MAX)
        )
        with self._engine.connect().execution_options(read_only=True) as connection:
            return tuple(
                Subscription(name, tuple(msgspec.json.decode(events)), campaign)
                for name, events, campaign in connection.execute(query)
            )


def has_notice(postings: Sequence[Posting]) -> bool:
    """Whether a notification is among these ledger rows: it has a fulfilment with and without a webhook."""
    return any(posting.business_type == NOTICE for posting in postings)


def insert(transaction: Transaction, rows: Sequence[Row], now: datetime) -> None:
    """Write `rows` in the transaction that settles their draws, in one statement; without rows nothing is sent."""
    moment = time_text(now)
    values = [(*row, FulfilmentState.PENDING.value, moment) for row in rows]
    transaction.insert("fulfilments", _COLUMNS, values, copies=_COPIES)
