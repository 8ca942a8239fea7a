"""Fulfilments, delivered: each webhook has a lane of its own, so that a receiver that hangs holds up no other one.

A lane leases what is due, posts it, CALLS_AT_ONCE at a time, records what came of it, and goes on until nothing is due.
All lanes run in one thread; the database is asked in others. Any number of relays may run at once: what one has leased
is due again only after all calls of the lease must have ended.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Concatenate, Final, ParamSpec, TypeVar

import httpx
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.causes import FulfilmentState
from tombola.producers.domain.errors import ConfigurationError, DrawError, ServiceUnavailable
from tombola.producers.settings import Settings
from tombola.producers.storage import clock
from tombola.producers.storage.chunks import IN_LIST_MAX
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.faults import explain
from tombola.producers.storage.transactions import again_after_conflicts
from tombola.worker.fulfilments import fulfilments, webhooks
from tombola.worker.fulfilments.bodies import bodies
from tombola.worker.fulfilments.fulfilments import Attempt, Fulfilment
from tombola.worker.fulfilments.sending import Message, Outcome, Place, certificates, client, find_place, send
from tombola.worker.fulfilments.webhooks import LIVE_MAX, Signer
from tombola.worker.metrics import FULFILMENTS_DELIVERED, FULFILMENTS_FAILED

log = logging.getLogger(__name__)

CALLS_AT_ONCE: Final = 8  # to one webhook
IDLE_WAIT_S: Final = 1.0
LEASE_SPARE_S: Final = 30.0  # beyond the longest that the calls of a lease can take
LANE_S_MAX: Final = 5.0  # then its webhook is read, and its host resolved, again
TIDY_EVERY_S: Final = 10.0
DELAY_S_MIN: Final = 5.0
DELAY_S_MAX: Final = 6 * 3600.0
BACKOFF_S_MAX: Final = 10.0
STOP_S_MAX: Final = 5.0  # for the calls under way, when the relay stops
CONFLICTS_MAX: Final = 5
DATABASE_THREADS: Final = 4

P = ParamSpec("P")
T = TypeVar("T")


def delay_after(attempts: int) -> timedelta:
    """How long after the last of so many attempts the next one is made: 5 s, doubled up to 6 h, give or take a fifth.

    24 attempts take about three days. The jitter keeps what failed together from coming back together.
    """
    delay_s = min(DELAY_S_MAX, DELAY_S_MIN * 2.0 ** min(attempts - 1, 30))
    return timedelta(seconds=delay_s * random.uniform(0.8, 1.2))


class Fulfilling:
    """Delivers the fulfilments of a database to their webhooks."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._trusted: ssl.SSLContext | None = None
        self._next_tidy = 0.0
        self._database = ThreadPoolExecutor(DATABASE_THREADS, "fulfilments")
        # Threads of their own: the system's resolver can hang for longer than anybody waits for it.
        self._resolver = ThreadPoolExecutor(2 * LIVE_MAX, "resolver")

    @classmethod
    def from_settings(cls, settings: Settings) -> Fulfilling:
        """For `settings`, with connections of its own; it connects at first use."""
        return cls(open_engine(settings.need("database_url"), lock_wait_s=settings.lock_wait_s), settings)

    def run_once(self) -> int:
        """Deliver until nothing is due; return how many fulfilments were delivered.

        Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
        """
        return asyncio.run(self._run(threading.Event(), is_once=True))

    def run(self, stopping: threading.Event) -> None:
        """Deliver until `stopping` is set. No error ends this loop: it logs the error, backs off, and goes on."""
        failures = 0
        while not stopping.is_set():
            began = time.monotonic()
            try:
                asyncio.run(self._run(stopping))
            except Exception as error:  # our own bugs as well: nothing else delivers
                failures = 1 if time.monotonic() > began + BACKOFF_S_MAX else failures + 1
                mistake = None if isinstance(error, ServiceUnavailable | ConfigurationError) else error
                log.warning("%s; fulfilments are delivered later (%d)", error, failures, exc_info=mistake)
                stopping.wait(min(BACKOFF_S_MAX, 0.1 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0))

    def close(self) -> None:
        """Close the connections."""
        self._database.shutdown(wait=False, cancel_futures=True)
        self._resolver.shutdown(wait=False, cancel_futures=True)
        self._engine.dispose()

    # ---- lanes -------------------------------------------------------------------------------------------------------

    async def _run(self, stopping: threading.Event, *, is_once: bool = False) -> int:
        """Start a lane for each webhook that has something due and no lane; return how many were delivered."""
        lanes: dict[str, asyncio.Task[int]] = {}
        delivered = 0
        try:
            while not stopping.is_set():
                await self._tidy()
                for signer in await self._read(_with_due):
                    if signer.webhook.name not in lanes:
                        lanes[signer.webhook.name] = asyncio.create_task(self._lane(signer, stopping))
                if lanes:
                    await asyncio.wait(lanes.values(), timeout=IDLE_WAIT_S)
                elif is_once:
                    break
                ended = [name for name, lane in lanes.items() if lane.done()]
                delivered += sum(lanes.pop(name).result() for name in ended)
                if not lanes and not is_once:
                    await asyncio.sleep(IDLE_WAIT_S)
        finally:
            await _wind_up(list(lanes.values()))
        return delivered

    async def _lane(self, signer: Signer, stopping: threading.Event) -> int:
        """Deliver what is due to one webhook; return how many it took."""
        ends_at = time.monotonic() + LANE_S_MAX
        delivered = 0
        place: Place | Outcome | None = None
        if self._trusted is None:
            self._trusted = certificates()
        async with client(self._trusted, calls_max=CALLS_AT_ONCE) as through:
            while not stopping.is_set() and time.monotonic() < ends_at:
                leased = await self._write(self._lease, signer.webhook.name)
                if not leased:
                    break
                if place is None:
                    place = await self._place(signer.webhook.url)
                texts = await self._read(bodies, leased)
                outcomes = await asyncio.gather(
                    *(self._call(through, place, signer.secrets, it, texts[it.id]) for it in leased)
                )
                attempts = [self._attempt(it, outcome) for it, outcome in zip(leased, outcomes, strict=True)]
                await self._write(_finish, attempts)
                _tell(signer, attempts)
                taken = sum(it.error is None for it in attempts)
                delivered += taken
                if not taken:  # the receiver is down: the next lane, a second later, asks again
                    break
        return delivered

    def _lease(self, connection: Connection, webhook: str) -> list[Fulfilment]:
        lease_s = 2 * self._settings.webhook_timeout_s + LEASE_SPARE_S
        now = clock.now(connection)
        return fulfilments.lease(connection, webhook, now, rows_max=CALLS_AT_ONCE, lease_s=lease_s)

    async def _place(self, url: str) -> Place | Outcome:
        settings = self._settings
        return await find_place(
            url,
            is_private_allowed=settings.webhook_private,
            timeout_s=settings.webhook_timeout_s,
            resolver=self._resolver,
        )

    async def _call(
        self,
        through: httpx.AsyncClient,
        place: Place | Outcome,
        secrets: Sequence[str],
        fulfilment: Fulfilment,
        body: bytes | DrawError,
    ) -> Outcome:
        if isinstance(body, DrawError):
            return Outcome(None, str(body))
        if isinstance(place, Outcome):
            return place
        message = Message(fulfilment.idempotency_key, f"msg_{fulfilment.id}", body)
        try:
            return await send(through, place, secrets, message, timeout_s=self._settings.webhook_timeout_s)
        except Exception as error:  # a mistake of ours with this one must not keep the others
            log.exception("fulfilment %d could not be sent", fulfilment.id)
            return Outcome(None, f"not sent: {type(error).__name__}")

    def _attempt(self, fulfilment: Fulfilment, outcome: Outcome) -> Attempt:
        if outcome.error is None:
            return Attempt(fulfilment)
        is_last = outcome.is_final or fulfilment.attempts >= self._settings.webhook_tries_max
        return Attempt(fulfilment, outcome.error, None if is_last else delay_after(fulfilment.attempts))

    async def _tidy(self) -> None:
        """Hand notifications without a webhook over, and give up what was for removed webhooks, if it is time."""
        if time.monotonic() < self._next_tidy:
            return
        if await self._read(fulfilments.is_untidy):
            while await self._write(_tidied) >= IN_LIST_MAX:
                pass
        self._next_tidy = time.monotonic() + TIDY_EVERY_S

    # ---- the database, in threads ------------------------------------------------------------------------------------

    async def _read(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        def read() -> T:
            with self._engine.connect().execution_options(read_only=True) as connection:
                return function(connection, *args, **kwargs)

        return await self._in_thread(read)

    async def _write(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        def write(connection: Connection) -> T:
            return function(connection, *args, **kwargs)

        return await self._in_thread(lambda: again_after_conflicts(self._engine, write, tries_max=CONFLICTS_MAX))

    async def _in_thread(self, act: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._database, act)
        except SQLAlchemyError as error:
            raise explain(error) from error


async def _wind_up(lanes: Sequence[asyncio.Task[int]]) -> None:
    """Let the calls under way end, for a while: what is cut off is sent again once its lease ends."""
    if lanes:
        await asyncio.wait(lanes, timeout=STOP_S_MAX)
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)


def _with_due(connection: Connection) -> list[Signer]:
    now = clock.now(connection)
    return [it for it in webhooks.live(connection) if fulfilments.is_due(connection, it.webhook.name, now)]


def _finish(connection: Connection, attempts: Sequence[Attempt]) -> None:
    fulfilments.finish(connection, attempts, clock.now(connection))


def _tidied(connection: Connection) -> int:
    """How many fulfilments one transaction handed over or gave up, for one webhook at most IN_LIST_MAX."""
    now = clock.now(connection)
    handed = [fulfilments.hand_over(connection, it.webhook, now) for it in webhooks.live(connection)]
    return max([fulfilments.give_up_removed(connection, now), *handed])


def _tell(signer: Signer, attempts: Sequence[Attempt]) -> None:
    failed = [it for it in attempts if it.error is not None]
    FULFILMENTS_DELIVERED.inc(len(attempts) - len(failed))
    FULFILMENTS_FAILED.inc(len(failed))
    for it in failed:
        if it.state is FulfilmentState.DEAD:
            key, error = it.fulfilment.idempotency_key, it.error
            log.error("fulfilment %s for webhook %s is dead: %s", key, signer.webhook.name, error)
    if failed:
        log.warning("webhook %s did not take %d fulfilments: %s", signer.webhook.name, len(failed), failed[0].error)
