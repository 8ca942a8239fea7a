"""uvicorn's HTTP protocol with bounds on the size, the duration and the number of requests and connections.

uvicorn reads heads of any size, waits for the rest of a request for ever, and refuses the newest connection if there
are too many, even if others are idle. Here heads and bodies have a maximal size, a request must be complete and an
answer must be taken in time, and beyond the maximal number of connections the longest idle one is closed.

Requests refused here never reach an application; they are answered with problem+json, like the gateway's.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary

import httptools
import msgspec
from prometheus_client import Counter
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from tombola.producers.web import problems
from tombola.producers.web.budget import Budget
from tombola.producers.web.headers import SAFETY
from tombola.producers.web.proxies import subscriber

log = logging.getLogger(__name__)

HEAD_BYTES_MAX: Final = 16 * 1024
HEADERS_MAX: Final = 100
PIECES_MAX: Final = 1024  # of a body: parsing thousands of chunks in one packet would take milliseconds
FRAMING_FACTOR: Final = 2  # bytes of a chunked body on the wire per byte of body, at most
PIPELINED_MAX: Final = 16
WRITE_S_MAX: Final = 60.0
LINGER_S: Final = 2.0
LINGER_BYTES_MAX: Final = 2 * 1024 * 1024
MISTAKES_PER_S_MAX: Final = 20  # from one address; answers to more are delayed
MISTAKE_HELD_S: Final = 1.0
LOG_EVERY_S: Final = 10.0

REFUSED: Final = Counter(
    "tombola_http_refused", "requests refused before any application saw them, by the answer's status", ["status"]
)

_WHY: Final = {kind.status: problems.Problem.of(kind) for kind in problems.BEFORE_ANY_APPLICATION} | {
    431: problems.Problem.of(
        problems.HEAD_TOO_LARGE, f"A request's head has at most {HEAD_BYTES_MAX:,} bytes and {HEADERS_MAX} headers."
    ),
    503: problems.Problem.of(
        problems.TOO_MANY_CONNECTIONS, "Too many connections are open here: try again in a second."
    ),
}


class _TooLarge(Exception):
    """Raised in the parser's callbacks for a head that is too large, or a body in too many pieces."""


class _TooMany(Exception):
    """Raised in the parser's callbacks for too many pipelined requests."""


class Protocol(HttpToolsProtocol):
    """One connection. Subclasses may change the maximal size of a body and the time for a request to arrive."""

    body_bytes_max: ClassVar[int] = 16 * 1024
    request_s_max: ClassVar[float] = 10.0

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._connections_max = config.limit_concurrency
        self.limit_concurrency = None  # uvicorn would refuse requests of connections that this class accepted
        self._idle = _idle_connections(server_state)
        self._is_open = False  # a request has begun and is not complete
        self._received_bytes = 0  # of that request
        self._head_bytes = 0
        self._pieces = self._body_bytes = 0  # of its body
        self._is_over = False  # no more requests are read
        self._patience: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    # ---- the connection ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle[self] = None
        self._patience = self.loop.call_later(self.request_s_max, self._lose_patience)
        if self._connections_max is not None and len(self.connections) > self._connections_max:
            silent = next(iter(self._idle))
            if silent is self:
                self._refuse(503)
            else:
                silent._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        for timer in (self._patience, self._stalled):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(WRITE_S_MAX, self._end)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _end(self) -> None:
        """Close at once, without sending what is buffered."""
        self._is_over = True
        self._idle.pop(self, None)
        self.transport.abort()

    # ---- requests ----------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._is_over:
            self._received_bytes += len(data)
            if self._received_bytes > LINGER_BYTES_MAX:
                self.flow.pause_reading()
            return
        if len(data) <= HEAD_BYTES_MAX:
            self._feed(data)
        else:  # in pieces, so that the bounds are checked in between
            view = memoryview(data)
            for start in range(0, len(data), HEAD_BYTES_MAX):
                self._feed(view[start : start + HEAD_BYTES_MAX])
        self._watch()

    def _watch(self) -> None:
        """Start the timer for the next request, or stop it while a complete request has no answer."""
        if self._is_over:
            return
        if self._is_open or self.cycle is None or self.cycle.response_complete:
            if self._patience is None:
                self._patience = self.loop.call_later(self.request_s_max, self._lose_patience)
        elif self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _feed(self, data: bytes | memoryview) -> None:
        if self._is_over or self.parser is None:
            return
        self._received_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without(bytes(data[upgrade.args[0] :]))
        except httptools.HttpParserError as error:
            is_too_large = isinstance(error.__context__, _TooLarge)
            self._refuse((431 if self._head_bytes >= 0 else 413) if is_too_large else 400)
        else:
            if self._is_open and self._received_bytes > HEAD_BYTES_MAX:
                self._look_at_size()

    def _go_on_without(self, rest: bytes) -> None:
        """Parse the request again without its Upgrade header, which a server may ignore.

        The parser would treat the body, and every later request, as data of the other protocol.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(400)
            return
        head = [b"%b %b HTTP/1.1" % (method, self.url)]
        head += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join([*head, b"", rest]))

    def _look_at_size(self) -> None:
        if self._head_bytes >= 0:
            self._refuse(431)
        elif self._received_bytes > HEAD_BYTES_MAX + FRAMING_FACTOR * self.body_bytes_max:
            self._refuse(413)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= PIPELINED_MAX:
            raise _TooMany
        self._is_open = True
        self._received_bytes = self._head_bytes = self._pieces = self._body_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        if self._head_bytes > HEAD_BYTES_MAX:
            raise _TooLarge
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > HEAD_BYTES_MAX or len(self.headers) >= HEADERS_MAX:
            raise _TooLarge
        if len(name) == 14 and name.lower() == b"content-length":
            self._body_bytes = int(value)  # as announced
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # the head is parsed again, without Upgrade
        self._head_bytes = -1  # complete
        self._idle.pop(self, None)
        super().on_headers_complete()
        if self._body_bytes > self.body_bytes_max:
            self._end_with_answer()

    def on_body(self, body: bytes) -> None:
        self._pieces += 1
        if self._pieces > PIECES_MAX:
            raise _TooLarge
        if self._pieces == 1:
            self._body_bytes = 0
        self._body_bytes += len(body)
        if self._body_bytes > self.body_bytes_max and self.cycle.keep_alive:
            self._end_with_answer()
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._is_open = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline and not self._is_over:
            self._idle[self] = None

    def _end_with_answer(self) -> None:
        """Let the application refuse a body that is too large; close then, without reading the rest of the body."""
        self.cycle.keep_alive = False
        self.cycle.transport = _Lingering(self)  # type: ignore[assignment]

    def linger(self) -> None:
        """Close after LINGER_S, so that the client can read the answer.

        Closing at once, while the client still sends, would discard the answer on its side.
        """
        self._is_over = True
        self._idle[self] = None
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self._end)

    # ---- refusals ----------------------------------------------------------------------------------------------------

    def _lose_patience(self) -> None:
        self._patience = None
        if self._is_over or self.transport.is_closing():
            return
        if self._is_open:
            self._refuse(408)
        elif self.cycle is None or self.cycle.response_complete:
            self.transport.close()  # idle

    def _refuse(self, status: int) -> None:
        """Answer instead of the application, and read no more. After many mistakes of an address, answer later."""
        self._is_over = True
        self._is_open = False
        self._idle[self] = None
        REFUSED.labels(status).inc()
        address = self.client[0] if self.client else ""
        _mistakes.add(status, address)
        if status == 503 or _mistakes.budget.take(subscriber(address)):
            self._answer(status)
        else:
            self.loop.call_later(MISTAKE_HELD_S * random.uniform(1.0, 2.0), self._answer, status)

    def _answer(self, status: int) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        cycle, has_head = self.cycle, self._head_bytes < 0
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started or not has_head:
                self._end()  # an answer is half sent, or the client would take this one for an earlier request's
                return
            cycle.disconnected = True
            cycle.message_event.set()
        if cycle is None or not (has_head and cycle.response_complete):
            self.transport.write(_ANSWERS[status])
        self.linger()


class _Lingering:
    """The transport for the last answer of a connection: closing it lingers."""

    def __init__(self, connection: Protocol) -> None:
        self._connection = connection
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        self._connection.linger()


def _answer_of(status: int) -> bytes:
    phrase = HTTPStatus(status).phrase
    body = msgspec.json.encode(_WHY[status])
    headers = [(b"content-type", problems.PROBLEM_TYPE.encode()), (b"content-length", b"%d" % len(body)), *SAFETY]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    lines = [b"HTTP/1.1 %d %b" % (status, phrase.encode()), b"connection: close"]
    lines += [name + b": " + value for name, value in headers]
    return b"\r\n".join([*lines, b"", body])


_ANSWERS: Final = {status: _answer_of(status) for status in _WHY}

_idle: Final[WeakKeyDictionary[ServerState, dict[Protocol, None]]] = WeakKeyDictionary()


def _idle_connections(server_state: ServerState) -> dict[Protocol, None]:
    """The server's idle connections, the longest idle one first."""
    found = _idle.get(server_state)
    if found is None:
        found = _idle[server_state] = {}
    return found


class _Mistakes:
    """Counts refusals, and logs them in one line per LOG_EVERY_S."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.budget = Budget(MISTAKES_PER_S_MAX)
        self._now = now
        self._count = 0
        self._logged_at = float("-inf")

    def add(self, status: int, address: str) -> None:
        self._count += 1
        if self._now() < self._logged_at + LOG_EVERY_S:
            return
        log.warning(
            "%d requests refused, the last one (%d) from %s: %s", self._count, status, address, _WHY[status].detail
        )
        self._count, self._logged_at = 0, self._now()


_mistakes: Final = _Mistakes()
