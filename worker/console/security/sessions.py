"""The cookies of the console: a session's, and the login form's before there is a session."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request

SESSION_COOKIE: Final = "tombola_session"
LOGIN_COOKIE: Final = "tombola_login"  # the secret behind the login form's token
LOGIN: Final = "/login"


def cookie(request: Request, name: str, value: str, *, max_age_s: int | None = None) -> str:
    """A Set-Cookie header: no script reads the cookie, and no link or form of another site makes browsers send it."""
    parts = [f"{name}={value}", "Path=/", "HttpOnly", "SameSite=Strict"]
    if request.url.scheme == "https":
        parts.append("Secure")
    if max_age_s is not None:
        parts.append(f"Max-Age={max_age_s}")
    return "; ".join(parts)


def address_of(request: Request) -> str:
    """The client's IP address; only headers of trusted proxies change it (guard.py)."""
    return request.client.host if request.client else ""
