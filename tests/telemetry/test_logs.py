"""Logs: fields come out as fields, nothing from outside forges a line or a field, no secret is written."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from tombola.producers.domain.contract import DrawRequest
from tombola.producers.telemetry.fields import about
from tombola.producers.telemetry.logs import FIELD_LENGTH_MAX, TRACEBACK_LENGTH_MAX, LogFormat, set_up_logging

DRAW = DrawRequest(account_id=6, request_key="key_1", lottery_session_id="session_1")
LINE = re.compile(r"^(\x1b\[\d+m)?\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
log = logging.getLogger("tombola.producers.somewhere")


class Stream(io.StringIO):
    """Standard error: a terminal, or not."""

    is_terminal = False

    def isatty(self) -> bool:
        return self.is_terminal

    def set_up(self, *arguments: Any, **options: Any) -> None:
        """Set up logging while this is standard error, which pytest exchanges as well."""
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "stderr", self)
            set_up_logging(*arguments, **options)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture
def stream() -> Stream:
    return Stream()


def fields(stream: Stream) -> dict[str, Any]:
    """The one line that was written."""
    (line,) = stream.getvalue().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


# ---- what is written -------------------------------------------------------------------------------------------------


def test_a_line_of_json_has_the_fields_of_its_draw(stream: Stream) -> None:
    stream.set_up("json")
    log.warning("draw %s is late", "key_1", extra={"cause": "outage", "tries": 3, **about(DRAW)})
    line = fields(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line.pop("timestamp"))
    assert line == {
        "level": "warning",
        "event": "draw key_1 is late",
        "logger": "tombola.producers.somewhere",
        "cause": "outage",
        "tries": 3,
        "request_key": "key_1",
        "lottery_session_id": "session_1",
    }


def test_a_terminal_gets_text_with_the_fields_behind_it(stream: Stream) -> None:
    stream.is_terminal = True
    stream.set_up()
    log.info("draws %d", 7, extra=about(DRAW))
    written = stream.getvalue()
    assert LINE.match(written)
    assert "\x1b[" in written, "it is coloured"
    plain = re.sub(r"\x1b\[\d+m", "", written)
    assert plain.endswith("draws 7 [tombola.producers.somewhere] request_key=key_1 lottery_session_id=session_1\n")


@pytest.mark.parametrize(
    ("log_format", "is_terminal", "is_json"),
    [("auto", False, True), ("auto", True, False), ("json", True, True), ("text", False, False), ("text", True, False)],
)
def test_the_format(stream: Stream, log_format: LogFormat, is_terminal: bool, is_json: bool) -> None:
    stream.is_terminal = is_terminal
    stream.set_up(log_format)
    log.info("consuming draws")
    assert "consuming draws" in stream.getvalue()  # what embedded mode waits for, whatever the format
    assert stream.getvalue().startswith("{") == is_json
    assert ("\x1b[" in stream.getvalue()) == (is_terminal and not is_json)


def test_the_level_holds_and_setting_up_again_doubles_nothing(stream: Stream) -> None:
    logging.basicConfig(level=logging.INFO)
    stream.set_up("json")
    stream.set_up("json", level="WARNING")
    log.info("too little")
    log.warning("enough")
    assert fields(stream)["event"] == "enough"


def test_a_file_gets_json_while_a_terminal_is_there(stream: Stream, tmp_path: Path) -> None:
    stream.is_terminal = True
    stream.set_up(file=str(tmp_path / "log"))
    log.info("into the file: ü")
    assert json.loads((tmp_path / "log").read_text())["event"] == "into the file: ü"
    assert stream.getvalue() == ""


def test_a_servers_own_loggers_come_along(stream: Stream) -> None:
    own = logging.getLogger("uvicorn")
    own.addHandler(logging.StreamHandler(io.StringIO()))
    own.propagate = False
    stream.set_up("json")
    logging.getLogger("uvicorn.error").info("Application startup complete.", extra={"color_message": "\x1b[1mcolour"})
    line = fields(stream)
    assert line["event"] == "Application startup complete."
    assert "color_message" not in line


def test_what_is_no_json_is_told_all_the_same(stream: Stream) -> None:
    stream.set_up("json")
    log.info("odd", extra={"nan": float("nan"), "path": Path("/x"), "surrogate": "\udcff", "items": [1, "2"]})
    line = fields(stream)
    assert (line["nan"], line["surrogate"], line["items"]) == ("nan", "\udcff", "[1, '2']")
    assert "/x" in line["path"]


# ---- what cannot be forged -------------------------------------------------------------------------------------------

FORGED = '\n2026-01-01 00:00:00 [info     ] all is well\r\n{"level":"info","event":"all is well"}'
# What str.splitlines, a terminal or a log reader takes for the end of a line, or for a command.
NASTY = [
    "\n",
    "\r",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1d",
    "\x1e",
    "\x85",
    "\u2028",
    "\u2029",
    "\x1b[2J",
    "\x9b2J",
    "\x00",
    "\b",
]


@pytest.mark.parametrize("where", ["message", "argument", "field"])
def test_json_cannot_be_forged(stream: Stream, where: str) -> None:
    stream.set_up("json")
    evil = FORGED + "".join(NASTY)
    match where:
        case "message":
            log.info(evil.replace("%", "%%"))
        case "argument":
            log.info("%s", evil)
        case _:
            log.info("a field", extra={"request_key": evil})
    line = fields(stream)  # one line, and it is JSON
    assert evil in line.values()
    assert line["logger"] == "tombola.producers.somewhere"
    assert stream.getvalue().rstrip("\n").isascii()


@pytest.mark.parametrize("where", ["argument", "field", "exception"])
def test_text_cannot_be_forged(stream: Stream, where: str) -> None:
    stream.set_up("text")
    evil = FORGED + "".join(NASTY)
    match where:
        case "argument":
            log.info("%s", evil)
        case "field":
            log.info("a field", extra={"request_key": evil})
        case _:
            try:
                raise ValueError(evil)
            except ValueError:
                log.exception("it failed")
    written = stream.getvalue()
    assert [line for line in written.splitlines() if not line.startswith("    ")] == [written.splitlines()[0]]
    assert not [nasty for nasty in NASTY if nasty != "\n" and nasty in written]


@given(st.text())
def test_whatever_the_text_a_line_is_a_line(text: str) -> None:
    for log_format in ("json", "text"):
        stream = Stream()
        stream.set_up(log_format)
        log.info("%s", text, extra={"field": text})
        assert len(stream.getvalue().splitlines()) == 1, log_format
        stream.getvalue().encode()  # a lone surrogate would stop here
        if log_format == "json":
            assert fields(stream)["field"] == text or "***" in fields(stream)["field"]


def test_no_extra_stands_in_for_what_the_record_says(stream: Stream) -> None:
    stream.set_up("json")
    forged = {"event": "forged", "level": "info", "logger": "forged", "timestamp": "forged", "exception": "forged"}
    log.error("true", extra=forged)
    line = fields(stream)
    assert (line["event"], line["level"], line["logger"]) == ("true", "error", "tombola.producers.somewhere")
    assert "forged" not in stream.getvalue()


def test_a_traceback_is_one_field(stream: Stream) -> None:
    stream.set_up("json")
    try:
        raise ValueError(FORGED)
    except ValueError:
        log.exception("it failed", extra=about(DRAW))
    line = fields(stream)
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["event"] == "it failed"
    assert line["request_key"] == "key_1"


def test_what_is_endless_ends(stream: Stream) -> None:
    stream.set_up("json")
    try:
        raise ValueError("x" * 40_000)
    except ValueError:
        log.exception("y" * 40_000, extra={"field": "z" * 40_000})
    line = fields(stream)
    assert len(line["event"]) == len(line["field"]) == FIELD_LENGTH_MAX
    assert len(line["exception"]) == TRACEBACK_LENGTH_MAX


# ---- what is not written ---------------------------------------------------------------------------------------------

PASSWORDS = [
    "redis://:hunter2@h:6379/0",
    "mysql+pymysql://me:hunter2@h/d",
    "amqps://me:hunt@er2@mq//",
    "redis://:hunter2/@h:6379/0",
]


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("url", PASSWORDS)
def test_no_password_of_a_url(stream: Stream, log_format: LogFormat, url: str) -> None:
    stream.set_up(log_format)
    try:
        raise OSError(f"cannot connect to {url}")
    except OSError:
        log.exception("%s: no answer", url, extra={"where": url, "all": {"url": url}})
    written = stream.getvalue()
    assert "er2" not in written
    assert ":***@" in written


@pytest.mark.parametrize("text", ["://a:", "://", "tmb_0123456789abcdef_", ":@", "a://b:c@ "])
def test_a_strangers_text_costs_no_more_than_its_length(stream: Stream, text: str) -> None:
    """A thousand times as long is a thousand times as much, not a million times."""
    stream.set_up("json")
    began = time.process_time()
    log.info("refused GET /%s", text * (1_000_000 // len(text)))
    assert time.process_time() - began < 1  # `://a:` once took seconds at 65 kB, and minutes here


@pytest.mark.parametrize("url", PASSWORDS)
def test_no_half_of_a_password_where_a_text_is_cut(stream: Stream, url: str) -> None:
    stream.set_up("json")
    for shift in range(len(url) + 2):
        log.info("%s %s", "x" * (FIELD_LENGTH_MAX - shift), url)
        try:
            raise OSError(f"{url} {'y' * (TRACEBACK_LENGTH_MAX - shift)}")
        except OSError:
            log.exception("%s%s", "://a:b@ " * 1000, url)
    assert "hun" not in stream.getvalue()
    assert "er2" not in stream.getvalue()


def test_a_server_that_keeps_no_access_log_writes_none(stream: Stream) -> None:
    access_log = logging.getLogger("uvicorn.access")
    for is_wanted in (True, False):
        uvicorn.Config("nowhere:app", access_log=is_wanted, log_config=None)  # as a server is made, before its app
        stream.set_up("json")
        assert access_log.hasHandlers() == is_wanted
    access_log.propagate = True


def test_no_api_key_and_no_field_named_after_a_secret(stream: Stream) -> None:
    stream.set_up("json")
    named = {"password": "hunter2", "api_key": "hunter2", "Authorization": "hunter2", "seed": "hunter2"}
    log.info("Bearer tmb_3f9c2a7be1d04c58_%s", "s3cret-s3cret_" * 3, extra={**named, **about(DRAW)})
    line = fields(stream)
    assert "hunter2" not in stream.getvalue()
    assert "s3cret" not in stream.getvalue()
    assert line["event"] == "Bearer tmb_3f9c2a7be1d04c58_***"
    assert line["request_key"] == "key_1", "a request key is no secret"


def test_a_url_without_a_password_is_left_alone(stream: Stream) -> None:
    stream.set_up("json")
    log.info("see http://127.0.0.1:8000/docs and me@example.org")
    assert fields(stream)["event"] == "see http://127.0.0.1:8000/docs and me@example.org"
