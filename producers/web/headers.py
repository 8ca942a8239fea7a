"""Headers: request headers that can come only once, and headers of every answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tombola.producers.domain.errors import InvalidRequest

# If such a header came twice, a proxy might have checked the other one.
_ONCE: Final = frozenset({b"authorization", b"content-type", b"host", b"idempotency-key", b"origin"})

# For browsers that open an answer as a page. Answers that are pages set a Content-Security-Policy of their own.
NO_SNIFFING: Final = (b"x-content-type-options", b"nosniff")
NO_CONTENT: Final = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
SAFETY: Final = (NO_SNIFFING, NO_CONTENT)


def once(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The headers that can come only once, by name in lower case; raises InvalidRequest for one that comes twice."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _ONCE:
            if name in found:
                raise InvalidRequest(f"the header {name.decode().title()} comes twice")
            found[name] = value
    return found
