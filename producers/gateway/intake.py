"""The intake: requests that arrive while one transaction is under way share the next one.

A lone request is accepted at once. Under load, a batch is what arrived since the last batch began, ACCEPT_EVERY_S ago
or more: many small transactions would take longer than few large ones. A request whose key another transaction holds
waits apart from the others: it is tried every BUSY_EVERY_S, for BUSY_WAIT_S at most. Publishing comes after the commit
and delays no answer: a request whose publish fails stays accepted, and the relay publishes it.
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
from tombola.producers.entry import BUSY_WAIT_S, Entry, EntryAnswer
from tombola.producers.storage.requests import Acceptance, Submission
from tombola.producers.telemetry import metrics, tracing
from tombola.producers.telemetry.pulse import Pulse

log = logging.getLogger(__name__)

ACCEPT_SIZE_MAX: Final = 400
ACCEPT_EVERY_S: Final = 0.005
BUSY_EVERY_S: Final = 0.05
PUBLISH_SIZE_MAX: Final = 2000
CHECK_TIMEOUT_S: Final = 3.0
UNPUBLISHED_MAX: Final = 50_000  # behind a broker that is slow or away; the relay publishes further requests

ACCEPTS: Final = Counter(
    "tombola_gateway_accepts", "draws asked for: accepted, replayed (known before) or conflict", ["outcome"]
)
ACCEPTED, REPLAYED, CONFLICT = (ACCEPTS.labels(outcome) for outcome in ("accepted", "replayed", "conflict"))
ACCEPT_SECONDS: Final = Histogram(
    "tombola_gateway_accept_seconds",
    "from a request's arrival until its accept is durable",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)

MessageHeaders = Mapping[str, str]  # of the trace: see producers.telemetry.tracing
NO_HEADERS: Final[MessageHeaders] = {}


class Waiting(NamedTuple):
    """A request, the future of its answer, and the loop's time until which RequestBusy is retried."""

    asked: Submission
    future: asyncio.Future[Acceptance]
    headers: MessageHeaders | None
    busy_until: float


class Intake:
    """Accepts requests for one event loop, in two queues.

    Requests whose key another transaction holds wait in a queue of their own, with all requests for the same key;
    other requests are accepted meanwhile.
    """

    def __init__(self, entry: Entry, broker: Broker, pulse: Pulse | None = None) -> None:
        self._entry = entry
        self._pulse = pulse
        self._publisher = Publisher(broker)
        self._open = AcceptQueue("accept", ACCEPT_EVERY_S, self, entry.accept_free)
        self._busy = AcceptQueue("accept-busy", BUSY_EVERY_S, self, partial(entry.accept_each, busy_wait_s=0))
        self._busy_keys: dict[str, int] = {}

    async def accept(self, asked: Submission) -> Acceptance:
        """Accept one request; return when the accept is durable. Raises what Entry.accept raises."""
        answer = self._entry.recall(asked)
        if answer is None:
            began = time.perf_counter()
            answer = await self._enqueue(asked)
            ACCEPT_SECONDS.observe(time.perf_counter() - began)
        (ACCEPTED if answer.is_new else CONFLICT if answer.is_conflict else REPLAYED).inc()
        return answer

    async def accept_many(self, asked: Sequence[Submission]) -> list[EntryAnswer]:
        """Accept several requests, each independently; return when all accepts are durable or have failed.

        Raises ServiceUnavailable or ConfigurationError if all of them failed so.
        """
        outcomes = await asyncio.gather(*[self.accept(it) for it in asked], return_exceptions=True)
        answers: list[EntryAnswer] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, DrawError):
                raise outcome
            answers.append(outcome)
        if answers and all(isinstance(it, ServiceUnavailable | ConfigurationError) for it in answers):
            raise answers[0]  # type: ignore[misc]
        return answers

    def publish_accepted(self, answer: Acceptance) -> None:
        """Publish a new request that was accepted in another transaction: with the account that it recharges."""
        ACCEPTED.inc()
        if self._pulse is not None:
            self._pulse.add("accepted", 1)
        self._publisher.publish([(answer.request.encode(), tracing.headers() or NO_HEADERS)])

    async def has_broker(self) -> bool:
        """Whether the broker answers."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._publisher.check()), CHECK_TIMEOUT_S)
        except TimeoutError:
            return False

    def close(self) -> None:
        """Publish what waits to be published, and end the threads."""
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

    def publish(self, batch: list[Waiting], answers: list[EntryAnswer]) -> None:
        """Publish the new requests of a batch. Runs in the queue's thread, after its answers were passed on."""
        new = [
            (answer.request.encode(), it.headers or NO_HEADERS)
            for answer, it in zip(answers, batch, strict=True)
            if isinstance(answer, Acceptance) and answer.is_new
        ]
        if self._pulse is not None:
            self._pulse.add("accepted", len(new))
        self._publisher.publish(new)

    def answer(
        self, queue: AcceptQueue, loop: asyncio.AbstractEventLoop, it: Waiting, answer: EntryAnswer | BaseException
    ) -> None:
        """Answer a request; put one that is busy into the queue for busy requests, until its time is over."""
        if it.future.done():
            return
        if not isinstance(answer, BaseException):
            it.future.set_result(answer)
        elif not isinstance(answer, RequestBusy) or loop.time() >= it.busy_until:
            it.future.set_exception(answer)
        elif queue is self._busy:
            queue.add(loop, it)
        else:
            self._wait_apart(loop, it)


class AcceptQueue:
    """A queue of requests, and the thread that accepts them: a batch is all requests since the last batch began."""

    def __init__(
        self,
        name: str,
        every_s: float,
        intake: Intake,
        accept: Callable[[Sequence[Submission]], list[EntryAnswer]],
    ) -> None:
        self._every_s = every_s
        self._intake = intake
        self._accept = accept
        self._waiting: deque[Waiting] = deque()
        self._is_working = False
        self._began_at = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def add(self, loop: asyncio.AbstractEventLoop, it: Waiting) -> None:
        """Queue a request for the next batch."""
        self._waiting.append(it)
        if not self._is_working:
            self._is_working = True
            self._go_on(loop)

    def close(self) -> None:
        """End the thread after the batch under way."""
        self._thread.shutdown()

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        # Never at once: requests that arrived in one round of the loop belong to one batch.
        loop.call_at(self._began_at + self._every_s, self._next, loop)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), ACCEPT_SIZE_MAX))]
        # Drop requests whose client disconnected before their batch began.
        batch = [it for it in batch if not it.future.done()]
        if not batch:
            self._is_working = False
            return
        self._began_at = loop.time()
        try:
            self._thread.submit(self._work, loop, batch)
        except RuntimeError:  # closed
            ending = ServiceUnavailable("this gateway process is ending: send the same request again")
            self._done(loop, batch, [ending] * len(batch))

    def _work(self, loop: asyncio.AbstractEventLoop, batch: list[Waiting]) -> None:
        """Accept a batch, in the thread."""
        try:
            answers = self._accept([it.asked for it in batch])
        except BaseException as error:  # every request needs an answer
            loop.call_soon_threadsafe(self._done, loop, batch, [error] * len(batch))
            return
        loop.call_soon_threadsafe(self._done, loop, batch, answers)
        try:
            self._intake.publish(batch, answers)
        except Exception:  # the draws stay accepted
            log.exception("%d accepted draws are left to the relay", len(batch))

    def _done(
        self, loop: asyncio.AbstractEventLoop, batch: list[Waiting], answers: Sequence[EntryAnswer | BaseException]
    ) -> None:
        self._go_on(loop)
        for it, answer in zip(batch, answers, strict=True):
            self._intake.answer(self, loop, it, answer)


class Publisher:
    """Publishes accepted requests in a thread of its own, up to PUBLISH_SIZE_MAX at once."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._waiting: deque[tuple[bytes, MessageHeaders]] = deque()
        self._publishing = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._is_closing = False

    def publish(self, messages: Sequence[tuple[bytes, MessageHeaders]]) -> None:
        """Queue these bodies, with their headers, for publishing; return at once."""
        if messages and len(self._waiting) < UNPUBLISHED_MAX:
            self._waiting.extend(messages)
            self._publishing.submit(self._publish)

    def check(self) -> Future[bool]:
        """A future: whether the broker answers."""
        return self._publishing.submit(self._check)

    def close(self) -> None:
        """Publish what waits, unless the broker refuses it; then end the thread."""
        self._is_closing = True
        self._publishing.submit(self._broker.close)
        self._publishing.shutdown()

    def _publish(self) -> None:
        messages = [self._waiting.popleft() for _ in range(min(len(self._waiting), PUBLISH_SIZE_MAX))]
        if not messages:
            return  # an earlier call published them
        bodies, headers = zip(*messages, strict=True)
        try:
            with metrics.watching_blocked():
                self._broker.publish(bodies, headers if any(headers) else None)
        except PublishFailed as error:
            log.warning("%s; %d accepted draws are left to the relay", error, len(messages))
            if self._is_closing:
                self._waiting.clear()  # the relay publishes these as well
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
