"""Replay: send dead letters again, under the same request key, through the outbox.

One step is one transaction: the requests are accepted (or accepted again), their dead letters are `replaying`, the
replay's own row counts them. Then they are published; what is lost then, the relay publishes. So a replay that dies
half-way, or is run twice, does nothing twice, and what had happened already answers with its first result.

A canary replay sends the first few, waits until it knows what became of them, then twice as many, and so on. It stops
by itself when one is parked again for the cause it had before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Connection, Engine, Select, and_, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.brokers.registry import Broker
from tombola.producers.domain.causes import OPEN_STATES, Cause, LetterState, Status
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import DrawError, InvalidRequest, PublishFailed, ReplayNotFound
from tombola.producers.results import LOOK_TIMEOUT_S, ResultStore
from tombola.producers.settings import Settings
from tombola.producers.storage import clock, requests
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.faults import Fault, RowsChanged, explain, fault_of
from tombola.producers.storage.requests import RequestRecord, Submission
from tombola.producers.storage.schema import dead_letters
from tombola.producers.storage.schema import replays as table
from tombola.producers.storage.transactions import Transaction, again_after_conflicts
from tombola.worker.dead_letters import parking
from tombola.worker.dead_letters.letters import Selection
from tombola.worker.dead_letters.parking import ROWS_MAX
from tombola.worker.operators import actions
from tombola.worker.replays.forecast import letters_of, originals_settled, selected_ids
from tombola.worker.replays.vouching import Vouching

log = logging.getLogger(__name__)

RUNNING: Final = "running"
DONE: Final = "done"
STOPPED: Final = "stopped"
FAILED: Final = "failed"

CANARY: Final = 10  # how many are sent first, where the forecast calls it hopeless
LOOK_EVERY_S: Final = 0.25
SILENT_S_MAX: Final = 60.0  # nothing settles for so long: nobody is at work
DEAD_AFTER_S: Final = 60.0  # a replay that gives no sign of life for so long has died
SETTLE_DOWN_S: Final = 5.0
TRIES_MAX: Final = 5


class Options(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a replay goes: at most `rate` a second, `limit` in all; with `canary` that many first.

    `vouch`: the operator vouches for what is not signed, or nobody is on record as having asked for.
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
    """A replay's row. `selected` is what it began with; `refused` were left parked: the forecast says why."""

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
    # Whether the process that ran it has given no sign of life, by the database's clock. Beginning anew does no harm.
    has_died: bool = False

    @property
    def under_way(self) -> int:
        """How many were sent and have no outcome yet."""
        return self.sent - self.settled - self.parked_again

    @property
    def is_running(self) -> bool:
        return self.status == RUNNING

    @property
    def outcome(self) -> Literal["busy", "good", "mixed", "bad"]:
        """What to make of it: `done` says only that all were tried. Bad is one that has ended and settled nothing."""
        if self.is_running:
            return "bad" if self.has_died else "busy"
        if self.status == DONE and self.settled == self.selected:
            return "good"
        return "mixed" if self.settled else "bad"


# ---- begin, stop, look -----------------------------------------------------------------------------------------------


def begin(engine: Engine, selection: Selection, options: Options, *, operator: str, reason: str) -> int:
    """Put a replay on record; return its id, for `Replayer.run`. Nothing is sent yet.

    Raises InvalidRequest without a reason, or if nothing is selected.
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
    """Put on record that replays which have given no sign of life are over."""
    rows = connection.execute(select(table).where(_has_died(now)).with_for_update()).all()
    for row in rows:
        _record_end(connection, Replay(**row._mapping), FAILED, "whoever ran it died", now)


def _has_died(now: datetime) -> ColumnElement[bool]:
    return and_(table.c.status == RUNNING, table.c.seen_at < now - timedelta(seconds=DEAD_AFTER_S))


def _record_end(connection: Connection, run: Replay, status: str, because: str | None, now: datetime) -> None:
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


def ask_to_stop(engine: Engine, replay_id: int, *, operator: str) -> None:
    """Tell whoever runs this replay to stop, wherever that is. What is sent is sent; the rest stays parked."""
    try:
        with engine.begin() as connection:
            asked = connection.execute(
                update(table)
                .where(table.c.id == replay_id, table.c.status == RUNNING, table.c.stop_asked_at.is_(None))
                .values(stop_asked_at=clock.now(connection), stop_asked_by=operator[:100])
            ).rowcount
            if not asked:
                find(connection, replay_id)
                return  # it has ended, or was told already
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


# ---- run -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """What one transaction did."""

    sent: int
    to_publish: list[Request]
    revived: list[Request]


class _Refused(Exception):
    """The database refuses one of these, or our own code does: its cause says why."""


class _Ended(Exception):
    """The replay ends before everything is sent."""

    def __init__(self, status: str, because: str) -> None:
        super().__init__(because)
        self.status = status
        self.because = because


class Replayer:
    """Runs replays: one at a time, from one thread. `stop` may be called from any."""

    def __init__(self, engine: Engine, broker: Broker, settings: Settings) -> None:
        self._engine = engine
        self._broker = broker
        self._results = (
            ResultStore.from_settings(settings, timeout_s=LOOK_TIMEOUT_S) if settings.has("result_url") else None
        )
        self._relay_after = timedelta(seconds=settings.relay_after_s)
        self._vouching = Vouching.of(settings)
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Send no more; `run` returns soon."""
        self._stopping.set()

    def run(self, replay_id: int, tell: Callable[[Replay], None] = lambda _replay: None) -> Replay:
        """Send what was selected, and see what becomes of it; return the replay as it ended.

        `tell` hears of it several times a second. Raises ServiceUnavailable or ConfigurationError when the database
        cannot be used; the replay is then on record as failed as soon as the next one begins.
        """
        run = self._look(replay_id)
        selection = msgspec.json.decode(run.selection, type=Selection)
        options = msgspec.json.decode(run.options, type=Options)
        self._vouching = self._vouching._replace(by_operator=options.vouch)
        status, because = DONE, None
        try:
            with self._engine.connect().execution_options(read_only=True) as connection:
                ids = selected_ids(connection, selection, options.limit)
            if options.canary:
                self._send_by_canary(replay_id, ids, options.canary, options.rate, tell)
            else:
                self._send_all(replay_id, ids, options.rate, tell)
                self._await_outcomes(replay_id, tell)
        except _Ended as ended:
            status, because = ended.status, ended.because
        except SQLAlchemyError as error:
            raise explain(error) from error
        finally:
            if self._results is not None:
                self._results.close()
        return self._end(replay_id, status, because, tell)

    def _send_by_canary(
        self, replay_id: int, ids: Sequence[int], canary: int, rate: float | None, tell: Callable[[Replay], None]
    ) -> None:
        start, size = 0, canary
        while start < len(ids):
            step = ids[start : start + size]
            causes = self._causes(step)
            self._send_all(replay_id, step, rate, tell)
            self._await_outcomes(replay_id, tell)
            self._check_canary(step, causes)
            start, size = start + size, 2 * size

    def _check_canary(self, step: Sequence[int], causes: Mapping[int, tuple[str, str]]) -> None:
        now = self._causes(step, state=LetterState.PARKED_AGAIN)
        back = [cause for it, (cause, _) in now.items() if causes[it][0] == cause]
        if back:
            error = next(error for it, (cause, error) in now.items() if cause == back[0])
            # Everybody sees this: what failed alone may have failed for its prize.
            why = back[0] if back[0] == Cause.FAILED_ALONE else f"{back[0]}: {error}"
            raise _Ended(STOPPED, f"the cause came back: {len(back)} of {len(step)} parked again, {why}")

    def _causes(self, ids: Sequence[int], *, state: str | None = None) -> dict[int, tuple[str, str]]:
        found: dict[int, tuple[str, str]] = {}
        book = dead_letters.c
        with self._engine.connect().execution_options(read_only=True) as connection:
            for some in chunks(ids):
                query = select(book.id, book.cause, book.error).where(book.id.in_(some))
                rows = connection.execute(query if state is None else query.where(book.state == state))
                found |= {row.id: (row.cause, row.error) for row in rows}
        return found

    def _send_all(self, replay_id: int, ids: Sequence[int], rate: float | None, tell: Callable[[Replay], None]) -> None:
        size = ROWS_MAX if rate is None else max(1, min(ROWS_MAX, int(rate * LOOK_EVERY_S)))
        began, sent, next_look = time.monotonic(), 0, 0.0
        for start in range(0, len(ids), size):
            # However slow it goes, it heeds a stop and gives a sign of life.
            while True:
                if time.monotonic() >= next_look or self._stopping.is_set():
                    self._heed_stop(replay_id, tell)
                    next_look = time.monotonic() + LOOK_EVERY_S
                ahead_s = 0.0 if rate is None else began + sent / rate - time.monotonic()
                if ahead_s <= 0:
                    break
                self._stopping.wait(min(ahead_s, LOOK_EVERY_S))
            sent += self._send(replay_id, ids[start : start + size])
        self._heed_stop(replay_id, tell)

    def _heed_stop(self, replay_id: int, tell: Callable[[Replay], None]) -> Replay:
        parking.follow_up_once(self._engine)
        run = self._count(replay_id)
        tell(run)
        if self._stopping.is_set():
            raise _Ended(STOPPED, "stopped where it was run")
        if run.stop_asked_at is not None:
            raise _Ended(STOPPED, f"stopped by {run.stop_asked_by}")
        return run

    def _await_outcomes(self, replay_id: int, tell: Callable[[Replay], None]) -> None:
        """Wait until all that was sent has settled or is parked again."""
        before, since = -1, time.monotonic()
        while True:
            run = self._heed_stop(replay_id, tell)
            if not run.under_way:
                return
            if run.under_way != before:
                before, since = run.under_way, time.monotonic()
            elif time.monotonic() > since + SILENT_S_MAX:
                raise _Ended(
                    STOPPED,
                    f"{run.under_way} have had no outcome for {SILENT_S_MAX:g} s: are workers running? "
                    "They stay accepted, and settle when there are",
                )
            self._stopping.wait(LOOK_EVERY_S)

    # ---- one step ----

    def _send(self, replay_id: int, ids: Sequence[int]) -> int:
        try:
            step = self._accept_in_tries(replay_id, ids)
        except _Refused as refused:
            if len(ids) > 1:
                middle = len(ids) // 2
                return self._send(replay_id, ids[:middle]) + self._send(replay_id, ids[middle:])
            log.error("dead letter %d cannot be accepted, and stays parked", ids[0], exc_info=refused.__cause__)
            self._leave_parked(replay_id)
            return 0
        if self._results is not None:
            self._results.forget_dead(step.revived)
        try:
            if step.to_publish:
                self._broker.publish([request.encode() for request in step.to_publish])
        except PublishFailed as error:
            raise _Ended(FAILED, f"{error}. What was sent is accepted: the relay publishes it") from error
        return step.sent

    def _accept_in_tries(self, replay_id: int, ids: Sequence[int]) -> _Step:
        try:
            return again_after_conflicts(
                self._engine, lambda connection: self._accept(connection, replay_id, ids), tries_max=TRIES_MAX
            )
        except DrawError:
            raise
        except Exception as error:  # the driver's own as well, from inside the accept
            if fault_of(error) is Fault.REFUSED:
                raise _Refused from error
            raise explain(error) from error

    def _leave_parked(self, replay_id: int) -> None:
        try:
            with self._engine.begin() as connection:
                connection.execute(
                    update(table)
                    .where(table.c.id == replay_id)
                    .values(refused=table.c.refused + 1, seen_at=clock.now(connection))
                )
        except SQLAlchemyError as error:
            raise explain(error) from error

    def _accept(self, connection: Connection, replay_id: int, ids: Sequence[int]) -> _Step:
        """The transaction: requests first, then their dead letters, as everybody else who writes to both."""
        now = clock.now(connection)
        letters = [it for it in letters_of(connection, ids) if it.state in OPEN_STATES]
        too_late = originals_settled(connection, letters)
        asked: dict[int, Request] = {}
        for it in letters:
            if it.edited_from in too_late:
                continue
            try:
                asked[it.id] = it.request()
            except InvalidRequest:
                continue
        joined = Transaction(connection.connection.driver_connection, is_sqlite=connection.dialect.name == "sqlite")
        known = requests.look_up(joined, sorted({it.request_key for it in asked.values()}), lock=True) if asked else {}
        mine = {
            it: request
            for it, request in asked.items()
            if request.request_key not in known or known[request.request_key].fingerprint == request.fingerprint()
        }
        settled = [it for it, request in mine.items() if _is_settled(known.get(request.request_key))]
        headers = {it.id: it.headers for it in letters}
        new = {
            it: request
            for it, request in mine.items()
            if request.request_key not in known and not self._vouching.why_not(request, headers[it])
        }
        mine = {it: request for it, request in mine.items() if it in new or request.request_key in known}
        taken = self._accept_new(joined, new, now)
        dead = [
            request
            for request in mine.values()
            if (found := known.get(request.request_key)) is not None and found.status == Status.DEAD
        ]
        if dead:
            keys = [request.request_key for request in dead]
            publish_at = now + self._relay_after
            requests.revive(connection, keys, now, publish_at=publish_at, is_published=True)
        sent = [it for it in mine if it not in taken and it not in settled]
        self._mark(connection, sent, replay_id, LetterState.REPLAYING, now)
        self._mark(connection, settled, replay_id, LetterState.SETTLED, now)
        parking.settle(connection, settled, now)
        connection.execute(
            update(table)
            .where(table.c.id == replay_id)
            .values(
                sent=table.c.sent + len(sent) + len(settled),
                refused=table.c.refused + len(letters) - len(sent) - len(settled),
                seen_at=now,
            )
        )
        to_publish = dead + [request for it, request in new.items() if it not in taken]
        return _Step(len(sent), to_publish, dead)

    def _accept_new(self, joined: Transaction, new: Mapping[int, Request], now: datetime) -> set[int]:
        """Accept requests that nobody knows yet; return the dead letters whose key or session is taken."""
        if not new:
            return set()
        answers = requests.accept(
            joined,
            [Submission(request) for request in new.values()],
            now,
            publish_at=now + self._relay_after,
            is_published=True,
        )
        return {it for it, answer in zip(new, answers, strict=True) if answer.is_conflict}

    def _mark(self, connection: Connection, ids: Sequence[int], replay_id: int, state: str, now: datetime) -> None:
        if not ids:
            return
        marked = connection.execute(
            update(dead_letters)
            .where(dead_letters.c.id.in_(ids), dead_letters.c.state.in_(OPEN_STATES))
            .values(state=state, state_at=now, replay_id=replay_id)
        ).rowcount
        if marked != len(ids):
            raise RowsChanged  # another replay was quicker, or an operator discarded some

    # ---- its row ----

    def _look(self, replay_id: int) -> Replay:
        with self._engine.connect().execution_options(read_only=True) as connection:
            return find(connection, replay_id)

    def _count(self, replay_id: int) -> Replay:
        """Bring the replay's row up to date, which is its sign of life."""
        book = dead_letters.c
        with self._engine.connect().execution_options(read_only=True) as connection:
            rows = connection.execute(
                select(book.state, func.count().label("number")).where(book.replay_id == replay_id).group_by(book.state)
            )
            by_state = {row.state: row.number for row in rows}
        with self._engine.begin() as connection:
            connection.execute(
                update(table)
                .where(table.c.id == replay_id)
                .values(
                    settled=by_state.get(LetterState.SETTLED, 0),
                    parked_again=by_state.get(LetterState.PARKED_AGAIN, 0),
                    seen_at=clock.now(connection),
                )
            )
            return find(connection, replay_id)

    def _end(self, replay_id: int, status: str, because: str | None, tell: Callable[[Replay], None]) -> Replay:
        # What is on its way mostly arrives in a moment: better in these sums than only with the dead letters.
        deadline = time.monotonic() + SETTLE_DOWN_S
        while True:
            parking.follow_up_once(self._engine)
            run = self._count(replay_id)
            if not run.under_way or time.monotonic() > deadline:
                break
            time.sleep(LOOK_EVERY_S)
        try:
            with self._engine.begin() as connection:
                _record_end(connection, run, status, because, clock.now(connection))
                ended = find(connection, replay_id)
        except SQLAlchemyError as error:
            raise explain(error) from error
        tell(ended)
        return ended


def _is_settled(known: RequestRecord | None) -> bool:
    return known is not None and known.is_settled
