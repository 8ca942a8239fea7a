"""The login page: starlette-admin's layout, with our users, sessions and rate limits behind it."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import Counter
from typing import Final

import anyio
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from sqlalchemy import Engine
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.templating import Jinja2Templates
from starlette_admin.auth import AdminUser, AuthProvider
from starlette_admin.helpers import safe_redirect_url

from tombola.producers.web.proxies import subscriber
from tombola.worker.console.security.guard import SAFE_METHODS
from tombola.worker.console.security.roles import operator_of
from tombola.worker.console.security.sessions import LOGIN, LOGIN_COOKIE, SESSION_COOKIE, address_of, cookie
from tombola.worker.console.threads import explained, in_thread
from tombola.worker.operators import users as operators
from tombola.worker.operators.users import Operator

log = logging.getLogger(__name__)

Limit = tuple[RateLimitItem, tuple[str, ...]]

# Limits of failed logins; logins under way count as failed until they end.
TRIES_PER_USER: Final = RateLimitItemPerMinute(5)  # by name and address
TRIES_PER_ADDRESS: Final = RateLimitItemPerMinute(20)
REFUSAL_S: Final = 1.0  # time of a refusal beyond the limit, the same for names that exist and names that do not
VERIFIERS_MAX: Final = 2  # verifying a password takes 64 MB and a core


class Login(AuthProvider):
    """starlette-admin's authentication provider, over our users."""

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
        # A right password is accepted even from an address beyond its limit: several users may share the address.
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
        await in_thread(explained(lambda: operators.close_session(self._engine, request.cookies[SESSION_COOKIE])))
        log.info("logout of %s from %s", operator.name, address_of(request))
        answer = RedirectResponse(LOGIN, 303)
        answer.headers.append("Set-Cookie", cookie(request, SESSION_COOKIE, "", max_age_s=0))
        return answer

    def _again(self, request: Request, templates: Jinja2Templates, name: str, error: str, status_code: int) -> Response:
        context = {"title": "Log in", "error": error, "name": name}
        return templates.TemplateResponse(request, "login.html", context, status_code=status_code)

    def _too_many(self, request: Request, templates: Jinja2Templates, name: str, wait_s: int) -> Response:
        answer = self._again(request, templates, name, f"Too many tries: try again in {wait_s} s.", 429)
        answer.headers["Retry-After"] = str(wait_s)
        return answer

    def _wait_s(self, item: RateLimitItem, keys: tuple[str, ...]) -> int:
        """Whole seconds until the limit allows another try; 0 if it allows one now."""
        stats = self._limiter.get_window_stats(item, *keys)
        if stats.remaining > self._under_way[keys]:
            return 0
        return max(1, math.ceil(stats.reset_time - time.time()))

    def _limits(self, name: str, address: str) -> tuple[Limit, Limit]:
        # A name may be any text in any alphabet: its hash always fits as a key.
        user = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:32]
        address = subscriber(address)
        return (TRIES_PER_USER, (user, address)), (TRIES_PER_ADDRESS, (address,))

    async def _try(self, name: str, password: str, address: str, *, is_suspect: bool) -> str | None:
        """A new session's token, or None if name or password is wrong."""
        limits = [keys for _, keys in self._limits(name, address)]
        began = anyio.current_time()
        self._under_way.update(limits)
        try:
            # Verifying costs too much for names that a suspect address makes up.
            is_worth_it = not is_suspect or await in_thread(explained(lambda: self._is_user(name)))
            token = await self._verify(name, password, address) if is_worth_it else None
            if is_suspect and token is None:
                await anyio.sleep_until(began + REFUSAL_S)
            return token
        finally:
            self._under_way.subtract(limits)
            self._under_way += Counter()  # drops counts of zero

    def _is_user(self, name: str) -> bool:
        return any(operator.name == name for operator in operators.list_all(self._engine))

    async def _verify(self, name: str, password: str, address: str) -> str | None:
        if self._verifiers is None:
            self._verifiers = anyio.CapacityLimiter(VERIFIERS_MAX)

        def verify() -> str | None:
            known = operators.verify(self._engine, name, password)
            return None if known is None else operators.open_session(self._engine, known.name, address=address)

        return await in_thread(explained(verify), limiter=self._verifiers)


def _next(request: Request) -> str:
    """The page to show after the login: the one asked for before it. Addresses of other sites become the overview."""
    return safe_redirect_url(request.query_params.get("next") or "/", request, "/")
