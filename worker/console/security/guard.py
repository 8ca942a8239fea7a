"""The middleware around the console: finds the session, refuses forged forms, sets the security headers."""

from __future__ import annotations

import html
import logging
import secrets
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tombola.producers.domain.errors import InvalidRequest, ServiceUnavailable, WrongHost, WrongOrigin
from tombola.producers.settings import Settings
from tombola.producers.storage.faults import explain
from tombola.producers.web.headers import once
from tombola.producers.web.hosts import Hosts
from tombola.producers.web.proxies import Proxies
from tombola.worker.console.security.forms import Refused, form_token, read_form, receive_again, refuse_forged
from tombola.worker.console.security.headers import STATIC, HeaderSender
from tombola.worker.console.security.sessions import LOGIN, LOGIN_COOKIE, SESSION_COOKIE, address_of
from tombola.worker.console.threads import in_thread
from tombola.worker.operators import users as operators

log = logging.getLogger(__name__)

SAFE_METHODS: Final = frozenset({"GET", "HEAD"})


class Guard:
    """ASGI middleware around everything. Sets `operator`, `form`, `nonce` and `csrf_token` in `request.state`."""

    def __init__(self, app: ASGIApp, engine: Engine, settings: Settings) -> None:
        self.app = app
        self._engine = engine
        self._proxies = Proxies(settings.trusted_proxies)
        self._hosts = Hosts(settings.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        self._proxies.apply(scope)
        request = Request(scope, receive)
        if not self._proxies and request.headers.get("x-forwarded-proto") == "https":
            scope["scheme"] = "https"  # a client that forges the header gets stricter cookies, nothing else
        state = scope.setdefault("state", {})
        state["nonce"] = secrets.token_urlsafe(16)
        sender = HeaderSender(send, request, state["nonce"])
        try:
            app, receive = await self._admit(request, receive)
        except Refused as refused:
            log.warning("refused %s %s from %s: %s", request.method, request.url.path, address_of(request), refused)
            app = PlainTextResponse(str(refused), refused.status)
        except (SQLAlchemyError, ServiceUnavailable) as error:
            why = explain(error) if isinstance(error, SQLAlchemyError) else error
            log.error("%s", why)
            app = PlainTextResponse(f"{why}\n\nThe console needs the database. Try again.", 503)
        except Exception:  # a mistake of ours; the server's own answer would lack our headers
            log.exception("%s %s failed", request.method, request.url.path)
            app = PlainTextResponse("Something went wrong: the console's log says what.", 500)
        await app(scope, receive, sender)

    async def _admit(self, request: Request, receive: Receive) -> tuple[ASGIApp, Receive]:
        """The ASGI application that answers the request, and its `receive`. Raises Refused."""
        state = request.state
        state.operator, state.form = None, {}
        self._refuse_misdirected(request)
        if request.url.path.startswith(STATIC):
            if request.method not in SAFE_METHODS:
                raise Refused(405, "static files answer GET and HEAD only")
            return self.app, receive
        is_data = request.url.path.endswith(".json")
        token = request.cookies.get(SESSION_COOKIE, "")
        if token:
            # Pages fetch data while they refresh themselves: that alone must not keep a session open.
            state.operator = await in_thread(lambda: operators.session(self._engine, token, touch=not is_data))
        is_login = request.url.path == LOGIN
        if state.operator is None:
            token = request.cookies.get(LOGIN_COOKIE, "")
            if is_data:
                return JSONResponse({"detail": "the session has ended: log in"}, 401), receive
            if request.method not in SAFE_METHODS and not is_login:
                return RedirectResponse(LOGIN, 303), receive
            if not is_login and _comes_by_a_link(request):
                return _reload(request), receive
            if is_login and not token and request.method in SAFE_METHODS:
                token = state.login_secret = secrets.token_urlsafe(32)
        elif is_login and request.method not in SAFE_METHODS:
            return RedirectResponse("/", 303), receive  # a second click
        state.csrf_token = form_token(token)
        if request.method in SAFE_METHODS:
            return self.app, receive
        body = await read_form(request)
        refuse_forged(request, state.form, token)
        return self.app, receive_again(body)

    def _refuse_misdirected(self, request: Request) -> None:
        try:
            given = once(request.scope["headers"])
            self._hosts.check(given.get(b"host"), given.get(b"origin"))
        except WrongHost as error:
            raise Refused(421, str(error)) from None
        except WrongOrigin as error:
            raise Refused(403, str(error)) from None
        except InvalidRequest as error:
            raise Refused(400, str(error)) from None


def _comes_by_a_link(request: Request) -> bool:
    """Whether the user followed a link from another site, such as a chat: browsers send no strict cookie then."""
    headers = request.headers
    return (
        request.method == "GET"
        and SESSION_COOKIE not in request.cookies
        and headers.get("sec-fetch-site") == "cross-site"
        and headers.get("sec-fetch-mode") == "navigate"
    )


def _reload(request: Request) -> Response:
    """A page that loads its own address again, now from this site: the browser sends the session's cookie then."""
    return HTMLResponse(f'<!doctype html><meta http-equiv="refresh" content="0;url={html.escape(str(request.url))}">')
