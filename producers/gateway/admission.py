"""Admission: API keys, rate limits and back-pressure, before a body is read or a row is written.

Limits are per process: they protect the process, and do not depend on Redis.

Requests with a known API key count against their caller. Requests without one, from strangers, count against their
address: a caller is never refused or delayed because of other clients. The routes of OPEN need no key; every other
route under /v1/ names the scope that a key must have to call it: `opt=needs("read")`.
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

from tombola.producers.domain.errors import (
    InvalidRequest,
    MissingScope,
    NotAllowed,
    ServiceUnavailable,
    TooManyRequests,
)
from tombola.producers.gateway.callers import Callers
from tombola.producers.gateway.readers import Readers
from tombola.producers.settings import Settings
from tombola.producers.storage import requests
from tombola.producers.storage.api_keys import KEY_SCOPES, Holder, KeyScope
from tombola.producers.storage.faults import explain
from tombola.producers.telemetry.metrics import BACKLOG, Throttle
from tombola.producers.web.budget import Budget
from tombola.producers.web.proxies import subscriber

log = logging.getLogger(__name__)

Scope = Any
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Any, Send], Awaitable[None]]

STRANGERS_PER_S_MAX: Final = 100  # requests without a known key, from one address; more are held
WRONG_KEYS_PER_S_MAX: Final = 10  # from one address
HELD_S: Final = 1.0
HELD_MAX: Final = 1_000  # requests held at the same time
COUNT_BACKLOG_EVERY_S: Final = 1.0
JSON_TYPE: Final = b"application/json"
# For players, who must see odds before they pay, for witnesses of the books, and for whoever verifies draws.
OPEN: Final = ("/v1/campaigns", "/v1/odds/", "/v1/checkpoints/", "/v1/seeds")
NOBODY: Final = Holder("", scopes=frozenset(KEY_SCOPES))


class Admission:
    """Identifies callers, counts their requests and waits, and watches the backlog."""

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
        """Hold a stranger's request if its address sends too many. Raises TooManyRequests if HELD_MAX are held."""
        if self._needs_key or not is_for_callers(scope["path"]):
            authorization = scope["given"].get(b"authorization", b"")
            if not (authorization and self._callers.is_familiar(authorization)):
                address = _address(scope)
                if not self._strangers.take(address):
                    await self._hold()

    async def admit(self, scope: Scope, needed: KeyScope) -> Holder:
        """The holder of the request's API key, which has the scope `needed`; NOBODY where the gateway needs no keys.

        Raises NotAllowed, MissingScope, TooManyRequests, or InvalidRequest for a content type other than JSON.
        """
        given, holder = scope["given"], NOBODY
        if self._needs_key:
            authorization = given.get(b"authorization", b"")
            holder = self._callers.recall(authorization) or await self._identify(authorization, scope)
        if not self._rate.take(holder.caller or _address(scope)):
            raise self._too_often()
        if needed not in holder.scopes:
            raise MissingScope(f"this request needs an API key with the scope {needed}. Nothing was written")
        if scope["method"] == "POST":
            content_type = given.get(b"content-type", b"")
            # Without a CORS preflight, a page of another origin can send forms, but no JSON.
            if content_type != JSON_TYPE and content_type.partition(b";")[0].strip().lower() != JSON_TYPE:
                raise InvalidRequest("send the body as `Content-Type: application/json`")
            if self._is_full:
                raise TooManyRequests(f"more than {self._backlog_max:,} draws are under way: try again in a second")
            if holder.caller in self._over_their_share:
                raise TooManyRequests("your draws under way fill your share of the backlog: try again later")
        return holder

    def count_more(self, scope: Scope, count: int) -> None:
        """Count a request as `count` further requests: the draws of its batch. Raises TooManyRequests."""
        if count and not self._rate.take_more(scope["holder"].caller or _address(scope), count):
            raise self._too_often()

    def begin_wait(self, scope: Scope) -> None:
        """Count a long poll or an event stream for its caller, until `end_wait`. Raises TooManyRequests."""
        name = scope["holder"].caller or _address(scope)
        if self._waits[name] >= self._waits_max:
            raise TooManyRequests(f"more than {self._waits_max:,} of your requests wait here: try again in a second")
        self._waits[name] += 1
        scope["waits_as"] = name

    def end_wait(self, scope: Scope) -> None:
        """End the wait that `begin_wait` counted for this request, if it did."""
        name = scope.get("waits_as")
        if name is not None:
            self._waits[name] -= 1
            if not self._waits[name]:
                del self._waits[name]

    async def watch_backlog(self) -> None:
        """Count the accepted requests that have not settled, every COUNT_BACKLOG_EVERY_S, until cancelled."""
        shares = Throttle(COUNT_BACKLOG_EVERY_S)
        while True:
            try:
                count = await self._readers.run(self._count)
                self._is_full = count > self._backlog_max
                BACKLOG.set(count)
                if not self._needs_key or 2 * count < self._backlog_max:
                    self._over_their_share = frozenset()
                elif shares.is_due():
                    self._over_their_share = await self._readers.run(self._find_over_share)
                    shares.done()
            except SQLAlchemyError as error:
                log.warning("%s; the backlog is not known", explain(error))
            except ServiceUnavailable as error:
                log.warning("%s; the backlog is not known", error)
            except Exception:  # without this task the limit would not be enforced
                log.exception("the backlog is not known")
            await asyncio.sleep(COUNT_BACKLOG_EVERY_S)

    def _count(self) -> int:
        with self._engine.connect().execution_options(read_only=True) as connection:
            return requests.count_accepted(connection, count_max=self._backlog_max + 1)

    def _find_over_share(self) -> frozenset[str]:
        """Callers whose draws under way are at least as many as the backlog has room left.

        So n such callers get at most 1 / (n + 1) of the backlog each, and as much is left for other callers.
        """
        with self._engine.connect().execution_options(read_only=True) as connection:
            counts = requests.count_accepted_by_caller(connection)
        room = self._backlog_max - sum(counts.values())
        return frozenset(caller for caller, count in counts.items() if caller and count >= room)

    async def _identify(self, authorization: bytes, scope: Scope) -> Holder:
        holder = await self._callers.find(authorization)
        if holder is not None:
            return holder
        if self._wrong_keys.take(_address(scope)):
            raise NotAllowed("this API key is not known, was revoked or has expired")
        await self._hold()
        raise TooManyRequests("too many wrong API keys from this address: try again in a second")

    async def _hold(self) -> None:
        if self._held >= HELD_MAX:
            raise TooManyRequests
        self._held += 1
        try:
            # A random time, so that requests that came at once do not go on at once.
            await asyncio.sleep(HELD_S * random.uniform(1.0, 2.0))
        finally:
            self._held -= 1

    def _too_often(self) -> TooManyRequests:
        return TooManyRequests(f"more than {self._rate.per_s} requests a second: try again in a second")


def needs(scope: KeyScope) -> dict[str, KeyScope]:
    """The `opt` of a route for callers: the scope that an API key must have to call it."""
    return {"needs": scope}


def is_for_callers(path: str) -> bool:
    """Whether a request for that path needs a key, where the gateway needs keys."""
    return path.startswith("/v1/") and not path.startswith(OPEN)


class AdmissionMiddleware:
    """ASGI middleware: admits or refuses every request that is for callers."""

    def __init__(self, app: App, admission: Admission) -> None:
        self.app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] == "http" and is_for_callers(scope["path"]) and scope["method"] != "OPTIONS":
            scope["holder"] = await self._admission.admit(scope, scope["route_handler"].opt["needs"])
        await self.app(scope, receive, send)


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return subscriber(client[0]) if client else ""
