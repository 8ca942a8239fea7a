"""The intake: requests that arrive while one transaction is under way share the next one.

A lone request is accepted at once. Under load a batch is what piled up since the last one began, ACCEPT_EVERY_S at
the least: without it many small transactions would take the time that few larger ones need for as many requests.
What another open transaction holds waits apart from the others, tried every BUSY_EVERY_S, for BUSY_WAIT_S at most.
Publishing comes after the commit and holds nobody up: what does not get through is accepted all the same, and the
relay's to publish.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final, NamedTuple

from prometheus_client import Counter, Histogram

from tombola.producers.brokers.registry import Broker
from tombola.producers.domain.errors import (
    ConfigurationError,
    DrawError,
    PublishFailed,
    RequestBusy,
    ServiceUnavailable,
)
from tombola.producers.entry import BUSY_WAIT_S, Answer, Entry
from tombola.producers.storage.requests import Acceptance, Submission
from tombola.producers.telemetry import metrics, tracing
from tombola.producers.telemetry.pulse import Pulse

log = logging.getLogger(__name__)

ACCEPT_SIZE_MAX: Final = 400
ACCEPT_EVERY_S: Final = 0.005
BUSY_EVERY_S: Final = 0.05
PUBLISH_SIZE_MAX: Final = 2000
CHECK_TIMEOUT_S: Final = 3.0
UNPUBLISHED_MAX: Final = 50_000  # beyond, a broker that is slow or away: the relay has these anyway

ACCEPTS: Final = Counter(
    "tombola_gateway_accepts", "draws asked for: accepted, replayed (known before) or conflict", ["outcome"]
)
ACCEPTED, REPLAYED, CONFLICT = (ACCEPTS.labels(outcome) for outcome in ("accepted", "replayed", "conflict"))
ACCEPT_SECONDS: Final = Histogram(
    "tombola_gateway_accept_seconds",
    "from a request's arrival until its accept is durable",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)

Beside = Mapping[str, str]  # what travels beside a body: see producers.telemetry.tracing
NOTHING: Final[Beside] = {}


class Waiting(NamedTuple):
    """A request, whoever waits for its answer, and until when it may be busy (in the loop's time)."""

    asked: Submission
    future: asyncio.Future[Acceptance]
    beside: Beside | None
    busy_until: float


class Intake:
    """Accepts requests for one event loop, in two lanes.

    What another transaction holds waits in a lane of its own, with all that ask for the same key: the others are
    accepted meanwhile.
    """

    def __init__(self, entry: Entry, broker: Broker, pulse: Pulse | None = None) -> None:
        self._entry = entry
        self._pulse = pulse
        self._publisher = Publisher(broker)
        self._open = Lane("accept", ACCEPT_EVERY_S, self, entry.accept_free)
        self._busy = Lane("accept-busy", BUSY_EVERY_S, self, partial(entry.accept_each, busy_wait_s=0))
        self._busy_keys: dict[str, int] = {}

    async def accept(self, asked: Submission) -> Acceptance:
        """Accept one request; return when that is durable. Raises what Entry.accept raises."""
        answer = self._entry.recall(asked)
        if answer is None:
            began = time.perf_counter()
            answer = await self._enqueue(asked)
            ACCEPT_SECONDS.observe(time.perf_counter() - began)
        (ACCEPTED if answer.is_new else CONFLICT if answer.is_conflict else REPLAYED).inc()
        return answer

    async def accept_many(self, asked: Sequence[Submission]) -> list[Answer]:
        """Accept several requests, each for itself; return when all of them are durable, or have failed.

        Raises ServiceUnavailable or ConfigurationError when that is the answer to all of them.
        """
        answers = await asyncio.gather(*[self.accept(it) for it in asked], return_exceptions=True)
        told: list[Answer] = []
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, DrawError):
                raise answer
            told.append(answer)
        if told and all(isinstance(it, ServiceUnavailable | ConfigurationError) for it in told):
            raise told[0]  # type: ignore[misc]
        return told

    async def has_broker(self) -> bool:
        """Whether the broker answers."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._publisher.check()), CHECK_TIMEOUT_S)
        except TimeoutError:
            return False

    def close(self) -> None:
        """Publish what is left, and end the threads."""
        self._open.close()
        self._busy.close()
        self._publisher.close()

    def _enqueue(self, asked: Submission) -> asyncio.Future[Acceptance]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Acceptance] = loop.create_future()
        it = Waiting(asked, future, tracing.headers(), loop.time() + BUSY_WAIT_S)
        if asked.request.request_key in self._busy_keys:
            self._wait_apart(loop, it)
        else:
            self._open.add(loop, it)
        return future

    def _wait_apart(self, loop: asyncio.AbstractEventLoop, it: Waiting) -> None:
        key = it.asked.request.request_key
        self._busy_keys[key] = self._busy_keys.get(key, 0) + 1
        it.future.add_done_callback(lambda _: self._is_over(key))
        self._busy.add(loop, it)

    def _is_over(self, key: str) -> None:
        self._busy_keys[key] -= 1
        if not self._busy_keys[key]:
            del self._busy_keys[key]

    def publish(self, batch: list[Waiting], answers: list[Answer]) -> None:
        """In a lane's thread, when the answers are on their way."""
        new = [
            (answer.request.encode(), it.beside or NOTHING)
            for answer, it in zip(answers, batch, strict=True)
            if isinstance(answer, Acceptance) and answer.is_new
        ]
        if self._pulse is not None:
            self._pulse.add("accepted", len(new))
        self._publisher.publish(new)

    def answer(self, lane: Lane, loop: asyncio.AbstractEventLoop, it: Waiting, answer: Answer | BaseException) -> None:
        """Tell who waits, or have it wait apart."""
        if it.future.done():
            return
        if not isinstance(answer, BaseException):
            it.future.set_result(answer)
        elif not isinstance(answer, RequestBusy) or loop.time() >= it.busy_until:
            it.future.set_exception(answer)
        elif lane is self._busy:
            lane.add(loop, it)
        else:
            self._wait_apart(loop, it)


class Lane:
    """A queue of requests and the thread that accepts them: all that have come since it began the last time."""

    def __init__(
        self, name: str, every_s: float, intake: Intake, accept: Callable[[Sequence[Submission]], list[Answer]]
    ) -> None:
        self._every_s = every_s
        self._intake = intake
        self._accept = accept
        self._waiting: deque[Waiting] = deque()
        self._is_working = False
        self._began_at = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def add(self, loop: asyncio.AbstractEventLoop, it: Waiting) -> None:
        """Take one along, soon."""
        self._waiting.append(it)
        if not self._is_working:
            self._is_working = True
            self._go_on(loop)

    def close(self) -> None:
        """End the thread, when it has done what is under way."""
        self._thread.shutdown()

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        # Soon at the earliest: requests that came in together go in together.
        loop.call_at(self._began_at + self._every_s, self._next, loop)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), ACCEPT_SIZE_MAX))]
        # A client that has gone away takes its request along, unless it is under way.
        batch = [it for it in batch if not it.future.done()]
        if not batch:
            self._is_working = False
            return
        self._began_at = loop.time()
        try:
            self._thread.submit(self._work, loop, batch)
        except RuntimeError:  # closed
            ending = ServiceUnavailable("this gateway is ending: send the same request again")
            self._done(loop, batch, [ending] * len(batch))

    def _work(self, loop: asyncio.AbstractEventLoop, batch: list[Waiting]) -> None:
        """In the thread."""
        try:
            answers = self._accept([it.asked for it in batch])
        except BaseException as error:  # whatever it is, nobody waits for ever
            loop.call_soon_threadsafe(self._done, loop, batch, [error] * len(batch))
            return
        loop.call_soon_threadsafe(self._done, loop, batch, answers)
        try:
            self._intake.publish(batch, answers)
        except Exception:  # they are accepted all the same
            log.exception("%d accepted draws are left to the relay", len(batch))

    def _done(
        self, loop: asyncio.AbstractEventLoop, batch: list[Waiting], answers: Sequence[Answer | BaseException]
    ) -> None:
        self._go_on(loop)
        for it, answer in zip(batch, answers, strict=True):
            self._intake.answer(self, loop, it, answer)


class Publisher:
    """Publishes what was accepted, in a thread of its own, all that has piled up at once."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._waiting: deque[tuple[bytes, Beside]] = deque()
        self._publishing = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._is_closing = False

    def publish(self, messages: Sequence[tuple[bytes, Beside]]) -> None:
        """Publish these bodies with what travels beside them, soon; returns at once."""
        if messages and len(self._waiting) < UNPUBLISHED_MAX:
            self._waiting.extend(messages)
            self._publishing.submit(self._publish)

    def check(self) -> Future[bool]:
        """Whether the broker answers."""
        return self._publishing.submit(self._check)

    def close(self) -> None:
        """Publish what is left, unless the broker does not take it, then end."""
        self._is_closing = True
        self._publishing.submit(self._broker.close)
        self._publishing.shutdown()

    def _publish(self) -> None:
        messages = [self._waiting.popleft() for _ in range(min(len(self._waiting), PUBLISH_SIZE_MAX))]
        if not messages:
            return  # an earlier turn took them along
        bodies, besides = zip(*messages, strict=True)
        try:
            with metrics.watching_blocked():
                self._broker.publish(bodies, besides if any(besides) else None)
        except PublishFailed as error:
            log.warning("%s; %d accepted draws are left to the relay", error, len(messages))
            if self._is_closing:
                self._waiting.clear()  # the relay has these as well
        except Exception:
            log.exception("%d accepted draws are left to the relay", len(messages))

    def _check(self) -> bool:
        try:
            with metrics.watching_blocked():
                self._broker.backlog()
        except PublishFailed:
            return False
        except Exception:
            log.exception("the broker cannot be asked")
            return False
        return True
