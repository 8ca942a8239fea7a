"""A message to park, and the values of its row. A stranger may have written any part of the message."""

from __future__ import annotations

import hashlib
import os
import traceback
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from tombola.producers.brokers.streams import QUEUE
from tombola.producers.domain.causes import STRANGERS, LetterState
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import DrawError
from tombola.worker.dead_letters.groups import group_of
from tombola.worker.deliveries import BODY_KEPT_BYTES_MAX, Delivery

HEADERS_KEPT_LENGTH_MAX: Final = 8 * 1024
ERROR_LENGTH_MAX: Final = 2000
TRACEBACK_LENGTH_MAX: Final = 12 * 1024  # at four bytes a character this still fits a TEXT
VERSION: Final = version("tombola")
INSTALLED_IN: Final = f"{Path(__file__).parents[2]}{os.sep}"


class Parking(NamedTuple):
    """A message to park. `request` is what the message asks for, None if that cannot be read."""

    delivery: Delivery
    cause: str
    error: str
    request: Request | None = None
    exception: BaseException | None = None
    # False: not tried yet, so the request is not given up.
    is_tried: bool = True
    # The request was given up before, and the cause that mattered was recorded then.
    is_echo: bool = False

    @property
    def claims(self) -> tuple[str | None, str | None, int | None]:
        """The request key, session and account that the message names; None where unreadable or out of range."""
        if self.request is None:
            return _claims(self.delivery.body)
        return self.request.request_key, self.request.lottery_session_id, self.request.account_id

    @property
    def sha256(self) -> str:
        """The name of the message, 64 hex digits: of its request's fingerprint, or of its bytes if there is none.

        A message that is neither signed nor accepted (STRANGERS) gets another name than the request that it names.
        """
        name = self.delivery.sha256 if self.request is None else self.request.fingerprint()
        return hashlib.sha256(f"stranger:{name}".encode()).hexdigest() if self.is_strangers else name

    @property
    def is_strangers(self) -> bool:
        """Whether a stranger may have sent the message."""
        return self.cause in STRANGERS

    @property
    def gives_up(self) -> Request | None:
        """The request that is dead once the message is parked, if the request was accepted."""
        return self.request if self.is_tried and not self.is_strangers else None


# For a row that the database refuses: without anything that may be odd. The body is kept: a column of bytes takes it.
BARE: Final[dict[str, Any]] = {
    "headers": None,
    "error": "the database refused the details of this message: see the worker's log",
    "error_type": None,
    "traceback": None,
    "request_key": None,
    "lottery_session_id": None,
    "account_id": None,
    "deliveries": 1,
}


def new_row(parking: Parking, worker: str, now: datetime) -> dict[str, Any]:
    """The values of a message that is parked for the first time, by column name; without `body_sha256`."""
    delivery = parking.delivery
    key, session, account_id = parking.claims
    return {
        **death(parking, worker, now),
        "state": LetterState.PARKED,
        "body": delivery.body[:BODY_KEPT_BYTES_MAX],
        "body_bytes": delivery.body_bytes,
        "headers": _headers(delivery.headers),
        "request_key": key,
        "lottery_session_id": session,
        "account_id": account_id,
        "queue": QUEUE,
        "deliveries": delivery.count,
        "times_parked": 1,
        "first_parked_at": now,
        "last_parked_at": now,
    }


def death(parking: Parking, worker: str, now: datetime) -> dict[str, Any]:
    """The values that say why, where and when the message was parked, by column name."""
    error, exception = _storable(parking.error)[:ERROR_LENGTH_MAX], parking.exception
    stack = None
    # Our own errors say everything in their words, and are raised in the same few places.
    if exception is not None and not isinstance(exception, DrawError):
        stack = _storable("".join(traceback.format_exception(exception)))
        # The folder of the installation is noise in every line, and private.
        stack = stack.replace(f'File "{INSTALLED_IN}', 'File "')
    return {
        "cause": parking.cause,
        "error": error,
        "error_type": None if exception is None else type(exception).__name__.encode("ascii", "replace").decode()[:100],
        "traceback": None if stack is None else stack[-TRACEBACK_LENGTH_MAX:],
        "group_id": group_of(parking.cause, error, exception),
        "worker": worker[:100],
        "version": VERSION[:32],
        "state_at": now,
    }


def _storable(text: str) -> str:
    """`text` with escapes for what UTF-8 cannot encode, which the database would refuse."""
    return text.encode("utf-8", "backslashreplace").decode()


def _claims(body: bytes) -> tuple[str | None, str | None, int | None]:
    """The request key, session and account id that a message names, where they fit their columns."""
    try:
        loose: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None, None, None
    if not isinstance(loose, dict):
        return None, None, None
    account_id = loose.get("account_id")
    id_fits = isinstance(account_id, int) and not isinstance(account_id, bool) and abs(account_id) < 2**63
    return (
        _fitting(loose.get("request_key"), 64),
        _fitting(loose.get("lottery_session_id"), 100),
        account_id if id_fits else None,
    )


def _fitting(text: Any, length_max: int) -> str | None:
    fits = isinstance(text, str) and 0 < len(text) <= length_max and text.isascii() and text.isprintable()
    return text if fits else None


def _headers(headers: Mapping[str, Any]) -> str | None:
    """The headers as a JSON object: a value that JSON cannot hold as its repr; cut after HEADERS_KEPT_LENGTH_MAX."""
    if not headers:
        return None
    kept: dict[str, Any] = {}
    room = HEADERS_KEPT_LENGTH_MAX
    for name, value in headers.items():
        try:
            text = msgspec.json.encode(value).decode()
        except (TypeError, ValueError, OverflowError, RecursionError):
            text = value = _shown(value)
        room -= len(text) + len(str(name))
        if room < 0:
            kept["…"] = "too long: the rest was left out"
            break
        kept[_storable(str(name))] = value
    return msgspec.json.encode(kept).decode()


def _shown(value: Any) -> str:
    """The repr of a value of any kind."""
    try:
        return _storable(repr(value))
    except RecursionError:
        return f"a {type(value).__name__} nested too deep"
