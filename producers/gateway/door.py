"""The door: who may come in, and how many. All of it before anything is read or written.

Limits are per process: they protect this one, and a limit that has to ask Redis first would fail with it.

What a caller does counts against the caller, and only what strangers do counts against their address: a request with a
key that is known is never refused, nor made to wait, for what others do.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter as Tally
from collections.abc import Awaitable, Callable
from typing import Any, Final

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.errors import InvalidRequest, NotAllowed, ServiceUnavailable, TooManyRequests
from tombola.producers.gateway.callers import Callers
from tombola.producers.gateway.readers import Readers
from tombola.producers.settings import Settings
from tombola.producers.storage import requests
from tombola.producers.storage.api_keys import Holder
from tombola.producers.storage.faults import explain
from tombola.producers.telemetry.metrics import BACKLOG, Throttle
from tombola.producers.web.budget import Budget
from tombola.producers.web.proxies import subscriber

log = logging.getLogger(__name__)

Scope = Any
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Any, Send], Awaitable[None]]

STRANGERS_PER_S_MAX: Final = 100  # requests without a known key, from one address; what is beyond waits for its turn
WRONG_KEYS_PER_S_MAX: Final = 10  # from one address
HELD_S: Final = 1.0
HELD_MAX: Final = 1_000  # requests that wait for their turn
COUNT_BACKLOG_EVERY_S: Final = 1.0
JSON_TYPE: Final = b"application/json"
NOBODY: Final = Holder("")


class Doorkeeper:
    """Knows the callers, counts their requests, and watches the backlog."""

    def __init__(self, settings: Settings, engine: Engine, readers: Readers) -> None:
        self._engine = engine
        self._readers = readers
        self._needs_key = settings.gateway_auth == "api-key"
        self._callers = Callers(engine, readers)
        self._rate = Budget(settings.gateway_rate_max)
        self._strangers = Budget(STRANGERS_PER_S_MAX)
        self._wrong_keys = Budget(WRONG_KEYS_PER_S_MAX)
        self._held = 0
        self._waits_max = max(1, settings.gateway_connections_max // 2)
        self._waits: Tally[str] = Tally()
        self._backlog_max = settings.backlog_max
        self._is_full = False
        self._over_their_share: frozenset[str] = frozenset()

    async def receive(self, scope: Scope) -> None:
        """Have a stranger wait who asks too often. Raises TooManyRequests when too many wait."""
        if self._needs_key or not scope["path"].startswith("/v1/"):
            authorization = scope["given"].get(b"authorization", b"")
            if not (authorization and self._callers.is_familiar(authorization)):
                address = _address(scope)
                if not self._strangers.take(address):
                    await self._hold()

    async def admit(self, scope: Scope) -> Holder:
        """The caller, whose name is empty where no key is needed.

        Raises NotAllowed, TooManyRequests, or InvalidRequest for a body that is not JSON.
        """
        given, holder = scope["given"], NOBODY
        if self._needs_key:
            authorization = given.get(b"authorization", b"")
            holder = self._callers.recall(authorization) or await self._identify(authorization, scope)
        if not self._rate.take(holder.caller or _address(scope)):
            raise self._too_often()
        if scope["method"] == "POST":
            content_type = given.get(b"content-type", b"")
            # A page of another origin can send a form without being asked, but not JSON.
            if content_type != JSON_TYPE and content_type.partition(b";")[0].strip().lower() != JSON_TYPE:
                raise InvalidRequest("send the body as `Content-Type: application/json`")
            if self._is_full:
                raise TooManyRequests(f"more than {self._backlog_max:,} draws are under way: come back in a second")
            if holder.caller in self._over_their_share:
                raise TooManyRequests("as many draws of yours are under way as there is room left: come back later")
        return holder

    def count_more(self, scope: Scope, count: int) -> None:
        """Count a request as `count` more, now that it is known. Raises TooManyRequests."""
        if count and not self._rate.take_more(scope["holder"].caller or _address(scope), count):
            raise self._too_often()

    def begin_wait(self, scope: Scope) -> None:
        """Count a wait or a stream for its caller, until `end_wait`. Raises TooManyRequests."""
        name = scope["holder"].caller or _address(scope)
        if self._waits[name] >= self._waits_max:
            raise TooManyRequests(f"more than {self._waits_max:,} of your requests wait here: come back in a second")
        self._waits[name] += 1
        scope["waits_as"] = name

    def end_wait(self, scope: Scope) -> None:
        """The request is over: if it was a wait, it is none any more."""
        name = scope.get("waits_as")
        if name is not None:
            self._waits[name] -= 1
            if not self._waits[name]:
                del self._waits[name]

    async def watch_backlog(self) -> None:
        """Count what is accepted and not settled, now and then, for ever."""
        shares = Throttle(COUNT_BACKLOG_EVERY_S)
        while True:
            try:
                count = await self._readers.run(self._count)
                self._is_full = count > self._backlog_max
                BACKLOG.set(count)
                if not self._needs_key or 2 * count < self._backlog_max:
                    self._over_their_share = frozenset()
                elif shares.is_due():
                    self._over_their_share = await self._readers.run(self._find_hogs)
                    shares.done()
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

    def _find_hogs(self) -> frozenset[str]:
        """Callers with as many draws under way as there is room left, or more: of n such callers each can have one
        part in n + 1 of the backlog, and the last part is left for others."""
        with self._engine.connect().execution_options(read_only=True) as connection:
            counts = requests.count_accepted_by_caller(connection)
        room = self._backlog_max - sum(counts.values())
        return frozenset(caller for caller, count in counts.items() if caller and count >= room)

    async def _identify(self, authorization: bytes, scope: Scope) -> Holder:
        holder = await self._callers.find(authorization)
        if holder is not None:
            return holder
        if self._wrong_keys.take(_address(scope)):
            raise NotAllowed("this API key is not known, or was revoked")
        await self._hold()
        raise TooManyRequests("too many wrong API keys from this address: come back in a second")

    async def _hold(self) -> None:
        if self._held >= HELD_MAX:
            raise TooManyRequests
        self._held += 1
        try:
            # Not all at the same time again: what they ask for together takes as long as it takes them all.
            await asyncio.sleep(HELD_S * random.uniform(1.0, 2.0))
        finally:
            self._held -= 1

    def _too_often(self) -> TooManyRequests:
        return TooManyRequests(f"more than {self._rate.per_s} requests a second: come back in a second")


class Door:
    """ASGI middleware: asks the doorkeeper about everything under /v1."""

    def __init__(self, app: App, keeper: Doorkeeper) -> None:
        self.app = app
        self._keeper = keeper

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/") and scope["method"] != "OPTIONS":
            scope["holder"] = await self._keeper.admit(scope)
        await self.app(scope, receive, send)


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return subscriber(client[0]) if client else ""
