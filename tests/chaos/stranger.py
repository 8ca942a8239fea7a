"""A stranger with 50 connections: `python -m tests.chaos.stranger URL KIND SECONDS`, prints how often it asked.

Each connection asks again as soon as it was answered, or closed.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

import uvloop

CONNECTIONS: Final = 50
ANSWER_S_MAX: Final = 30.0

_GET: Final = b"GET %b HTTP/1.1\r\nHost: h\r\n\r\n"
_POST: Final = b"POST /v1/draws HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
_KEY: Final = b"Authorization: Bearer tmb_%016x_" + b"x" * 43 + b"\r\n"

# What is sent, in parts; endless ones are read no answer of before they are refused.
KINDS: Final[dict[str, tuple[Iterable[bytes], int]]] = {
    "a path like passwords": ((_GET % (b"/healthz?" + b"://a:" * 2800),), 1),
    "the document": ((_GET % b"/openapi.json",), 1),
    "a page that is not there": ((_GET % (b"/" + b"a/" * 4000),), 1),
    "readiness": ((_GET % b"/readyz",), 1),
    "a file and no reading": ((_GET % b"/docs/files/swagger-ui-bundle.js",), 20),
    "no key": ((_POST + b"Content-Length: 16\r\n\r\n" + b'{"account_id":6}',), 1),
    "a wrong key": ((_POST + _KEY % 0xBAD + b"Content-Length: 16\r\n\r\n" + b'{"account_id":6}',), 1),
    "a hundred headers": ((_POST + b"X-Y: z\r\n" * 95 + b"Content-Length: 0\r\n\r\n",), 1),
    "too many headers": ((_POST + b"X-Y: z\r\n" * 2000,), 1),
    "a head without end": ((_POST, *[b"X: " + b"x" * 8000 + b"\r\n"] * 2000), 1),
    "a body in single bytes": ((_POST + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n" * 2000] * 200), 1),
    "no HTTP": ((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",), 1),
    "many at once": ((_GET % b"/healthz" * 2000,), 1),
    "silence": ((b"",), 1),
}


async def ask(host: str, port: int, parts: Iterable[bytes], times: int) -> None:
    """On one connection: send, wait for the first of the answer or the end."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        while True:
            for part in parts:
                writer.write(part)
                await writer.drain()
            if times > 1:  # it asks for much and takes nothing of it
                times -= 1
                await asyncio.sleep(0.2)
                continue
            answer = await asyncio.wait_for(reader.read(65_536), ANSWER_S_MAX)
            global asked
            asked += 1
            if not answer:
                return
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


asked = 0


async def run(url: str, kind: str, seconds: float) -> None:
    address = urlsplit(url)
    parts, times = KINDS[kind]
    until = time.monotonic() + seconds

    async def go_on() -> None:
        while time.monotonic() < until:
            with suppress(OSError, TimeoutError):
                await ask(address.hostname or "", address.port or 0, parts, times)

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*[go_on() for _ in range(CONNECTIONS)])


if __name__ == "__main__":
    uvloop.run(run(sys.argv[1], sys.argv[2], float(sys.argv[3])))
    print(asked)
