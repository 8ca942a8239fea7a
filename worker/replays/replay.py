"""A replay's row: begun with who, why and what; stopped, ended, read. worker.replays.replayer runs the replay."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final, Literal, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Connection, Engine, Select, and_, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.causes import OPEN_STATES
from tombola.producers.domain.errors import InvalidRequest, ReplayNotFound
from tombola.producers.storage import clock
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import replays as table
from tombola.worker.dead_letters.letters import Selection
from tombola.worker.operators import actions
from tombola.worker.replays.selected import selected_ids

RUNNING: Final = "running"
DONE: Final = "done"
STOPPED: Final = "stopped"
FAILED: Final = "failed"

CANARY: Final = 10  # the size of the first step, when the forecast calls a replay hopeless
DEAD_AFTER_S: Final = 60.0  # a replay that gives no sign of life for so long has died


class Options(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a replay goes: at most `rate` messages a second, `limit` in all; with `canary`, that many first.

    `vouch`: the operator vouches for messages that are not signed or not accepted. Raises InvalidRequest for a value
    out of range.
    """

    rate: float | None = None
    limit: int | None = None
    canary: int | None = None
    vouch: bool = False

    def __post_init__(self) -> None:
        for name in ("rate", "limit", "canary"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 10_000_000:
                raise InvalidRequest(f"{name} is above 0 and at most 10,000,000, not {value:g}")


class Replay(NamedTuple):
    """A replay's row. `selected` counts the dead letters at its start; `refused` were left parked, see the forecast."""

    id: int
    operator: str
    reason: str
    selection: str
    options: str
    status: str
    stopped_because: str | None
    selected: int
    sent: int
    settled: int
    parked_again: int
    refused: int
    started_at: datetime
    seen_at: datetime
    ended_at: datetime | None
    stop_asked_at: datetime | None
    stop_asked_by: str | None
    # Whether the process that ran it has given no sign of life, by the database's clock. A new replay does no harm.
    has_died: bool = False

    @property
    def under_way(self) -> int:
        """The number of messages that were sent and have no outcome yet."""
        return self.sent - self.settled - self.parked_again

    @property
    def is_running(self) -> bool:
        return self.status == RUNNING

    @property
    def outcome(self) -> Literal["busy", "good", "mixed", "bad"]:
        """The result in one word: `good` if all selected have settled, `bad` if none has or the process has died."""
        if self.is_running:
            return "bad" if self.has_died else "busy"
        if self.status == DONE and self.settled == self.selected:
            return "good"
        return "mixed" if self.settled else "bad"


def begin(engine: Engine, selection: Selection, options: Options, *, operator: str, reason: str) -> int:
    """Put a replay on record; return its id, for `Replayer.run`. No message is sent yet.

    Raises InvalidRequest without a reason or if nothing is selected, and ServiceUnavailable or ConfigurationError when
    the database cannot be used.
    """
    why = actions.checked_reason(reason)
    asked = msgspec.structs.replace(selection, states=tuple(it for it in selection.states if it in OPEN_STATES))
    try:
        with engine.begin() as connection:
            number = len(selected_ids(connection, asked, options.limit)) if asked.states else 0
            if not number:
                raise InvalidRequest("nothing to replay: no parked message is selected")
            now = clock.now(connection)
            _end_the_dead(connection, now)
            (replay_id,) = connection.execute(
                insert(table).values(
                    operator=operator[:100],
                    reason=why,
                    selection=msgspec.json.encode(asked).decode(),
                    options=msgspec.json.encode(options).decode(),
                    status=RUNNING,
                    selected=number,
                    started_at=now,
                    seen_at=now,
                )
            ).inserted_primary_key or (0,)
            details = {"selection": asked.described(), "options": msgspec.to_builtins(options)}
            actions.record(
                connection,
                operator=operator,
                action="replay",
                reason=why,
                count=number,
                details=details,
                replay_id=replay_id,
            )
    except SQLAlchemyError as error:
        raise explain(error) from error
    return int(replay_id)


def _end_the_dead(connection: Connection, now: datetime) -> None:
    """Put on record that replays whose process has died are over."""
    rows = connection.execute(select(table).where(_has_died(now)).with_for_update()).all()
    for row in rows:
        record_end(connection, Replay(**row._mapping), FAILED, "the process that ran it died", now)


def _has_died(now: datetime) -> ColumnElement[bool]:
    return and_(table.c.status == RUNNING, table.c.seen_at < now - timedelta(seconds=DEAD_AFTER_S))


def record_end(connection: Connection, run: Replay, status: str, because: str | None, now: datetime) -> None:
    """Put on record that a replay has ended, with its sums. `because` says why it ended before everything was sent."""
    connection.execute(
        update(table).where(table.c.id == run.id).values(status=status, stopped_because=because, ended_at=now)
    )
    sums = {name: getattr(run, name) for name in ("selected", "sent", "settled", "parked_again", "refused")}
    actions.record(
        connection,
        operator=run.operator,
        action="replay ended",
        reason=run.reason,
        count=run.sent,
        details={"status": status, "because": because, **sums},
        replay_id=run.id,
    )


def count_step(connection: Connection, replay_id: int, *, sent: int, refused: int, now: datetime) -> None:
    """Add one step to a replay's sums; this is its sign of life as well."""
    connection.execute(
        update(table)
        .where(table.c.id == replay_id)
        .values(sent=table.c.sent + sent, refused=table.c.refused + refused, seen_at=now)
    )


def count_outcomes(connection: Connection, replay_id: int, *, settled: int, parked_again: int, now: datetime) -> Replay:
    """Bring a replay's outcomes up to date, which is its sign of life as well; return its row."""
    connection.execute(
        update(table).where(table.c.id == replay_id).values(settled=settled, parked_again=parked_again, seen_at=now)
    )
    return find(connection, replay_id)


def ask_to_stop(engine: Engine, replay_id: int, *, operator: str) -> None:
    """Ask the process that runs this replay to stop. Messages that were sent stay sent; the rest stays parked.

    Raises ReplayNotFound, and ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    try:
        with engine.begin() as connection:
            asked = connection.execute(
                update(table)
                .where(table.c.id == replay_id, table.c.status == RUNNING, table.c.stop_asked_at.is_(None))
                .values(stop_asked_at=clock.now(connection), stop_asked_by=operator[:100])
            ).rowcount
            if not asked:
                find(connection, replay_id)
                return  # it has ended, or was asked before
            actions.record(
                connection,
                operator=operator,
                action="stop replay",
                reason="asked to stop",
                count=1,
                details={},
                replay_id=replay_id,
            )
    except SQLAlchemyError as error:
        raise explain(error) from error


def find(connection: Connection, replay_id: int) -> Replay:
    """One replay; raises ReplayNotFound."""
    row = connection.execute(_all(connection).where(table.c.id == replay_id)).first()
    if row is None:
        raise ReplayNotFound(f"there is no replay {replay_id}")
    return Replay(**row._mapping)


def recent(connection: Connection, rows_max: int) -> list[Replay]:
    """The latest replays, newest first."""
    rows = connection.execute(_all(connection).order_by(table.c.id.desc()).limit(rows_max))
    return [Replay(**row._mapping) for row in rows]


def _all(connection: Connection) -> Select[Any]:
    return select(table, _has_died(clock.now(connection)).label("has_died"))
