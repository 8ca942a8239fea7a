"""Replay: send dead letters again, under the same request keys, through the outbox.

One step is one transaction (worker.replays.step): the requests are accepted, or accepted again; their dead letters are
`replaying`; the replay's own row counts them. Then the requests are published. The relay publishes what is lost after
that. So a replay that dies half-way, or runs twice, does nothing twice: a request that has settled answers with its
first result.

A canary replay sends the first few, waits for their outcomes, then sends twice as many, and so on. It stops by itself
when one of them is parked again with the cause that it had before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Final

import msgspec
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.brokers.registry import Broker
from tombola.producers.domain.causes import Cause, LetterState
from tombola.producers.domain.errors import DrawError, PublishFailed
from tombola.producers.results import LOOK_TIMEOUT_S, ResultStore
from tombola.producers.settings import Settings
from tombola.producers.storage import clock
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.faults import Fault, explain, fault_of
from tombola.producers.storage.schema import dead_letters
from tombola.producers.storage.transactions import again_after_conflicts
from tombola.worker.dead_letters import states
from tombola.worker.dead_letters.letters import Selection
from tombola.worker.dead_letters.states import ROWS_MAX
from tombola.worker.replays import replay
from tombola.worker.replays.replay import DONE, FAILED, STOPPED, Options, Replay
from tombola.worker.replays.selected import selected_ids
from tombola.worker.replays.step import Step, accept_once
from tombola.worker.replays.vouching import Vouching

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 0.25
SILENT_S_MAX: Final = 60.0  # when no message settles for so long, no worker is running
SETTLE_DOWN_S: Final = 5.0
TRIES_MAX: Final = 5

OnProgress = Callable[[Replay], None]


class _Refused(Exception):
    """The database refuses one of these requests, or our own code fails on it: see the exception's cause."""


class _Ended(Exception):
    """The replay ends before everything is sent."""

    def __init__(self, status: str, because: str) -> None:
        super().__init__(because)
        self.status = status
        self.because = because


class Replayer:
    """Runs replays: one at a time, in one thread. `stop` may be called from any thread."""

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

    def run(self, replay_id: int, on_progress: OnProgress = lambda _replay: None) -> Replay:
        """Send the selected dead letters, and wait for their outcomes; return the replay as it ended.

        `on_progress` is called with the replay several times a second. Raises ServiceUnavailable or ConfigurationError
        when the database cannot be used; the replay is then put on record as failed when the next replay begins.
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
                self._send_by_canary(replay_id, ids, options.canary, options.rate, on_progress)
            else:
                self._send_all(replay_id, ids, options.rate, on_progress)
                self._await_outcomes(replay_id, on_progress)
        except _Ended as ended:
            status, because = ended.status, ended.because
        except SQLAlchemyError as error:
            raise explain(error) from error
        finally:
            if self._results is not None:
                self._results.close()
        return self._end(replay_id, status, because, on_progress)

    # ---- canary ----

    def _send_by_canary(
        self, replay_id: int, ids: Sequence[int], canary: int, rate: float | None, on_progress: OnProgress
    ) -> None:
        start, size = 0, canary
        while start < len(ids):
            step = ids[start : start + size]
            causes = self._causes(step)
            self._send_all(replay_id, step, rate, on_progress)
            self._await_outcomes(replay_id, on_progress)
            self._check_canary(step, causes)
            start, size = start + size, 2 * size

    def _check_canary(self, step: Sequence[int], causes: Mapping[int, tuple[str, str]]) -> None:
        now = self._causes(step, state=LetterState.PARKED_AGAIN)
        back = [cause for it, (cause, _) in now.items() if causes[it][0] == cause]
        if back:
            error = next(error for it, (cause, error) in now.items() if cause == back[0])
            # All operators see this, and the error of a draw that failed alone may name its prize.
            why = back[0] if back[0] == Cause.FAILED_ALONE else f"{back[0]}: {error}"
            raise _Ended(STOPPED, f"the cause came back: {len(back)} of {len(step)} parked again, {why}")

    def _causes(self, ids: Sequence[int], *, state: str | None = None) -> dict[int, tuple[str, str]]:
        """Cause and error by id, of the dead letters in `state`."""
        found: dict[int, tuple[str, str]] = {}
        book = dead_letters.c
        with self._engine.connect().execution_options(read_only=True) as connection:
            for some in chunks(ids):
                query = select(book.id, book.cause, book.error).where(book.id.in_(some))
                rows = connection.execute(query if state is None else query.where(book.state == state))
                found |= {row.id: (row.cause, row.error) for row in rows}
        return found

    # ---- send ----

    def _send_all(self, replay_id: int, ids: Sequence[int], rate: float | None, on_progress: OnProgress) -> None:
        size = ROWS_MAX if rate is None else max(1, min(ROWS_MAX, int(rate * LOOK_EVERY_S)))
        began, sent, next_look = time.monotonic(), 0, 0.0
        for start in range(0, len(ids), size):
            # However slow the rate, the replay heeds a stop and gives a sign of life.
            while True:
                if time.monotonic() >= next_look or self._stopping.is_set():
                    self._heed_stop(replay_id, on_progress)
                    next_look = time.monotonic() + LOOK_EVERY_S
                ahead_s = 0.0 if rate is None else began + sent / rate - time.monotonic()
                if ahead_s <= 0:
                    break
                self._stopping.wait(min(ahead_s, LOOK_EVERY_S))
            sent += self._send(replay_id, ids[start : start + size])
        self._heed_stop(replay_id, on_progress)

    def _send(self, replay_id: int, ids: Sequence[int]) -> int:
        """Accept and publish these, in halves when the database refuses one; return how many were sent."""
        try:
            step = self._accept(replay_id, ids)
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

    def _accept(self, replay_id: int, ids: Sequence[int]) -> Step:
        try:
            return again_after_conflicts(
                self._engine,
                lambda connection: accept_once(
                    connection, replay_id, ids, self._vouching, relay_after=self._relay_after
                ),
                tries_max=TRIES_MAX,
            )
        except DrawError:
            raise
        except Exception as error:  # the driver's own errors as well, from inside the accept
            if fault_of(error) is Fault.REFUSED:
                raise _Refused from error
            raise explain(error) from error

    def _leave_parked(self, replay_id: int) -> None:
        try:
            with self._engine.begin() as connection:
                replay.count_step(connection, replay_id, sent=0, refused=1, now=clock.now(connection))
        except SQLAlchemyError as error:
            raise explain(error) from error

    # ---- watch ----

    def _heed_stop(self, replay_id: int, on_progress: OnProgress) -> Replay:
        """Bring the replay's row up to date. Raises _Ended if the replay was asked to stop."""
        states.follow_up_once(self._engine)
        run = self._count(replay_id)
        on_progress(run)
        if self._stopping.is_set():
            raise _Ended(STOPPED, "stopped where it was run")
        if run.stop_asked_at is not None:
            raise _Ended(STOPPED, f"stopped by {run.stop_asked_by}")
        return run

    def _await_outcomes(self, replay_id: int, on_progress: OnProgress) -> None:
        """Wait until all messages that were sent have settled or are parked again."""
        before, since = -1, time.monotonic()
        while True:
            run = self._heed_stop(replay_id, on_progress)
            if not run.under_way:
                return
            if run.under_way != before:
                before, since = run.under_way, time.monotonic()
            elif time.monotonic() > since + SILENT_S_MAX:
                raise _Ended(
                    STOPPED,
                    f"{run.under_way} draws have had no outcome for {SILENT_S_MAX:g} s: are workers running? "
                    "The draws stay accepted, and settle once workers run",
                )
            self._stopping.wait(LOOK_EVERY_S)

    def _look(self, replay_id: int) -> Replay:
        with self._engine.connect().execution_options(read_only=True) as connection:
            return replay.find(connection, replay_id)

    def _count(self, replay_id: int) -> Replay:
        """Bring the outcomes in the replay's row up to date, which is its sign of life."""
        book = dead_letters.c
        with self._engine.connect().execution_options(read_only=True) as connection:
            rows = connection.execute(
                select(book.state, func.count().label("number")).where(book.replay_id == replay_id).group_by(book.state)
            )
            by_state = {row.state: row.number for row in rows}
        with self._engine.begin() as connection:
            return replay.count_outcomes(
                connection,
                replay_id,
                settled=by_state.get(LetterState.SETTLED, 0),
                parked_again=by_state.get(LetterState.PARKED_AGAIN, 0),
                now=clock.now(connection),
            )

    def _end(self, replay_id: int, status: str, because: str | None, on_progress: OnProgress) -> Replay:
        # Most outcomes arrive within moments: better in these sums than in the dead letters alone.
        deadline = time.monotonic() + SETTLE_DOWN_S
        while True:
            states.follow_up_once(self._engine)
            run = self._count(replay_id)
            if not run.under_way or time.monotonic() > deadline:
                break
            time.sleep(LOOK_EVERY_S)
        try:
            with self._engine.begin() as connection:
                replay.record_end(connection, run, status, because, clock.now(connection))
                ended = replay.find(connection, replay_id)
        except SQLAlchemyError as error:
            raise explain(error) from error
        on_progress(ended)
        return ended
