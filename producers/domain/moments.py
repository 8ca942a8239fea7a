"""Moments as callers and operators write them: ISO 8601 with a zone, or a date."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from tombola.producers.domain.errors import InvalidRequest

YEAR_MIN: Final = 1970

_is_moment = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[+-][0-9]{2}:[0-9]{2}))?"
).fullmatch


def parse_moment(text: str) -> datetime:
    """The moment, in UTC: `2027-01-31T12:00:00+01:00`, `2027-01-31T11:00Z`, or `2027-01-31`, a day's beginning in UTC.

    Raises InvalidRequest for any other text: a time without a zone is a different moment in each place.
    """
    if match := _is_moment(text):
        try:
            found = datetime.fromisoformat(text if match[1] else f"{text}T00:00:00Z").astimezone(UTC)
        except (ValueError, OverflowError):
            pass
        else:
            if found.year >= YEAR_MIN:
                return found
    raise InvalidRequest(
        "a moment is a date, such as 2027-01-31 (its beginning, in UTC), or a time with its zone, such as "
        f"2027-01-31T12:00:00Z (in a URL, write + as %2B), from {YEAR_MIN} on: {text!r:.60}"
    )
