"""The intake: requests that arrive while one transaction is under way share the next one.

A lone request is accepted at once. Under load a batch is what piled up since the last one began, ACCEPT_EVERY_S at
the least: without it many small transactions would take the time that few larger ones need for as many requests.
Publishing comes after the commit and holds nobody up: what does not get through is accepted all the same, and the
relay's to publish.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from prometheus_client import Counter, Histogram

from producers import metrics, tracing
from producers.broker import Broker
from producers.entry import Entry
from producers.errors import PublishFailed
from producers.pulse import Pulse
from producers.requests import Acceptance, Asked

log = logging.getLogger(__name__)

ACCEPT_SIZE_MAX: Final = 400
ACCEPT_EVERY_S: Final = 0.005
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

Beside = Mapping[str, str]  # what travels beside a body: see producers.tracing
Waiting = tuple[Asked, "asyncio.Future[Acceptance]", Beside | None]
NOTHING: Final[Beside] = {}


class Intake:
    """Accepts requests for one event loop."""

    def __init__(self, entry: Entry, broker: Broker, pulse: Pulse | None = None) -> None:
        self._entry = entry
        self._pulse = pulse
        self._waiting: deque[Waiting] = deque()
        self._is_busy = False
        self._began_at = 0.0
        self._accepting = ThreadPoolExecutor(1, thread_name_prefix="accept")
        self._publisher = Publisher(broker)

    async def accept(self, asked: Asked) -> Acceptance:
        """Accept one request; return when that is durable. Raises what Entry.accept raises."""
        answer = self._entry.recall(asked)
        if answer is None:
            began = time.perf_counter()
            answer = await self._enqueue(asked)
            ACCEPT_SECONDS.observe(time.perf_counter() - began)
        (ACCEPTED if answer.is_new else CONFLICT if answer.is_conflict else REPLAYED).inc()
        return answer

    async def accept_many(self, asked: Sequence[Asked]) -> list[Acceptance]:
        """Accept several requests, each for itself; return when all of them are durable."""
        return await asyncio.gather(*[self.accept(it) for it in asked])

    async def has_broker(self) -> bool:
        """Whether the broker answers."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._publisher.check()), CHECK_TIMEOUT_S)
        except TimeoutError:
            return False

    def close(self) -> None:
        """Publish what is left, and end the threads."""
        self._accepting.shutdown()
        self._publisher.close()

    def _enqueue(self, asked: Asked) -> asyncio.Future[Acceptance]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Acceptance] = loop.create_future()
        self._waiting.append((asked, future, tracing.headers()))
        if not self._is_busy:
            self._is_busy = True
            self._go_on(loop)
        return future

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        # Soon at the earliest: requests that came in together go in together.
        loop.call_at(self._began_at + ACCEPT_EVERY_S, self._next, loop)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), ACCEPT_SIZE_MAX))]
        # A client that has gone away takes its request along, unless it is under way.
        batch = [it for it in batch if not it[1].done()]
        if not batch:
            self._is_busy = False
            return
        self._began_at = loop.time()
        self._accepting.submit(self._accept, loop, batch)

    def _accept(self, loop: asyncio.AbstractEventLoop, batch: list[Waiting]) -> None:
        """In the accepting thread."""
        try:
            answers = self._entry.accept([asked for asked, _, _ in batch])
        except BaseException as error:
            loop.call_soon_threadsafe(self._answer, loop, batch, error)
            return
        loop.call_soon_threadsafe(self._answer, loop, batch, answers)
        new = [
            (answer.request.encode(), beside or NOTHING)
            for answer, (_, _, beside) in zip(answers, batch, strict=True)
            if answer.is_new
        ]
        if self._pulse is not None:
            self._pulse.add("accepted", len(new))
        self._publisher.publish(new)

    def _answer(
        self, loop: asyncio.AbstractEventLoop, batch: list[Waiting], answers: list[Acceptance] | BaseException
    ) -> None:
        self._go_on(loop)
        if isinstance(answers, BaseException):
            for _, future, _ in batch:
                if not future.done():
                    future.set_exception(answers)
            return
        for (_, future, _), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)


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
            with metrics.telling_of_blocked():
                self._broker.publish(bodies, besides if any(besides) else None)
        except PublishFailed as error:
            log.warning("%s; %d accepted draws are left to the relay", error, len(messages))
            if self._is_closing:
                self._waiting.clear()  # the relay has these as well

    def _check(self) -> bool:
        try:
            with metrics.telling_of_blocked():
                self._broker.backlog()
        except PublishFailed:
            return False
        return True
