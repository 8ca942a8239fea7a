"""Settle a batch in spite of conflicts: run THE transaction again, then halve the batch, then go on without waiting.

ARCHITECTURE, The transaction, 6 says which errors undo a transaction, and why all of it is rolled back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Engine

from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import Request
from tombola.producers.storage import clock, requests
from tombola.producers.storage.faults import (
    Fault,
    explain,
    fault_of,
    is_duplicate_key,
    is_lock_conflict,
    is_lock_timeout,
)
from tombola.producers.storage.transactions import Transaction, conflict_pause_s, transaction
from tombola.producers.telemetry.fields import about
from tombola.worker import metrics
from tombola.worker.ledger import post as ledger
from tombola.worker.settle import batch, repeats
from tombola.worker.settle.answers import Answer, Deferred, Refused, Repeat
from tombola.worker.settle.batch import UNTOLD, Handling
from tombola.worker.settle.rules import Rules

log = logging.getLogger(__name__)


def settle(
    engine: Engine,
    draws: Sequence[Request],
    rules: Rules,
    handling: Handling = UNTOLD,
    *,
    has_patience: bool = True,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Answer]:
    """Settle `draws` in one transaction; return an answer for each, in their order.

    After a conflict the whole transaction runs again, up to `rules.tries_max` times. A batch that still fails is
    halved, so that one bad draw is found and the others go through. After the first lock that another transaction holds
    for longer than `rules.lock_wait_s`, the batch waits for no lock any more: draws whose rows are held are deferred,
    and the others settle. Without `has_patience` this holds from the first try on: for draws that were deferred before.

    Raises ServiceUnavailable or ConfigurationError when the database cannot be used. Then it is unknown which draws
    have settled; the same call later finds out.
    """
    answers = settle_unread(engine, draws, rules, handling, has_patience=has_patience, sleep=sleep)
    return repeats.tell(engine, answers, rules)


def settle_unread(
    engine: Engine,
    draws: Sequence[Request],
    rules: Rules,
    handling: Handling = UNTOLD,
    *,
    has_patience: bool = True,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Answer | Repeat]:
    """As `settle`, but repeats are answered without their results: worker.settle.repeats reads them."""
    if not draws:
        return []
    tries = _Tries(engine, rules, handling, sleep)
    if not has_patience:
        tries.wait_no_more(draws)
    return tries.run(draws)


@dataclass(slots=True)
class _Tries:
    """One call of `settle`, with what its tries have learned."""

    engine: Engine
    rules: Rules
    handling: Handling
    sleep: Callable[[float], None]
    has_patience: bool = True
    is_careful: bool = False
    held: set[str] = field(default_factory=set)  # request keys that another transaction holds
    began_at: float = field(default_factory=time.monotonic)

    def run(self, draws: Sequence[Request], error: Exception | None = None) -> list[Answer | Repeat]:
        """Settle `draws`: the whole batch, or a part of a batch that has failed with `error`."""
        is_part = error is not None
        if error is not None and is_lock_conflict(error) and self.is_late:
            return [Deferred(draw, _why(error)) for draw in draws]
        for attempt in range(self.rules.tries_max):
            if attempt:
                self.sleep(conflict_pause_s(attempt))
            try:
                return self._try(draws)
            except Exception as raised:
                error = raised
            fault = fault_of(error)
            if fault is Fault.OUTAGE:
                raise explain(error) from error
            metrics.count_retry(error)
            if is_lock_timeout(error) and self.has_patience:
                self.wait_no_more(draws)
                return self.run(draws)
            # A part that has waited for a lock in full does not wait again: this bounds the time.
            if fault is Fault.REFUSED or (is_lock_timeout(error) and is_part):
                break
            # A draw may name another request's session. This is rare, so it is looked up only now.
            self.is_careful = self.is_careful or is_duplicate_key(error)
        assert error is not None
        if len(draws) > 1:
            middle = len(draws) // 2
            return [*self.run(draws[:middle], error), *self.run(draws[middle:], error)]
        (draw,) = draws
        log.warning("draw %s does not settle: %s", draw.request_key, _why(error), exc_info=error, extra=about(draw))
        if is_lock_conflict(error):
            return [Deferred(draw, _why(error))]
        return [Refused(draw, Cause.FAILED_ALONE, _why(error), error)]

    def wait_no_more(self, draws: Sequence[Request]) -> None:
        """From here on wait for no lock; find out which of `draws` another transaction holds."""
        self.has_patience = False
        try:
            with transaction(self.engine) as open_transaction:
                self.held |= _held(open_transaction, draws)
        except Exception as error:
            raise explain(error) from error

    @property
    def is_late(self) -> bool:
        """Whether the time for waiting is over: `lock_wait_s` for the first lock, and once more for each try."""
        return time.monotonic() - self.began_at > self.rules.lock_wait_s * (self.rules.tries_max + 1)

    def _try(self, draws: Sequence[Request]) -> list[Answer | Repeat]:
        """One transaction."""
        free = [draw for draw in draws if draw.request_key not in self.held] if self.held else draws
        settled: Iterator[Answer | Repeat] = iter(())
        if free:
            now = clock.now(self.engine)
            # What is read once in a while is read here: no lock waits for it.
            if self.rules.subscriptions is not None:
                self.rules.subscriptions.refresh()
            if self.rules.seeds is not None:
                self.rules.seeds.epochs.at(now)
            with transaction(self.engine) as open_transaction:
                answers = batch.settle_in(
                    open_transaction,
                    free,
                    self.rules,
                    now,
                    self.handling,
                    has_patience=self.has_patience,
                    is_careful=self.is_careful,
                )
            if free is draws:
                return answers
            settled = iter(answers)
        return [_request_held(it) if it.request_key in self.held else next(settled) for it in draws]


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _held(open_transaction: Transaction, draws: Sequence[Request]) -> set[str]:
    """The keys of requests whose rows another transaction holds, in the table of requests or in the ledger."""
    request_keys = [draw.request_key for draw in draws]
    sessions = [draw.lottery_session_id for draw in draws]
    return requests.busy(open_transaction, request_keys, sessions) | ledger.busy(open_transaction, draws)


def _request_held(draw: Request) -> Deferred:
    return Deferred(draw, "another transaction holds its request")
