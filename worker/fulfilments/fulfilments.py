"""Fulfilments: what is to be delivered to webhooks, and what came of it.

               ┌──► delivered   the receiver answered 2xx
    pending ───┤                                              a failed attempt is made again, later and later
       ▲       └──► dead        too many attempts, 410, or its webhook was removed
       └──────────── │          an operator's replay

The batch writes them (subscriptions), the relay leases and ends them (this file), operators replay dead ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, Engine, and_, func, select, update

from tombola.producers.domain.causes import FulfilmentState
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage import clock
from tombola.producers.storage.chunks import IN_LIST_MAX, chunks
from tombola.producers.storage.schema import fulfilments as table
from tombola.producers.storage.schema import webhooks
from tombola.worker.fulfilments.events import EVERY
from tombola.worker.fulfilments.subscriptions import NO_WEBHOOK
from tombola.worker.fulfilments.webhooks import Webhook
from tombola.worker.operators import actions
from tombola.worker.operators.once import once

ERROR_LENGTH_MAX: Final = 200
REPLAYED_MAX: Final = 10_000  # in one act
IDS_RECORDED_MAX: Final = 100


class Fulfilment(NamedTuple):
    """A row of the table. `webhook` is empty while no webhook has subscribed to the notification."""

    id: int
    idempotency_key: str
    webhook: str
    event: str
    campaign: str
    account_id: int
    lottery_session_id: str
    state: str
    attempts: int
    next_at: datetime
    error: str | None
    created_at: datetime
    ended_at: datetime | None


_COLUMNS: Final = [table.c[name] for name in Fulfilment._fields]


# ---- what the relay does ---------------------------------------------------------------------------------------------


def is_due(connection: Connection, webhook: str, now: datetime) -> bool:
    """Whether anything is to be sent to a webhook now."""
    return connection.execute(select(table.c.id).where(_due(webhook, now)).limit(1)).first() is not None


def lease(connection: Connection, webhook: str, now: datetime, *, rows_max: int, lease_s: float) -> list[Fulfilment]:
    """Take up to `rows_max` fulfilments that are due, in the order in which they became due; each is an attempt.

    No other relay takes them within `lease_s`: a relay that dies with them costs only time. Rows that another relay has
    locked are skipped.
    """
    rows = connection.execute(
        select(*_COLUMNS)
        .where(_due(webhook, now))
        .order_by(table.c.next_at)
        .limit(rows_max)
        .with_for_update(skip_locked=True)
    ).all()
    if rows:
        until = now + timedelta(seconds=lease_s)
        connection.execute(
            update(table)
            .where(table.c.id.in_([row.id for row in rows]))
            .values(attempts=table.c.attempts + 1, next_at=until)
        )
    return [Fulfilment(*row)._replace(attempts=row.attempts + 1) for row in rows]


class Attempt(NamedTuple):
    """What came of one attempt: `error` is None where the receiver took it, `delay` where no attempt follows."""

    fulfilment: Fulfilment
    error: str | None = None
    delay: timedelta | None = None

    @property
    def state(self) -> FulfilmentState:
        """The state that the attempt leads to."""
        if self.error is None:
            return FulfilmentState.DELIVERED
        return FulfilmentState.DEAD if self.delay is None else FulfilmentState.PENDING


def finish(connection: Connection, attempts: Sequence[Attempt], now: datetime) -> None:
    """Record what came of leased fulfilments.

    A failure counts only while the lease is the latest: a relay that was frozen past its lease undoes nothing.
    """
    delivered = [it.fulfilment.id for it in attempts if it.error is None]
    for ids in chunks(delivered):
        connection.execute(
            update(table)
            .where(table.c.id.in_(ids), table.c.state == FulfilmentState.PENDING)
            .values(state=FulfilmentState.DELIVERED, ended_at=now)
        )
    for it in attempts:
        if it.error is not None:
            connection.execute(
                update(table)
                .where(
                    table.c.id == it.fulfilment.id,
                    table.c.state == FulfilmentState.PENDING,
                    table.c.attempts == it.fulfilment.attempts,
                )
                .values(
                    state=it.state,
                    error=it.error[:ERROR_LENGTH_MAX],
                    next_at=now + (it.delay or timedelta(0)),
                    ended_at=now if it.delay is None else None,
                )
            )


def is_untidy(connection: Connection) -> bool:
    """Whether anything pending has no live webhook: `hand_over` or `give_up_removed` may have something to do."""
    removed = select(webhooks.c.name).where(webhooks.c.removed_at.is_not(None))
    for condition in (table.c.webhook == NO_WEBHOOK, table.c.webhook.in_(removed)):
        query = select(table.c.id).where(table.c.state == FulfilmentState.PENDING, condition).limit(1)
        if connection.execute(query).first() is not None:
            return True
    return False


def hand_over(connection: Connection, webhook: Webhook, now: datetime, *, rows_max: int = IN_LIST_MAX) -> int:
    """Give a webhook up to `rows_max` notifications that had no webhook and that it subscribes to; return how many."""
    condition = and_(table.c.state == FulfilmentState.PENDING, table.c.webhook == NO_WEBHOOK)
    if EVERY not in webhook.events:
        condition = and_(condition, table.c.event.in_(webhook.events))
    if webhook.campaign is not None:
        condition = and_(condition, table.c.campaign == webhook.campaign)
    ids = list(
        connection.execute(
            select(table.c.id).where(condition).limit(rows_max).with_for_update(skip_locked=True)
        ).scalars()
    )
    if ids:
        connection.execute(update(table).where(table.c.id.in_(ids)).values(webhook=webhook.name, next_at=now))
    return len(ids)


def give_up_removed(connection: Connection, now: datetime, *, rows_max: int = IN_LIST_MAX) -> int:
    """pending → dead for up to `rows_max` fulfilments whose webhook was removed; return how many."""
    removed = list(connection.execute(select(webhooks.c.name).where(webhooks.c.removed_at.is_not(None))).scalars())
    given_up = 0
    for name in removed:
        ids = list(
            connection.execute(
                select(table.c.id)
                .where(table.c.state == FulfilmentState.PENDING, table.c.webhook == name)
                .limit(rows_max - given_up)
                .with_for_update(skip_locked=True)
            ).scalars()
        )
        if ids:
            connection.execute(
                update(table)
                .where(table.c.id.in_(ids))
                .values(state=FulfilmentState.DEAD, error="its webhook was removed", ended_at=now)
            )
        given_up += len(ids)
        if given_up >= rows_max:
            break
    return given_up


def _due(webhook: str, now: datetime) -> ColumnElement[bool]:
    return and_(table.c.state == FulfilmentState.PENDING, table.c.webhook == webhook, table.c.next_at <= now)


def forget_delivered(connection: Connection, ended_before: datetime, *, after_id: int, rows_max: int) -> int | None:
    """Delete what was delivered before then, among the next `rows_max` rows after `after_id`; return the last id.

    None: the rows that follow are all younger. The oldest rows are the first ones, so no index is needed.
    """
    rows = connection.execute(
        select(table.c.id, table.c.state, table.c.created_at, table.c.ended_at)
        .where(table.c.id > after_id)
        .order_by(table.c.id)
        .limit(rows_max)
    ).all()
    old = [row for row in rows if row.created_at < ended_before]
    ids = [row.id for row in old if row.state == FulfilmentState.DELIVERED and row.ended_at < ended_before]
    if ids:
        connection.execute(table.delete().where(table.c.id.in_(ids)))
    return old[-1].id if len(old) == rows_max else None


# ---- what operators see and do ---------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Pending fulfilments, pending notifications that no webhook has subscribed to, dead ones; and since when the
    oldest of the first waits."""

    pending: int
    without_webhook: int
    dead: int
    oldest_at: datetime | None


def counts(connection: Connection) -> Counts:
    """How many are not delivered. Delivered ones are not counted: there may be millions."""
    found: Mapping[tuple[str, bool], tuple[int, int]] = {
        (row.state, row.has_webhook): (row.number, row.first_id)
        for row in connection.execute(
            select(
                table.c.state,
                (table.c.webhook != NO_WEBHOOK).label("has_webhook"),
                func.count().label("number"),
                func.min(table.c.id).label("first_id"),
            )
            .where(table.c.state.in_((FulfilmentState.PENDING, FulfilmentState.DEAD)))
            .group_by(table.c.state, table.c.webhook != NO_WEBHOOK)
        )
    }
    pending, first_id = found.get((FulfilmentState.PENDING, True), (0, 0))
    oldest_at = (
        connection.execute(select(table.c.created_at).where(table.c.id == first_id)).scalar() if pending else None
    )
    return Counts(
        pending,
        found.get((FulfilmentState.PENDING, False), (0, 0))[0],
        sum(number for (state, _), (number, _) in found.items() if state == FulfilmentState.DEAD),
        oldest_at,
    )


class Selection(NamedTuple):
    """Which fulfilments: those that fit every field that is set."""

    ids: tuple[int, ...] = ()
    state: FulfilmentState | None = None
    webhook: str | None = None
    event: str | None = None
    lottery_session_id: str | None = None

    def condition(self) -> ColumnElement[bool]:
        """As SQL. Raises InvalidRequest for too many ids, and for text that no column can hold."""
        if len(self.ids) > IN_LIST_MAX:
            raise InvalidRequest(f"at most {IN_LIST_MAX:,} ids at once")
        conditions: list[ColumnElement[bool]] = [table.c.id.in_(self.ids)] if self.ids else []
        for name in ("state", "webhook", "event", "lottery_session_id"):
            value = getattr(self, name)
            if value is None:
                continue
            if not value.isascii():  # MariaDB raises an error when it compares other text with an ASCII column
                raise InvalidRequest(f"no fulfilment has the {name.replace('_', ' ')} {value!r:.80}")
            conditions.append(table.c[name] == str(value))
        return and_(True, *conditions)


def some(
    connection: Connection, selection: Selection, *, rows_max: int, before_id: int | None = None
) -> list[Fulfilment]:
    """Up to `rows_max` fulfilments, newest first; from below `before_id` on."""
    query = select(*_COLUMNS).where(selection.condition()).order_by(table.c.id.desc()).limit(rows_max)
    if before_id is not None:
        query = query.where(table.c.id < before_id)
    return [Fulfilment(*row) for row in connection.execute(query)]


def of_sessions(connection: Connection, lottery_session_ids: Sequence[str], *, rows_max: int) -> list[Fulfilment]:
    """The fulfilments of these lottery sessions, oldest first."""
    query = select(*_COLUMNS).where(table.c.lottery_session_id.in_(lottery_session_ids)).order_by(table.c.id)
    return [Fulfilment(*row) for row in connection.execute(query.limit(rows_max))]


def replay(engine: Engine, selection: Selection, *, operator: str, reason: str) -> int:
    """dead → pending for what is selected, REPLAYED_MAX at most, the oldest first; return how many.

    They are due at once, under their own keys, with all their attempts again. Dead ones of a removed webhook stay dead.
    Raises InvalidRequest where nothing is selected, or only what cannot be replayed; ServiceUnavailable or
    ConfigurationError when the database cannot be used.
    """
    why = actions.checked_reason(reason)
    condition = and_(selection.condition(), table.c.state == FulfilmentState.DEAD)
    live = select(webhooks.c.name).where(webhooks.c.removed_at.is_(None))

    def act(connection: Connection) -> int:
        now = clock.now(connection)
        ids = list(
            connection.execute(
                select(table.c.id)
                .where(condition, table.c.webhook.in_(live))
                .order_by(table.c.id)
                .limit(REPLAYED_MAX)
                .with_for_update()
            ).scalars()
        )
        if not ids:
            _refuse(connection, condition)
        for some_ids in chunks(ids):
            connection.execute(
                update(table)
                .where(table.c.id.in_(some_ids))
                .values(state=FulfilmentState.PENDING, attempts=0, next_at=now, ended_at=None)
            )
        named = {name: value for name, value in selection._asdict().items() if value and name != "ids"}
        details: dict[str, Any] = named | {"fulfilments": ids[:IDS_RECORDED_MAX]}
        actions.record(
            connection, operator=operator, action="fulfilment replay", reason=why, count=len(ids), details=details
        )
        return len(ids)

    return once(engine, act)


def _refuse(connection: Connection, condition: ColumnElement[bool]) -> None:
    row = connection.execute(select(table.c.webhook).where(condition).limit(1)).first()
    if row is None:
        raise InvalidRequest("no dead fulfilment is selected: `tombola fulfilment list --state dead` shows them")
    raise InvalidRequest(f"webhook {row.webhook} was removed: add it again under this name, then replay")
