"""Waiting for results: one Redis subscription for all waits, so that a wait costs neither a thread nor a query.

The database is asked as well, for all waits together: every second while Redis is away, otherwise once per wait, as
Redis may have evicted a result that was there before. A stored result that names another session counts as none.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import ConnectionError, RedisError, ResponseError

from tombola.producers.brokers.redis_clients import open_async_pool
from tombola.producers.results import KEY_PREFIX, is_dead_envelope, unwrap
from tombola.producers.storage.requests import SessionState

log = logging.getLogger(__name__)

CONTROL_CHANNEL: Final = "tombola-gateway"
ASK_DATABASE_EVERY_S: Final = 1.0
READ_TIMEOUT_S: Final = 2.0
CONNECTIONS_MAX: Final = 50
RECONNECT_S_MAX: Final = 2.0
CANCEL_EVERY_S: Final = 0.1

# Raised by a lost subscription. AttributeError is a bug of redis-py: the listener closed the subscription meanwhile.
_LOST: Final = (RedisError, OSError, AttributeError)

FindStates = Callable[[Sequence[str]], dict[str, SessionState]]


class Results:
    """Finds results, and waits for them; for one event loop."""

    def __init__(self, url: str, find_states: FindStates, readers: ThreadPoolExecutor, *, secret: bytes = b"") -> None:
        # Retries are off: after a silent reconnect the subscription would have missed announcements.
        self._client = Redis.from_pool(open_async_pool(url, timeout_s=READ_TIMEOUT_S, connections_max=CONNECTIONS_MAX))
        self._own_channel = f"{CONTROL_CHANNEL}-{secrets.token_hex(8)}"  # a subscription needs at least one channel
        self._find_states = find_states
        self._readers = readers
        self._secret = secret
        self._waiting: dict[str, set[asyncio.Future[bytes | None]]] = {}
        self._subscription = self._client.pubsub(ignore_subscribe_messages=True)
        self._unasked: set[str] = set()
        self._is_up = False
        self.is_stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start the listener, in the running loop."""
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._ask_database())]

    def stop_waiting(self) -> None:
        """End all waits, and those still to come, without a result: the process is about to end."""
        self.is_stopping = True
        for session_id in self._waiting:
            self._answer(session_id, None)

    async def close(self) -> None:
        """Stop the listener, and close the connections."""
        running = {task for task in self._tasks if not task.done()}
        while running:
            # Repeatedly: before Python 3.12 `asyncio.wait_for`, which redis-py uses around each write, loses a
            # cancellation that arrives as the write ends.
            for task in running:
                task.cancel()
            _, running = await asyncio.wait(running, timeout=CANCEL_EVERY_S)
        with suppress(RedisError):
            await self._subscription.aclose()
            await self._client.aclose()

    @property
    def waiting(self) -> int:
        """The number of waits."""
        return sum(map(len, self._waiting.values()))

    async def ping(self) -> bool:
        """Whether Redis answers."""
        try:
            return bool(await self._client.ping())
        except (RedisError, OSError):
            return False

    async def peek(self, session_id: str) -> bytes | None:
        """The result's bytes if Redis has them; None otherwise, also when Redis does not answer."""
        if not self._is_up:
            return None
        try:
            stored: Any = await self._client.get(KEY_PREFIX + session_id)
        except ResponseError:  # the key's value is not a string
            return None
        except (RedisError, OSError):
            return None
        return None if stored is None else unwrap(stored, session_id, self._secret)

    async def wait(self, session_id: str, *, timeout_s: float) -> bytes | None:
        """The result's bytes as soon as Redis or the database has them.

        None after `timeout_s`, or earlier for a session that has died: the caller asks the database then.
        """
        if self.is_stopping:
            return await self.peek(session_id)
        future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        futures = self._waiting.get(session_id)
        if futures is None:
            futures = self._waiting[session_id] = set()
        futures.add(future)
        self._unasked.add(session_id)
        try:
            # Subscribe, then read: a result stored in between is not missed.
            if len(futures) == 1:
                await self._subscribe(session_id)
            if (body := await self.peek(session_id)) is not None:
                self._hand_out(session_id, body)  # to waits that read before the subscription
                return body
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            return None
        finally:
            futures.discard(future)
            if not futures and self._waiting.get(session_id) is futures:
                del self._waiting[session_id]
                self._unasked.discard(session_id)
                await self._unsubscribe(session_id)

    async def _subscribe(self, session_id: str) -> None:
        if self._is_up:
            with suppress(*_LOST):  # the listener notices as well, and subscribes again
                await self._subscription.subscribe(KEY_PREFIX + session_id)

    async def _unsubscribe(self, session_id: str) -> None:
        if self._is_up and session_id not in self._waiting:
            with suppress(*_LOST):
                await self._subscription.unsubscribe(KEY_PREFIX + session_id)

    async def _listen(self) -> None:
        """Hand out announced results; after an outage subscribe again, and read what was announced meanwhile."""
        failures = 0
        while True:
            try:
                self._subscription = self._client.pubsub(ignore_subscribe_messages=True)
                await self._subscription.subscribe(self._own_channel)
                self._is_up = True  # from here on each wait subscribes itself
                if self._waiting:
                    await self._subscription.subscribe(*[KEY_PREFIX + session_id for session_id in self._waiting])
                failures = 0
                self._unasked.update(self._waiting)  # results of the outage were announced without a listener
                for session_id in list(self._waiting):
                    self._hand_out(session_id, await self.peek(session_id))
                await self._hear()
            except Exception as error:  # without a listener every wait would take its whole time
                if self._is_up or not failures:
                    log.warning("the result store does not answer: %s; the database is asked instead", error)
                self._is_up = False
                failures += 1
                with suppress(RedisError, OSError):
                    await self._subscription.aclose()
                await asyncio.sleep(min(RECONNECT_S_MAX, 0.1 * 2 ** min(failures, 8)))

    async def _hear(self) -> None:
        """Hand out announced results until the subscription fails, or misses what is published to its own channel."""
        heard_at, asked_at = time.monotonic(), 0.0
        while True:
            # None also for the confirmation of a subscription.
            message = await self._subscription.get_message(timeout=READ_TIMEOUT_S)
            now = time.monotonic()
            if message is None:
                # After a failover the subscription may be at the old primary, which stays connected and silent.
                if asked_at and now - asked_at >= READ_TIMEOUT_S:
                    raise ConnectionError("published messages do not arrive")
                if not asked_at and now - heard_at >= READ_TIMEOUT_S / 2:
                    asked_at = now
                    await self._client.publish(self._own_channel, b"")
                continue
            heard_at, asked_at = now, 0.0
            if message["type"] == "message":
                session_id = message["channel"].decode().removeprefix(KEY_PREFIX)
                self._hand_out(session_id, unwrap(message["data"], session_id, self._secret))
                if is_dead_envelope(message["data"], session_id, self._secret):
                    self._answer(session_id, None)  # each wait asks the database then

    async def _ask_database(self) -> None:
        """Ask the database once a second: for all waits while Redis is away, else for waits begun since."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(ASK_DATABASE_EVERY_S)
            asked = list(self._unasked if self._is_up else self._waiting)
            self._unasked.clear()
            if not asked:
                continue
            started = time.monotonic()
            try:
                states = await loop.run_in_executor(self._readers, self._find_states, asked)
            except Exception as error:
                log.warning("the database does not answer for %d waits: %s", len(asked), error)
                self._unasked.update(session_id for session_id in asked if session_id in self._waiting)
                continue
            for session_id, state in states.items():
                self._answer(session_id, state.result)
            log.debug("looked %d results up in %.3f s", len(states), time.monotonic() - started)

    def _hand_out(self, session_id: str, body: bytes | None) -> None:
        if body is not None:
            self._answer(session_id, body)

    def _answer(self, session_id: str, body: bytes | None) -> None:
        for future in self._waiting.get(session_id, ()):
            if not future.done():
                future.set_result(body)
