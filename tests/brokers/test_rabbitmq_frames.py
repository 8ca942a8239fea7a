"""Frames as RabbitMQ could hand them over, with anything where a stranger writes: every message arrives, once."""

import struct
from typing import Any

import pytest
from amqp import spec
from hypothesis import example, given
from hypothesis import strategies as st

from tombola.producers.brokers.rabbitmq import UNDECODABLE, Channel, Connection, _frame_handler

METHOD, HEADER, BODY = 1, 2, 3
GARBAGE = st.binary(max_size=200)
NAMES = st.binary(max_size=255)
ALL_PROPERTIES = b"\xff\xfc"


class Wire:
    """A connection whose frames we write."""

    def __init__(self) -> None:
        self.connection = Connection()
        self.channel = Channel(self.connection, 1)
        self.channel.auto_decode = False
        self.arrived: list[Any] = []
        self.channel.callbacks["c"] = self.arrived.append
        self._on_frame = _frame_handler(self.connection, self.connection.on_inbound_method)

    def deliver(self, properties: bytes, body: bytes, *, exchange: bytes = b"draws", key: bytes = b"draws") -> None:
        arguments = struct.pack(">HHB1sQB", *spec.Basic.Deliver, 1, b"c", len(self.arrived) + 1, 0)
        names = b"".join(struct.pack("B", len(name)) + name for name in (exchange, key))
        self._on_frame((METHOD, 1, arguments + names))
        self._on_frame((HEADER, 1, struct.pack(">HHQ", 60, 0, len(body)) + properties))
        for start in range(0, len(body), 100):
            self._on_frame((BODY, 1, body[start : start + 100]))


def short(text: bytes) -> bytes:
    return struct.pack("B", len(text)) + text


@given(properties=GARBAGE, body=st.binary(max_size=300), exchange=NAMES, key=NAMES)
@example(properties=b"\x80\x00" + short(b"\xff\xfe"), body=b"", exchange=b"", key=b"")
@example(properties=ALL_PROPERTIES, body=b"x", exchange=b"\xff" * 255, key=b"\xed\xa0\x80")
@example(properties=b"", body=b"x" * 250, exchange=b"", key=b"")
def test_whatever_stands_in_properties_and_names_the_message_arrives(
    properties: bytes, body: bytes, exchange: bytes, key: bytes
) -> None:
    wire = Wire()
    wire.deliver(properties, body, exchange=exchange, key=key)
    wire.deliver(b"\x00\x00", b"good")
    first, second = wire.arrived
    assert (first.body or b"") == body
    assert (first.delivery_info["delivery_tag"], second.delivery_info["delivery_tag"]) == (1, 2)
    assert (second.body, second.properties) == (b"good", {})


@given(table=GARBAGE, letters=st.lists(st.sampled_from("SsxbBUuIiLlfdDFAtTV?"), max_size=8))
def test_whatever_stands_in_a_header_table_the_message_arrives(table: bytes, letters: list[str]) -> None:
    fields = b"".join(short(b"k") + letter.encode() + table for letter in letters)
    wire = Wire()
    wire.deliver(b"\x20\x00" + struct.pack(">I", len(fields)) + fields, b"body")
    (message,) = wire.arrived
    assert message.body == b"body"
    assert UNDECODABLE not in message.properties or message.properties.keys() == {UNDECODABLE}


def test_what_is_wrong_is_said_of_that_message_alone() -> None:
    wire = Wire()
    wire.deliver(b"\x80\x00" + short(b"\xff\xfe"), b"bad")
    wire.deliver(b"\x80\x00" + short(b"text/plain"), b"good")
    bad, good = wire.arrived
    assert "UnicodeDecodeError" in bad.properties[UNDECODABLE]
    assert good.properties == {"content_type": "text/plain"}


def test_a_stranger_cannot_mark_a_message() -> None:
    wire = Wire()
    fields = short(UNDECODABLE.encode()) + b"S" + struct.pack(">I", 1) + b"x"
    wire.deliver(b"\x20\x00" + struct.pack(">I", len(fields)) + fields, b"good")
    assert wire.arrived[0].properties == {"application_headers": {UNDECODABLE: "x"}}


def test_names_that_are_no_text_are_shown() -> None:
    wire = Wire()
    wire.deliver(b"\x00\x00", b"x", exchange="größer".encode(), key=b"a\xff")
    info = wire.arrived[0].delivery_info
    assert (info["exchange"], info["routing_key"]) == ("größer", "a\\xff")


def test_an_error_of_who_takes_the_message_is_theirs() -> None:
    """It must not be taken for one of decoding, and the message not come twice."""
    wire = Wire()

    def fail(message: Any) -> None:
        wire.arrived.append(message)
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "theirs")

    wire.channel.callbacks["c"] = fail
    for body in (b"", b"body"):
        with pytest.raises(UnicodeDecodeError, match="theirs"):
            wire.deliver(b"\x00\x00", body)
    assert len(wire.arrived) == 2
