"""Reading a request: its body, strictly and within bounds, and its key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from litestar.exceptions import ClientException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge

from tombola.producers.domain.contract import BODY_BYTES_MAX
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.keys import make_request_key

T = TypeVar("T")


def strictly(decode: Callable[[bytes], T], body: bytes) -> T:
    """The decoded body, without conversions: the framework would accept "7" as a number. Raises InvalidRequest."""
    try:
        return decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(str(error)) from None


async def read_body(receive: Callable[[], Awaitable[Any]]) -> bytes:
    """The body; raises RequestEntityTooLarge before memory holds more than BODY_BYTES_MAX and one message of it."""
    body: bytes = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientException("the client has disconnected")
        body += message.get("body", b"")
        if len(body) > BODY_BYTES_MAX:
            raise RequestEntityTooLarge(f"a body has at most {BODY_BYTES_MAX:,} bytes")
        if not message.get("more_body", False):
            return body


def request_key_of(given: bytes | None, *, is_required: bool) -> str:
    """The request key from the header, bare or quoted (the Idempotency-Key draft); a new one without the header."""
    if given is None:
        if is_required:
            raise InvalidRequest("the header Idempotency-Key is required here")
        return make_request_key()
    key = given.decode("latin-1").strip()
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not key:
        raise InvalidRequest("the header Idempotency-Key is empty")
    return key
