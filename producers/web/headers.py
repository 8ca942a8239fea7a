"""Headers: those that may come only once, and those that every answer has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tombola.producers.domain.errors import InvalidRequest

# Two of them, and a proxy may have looked at the other one.
_ONCE: Final = frozenset({b"authorization", b"content-type", b"host", b"idempotency-key", b"origin"})

# For a browser that opens an answer as a page, whatever is in it. Pages say themselves what they need.
NO_SNIFFING: Final = (b"x-content-type-options", b"nosniff")
NO_CONTENT: Final = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
SAFETY: Final = (NO_SNIFFING, NO_CONTENT)


def once(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Those that may come only once, by their names in lower case; raises InvalidRequest for one that comes twice."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _ONCE:
            if name in found:
                raise InvalidRequest(f"the header {name.decode().title()} comes twice")
            found[name] = value
    return found
