"""What every answer of the console says to the browser beside its content."""

from __future__ import annotations

from typing import Final

from jinja2.ext import Extension
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import Message, Send

from tombola.worker.console.security.sessions import LOGIN_COOKIE, cookie

STATIC: Final = "/static/"
STATIC_KEPT_S: Final = 3600

_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not `no-referrer`: with it, browsers send the console's own forms with `Origin: null`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
# Sent over TLS only: browsers ignore it on plain HTTP. Not for subdomains: other names of the domain are not ours.
_KEEP_TO_TLS: Final = f"max-age={365 * 86_400}"
# Inline styles are allowed: the layout and the charts use them. Inline scripts need the nonce.
_POLICY: Final = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


class Nonces(Extension):
    """Adds the nonce to the scripts in the sources of templates: scripts in what a page shows never get a nonce.

    Also adds a landmark that the layout lacks: screen readers use it to jump to the main part of a page.
    """

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        source = source.replace('<div class="page-wrapper">', '<div class="page-wrapper" role="main">')
        return source.replace("<script", '<script nonce="{{ request.state.nonce }}"')


class HeaderSender:
    """ASGI `send` that adds the security headers, and the login form's cookie where a secret was made for it."""

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
