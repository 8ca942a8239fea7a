"""A load on an HTTP server from a process of its own: `python -m tests.benchmarks.load URL …`, prints one line of JSON.

Without --rate every connection asks again as soon as it was answered. With it, requests are due at fixed times, and the
time of each counts from when it was due: a server that stalls does not make its own load smaller.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import uvloop

from tombola.producers.domain.keys import make_request_key

BODY = b'{"account_id":6}'


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, head: bytes, done: Callable[[Connection, int, float], None]) -> None:
        self._head = head
        self._done = done
        self._received = b""
        self.due = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def ask(self, due: float) -> None:
        self.due = due
        self._transport.write(self._head % make_request_key().encode() + BODY)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line[15:])
        if len(rest) >= length:
            self._received = b""
            self._done(self, int(head[9:12]), asyncio.get_running_loop().time() - self.due)


async def run(url: str, api_key: str, connections: int, seconds: float, rate: float) -> dict[str, float]:
    parts = urlsplit(url)
    authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{authorization}"
        f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\nIdempotency-Key: %b\r\n\r\n"
    ).encode()
    loop = asyncio.get_running_loop()
    took_s: list[float] = []
    wrong: list[int] = []
    begin = loop.time()
    end = begin + seconds
    interval = connections / rate if rate else 0.0

    def done(connection: Connection, status: int, seconds_taken: float) -> None:
        took_s.append(seconds_taken)
        if status not in (200, 202):
            wrong.append(status)
        now = loop.time()
        if now >= end:
            return
        if not rate:
            connection.ask(now)
        else:
            due = connection.due + interval
            loop.call_at(due, connection.ask, due) if due > now else connection.ask(due)

    for number in range(connections):
        _, connection = await loop.create_connection(
            lambda: Connection(head, done), parts.hostname or "", parts.port or 80
        )
        start = begin + (number / rate if rate else 0.0)
        loop.call_at(max(start, loop.time()), connection.ask, max(start, loop.time()))
    await asyncio.sleep(seconds + 1.0)
    took_s.sort()
    return {
        "rate": len(took_s) / seconds,
        "p50_ms": took_s[len(took_s) // 2] * 1000,
        "p99_ms": took_s[int(len(took_s) * 0.99)] * 1000,
        "wrong": len(wrong),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.load")
    parser.add_argument("url")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0 is as many as it answers")
    given = parser.parse_args()
    found = uvloop.run(run(given.url, given.api_key, given.connections, given.seconds, given.rate))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
