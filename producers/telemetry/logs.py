"""Write logs: as text at a terminal, otherwise as one JSON object a line.

Code logs through the standard library, and names the subject of a line in fields:

    log.warning("the draw does not settle: %s", why, extra=about(request))

Text from outside cannot forge a line or a field: control characters are escaped, and a traceback is a field in JSON and
indented at a terminal. Passwords in URLs, API keys, and fields with the name of a secret are never written.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import MutableMapping
from logging.handlers import WatchedFileHandler
from typing import Any, Final, Literal

import structlog
from structlog.processors import TimeStamper, format_exc_info
from structlog.stdlib import ProcessorFormatter, add_log_level, add_logger_name

from tombola.producers.telemetry import tracing

LogFormat = Literal["auto", "text", "json"]
Fields = MutableMapping[str, Any]

FIELD_LENGTH_MAX: Final = 8 * 1024
TRACEBACK_LENGTH_MAX: Final = 32 * 1024

SECRET_LENGTH_MAX: Final = 2 * 1024  # longer than any password or key in a log

# Loggers that have handlers of their own where their server set them up first.
_TAKEN_OVER: Final = ("uvicorn", "uvicorn.error", "celery", "celery.task")
# The same, but a server may have turned it off: with a handler, uvicorn writes a line for each request.
_ACCESS_LOG: Final = "uvicorn.access"
_NOT_EXTRA: Final = frozenset(vars(logging.makeLogRecord({}))) | {
    # Added by another handler that has formatted the record, and by newer Pythons.
    *("message", "asctime", "taskName"),
    # Copies of the message: uvicorn's with colours, Celery's with the task's arguments.
    *("color_message", "data"),
    # The exception is taken from the record itself.
    *("exception", "stack"),
}

_SECRET_NAME: Final = re.compile(r"password|secret|token|authorization|api_?key|^seed$", re.IGNORECASE)
# These run on untrusted text, so each takes linear time.
_WORD: Final = re.compile(r"\S+")
_USER_IN_URL: Final = re.compile(r"://[^\s:/@]*:")
_API_KEY: Final = re.compile(r"(tmb_[0-9a-f]{16}_)[\w-]+")
# All line ends, terminal control characters, and marks that reverse the reading direction.
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def set_up_logging(log_format: LogFormat = "auto", *, level: int | str = logging.INFO, file: str | None = None) -> None:
    """Write all logs of this process to standard error, or to `file`. A further call replaces the setup."""
    handler: logging.Handler
    handler = logging.StreamHandler() if file is None else WatchedFileHandler(file, encoding="utf-8")
    is_terminal = file is None and sys.stderr.isatty()
    is_text = log_format == "text" or (log_format == "auto" and is_terminal)
    handler.setFormatter(_text(colors=is_terminal) if is_text else _json())
    root = logging.getLogger()
    for old in root.handlers[:]:
        # A handler of an earlier call or of `basicConfig` would write every line twice.
        if isinstance(old.formatter, ProcessorFormatter) or type(old) is logging.StreamHandler:
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name in _TAKEN_OVER:
        _take_over(logging.getLogger(name))
    access_log = logging.getLogger(_ACCESS_LOG)
    if access_log.hasHandlers():
        _take_over(access_log)
    logging.captureWarnings(True)


def _take_over(logger: logging.Logger) -> None:
    logger.handlers.clear()
    logger.propagate = True


def _json() -> ProcessorFormatter:
    return ProcessorFormatter(
        processors=[
            *_gather(TimeStamper(fmt="iso", utc=True)),
            lambda _logger, _name, fields: json.dumps(fields),  # ASCII only, with escapes for other characters
        ]
    )


def _text(*, colors: bool) -> ProcessorFormatter:
    return ProcessorFormatter(
        processors=[
            *_gather(TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False)),
            _escape,
            structlog.dev.ConsoleRenderer(
                colors=colors,
                pad_event_to=0,
                pad_level=False,
                sort_keys=False,
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    )


def _gather(stamper: TimeStamper) -> list[Any]:
    """The processors that turn a record into fields; standard fields come last, so that no `extra` can replace them."""
    return [
        _extra,
        format_exc_info,
        add_log_level,
        add_logger_name,
        stamper,
        ProcessorFormatter.remove_processors_meta,
        _order,
        _without_secrets,
    ]


def _extra(_logger: Any, _name: str, fields: Fields) -> Fields:
    """Add the fields of the call's `extra`."""
    record: logging.LogRecord = fields["_record"]
    for name, value in vars(record).items():
        if name not in _NOT_EXTRA:
            fields.setdefault(name, value)
    return fields


def _order(_logger: Any, _name: str, fields: Fields) -> Fields:
    first = ("timestamp", "level", "event", "logger")
    return {name: fields.pop(name) for name in first} | tracing.ids() | dict(fields)


def _without_secrets(_logger: Any, _name: str, fields: Fields) -> Fields:
    return {
        name: "***" if _SECRET_NAME.search(name) else _plain(value, is_traceback=name == "exception")
        for name, value in fields.items()
    }


def _plain(value: Any, *, is_traceback: bool) -> Any:
    """`value` as a JSON value, bounded, without secrets."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = value if isinstance(value, str) else repr(value)
    if is_traceback:
        return _without_passwords(_end(text, TRACEBACK_LENGTH_MAX))[-TRACEBACK_LENGTH_MAX:]  # the end matters most
    is_long = len(text) > FIELD_LENGTH_MAX
    text = _without_passwords(_beginning(text, FIELD_LENGTH_MAX))
    return text[: FIELD_LENGTH_MAX - 1] + "…" if is_long or len(text) > FIELD_LENGTH_MAX else text


def _beginning(text: str, length: int) -> str:
    """The first `length` characters, to the end of a word: half of a password is still secret, and not recognised."""
    rest = _WORD.match(text, length, length + SECRET_LENGTH_MAX)
    return text[: rest.end() if rest else length]


def _end(text: str, length: int) -> str:
    """The last `length` characters, from the beginning of a word."""
    start = max(0, len(text) - length)
    least = start - SECRET_LENGTH_MAX
    while start > max(0, least) and not text[start - 1].isspace():
        start -= 1
    return text[start:]


def _without_passwords(text: str) -> str:
    if "://" in text:
        text = _WORD.sub(_without_password, text)
    if "tmb_" in text:
        text = _API_KEY.sub(r"\1***", text)
    return text


def _without_password(word: re.Match[str]) -> str:
    """`word` without the text between a URL's user and its last @."""
    text = word.group()
    at = text.rfind("@")
    user = _USER_IN_URL.search(text, 0, max(at, 0))
    return text if user is None or user.end() == at else f"{text[: user.end()]}***{text[at:]}"


def _escape(_logger: Any, _name: str, fields: Fields) -> Fields:
    """For a terminal: no control characters, and only a timestamp at the beginning of a line."""
    for name, value in fields.items():
        if name == "exception":
            fields[name] = "\n".join("    " + _CONTROL.sub(_as_escape, line) for line in value.split("\n"))
        elif isinstance(value, str):
            fields[name] = _CONTROL.sub(_as_escape, value)
    return fields


def _as_escape(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape", "backslashreplace").decode()
