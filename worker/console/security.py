"""Who may come in, and what they may send.

    Guard       around everything: finds the session, refuses forms that are not ours, says what a browser may do
    Login       the login page of starlette-admin's making, with our users, sessions and rate limits behind it

A form carries a token made of its session's own: a page elsewhere cannot know it, a form of another session does not
fit, and it needs no secret that several processes would have to share. That browsers say where a form comes from
(Origin, Sec-Fetch-Site) is checked as well.
"""

from __future__ import annotations

import hashlib
import hmac
import html
import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, TypeVar
from urllib.parse import parse_qs, urlsplit

import anyio
from jinja2.ext import Extension
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.templating import Jinja2Templates
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette_admin.auth import AdminUser, AuthProvider
from starlette_admin.helpers import safe_redirect_url

from tombola.producers.domain.errors import (
    DeadLetterNotFound,
    DrawError,
    InvalidRequest,
    ReplayNotFound,
    ServiceUnavailable,
    WrongHost,
    WrongOrigin,
)
from tombola.producers.settings import Settings
from tombola.producers.storage.faults import explain
from tombola.producers.web.headers import once
from tombola.producers.web.hosts import Hosts
from tombola.producers.web.proxies import Proxies, subscriber
from tombola.worker.operators import users as operators
from tombola.worker.operators.users import Operator

log = logging.getLogger(__name__)

SESSION_COOKIE: Final = "tombola_session"
LOGIN_COOKIE: Final = "tombola_login"  # what the login form's token is made of, before there is a session
TOKEN_FIELD: Final = "csrftoken"
LOGIN: Final = "/login"
STATIC: Final = "/static/"
FORM_TYPE: Final = "application/x-www-form-urlencoded"
FORM_BYTES_MAX: Final = 512 * 1024  # a kept body of 64 kB, percent-encoded
FIELDS_MAX: Final = 100
SAFE_METHODS: Final = frozenset({"GET", "HEAD"})
STATIC_KEPT_S: Final = 3600

T = TypeVar("T")
Limit = tuple[RateLimitItem, tuple[str, ...]]

PAGE_WAIT_S: Final = 7.0

# Of logins that failed; those that have not ended yet count as well.
TRIES_PER_USER: Final = RateLimitItemPerMinute(5)  # by name and address
TRIES_PER_ADDRESS: Final = RateLimitItemPerMinute(20)
REFUSAL_S: Final = 1.0  # how long it takes beyond that, whether there is such a user or not
VERIFIERS_MAX: Final = 2  # a verification takes 64 MB and a core

_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not `no-referrer`: under it a browser sends its own forms with `Origin: null`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
# Only where the browser has come by TLS: on plain http it means nothing. Not for other names of the domain: not ours.
_KEEP_TO_TLS: Final = f"max-age={365 * 86_400}"
# Styles may stand in the page: the layout and the charts set some. Scripts may not.
_POLICY: Final = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


async def in_thread(look: Callable[[], T], *, limiter: anyio.CapacityLimiter | None = None) -> T:
    """What `look` returns, called in a thread. Raises ServiceUnavailable after PAGE_WAIT_S, for a free thread included.

    For reading: the thread goes on, and nobody hears of it. A server that is frozen says nothing for much longer.
    """
    try:
        with anyio.fail_after(PAGE_WAIT_S):
            return await anyio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=limiter)
    except TimeoutError:
        raise ServiceUnavailable(f"the database does not answer: nothing in {PAGE_WAIT_S:g} s") from None


class Nonces(Extension):
    """Gives the scripts in the templates' sources their nonce: what a page shows never gets one.

    And the layout a landmark that it lacks: screen readers go to the main part of a page by it.
    """

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        source = source.replace('<div class="page-wrapper">', '<div class="page-wrapper" role="main">')
        return source.replace("<script", '<script nonce="{{ request.state.nonce }}"')


class Refused(Exception):
    """A request that is not let in; the message says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """ASGI middleware around everything. What it has found out is in `request.state`: `operator`, `form`, `nonce`."""

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
            scope["scheme"] = "https"  # whoever makes this up gets stricter cookies
        state = scope.setdefault("state", {})
        state["nonce"] = secrets.token_urlsafe(16)
        sender = _Sender(send, request, state["nonce"])
        try:
            app, receive = await self._admit(request, receive)
        except Refused as refused:
            log.warning("refused %s %s from %s: %s", request.method, request.url.path, address_of(request), refused)
            app = PlainTextResponse(str(refused), refused.status)
        except (SQLAlchemyError, ServiceUnavailable) as error:
            why = explain(error) if isinstance(error, SQLAlchemyError) else error
            log.error("%s", why)
            app = PlainTextResponse(f"{why}\n\nThe console shows nothing without it. Try again.", 503)
        except Exception:  # a mistake of ours: what the server would answer itself lacks our headers
            log.exception("%s %s failed", request.method, request.url.path)
            app = PlainTextResponse("Something went wrong: the console's log says what.", 500)
        await app(scope, receive, sender)

    async def _admit(self, request: Request, receive: Receive) -> tuple[ASGIApp, Receive]:
        """What answers the request, and how it hears the body. Raises Refused."""
        state = request.state
        state.operator, state.form = None, {}
        self._refuse_misdirected(request)
        if request.url.path.startswith(STATIC):
            if request.method not in SAFE_METHODS:
                raise Refused(405, "these are files")
            return self.app, receive
        is_data = request.url.path.endswith(".json")
        token = request.cookies.get(SESSION_COOKIE, "")
        if token:
            # Data is fetched by pages that refresh themselves, which keeps no session open.
            state.operator = await in_thread(lambda: operators.session(self._engine, token, touch=not is_data))
        is_login = request.url.path == LOGIN
        if state.operator is None:
            token = request.cookies.get(LOGIN_COOKIE, "")
            if is_data:
                return JSONResponse({"detail": "the session is over: log in"}, 401), receive
            if request.method not in SAFE_METHODS and not is_login:
                return RedirectResponse(LOGIN, 303), receive
            if not is_login and _comes_by_a_link(request):
                return _here_again(request), receive
            if is_login and not token and request.method in SAFE_METHODS:
                token = state.login_secret = secrets.token_urlsafe(32)
        elif is_login and request.method not in SAFE_METHODS:
            return RedirectResponse("/", 303), receive  # a second click
        state.csrf_token = form_token(token)
        if request.method in SAFE_METHODS:
            return self.app, receive
        body = await self._form(request)
        _refuse_forged(request, state.form, token)
        return self.app, _replay(body)

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

    async def _form(self, request: Request) -> bytes:
        """The body, its fields in `request.state.form`."""
        if request.method != "POST":
            raise Refused(405, "only GET and POST are known here")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM_TYPE:
            raise Refused(415, f"send forms as {FORM_TYPE}")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > FORM_BYTES_MAX:
                raise Refused(413, f"a form has at most {FORM_BYTES_MAX:,} bytes")
        try:
            fields = parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=FIELDS_MAX, errors="strict")
        except ValueError:
            raise Refused(400, "this is not a form") from None
        request.state.form = {name: values[-1] for name, values in fields.items()}
        return body


class _Sender:
    """Adds to every answer what the browser is to keep to."""

    def __init__(self, send: Send, request: Request, nonce: str) -> None:
        self._send = send
        self._request = request
        self._nonce = nonce

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            headers["Content-Security-Policy"] = _POLICY.format(nonce=self._nonce)
            if self._request.url.scheme == "https":
                headers["Strict-Transport-Security"] = _KEEP_TO_TLS
            is_file = self._request.url.path.startswith(STATIC) and message["status"] == 200
            headers["Cache-Control"] = f"public, max-age={STATIC_KEPT_S}" if is_file else "no-store"
            login_secret = getattr(self._request.state, "login_secret", None)
            if login_secret is not None:
                headers.append("Set-Cookie", cookie(self._request, LOGIN_COOKIE, login_secret))
        await self._send(message)


def form_token(session_token: str) -> str:
    """What a form of this session carries. It says nothing about the session's token."""
    return hmac.digest(session_token.encode(), b"tombola console form", "sha256").hex() if session_token else ""


def _comes_by_a_link(request: Request) -> bool:
    """Whether somebody follows a link in a chat or a ticket: the browser keeps a strict cookie to itself then."""
    headers = request.headers
    return (
        request.method == "GET"
        and SESSION_COOKIE not in request.cookies
        and headers.get("sec-fetch-site") == "cross-site"
        and headers.get("sec-fetch-mode") == "navigate"
    )


def _here_again(request: Request) -> Response:
    """A page that leads to itself, from here this time: so a shared address opens for whoever is logged in."""
    return HTMLResponse(f'<!doctype html><meta http-equiv="refresh" content="0;url={html.escape(str(request.url))}">')


def _refuse_forged(request: Request, form: dict[str, str], session_token: str) -> None:
    site = request.headers.get("sec-fetch-site", "same-origin")
    if site != "same-origin":
        raise Refused(403, "this form was sent by another site: nothing was done")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower():
        raise Refused(403, "this form was sent by another origin: nothing was done")
    sent, expected = form.get(TOKEN_FIELD, ""), form_token(session_token)
    if not expected or not hmac.compare_digest(sent.encode(), expected.encode()):
        raise Refused(403, "this form does not belong to your session: nothing was done. Load its page again.")


def _replay(body: bytes) -> Receive:
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await anyio.sleep_forever()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def cookie(request: Request, name: str, value: str, *, max_age_s: int | None = None) -> str:
    """A Set-Cookie header: out of reach for scripts, and for what another site links to or sends."""
    parts = [f"{name}={value}", "Path=/", "HttpOnly", "SameSite=Strict"]
    if request.url.scheme == "https":
        parts.append("Secure")
    if max_age_s is not None:
        parts.append(f"Max-Age={max_age_s}")
    return "; ".join(parts)


def address_of(request: Request) -> str:
    """Where a request comes from. No header may say so, but those of proxies that are trusted (Guard)."""
    return request.client.host if request.client else ""


def operator_of(request: Request) -> Operator:
    """Who makes this request; the pages are shown to nobody else."""
    operator: Operator | None = request.state.operator
    if operator is None:
        raise HTTPException(403)
    return operator


def must_act(request: Request) -> Operator:
    """Who makes this request; raises 403 for a viewer."""
    operator = operator_of(request)
    if not operator.may_act:
        log.warning("%s may only look: refused %s", operator.name, request.url.path)
        raise HTTPException(403, f"{operator.name} is a viewer: only operators may do this. Nothing was done.")
    return operator


# ---- the login page --------------------------------------------------------------------------------------------------


class Login(AuthProvider):
    """starlette-admin's way to a login page, over our own users."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(login_path=LOGIN, allow_routes=["charts"])
        self._engine = engine
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._under_way: Counter[tuple[str, ...]] = Counter()
        self._verifiers: anyio.CapacityLimiter | None = None

    async def authenticate(self, request: Request) -> AdminUser | None:
        operator: Operator | None = request.state.operator
        return None if operator is None else AdminUser(username=operator.name)

    async def render_login(self, request: Request, templates: Jinja2Templates) -> Response:
        if request.state.operator is not None:
            return RedirectResponse(_next(request), 303)
        if request.method in SAFE_METHODS:
            return templates.TemplateResponse(request, "login.html", {"title": "Log in"})
        name, address = request.state.form.get("username", "")[:64], address_of(request)
        by_user, by_address = self._limits(name, address)
        wait_s = self._wait_s(*by_user)
        if wait_s:
            log.warning("login refused for %r from %s: too many tries", name, address)
            self._limiter.hit(by_address[0], *by_address[1])
            return self._too_many(request, templates, name, wait_s)
        # Of an address that fails too often a right password is taken all the same: others may share it.
        wait_s = self._wait_s(*by_address)
        token = await self._try(name, request.state.form.get("password", ""), address, is_suspect=wait_s > 0)
        if token is None:
            log.warning("login failed for %r from %s", name, address)
            for item, keys in (by_user, by_address):
                self._limiter.hit(item, *keys)
            if wait_s:
                return self._too_many(request, templates, name, wait_s)
            return self._again(request, templates, name, "The name or the password is wrong.", 401)
        log.info("login of %s from %s", name, address)
        answer = RedirectResponse(_next(request), 303)
        lifetime_s = int(operators.LIFETIME.total_seconds())
        answer.headers.append("Set-Cookie", cookie(request, SESSION_COOKIE, token, max_age_s=lifetime_s))
        answer.headers.append("Set-Cookie", cookie(request, LOGIN_COOKIE, "", max_age_s=0))
        return answer

    async def render_logout(self, request: Request) -> Response:
        operator = operator_of(request)
        await in_thread(_explained(lambda: operators.close_session(self._engine, request.cookies[SESSION_COOKIE])))
        log.info("logout of %s from %s", operator.name, address_of(request))
        answer = RedirectResponse(LOGIN, 303)
        answer.headers.append("Set-Cookie", cookie(request, SESSION_COOKIE, "", max_age_s=0))
        return answer

    def _again(self, request: Request, templates: Jinja2Templates, name: str, error: str, status_code: int) -> Response:
        context = {"title": "Log in", "error": error, "name": name}
        return templates.TemplateResponse(request, "login.html", context, status_code=status_code)

    def _too_many(self, request: Request, templates: Jinja2Templates, name: str, wait_s: int) -> Response:
        answer = self._again(request, templates, name, f"Too many tries: come back in {wait_s} s.", 429)
        answer.headers["Retry-After"] = str(wait_s)
        return answer

    def _wait_s(self, item: RateLimitItem, keys: tuple[str, ...]) -> int:
        """For how many seconds there may be no other try, 0 if one may be made."""
        stats = self._limiter.get_window_stats(item, *keys)
        if stats.remaining > self._under_way[keys]:
            return 0
        return max(1, math.ceil(stats.reset_time - time.time()))

    def _limits(self, name: str, address: str) -> tuple[Limit, Limit]:
        # The name may be anything, and of any alphabet: its hash is a key as good as others.
        user = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:32]
        address = subscriber(address)
        return (TRIES_PER_USER, (user, address)), (TRIES_PER_ADDRESS, (address,))

    async def _try(self, name: str, password: str, address: str, *, is_suspect: bool) -> str | None:
        """A new session's token, if the password is right."""
        limits = [keys for _, keys in self._limits(name, address)]
        began = anyio.current_time()
        self._under_way.update(limits)
        try:
            # A verification costs too much for names that a suspect makes up.
            is_worth_it = not is_suspect or await in_thread(_explained(lambda: self._is_user(name)))
            token = await self._verify(name, password, address) if is_worth_it else None
            if is_suspect and token is None:
                await anyio.sleep_until(began + REFUSAL_S)
            return token
        finally:
            self._under_way.subtract(limits)
            self._under_way += Counter()  # without those at zero

    def _is_user(self, name: str) -> bool:
        return any(operator.name == name for operator in operators.list_all(self._engine))

    async def _verify(self, name: str, password: str, address: str) -> str | None:
        if self._verifiers is None:
            self._verifiers = anyio.CapacityLimiter(VERIFIERS_MAX)

        def verify() -> str | None:
            known = operators.verify(self._engine, name, password)
            return None if known is None else operators.open_session(self._engine, known.name, address=address)

        return await in_thread(_explained(verify), limiter=self._verifiers)


def _explained(function: Callable[[], Any]) -> Callable[[], Any]:
    def explained() -> Any:
        try:
            return function()
        except SQLAlchemyError as error:
            raise explain(error) from error

    return explained


def _next(request: Request) -> str:
    """Where somebody wanted to go before the login page: a page of ours, whatever the address says."""
    return safe_redirect_url(request.query_params.get("next") or "/", request, "/")


def status_of(error: DrawError) -> int:
    """The HTTP status that an error of ours is answered with."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


_STATUSES: Final = (
    (DeadLetterNotFound, 404),
    (ReplayNotFound, 404),
    (InvalidRequest, 400),
    (ServiceUnavailable, 503),
)
