"""CORS: the origins whose pages can call the gateway (TOMBOLA_CORS_ORIGINS); none by default.

A browser sends a preflight first (OPTIONS, without a key), and hides answers from pages of other origins. Cookies are
not used: a key is sent in `Authorization`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

Header = tuple[bytes, bytes]

ANY: Final = "*"
_READABLE: Final = b"Idempotency-Key, Idempotency-Replayed, Location, Retry-After, Tombola-Receipt, WWW-Authenticate"
_ASKS_METHOD: Final = b"access-control-request-method"
_ASKS_HEADERS: Final = b"access-control-request-headers"
_ALLOWS_HEADERS: Final = b"access-control-allow-headers"
_PREFLIGHT: Final[tuple[Header, ...]] = (
    (b"access-control-allow-methods", b"GET, HEAD, POST"),
    (b"access-control-max-age", b"600"),
)


class Cors:
    """The allowed origins."""

    def __init__(self, origins: Sequence[str]) -> None:
        self.origins = frozenset(origins)

    def __bool__(self) -> bool:
        return bool(self.origins)

    def headers(self, origin: bytes | None) -> list[Header]:
        """The CORS headers of an answer to a page of `origin`."""
        if ANY in self.origins:
            allowed = b"*"
        elif origin is not None and origin.decode("latin-1").lower() in self.origins:
            allowed = origin
        else:
            return [(b"vary", b"Origin")]
        headers = [(b"access-control-allow-origin", allowed), (b"access-control-expose-headers", _READABLE)]
        return headers if allowed == b"*" else [*headers, (b"vary", b"Origin")]

    @staticmethod
    def is_preflight(scope: Any) -> bool:
        """Whether the request is a preflight."""
        return scope["method"] == "OPTIONS" and any(name == _ASKS_METHOD for name, _ in scope["headers"])

    def preflight(self, scope: Any, origin: bytes | None) -> list[Header]:
        """The headers of the answer to a preflight, without those of `headers`; none for an origin not allowed."""
        if not any(name == b"access-control-allow-origin" for name, _ in self.headers(origin)):
            return []
        asked = [(_ALLOWS_HEADERS, value) for name, value in scope["headers"] if name == _ASKS_HEADERS]
        return [*_PREFLIGHT, *asked[:1]]  # every request header is allowed: the gateway checks what it reads
