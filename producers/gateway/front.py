"""In front of the routes: what holds for every request. Proxies, hosts, CORS, admission, metrics, errors as problems.

`POST /v1/draws` is answered from here, without the framework, which would take longer than everything else.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from prometheus_client import Counter, Histogram

from tombola.producers.gateway.admission import Admission, App, Scope, Send
from tombola.producers.gateway.cors import Cors
from tombola.producers.gateway.problems import send_problem
from tombola.producers.settings import Settings
from tombola.producers.web.headers import NO_CONTENT, NO_SNIFFING, SAFETY, once
from tombola.producers.web.hosts import Hosts
from tombola.producers.web.proxies import Proxies
from tombola.producers.web.whole import Whole, send_whole

Receive = Callable[[], Awaitable[Any]]

DRAWS: Final = "/v1/draws"
# Probes call them by IP address, so any host is allowed; a page of another origin learns nothing useful from them.
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
    """The function that answers `POST /v1/draws`."""

    async def __call__(self, scope: Scope, receive: Any) -> Whole: ...


class Front:
    """ASGI middleware around `app`, the application with all routes."""

    def __init__(self, app: App, settings: Settings, admission: Admission, make_draw: MakeDraw) -> None:
        self.app = app
        self._admission = admission
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
        sender, method = ResponseSender(send), scope["method"]
        try:
            if method == "HEAD":
                scope, receive = {**scope, "method": "GET"}, sender.heard(receive)
                sender.is_head = True
            await self._serve(scope, receive, sender)
        except Exception as error:
            if sender.status:  # the response has begun: the server can only abort it
                raise
            await send_problem(sender, error)
        finally:
            self._admission.end_wait(scope)
            self._measure(scope, method, sender.status or 500, time.perf_counter() - started)

    async def _serve(self, scope: Scope, receive: Receive, sender: ResponseSender) -> None:
        if self._proxies:
            self._proxies.apply(scope)
        scope["given"] = given = once(scope["headers"])
        path = scope["path"]
        origin = given.get(b"origin")
        if self._cors:
            sender.headers += self._cors.headers(origin)
        if self._hosts and path not in CHECKS:
            self._hosts.check(given.get(b"host"), origin, origins=self._cors.origins)
        if self._cors and self._cors.is_preflight(scope):
            await sender({"type": "http.response.start", "status": 204, "headers": self._cors.preflight(scope, origin)})
            await sender({"type": "http.response.body", "body": b"", "more_body": False})
            return
        await self._admission.receive(scope)
        if path == DRAWS and scope["method"] == "POST":
            scope["path_template"] = DRAWS
            scope["holder"] = await self._admission.admit(scope, "draw")
            await sender.whole(await self._make_draw(scope, receive))
        else:
            await self.app(scope, receive, sender)

    def _measure(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        # The template, not the path: a path per session would be a metric per session.
        label = (scope.get("path_template") or "other", method, status)
        known = self._known.get(label)
        if known is None:
            known = self._known[label] = (REQUESTS.labels(*label), SECONDS.labels(*label[:2]))
        known[0].inc()
        known[1].observe(seconds)


class ResponseSender:
    """ASGI `send` that adds the headers of all responses, and drops the body of responses to HEAD."""

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
        """Send a whole answer to a request other than HEAD."""
        self.status = answer.status
        await send_whole(self._send, answer._replace(headers=[*answer.headers, *SAFETY, *self.headers]))

    def heard(self, receive: Receive) -> Receive:
        """`receive` that reports a disconnect once the response to HEAD is sent, so that streams end."""

        async def hear() -> Any:
            return {"type": "http.disconnect"} if self._is_done else await receive()

        return hear
