"""In front of the routes: everything that holds for each request, whatever it asks for.

`POST /v1/draws` is answered from here: the framework's way through a request takes longer than all the rest of it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from prometheus_client import Counter, Histogram

from tombola.producers.gateway.cors import Cors
from tombola.producers.gateway.door import App, Doorkeeper, Scope, Send
from tombola.producers.gateway.problems import send_problem
from tombola.producers.settings import Settings
from tombola.producers.web.headers import NO_CONTENT, NO_SNIFFING, SAFETY, once
from tombola.producers.web.hosts import Hosts
from tombola.producers.web.proxies import Proxies
from tombola.producers.web.whole import Whole, send_whole

Receive = Callable[[], Awaitable[Any]]

DRAWS: Final = "/v1/draws"
# They are asked by address, and tell a page nothing that it could use.
CHECKS: Final = frozenset({"/healthz", "/readyz"})

REQUESTS: Final = Counter(
    "tombola_gateway_requests", "HTTP requests, by route, method and status", ["route", "method", "status"]
)
SECONDS: Final = Histogram(
    "tombola_gateway_request_seconds",
    "how long an HTTP request took, waits included",
    ["route", "method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60),
)


class MakeDraw(Protocol):
    """What answers `POST /v1/draws`."""

    async def __call__(self, scope: Scope, receive: Any) -> Whole: ...


class Front:
    """The ASGI application: `app` behind what holds for all of its routes."""

    def __init__(self, app: App, settings: Settings, keeper: Doorkeeper, make_draw: MakeDraw) -> None:
        self.app = app
        self._keeper = keeper
        self._make_draw = make_draw
        self._proxies = Proxies(settings.trusted_proxies)
        self._hosts = Hosts(settings.allowed_hosts)
        self._cors = Cors(settings.cors_origins)
        self._known: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        answer, method = Answer(send), scope["method"]
        try:
            if method == "HEAD":
                scope, receive = {**scope, "method": "GET"}, answer.heard(receive)
                answer.is_head = True
            await self._serve(scope, receive, answer)
        except Exception as error:
            if answer.status:  # it is on its way: the server can only break it off
                raise
            await send_problem(answer, error)
        finally:
            self._keeper.end_wait(scope)
            self._measure(scope, method, answer.status or 500, time.perf_counter() - started)

    async def _serve(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        if self._proxies:
            self._proxies.apply(scope)
        scope["given"] = given = once(scope["headers"])
        path = scope["path"]
        origin = given.get(b"origin")
        if self._cors:
            answer.headers += self._cors.headers(origin)
        if self._hosts and path not in CHECKS:
            self._hosts.check(given.get(b"host"), origin, origins=self._cors.origins)
        if self._cors and self._cors.is_preflight(scope):
            await answer({"type": "http.response.start", "status": 204, "headers": self._cors.preflight(scope, origin)})
            await answer({"type": "http.response.body", "body": b"", "more_body": False})
            return
        await self._keeper.receive(scope)
        if path == DRAWS and scope["method"] == "POST":
            scope["path_template"] = DRAWS
            scope["holder"] = await self._keeper.admit(scope)
            await answer.whole(await self._make_draw(scope, receive))
        else:
            await self.app(scope, receive, answer)

    def _measure(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        # The template, not the path: a label for every session would never end.
        label = (scope.get("path_template") or "other", method, status)
        known = self._known.get(label)
        if known is None:
            known = self._known[label] = (REQUESTS.labels(*label), SECONDS.labels(*label[:2]))
        known[0].inc()
        known[1].observe(seconds)


class Answer:
    """Where an answer goes: with the headers that all have, and without a body where only the head was asked for."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_head = False
        self.status = 0
        self._is_done = False

    async def __call__(self, message: Any) -> None:
        if self._is_done:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            has_policy = any(name == NO_CONTENT[0] for name, _ in message["headers"])
            more = (NO_SNIFFING,) if has_policy else SAFETY
            message = {**message, "headers": [*message["headers"], *more, *self.headers]}
            await self._send(message)
            if self.is_head:
                self._is_done = True
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        await self._send(message)

    async def whole(self, answer: Whole) -> None:
        """Answer a request that is no HEAD with all there is."""
        self.status = answer.status
        await send_whole(self._send, answer._replace(headers=[*answer.headers, *SAFETY, *self.headers]))

    def heard(self, receive: Receive) -> Receive:
        """`receive`, for which the client is gone as soon as it has all that it asked for: a stream ends then."""

        async def hear() -> Any:
            return {"type": "http.disconnect"} if self._is_done else await receive()

        return hear
