"""Formatting for pages: times, numbers, bodies. FILTERS are the templates' filters. Pure functions."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace
from typing import Any, Final

from tombola.producers.domain.causes import LetterState
from tombola.worker.dead_letters.letters import Group

HEX_WIDTH: Final = 16
DUMPED_BYTES_MAX: Final = 4096  # of a body that is not text

# Tabler's colours of states, outcomes, tones and roles.
COLOURS: Final = {
    "parked": "red",
    "parked again": "red",
    "replaying": "azure",
    "settled": "green",
    "discarded": "secondary",
    "completed": "green",
    "accepted": "azure",
    "rejected": "orange",
    "dead": "red",
    "open": "green",
    "paused": "orange",
    "pending": "azure",
    "delivered": "green",
    "already settled": "secondary",
    "would charge": "green",
    "would be rejected": "orange",
    "conflict": "red",
    "cannot be parsed": "red",
    "not vouched for": "red",
    "unknown campaign": "red",
    "good": "green",
    "mixed": "orange",
    "bad": "red",
    "busy": "azure",
    "plain": "secondary",
    "operator": "azure",
    "viewer": "secondary",
}
_UNITS: Final = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))


def utc(moment: datetime | None) -> str:
    """A moment to the second, in UTC; empty for None."""
    return "" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def exact(moment: datetime | None) -> str:
    """The time of day to the millisecond, in UTC; empty for None."""
    return "" if moment is None else moment.astimezone(UTC).strftime("%H:%M:%S.%f")[:-3]


def duration(seconds: float | timedelta | None) -> str:
    """A duration in its two largest units: `2 h 5 min`; empty for None."""
    if seconds is None:
        return ""
    left = int(seconds.total_seconds() if isinstance(seconds, timedelta) else seconds)
    if left <= 0:
        return "0 s"
    parts = []
    for unit, size in _UNITS:
        if left >= size:
            parts.append(f"{left // size} {unit}")
            left %= size
        elif parts:
            break
        if len(parts) == 2:
            break
    return " ".join(parts)


def ago(moment: datetime | None) -> str:
    """The time since a moment, in one unit: `5 min ago`; empty for None."""
    if moment is None:
        return ""
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for unit, size in _UNITS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "just now"


def number(value: float | None) -> str:
    """A number with thousands separators; empty for None."""
    return "" if value is None else f"{value:,}"


def amount(value: Decimal) -> str:
    """An amount with two decimals and separators."""
    return f"{value:,.2f}"


def percent(share: float | None) -> str:
    """A share in per cent, with enough digits for a rare prize; empty for None."""
    if share is None:
        return ""
    return f"{share:.2%}" if share >= 0.1 else f"{share:.4%}" if share >= 0.0001 or not share else f"{share:.7%}"


def colour(word: str) -> str:
    """The colour of a state, an outcome, a tone or a role."""
    return COLOURS.get(word, "secondary")


def body(raw: bytes) -> tuple[str, bool]:
    """A message's bytes as text and True, or as a hex dump and False if they are not printable UTF-8."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return dump(raw), False
    if any(ord(character) < 32 and character not in "\t\r\n" for character in text):
        return dump(raw), False
    return text, True


def dump(raw: bytes) -> str:
    """A hex dump: offsets, bytes, and ASCII characters."""
    lines = []
    for start in range(0, min(len(raw), DUMPED_BYTES_MAX), HEX_WIDTH):
        part = raw[start : start + HEX_WIDTH]
        letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{start:08x}  {part.hex(' '):<{HEX_WIDTH * 3 - 1}}  {letters}")
    if len(raw) > DUMPED_BYTES_MAX:
        lines.append(f"… and {len(raw) - DUMPED_BYTES_MAX:,} more bytes")
    return "\n".join(lines)


def pretty(text: str | bytes | None) -> str:
    """JSON indented over several lines; any other text unchanged."""
    if text is None:
        return ""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


# Errors of database drivers: their messages quote rows that were to be written, also a prize's.
DATABASE_ERRORS: Final = frozenset(
    ("DatabaseError", "DataError", "IntegrityError", "InternalError", "NotSupportedError", "OperationalError")
)


def as_viewer(letter: Any) -> Any:
    """A dead letter, or a group, as viewers can see it: without errors that reveal the prize of an unsettled draw.

    `Duplicate entry 'k:reward'` reveals that the draw wins; so does a trigger that refuses a large balance. Operators,
    who can replay the draw, see these errors.
    """
    if letter.error_type not in DATABASE_ERRORS or getattr(letter, "state", "") == LetterState.SETTLED:
        return letter
    error = f"{letter.error_type}: only operators see the message of the database, which may reveal a prize"
    if isinstance(letter, Group):
        return replace(letter, title=error)
    rest = {"is_whole": getattr(letter, "is_whole", None), "error": error, "traceback": None}
    return SimpleNamespace(**letter._asdict() | rest)


def listed(details: dict[str, Any]) -> list[tuple[str, str]]:
    """An action's details as names and short texts."""
    return [(name, _short(value)) for name, value in details.items() if value not in (None, "", [], {})]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(it)}" for name, it in value.items())
    if isinstance(value, list):
        text = ", ".join(str(it) for it in value[:10])
        return text + (f" and {len(value) - 10} more" if len(value) > 10 else "")
    return shortened(str(value))


def shortened(text: str, length_max: int = 200) -> str:
    """The first `length_max` characters of a text, with an ellipsis if it is longer."""
    return text if len(text) <= length_max else f"{text[:length_max]}…"


FILTERS: Final = {
    "utc": utc,
    "exact": exact,
    "duration": duration,
    "ago": ago,
    "number": number,
    "amount": amount,
    "percent": percent,
    "colour": colour,
    "pretty": pretty,
    "listed": listed,
}
