"""What a connection may cost, before any application sees a request: real sockets, an empty application."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import pytest
import uvicorn

from tests import servers
from tests.processes import wait_for
from tombola.producers.web import protocol, serving
from tombola.producers.web.problems import BEFORE_ANY_APPLICATION
from tombola.producers.web.protocol import HEAD_BYTES_MAX, HEADERS_MAX, Protocol

pytestmark = pytest.mark.slow

PATIENCE_S = 0.5
CONNECTIONS_MAX = 8
DEADLINE_S = 20.0


class Connection(Protocol):
    """One that loses patience sooner."""

    request_s_max = PATIENCE_S
    body_bytes_max: ClassVar[int] = 1024


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """Tells how long the body was; waits before that where the path says so."""
    if scope["path"] == "/wait":
        await asyncio.sleep(2 * PATIENCE_S)
    length = 0
    while scope["path"] != "/refuse":
        message = await receive()
        length += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            break
    body = b"x" * 3_000_000 if scope["path"] == "/giant" else str(length).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Server:
    """One, and how to talk to it."""

    def __init__(self, connections_max: int = CONNECTIONS_MAX) -> None:
        self.port = servers._free_port()
        options = serving.options(protocol="", connections_max=connections_max) | {"http": Connection}
        config = uvicorn.Config(answer, host=servers.HOST, port=self.port, lifespan="off", **options)
        self.uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.uvicorn.run, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        wait_for(lambda: self.uvicorn.started, within_s=DEADLINE_S, what=lambda: "did not start")
        return self

    def __exit__(self, *_error: object) -> None:
        self.uvicorn.should_exit = True
        self._thread.join(DEADLINE_S)

    @contextmanager
    def connection(self) -> Iterator[socket.socket]:
        with socket.create_connection((servers.HOST, self.port), timeout=DEADLINE_S) as connection:
            yield connection

    def ask(self, *parts: bytes, pause_s: float = 0.0) -> bytes:
        """All that comes back, until the server closes the connection."""
        with self.connection() as connection:
            try:
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause_s)
            except OSError:  # it is closed; what was answered is there all the same
                pass
            return rest(connection)

    @property
    def connections(self) -> int:
        return len(self.uvicorn.server_state.connections)


def rest(connection: socket.socket) -> bytes:
    told = b""
    try:
        while data := connection.recv(65_536):
            told += data
    except ConnectionResetError:
        pass
    return told


def one(connection: socket.socket, request: bytes = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n") -> bytes:
    """One answer, of a connection that stays open."""
    connection.sendall(request)
    return connection.recv(65_536)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(autouse=True)
def no_habit() -> None:
    """Each test is as if the address had never made a mistake."""
    protocol._mistakes.budget._left.clear()


def is_problem(told: bytes, status: int) -> None:
    head, _, body = told.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), told[:500]
    for line in (
        b"content-type: application/problem+json",
        b"x-content-type-options: nosniff",
        b"content-security-policy: default-src 'none'",
        b"connection: close",
        b"content-length: %d" % len(body),
    ):
        assert line in head
    kind = next(it for it in BEFORE_ANY_APPLICATION if it.status == status)
    assert (json.loads(body)["code"], json.loads(body)["type"]) == (kind.code, kind.type)


# ---- size ------------------------------------------------------------------------------------------------------------


def test_a_head_has_a_size(server: Server) -> None:
    fits = b"X: " + b"x" * (HEAD_BYTES_MAX - 200) + b"\r\n"
    end = b"Host: h\r\nConnection: close\r\n\r\n"
    assert server.ask(b"GET / HTTP/1.1\r\n" + fits + end).startswith(b"HTTP/1.1 200")
    for large in (
        b"GET / HTTP/1.1\r\nX: " + b"x" * HEAD_BYTES_MAX + b"\r\n" + end,
        b"GET /" + b"x" * HEAD_BYTES_MAX + b" HTTP/1.1\r\n" + end,
        b"GET / HTTP/1.1\r\n" + b"X-Y: z\r\n" * (HEADERS_MAX + 1) + end,
        b"GET / HTTP/1.1\r\n" + (b"X: " + b"x" * 1000 + b"\r\n") * 1000 + end,
    ):
        is_problem(server.ask(large), 431)
    assert server.ask(b"GET / HTTP/1.1\r\n" + b"X: z\r\n" * (HEADERS_MAX - 2) + end).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("piece", [b"x" * 65_536, b"X: " + b"x" * 8000 + b"\r\n"], ids=["one header", "many"])
def test_a_head_without_end_costs_no_memory(server: Server, piece: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    is_problem(server.ask(b"GET / HTTP/1.1\r\nX: ", *[piece] * 3000), 431)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024  # kB


def test_a_body_has_a_size_however_it_comes(server: Server) -> None:
    end = b"Host: h\r\nConnection: close\r\n"
    chunked = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + end + b"\r\n"
    assert server.ask(chunked + b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n").endswith(b"1000")
    is_problem(server.ask(chunked, *[b"1\r\nx\r\n" * 1000] * 1000), 413)
    is_problem(server.ask(chunked, *[b"1;%b\r\nx\r\n" % (b"e" * 10_000)] * 200), 413)
    length = b"POST / HTTP/1.1\r\nContent-Length: 100000000\r\n" + end + b"\r\n"
    is_problem(server.ask(length, *[b"x" * 65_536] * 200), 413)


def test_what_is_answered_before_it_is_whole_is_answered_once(server: Server) -> None:
    head = b"POST /refuse HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n"
    told = server.ask(head % 10_000_000, *[b"x" * 65_536] * 100, pause_s=0.001)
    assert told.startswith(b"HTTP/1.1 200")
    assert told.count(b"HTTP/1.1") == 1
    assert b"connection: close" in told
    # A body that fits is read to its end, and the connection goes on.
    with server.connection() as connection:
        assert one(connection, head % 10).startswith(b"HTTP/1.1 200")
        connection.sendall(b"x" * 10)
        assert one(connection).startswith(b"HTTP/1.1 200")


def test_what_is_no_http_is_told_so(server: Server) -> None:
    for wrong in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"CONNECT h:80 HTTP/1.1\r\n\r\n"):
        is_problem(server.ask(wrong), 400)
    smuggled = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    is_problem(server.ask(smuggled), 400)
    is_problem(server.ask(b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx"), 400)


def test_requests_are_not_piled_up(server: Server) -> None:
    """Each waits for the answer before it; they are small, and there is room for thousands in what is read at once."""
    told = server.ask(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n" * 5000)
    assert told.count(b"HTTP/1.1 200") < 50
    with server.connection() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n" * 3)
        told = b""
        while told.count(b"HTTP/1.1 200") < 3:
            told += connection.recv(65_536)


def test_a_request_for_another_protocol_is_answered_in_this_one(server: Server) -> None:
    """Java's client asks for HTTP/2 beside each request. Its body was lost, and its next request waited for ever."""
    upgrade = b"Host: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    with server.connection() as connection:
        for _ in range(2):
            assert one(connection, b"GET / HTTP/1.1\r\n" + upgrade + b"\r\n").startswith(b"HTTP/1.1 200")
            told = one(connection, b"POST / HTTP/1.1\r\n" + upgrade + b"Content-Length: 3\r\n\r\nabc")
            assert told.startswith(b"HTTP/1.1 200")
            assert told.endswith(b"3")
            connection.sendall(b"POST / HTTP/1.1\r\n" + upgrade + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab")
            assert one(connection, b"cde\r\n0\r\n\r\n").endswith(b"5")


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_request_has_a_time_to_be_whole(server: Server) -> None:
    post = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n"
    began = time.monotonic()
    assert server.ask() == b""  # it never asked
    is_problem(server.ask(b"GET / HT"), 408)
    is_problem(server.ask(post + b"x"), 408)
    is_problem(server.ask(*[b"GET / HTTP/1.1\r\n", *[b"X: y\r\n"] * 20], pause_s=PATIENCE_S / 5), 408)
    is_problem(server.ask(post, *[b"x"] * 9, pause_s=PATIENCE_S / 5), 408)
    assert server.ask(*[b"\r\n"] * 20, pause_s=PATIENCE_S / 5) == b""
    assert time.monotonic() < began + 12 * PATIENCE_S + 10
    # How long the answer takes is not the asker's doing.
    with server.connection() as connection:
        assert one(connection, b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n").startswith(b"HTTP/1.1 200")
        time.sleep(2 * PATIENCE_S)
        assert one(connection).startswith(b"HTTP/1.1 200")  # nor how long it waits before it asks again
        # but blanks between two requests are no request
        connection.sendall(b"\r\n")
        assert rest(connection) == b""


def test_an_answer_has_a_time_to_be_taken(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "WRITE_S_MAX", PATIENCE_S)
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(server.connection()).sendall(b"GET /giant HTTP/1.1\r\nHost: h\r\n\r\n" * 3)
        wait_for(lambda: server.connections == 3, within_s=DEADLINE_S, what=lambda: str(server.connections))
        wait_for(lambda: server.connections == 0, within_s=DEADLINE_S, what=lambda: str(server.connections))


# ---- number ----------------------------------------------------------------------------------------------------------


def test_of_too_many_connections_the_silent_go() -> None:
    with Server() as server, ExitStack() as stack:
        wait = stack.enter_context(server.connection())
        wait.sendall(b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n")
        used = stack.enter_context(server.connection())
        assert one(used).startswith(b"HTTP/1.1 200")
        for _ in range(3 * CONNECTIONS_MAX):
            last = stack.enter_context(server.connection())
            last.sendall(b"GET / HT")
        assert one(last, b"TP/1.1\r\nHost: h\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert server.connections <= CONNECTIONS_MAX
        assert wait.recv(65_536).startswith(b"HTTP/1.1 200")
        assert rest(used) == b""


def test_where_none_is_silent_the_newest_is_told_so() -> None:
    with Server() as server, ExitStack() as stack:
        waits = [stack.enter_context(server.connection()) for _ in range(CONNECTIONS_MAX)]
        for wait in waits:
            wait.sendall(b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n")
        wait_for(lambda: bool(server.uvicorn.server_state.tasks), within_s=DEADLINE_S, what=lambda: "nothing asked")
        is_problem(server.ask(), 503)
        assert {wait.recv(65_536)[:12] for wait in waits} == {b"HTTP/1.1 200"}
        assert server.ask(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_who_makes_a_habit_of_mistakes_waits(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    for _ in range(protocol.MISTAKES_PER_S_MAX):
        is_problem(server.ask(b"no\r\n\r\n"), 400)
    assert time.monotonic() < began + protocol.MISTAKE_HELD_S
    while time.monotonic() < began + 3 * protocol.MISTAKE_HELD_S:
        asked_at = time.monotonic()
        is_problem(server.ask(b"no\r\n\r\n"), 400)
        if time.monotonic() - asked_at >= protocol.MISTAKE_HELD_S:
            break
    else:
        pytest.fail("never made to wait")
    assert len(caplog.records) <= 1, "a line for each would fill the disk"


def test_as_many_connections_as_there_may_be_files() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = serving.options(protocol="x", connections_max=60_000)["limit_concurrency"]
    assert told <= max(soft, serving.FILES_MAX) - serving.FILES_KEPT
