"""Which pages of other origins may call us (TOMBOLA_CORS_ORIGINS): none, unless it is said.

A browser asks beforehand, with OPTIONS and without a key, and hides the answer from a page that may not read it.
Cookies play no part: a key travels in `Authorization`, which a page has to have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

Header = tuple[bytes, bytes]

ANY: Final = "*"
_READABLE: Final = b"Idempotency-Key, Idempotency-Replayed, Location, Retry-After, WWW-Authenticate"
_ASKS_METHOD: Final = b"access-control-request-method"
_ASKS_HEADERS: Final = b"access-control-request-headers"
_ALLOWS_HEADERS: Final = b"access-control-allow-headers"
_PREFLIGHT: Final[tuple[Header, ...]] = (
    (b"access-control-allow-methods", b"GET, HEAD, POST"),
    (b"access-control-max-age", b"600"),
)


class Cors:
    """The origins that are allowed."""

    def __init__(self, origins: Sequence[str]) -> None:
        self.origins = frozenset(origins)

    def __bool__(self) -> bool:
        return bool(self.origins)

    def headers(self, origin: bytes | None) -> list[Header]:
        """What an answer to a page of this origin says beside."""
        if ANY in self.origins:
            allowed = b"*"
        elif origin is not None and origin.decode("latin-1").lower() in self.origins:
            allowed = origin
        else:
            return [(b"vary", b"Origin")]
        told = [(b"access-control-allow-origin", allowed), (b"access-control-expose-headers", _READABLE)]
        return told if allowed == b"*" else [*told, (b"vary", b"Origin")]

    @staticmethod
    def is_preflight(scope: Any) -> bool:
        """Whether a browser asks beforehand."""
        return scope["method"] == "OPTIONS" and any(name == _ASKS_METHOD for name, _ in scope["headers"])

    def preflight(self, scope: Any, origin: bytes | None) -> list[Header]:
        """The answer's headers, all but those that `headers` has: none for an origin that may not."""
        if not any(name == b"access-control-allow-origin" for name, _ in self.headers(origin)):
            return []
        asked = [(_ALLOWS_HEADERS, value) for name, value in scope["headers"] if name == _ASKS_HEADERS]
        return [*_PREFLIGHT, *asked[:1]]  # a page may send whatever it likes: what it may not say is no header
