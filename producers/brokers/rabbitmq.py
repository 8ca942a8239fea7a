"""Connections to RabbitMQ that no message can break, and on which every wait has a deadline.

py-amqp decodes a message's properties, headers and names, which may be garbage, while it reads a frame. An error there
ends the connection, with all messages that were prefetched on it. Here such a message is delivered without properties,
and marked. And py-amqp waits for an answer as long as heartbeats arrive; here every wait times out.

Celery's own connections can be of this kind as well, with `broker_transport` set to
`"tombola.producers.brokers.rabbitmq:Transport"`, or `…:SSLTransport` where the URL says `amqps://`.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ssl import SSLWantReadError
from typing import Any, ClassVar, Final

import amqp
import kombu
from amqp import spec
from amqp.method_framing import frame_handler
from kombu.exceptions import KombuError
from kombu.transport import pyamqp

from tombola.producers.brokers.registry import scheme_of
from tombola.producers.domain.errors import ServiceUnavailable

HEARTBEAT_S: Final = 20
CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 10.0  # for methods that the broker answers at once: declare, open, consume, get
CLOSE_TIMEOUT_S: Final = 1.0

# The errors of kombu and py-amqp for a connection that is lost or refused.
AMQP_ERRORS: Final = (amqp.AMQPError, KombuError, OSError)

# A key in a message's properties that no sender can set: AMQP has fourteen other properties.
UNDECODABLE: Final = "undecodable"

_HEADER_FRAME: Final = 2
_WRITE_BYTES_MAX: Final = (
    16 * 1024
)  # in one write, so that the deadline is checked in between; the length of a TLS record

Frame = tuple[int, int, Any]


def open_amqp(url: str, *, timeout_s: float = CONNECT_TIMEOUT_S, heartbeat_s: float = HEARTBEAT_S) -> kombu.Connection:
    """Open a connection to RabbitMQ within `timeout_s`; each host in `url` is tried once.

    Raises ServiceUnavailable when no host accepts the connection.
    """
    connection = unopened(url, timeout_s=timeout_s, heartbeat_s=heartbeat_s)
    hosts = max(1, len(connection.alt))
    connection.connect_timeout = timeout_s / hosts
    try:
        connection.ensure_connection(
            max_retries=hosts - 1, interval_start=0, interval_step=0, interval_max=0, reraise_as_library_errors=False
        )
    except (*AMQP_ERRORS, *connection.connection_errors) as error:
        connection.release()
        raise ServiceUnavailable(f"RabbitMQ does not answer: {error_text(error)}") from error
    return connection


def unopened(url: str, *, timeout_s: float = CONNECT_TIMEOUT_S, heartbeat_s: float = HEARTBEAT_S) -> kombu.Connection:
    """A connection of this module's kind that is not open yet."""
    return kombu.Connection(
        url,
        transport=SSLTransport if scheme_of(url) == "amqps" else Transport,
        heartbeat=heartbeat_s,
        connect_timeout=timeout_s,
        transport_options={"read_timeout": 30, "write_timeout": 30},
    )


def error_text(error: BaseException) -> str:
    """The message of an error, or the name of its type where the message is empty."""
    return str(error) or type(error).__name__


def blocked_words(reason: str) -> str:
    """The message about a broker that takes no messages for `reason`."""
    return f"RabbitMQ has blocked publishers: {reason}"


class Channel(pyamqp.Channel):  # type: ignore[misc]
    """A channel that delivers every message, and on which every wait times out.

    A message whose properties cannot be decoded has one property, the error: `message.properties["undecodable"]`. In
    names that are not UTF-8 each invalid byte is written as `\\xff`.
    """

    undecodable = ""  # the error in the properties of the message that is being read

    def dispatch_method(self, method_sig: tuple[int, int], payload: Any, content: Any) -> None:
        if content is not None:
            if self.undecodable:
                content.properties = {UNDECODABLE: self.undecodable}
                self.undecodable = ""
            payload = _readable(method_sig, payload)
        elif method_sig == spec.Channel.Close:
            payload = _readable(method_sig, payload)
        super().dispatch_method(method_sig, payload, content)

    def wait(self, *args: Any, **options: Any) -> Any:
        if self.connection is None:
            raise amqp.RecoverableConnectionError("connection already closed")
        with self.connection.within(ANSWER_TIMEOUT_S):
            return super().wait(*args, **options)

    def close(self, *args: Any, **options: Any) -> None:
        if self.connection is not None and self.connection.blocked:
            self.collect()  # a blocked broker does not read, and would not answer
        else:
            super().close(*args, **options)


class Connection(pyamqp.Connection):  # type: ignore[misc]
    """A connection with deadlines that knows whether the broker has blocked publishers.

    `blocked` is RabbitMQ's reason, such as `low on memory`, while the broker takes no messages; empty otherwise.
    """

    Channel = Channel
    # py-amqp does not read the reason.
    _METHODS: ClassVar = {
        **amqp.Connection._METHODS,
        spec.Connection.Blocked: spec.method(spec.Connection.Blocked, "s"),
    }

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, frame_handler=_frame_handler, **options)
        self.blocked = ""
        self._deadline: float | None = None

    @contextmanager
    def within(self, timeout_s: float) -> Iterator[None]:
        """Reads and writes inside raise TimeoutError after `timeout_s`, even while heartbeats arrive."""
        before, deadline = self._deadline, time.monotonic() + timeout_s
        self._deadline = deadline if before is None else min(before, deadline)
        try:
            yield
        finally:
            self._deadline = before

    def dispatch_method(self, method_sig: tuple[int, int], payload: Any, content: Any) -> None:
        super().dispatch_method(method_sig, _readable(method_sig, payload), content)

    def connect(self, callback: Callable[[], object] | None = None) -> Any:
        try:
            with self.within(self.connect_timeout or CONNECT_TIMEOUT_S):
                return super().connect(callback)
        except Exception:
            self.collect()
            raise

    def blocking_read(self, timeout: float | None = None) -> Any:
        if self._deadline is not None:
            left_s = self._left_s()
            timeout = left_s if timeout is None else min(timeout, left_s)
        return super().blocking_read(timeout)

    def take_in(self, is_enough: Callable[[], bool]) -> None:
        """Handle the frames that have arrived, until `is_enough()` or there are no more. Never waits."""
        transport, on_frame = self.transport, self.on_inbound_frame
        with suppress(TimeoutError), transport.having_timeout(0):
            while not is_enough():
                on_frame(transport.read_frame())

    def wait(self, *args: Any, **options: Any) -> Any:
        with self.within(ANSWER_TIMEOUT_S):
            return super().wait(*args, **options)

    def close(self, *args: Any, **options: Any) -> None:
        """Close the connection within CLOSE_TIMEOUT_S, with no handshake while the broker does not read (`blocked`)."""
        try:
            if not self.blocked:
                with self.within(CLOSE_TIMEOUT_S):
                    super().close(*args, **options)
        finally:
            self.collect()

    def leave(self) -> None:
        """Close without waiting for an answer. Never raises."""
        with suppress(*AMQP_ERRORS, AttributeError), self.within(CLOSE_TIMEOUT_S):
            if self._transport is not None and not self.blocked:
                self.send_method(spec.Connection.Close, "BsBB", (0, "", 0, 0))
        with suppress(*AMQP_ERRORS, AttributeError):
            self.collect()

    def collect(self) -> None:
        if self._transport is not None and self._transport.sock is not None:
            self._transport.sock.settimeout(CLOSE_TIMEOUT_S)  # for the close of TLS
        if self.channels is not None:
            super().collect()

    def Transport(self, *args: Any, **options: Any) -> Any:  # py-amqp's name
        transport = super().Transport(*args, **options)
        write = transport.write

        def write_in_time(data: Any) -> None:
            if self._deadline is None:
                write(data)
                return
            view = memoryview(data)
            for start in range(0, len(view), _WRITE_BYTES_MAX):
                with transport.having_timeout(self._left_s()):
                    write(view[start : start + _WRITE_BYTES_MAX])

        set_up = transport._setup_transport

        def set_up_reading() -> None:
            set_up()
            receive = transport._quick_recv

            def receive_or_time_out(size: int) -> Any:
                try:
                    return receive(size)
                except (BlockingIOError, SSLWantReadError):  # inside a frame py-amqp would retry without end
                    raise TimeoutError from None

            transport._quick_recv = receive_or_time_out

        transport.write = write_in_time
        transport._setup_transport = set_up_reading
        return transport

    def _left_s(self) -> float:
        assert self._deadline is not None
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no answer in time")
        return left_s

    def _on_blocked(self, reason: str = "") -> None:
        self.blocked = reason or "for a reason in its log"
        if self.on_blocked:
            self.on_blocked(self.blocked)

    def _on_unblocked(self) -> None:
        self.blocked = ""
        super()._on_unblocked()


class Transport(pyamqp.Transport):  # type: ignore[misc]
    """kombu's transport `amqp://` with the Connection of this module."""

    Connection = Connection


class SSLTransport(Transport, pyamqp.SSLTransport):  # type: ignore[misc]
    """kombu's transport `amqps://` with the Connection of this module."""


def _frame_handler(connection: Connection, callback: Callable[..., None]) -> Callable[[Frame], bool]:
    """py-amqp's frame handler; a content header that it cannot decode is replaced by an empty one."""
    on_frame: Callable[[Frame], bool] = frame_handler(connection, callback)

    def on_any_frame(frame: Frame) -> bool:
        try:
            return on_frame(frame)
        except Exception:
            kind, channel_id, payload = frame
            problem = _problem_of(payload) if kind == _HEADER_FRAME else ""
            if not problem:  # another error, perhaps of the message's callback
                raise
            connection.channels[channel_id].undecodable = problem
            class_id, body_size = struct.unpack_from(">HxxQ", payload)
            return on_frame((kind, channel_id, struct.pack(">HHQH", class_id, 0, body_size, 0)))

    return on_any_frame


def _problem_of(header: Any) -> str:
    """Why a content header cannot be decoded; empty for a valid header."""
    try:
        amqp.Message().inbound_header(header)
    except Exception as error:  # garbage raises any of UnicodeDecodeError, OverflowError, RecursionError, …
        return f"{type(error).__name__}: {error}"
    return ""


def _readable(method_sig: tuple[int, int], payload: Any) -> Any:
    """The arguments of a method, with every text that a sender can choose made valid UTF-8."""
    # Before the texts: the consumer tag and 9 bytes; 9 bytes; 2 bytes.
    match method_sig:
        case spec.Basic.Deliver:
            start, count = payload[4] + 14, 2
        case spec.Basic.GetOk:
            start, count = 13, 2
        case spec.Basic.Return:
            start, count = 6, 3
        case spec.Channel.Close | spec.Connection.Close:  # the broker's message may quote a sender's text
            start, count = 6, 1
        case _:
            return payload
    if payload[start:].isascii():
        return payload
    at = start
    names = []
    for _ in range(count):
        end = at + 1 + payload[at]
        name = bytes(payload[at + 1 : end]).decode("utf-8", "backslashreplace").encode()[:255]
        name = name.decode("utf-8", "ignore").encode()
        names.append(struct.pack("B", len(name)) + name)
        at = end
    return bytes(payload[:start]) + b"".join(names) + bytes(payload[at:])
