"""A receiver of webhooks in a thread of this process, which keeps what it was sent and answers as a test says."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from tests import servers


class Received(NamedTuple):
    """One request: header names in lower case."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def key(self) -> str:
        return self.headers["idempotency-key"]

    @property
    def event(self) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.body)
        return event


# What to do with a request: a status to answer with, or a function that answers by itself through the handler.
Answer = int | Callable[[BaseHTTPRequestHandler], None]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of connections that come at once; with 5, the others wait for a second


class Receiver:
    """`answer` decides each answer; `received` are all requests, in the order in which they came."""

    def __init__(self, answer: Callable[[Received], Answer] = lambda _: 204, port: int = 0) -> None:
        self.answer = answer
        self.received: list[Received] = []
        self.busy_max = 0
        self._busy = 0
        self._lock = threading.Lock()
        self._server = _Server((servers.HOST, port), self._handler())

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    @property
    def url(self) -> str:
        return f"http://{servers.HOST}:{self.port}/hook?x=1"

    @property
    def keys(self) -> list[str]:
        return [it.key for it in self.received]

    def __enter__(self) -> Receiver:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def _handling(self) -> Iterator[None]:
        with self._lock:
            self._busy += 1
            self.busy_max = max(self.busy_max, self._busy)
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                with receiver._handling(), suppress(OSError):
                    length = int(self.headers["content-length"])
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    received = Received(self.path, headers, self.rfile.read(length))
                    receiver.received.append(received)
                    answer = receiver.answer(received)
                    if callable(answer):
                        answer(self)
                    else:
                        self.send_response(answer)
                        self.send_header("content-length", "0")
                        self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def hangs(seconds: float) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer that does not come."""

    def hang(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(seconds)
        breaks_off(handler)

    return hang


def breaks_off(handler: BaseHTTPRequestHandler) -> None:
    """No answer: the connection ends."""
    handler.close_connection = True
    with suppress(OSError):
        handler.connection.shutdown(socket.SHUT_RDWR)


def trickles(handler: BaseHTTPRequestHandler) -> None:
    """A header that comes a byte at a time, and never ends."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    for _ in range(200):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)
    breaks_off(handler)


def pours(status: int, size: int) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer with a large body."""

    def pour(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("content-length", str(size))
        handler.end_headers()
        for _ in range(size // 65536):
            handler.wfile.write(b"y" * 65536)

    return pour


def redirects(to: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer that leads elsewhere."""

    def redirect(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(307)
        handler.send_header("location", to)
        handler.send_header("content-length", "0")
        handler.end_headers()

    return redirect
