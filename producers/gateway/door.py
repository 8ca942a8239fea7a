"""The door: who may come in, and how many. All of it before anything is read or written.

Limits are per process: they protect this one, and a limit that has to ask Redis first would fail with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

from cachetools import LRUCache, TTLCache
from limits import RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter
from prometheus_client import Counter, Histogram
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from producers import api_keys, requests
from producers.api_keys import Holder
from producers.database import explain
from producers.errors import InvalidRequest, NotAllowed, ServiceUnavailable, TooManyRequests
from producers.metrics import BACKLOG
from producers.settings import Settings

log = logging.getLogger(__name__)

Scope = Any
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Any, Send], Awaitable[None]]

T = TypeVar("T")

READERS: Final = 4
READ_WAIT_S: Final = 4.0
KEYS_REMEMBERED_S: Final = 5.0  # so long a revoked key may still get in
KEYS_REMEMBERED_MAX: Final = 10_000
STRANGERS_PER_S_MAX: Final = 10  # wrong keys from one address; each costs a query
COUNT_BACKLOG_EVERY_S: Final = 1.0
JSON_TYPE: Final = b"application/json"
NOBODY: Final = Holder("")

REQUESTS: Final = Counter(
    "tombola_gateway_requests", "HTTP requests, by route, method and status", ["route", "method", "status"]
)
SECONDS: Final = Histogram(
    "tombola_gateway_request_seconds",
    "how long an HTTP request took, waits included",
    ["route", "method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60),
)


class Readers:
    """The threads that read the database. Nobody waits longer than READ_WAIT_S for one, nor for what it finds.

    Behind a server that is frozen all of them are soon taken: what waits for one is given up, and cannot pile up.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")

    async def run(self, function: Callable[[], T]) -> T:
        """What `function` returns, called in one of the threads. Raises ServiceUnavailable when that takes too long."""
        future = self.pool.submit(function)  # cancelled with the wait, if it has not begun
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), READ_WAIT_S)
        except TimeoutError:
            raise ServiceUnavailable(f"the database does not answer: nothing in {READ_WAIT_S:g} s") from None


class Doorkeeper:
    """Knows the callers, counts their requests, and watches the backlog."""

    def __init__(self, settings: Settings, engine: Engine, readers: Readers) -> None:
        self._engine = engine
        self._readers = readers
        self._needs_key = settings.gateway_auth == "api-key"
        self._limiter = FixedWindowRateLimiter(MemoryStorage())
        self._rate = RateLimitItemPerSecond(settings.gateway_rate_max)
        self._allowance = max(1, settings.gateway_rate_max // 100)
        self._allowances: LRUCache[str, int] = LRUCache(KEYS_REMEMBERED_MAX)
        self._strangers = RateLimitItemPerSecond(STRANGERS_PER_S_MAX)
        self._backlog_max = settings.backlog_max
        self._is_full = False
        self._callers: TTLCache[bytes, Holder] = TTLCache(KEYS_REMEMBERED_MAX, KEYS_REMEMBERED_S)

    async def admit(self, scope: Scope) -> Holder:
        """The caller, whose name is empty where no key is needed.

        Raises NotAllowed, TooManyRequests, or InvalidRequest for a body that is not JSON.
        """
        client = scope.get("client")
        address = client[0] if client else ""
        holder = NOBODY
        if self._needs_key:
            authorization = header(scope, b"authorization") or b""
            holder = self._callers.get(authorization) or await self._identify(authorization, address)
        if not self._is_within_rate(holder.caller or address):
            raise TooManyRequests(f"more than {self._rate.amount} requests a second: come back in a second")
        if scope["method"] == "POST":
            content_type = header(scope, b"content-type") or b""
            # A page of another origin can send a form without being asked, but not JSON.
            if content_type != JSON_TYPE and content_type.partition(b";")[0].strip().lower() != JSON_TYPE:
                raise InvalidRequest("send the body as `Content-Type: application/json`")
            if self._is_full:
                raise TooManyRequests(f"more than {self._backlog_max:,} draws are under way: come back in a second")
        return holder

    def _is_within_rate(self, who: str) -> bool:
        """Take one from what `who` has left; fetched from the limiter several at a time, which takes as long as one."""
        left = self._allowances.get(who, 0)
        if left == 0:
            if not self._limiter.hit(self._rate, who, cost=self._allowance):
                return False
            left = self._allowance
        self._allowances[who] = left - 1
        return True

    async def watch_backlog(self) -> None:
        """Count what is accepted and not settled, now and then, for ever."""
        while True:
            try:
                count = await self._readers.run(self._count)
                self._is_full = count > self._backlog_max
                BACKLOG.set(count)
            except SQLAlchemyError as error:
                log.warning("%s; the backlog is not known", explain(error))
            except ServiceUnavailable as error:
                log.warning("%s; the backlog is not known", error)
            except Exception:  # whatever it is: without this watch the limit would be forgotten
                log.exception("the backlog is not known")
            await asyncio.sleep(COUNT_BACKLOG_EVERY_S)

    def _count(self) -> int:
        with self._engine.connect().execution_options(read_only=True) as connection:
            return requests.count_accepted(connection, count_max=self._backlog_max + 1)

    async def _identify(self, authorization: bytes, address: str) -> Holder:
        scheme, _, api_key = authorization.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not api_key:
            raise NotAllowed
        if not self._limiter.test(self._strangers, "stranger", address):
            raise TooManyRequests("too many wrong API keys from this address: come back in a second")
        holder = await self._readers.run(partial(self._look_up, api_key.strip()))
        if holder is None:
            self._limiter.hit(self._strangers, "stranger", address)
            raise NotAllowed("this API key is not known, or was revoked")
        self._callers[authorization] = holder
        return holder

    def _look_up(self, api_key: str) -> Holder | None:
        try:
            with self._engine.connect().execution_options(read_only=True) as connection:
                return api_keys.holder_of(connection, api_key)
        except SQLAlchemyError as error:
            raise explain(error) from error


class Door:
    """ASGI middleware: asks the doorkeeper about everything under /v1, and counts what comes of it."""

    def __init__(self, app: App, keeper: Doorkeeper) -> None:
        self.app = app
        self._keeper = keeper

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        scope["holder"] = await self._keeper.admit(scope)
        await self.app(scope, receive, send)


class Meter:
    """ASGI middleware around everything: counts and times requests by the route that took them."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._known: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def watch(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            # The template, not the path: a label for every session would never end.
            label = (scope.get("path_template") or "other", scope["method"], status)
            known = self._known.get(label)
            if known is None:
                known = self._known[label] = (REQUESTS.labels(*label), SECONDS.labels(*label[:2]))
            known[0].inc()
            known[1].observe(time.perf_counter() - started)


def header(scope: Scope, name: bytes) -> bytes | None:
    """A request header, by its name in lower case; None if it is not there."""
    for key, value in scope["headers"]:
        if key == name:
            found: bytes = value
            return found
    return None
