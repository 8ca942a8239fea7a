"""Moments as people write them: a zone, or a day; nothing that is a different moment in each place."""

from datetime import UTC, datetime

import pytest

from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.moments import parse_moment


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2027-01-31", datetime(2027, 1, 31, tzinfo=UTC)),
        ("2027-01-31T12:00Z", datetime(2027, 1, 31, 12, tzinfo=UTC)),
        ("2027-01-31T12:00:01.5+01:00", datetime(2027, 1, 31, 11, 0, 1, 500_000, tzinfo=UTC)),
        ("2027-01-01T00:30:00+02:00", datetime(2026, 12, 31, 22, 30, tzinfo=UTC)),
        ("1970-01-01", datetime(1970, 1, 1, tzinfo=UTC)),
        ("9999-12-31T23:59:59.999999Z", datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
    ],
)
def test_a_moment_is_in_utc(text: str, moment: datetime) -> None:
    assert parse_moment(text) == moment
    assert parse_moment(text).tzinfo is UTC


@pytest.mark.parametrize(
    "text",
    [
        *("", "today", "2027-01-31T12:00:00", "2027-01-31 12:00:00Z", "20270131", "2027-W05", "2027-1-1", "2027-02-29"),
        *(
            "2027-01-31T25:00Z",
            "2027-01-31T12:00+24:00",
            "2027-01-31T12:00+0100",
            "1969-12-31",
            "0001-01-01T00:00+14:00",
        ),
        *("9999-12-31T23:59:59-01:00", "٢٠٢٧-٠١-٣١", "2027-01-31\n", "2027-01-31T12:00:00 01:00", "12027-01-31"),
    ],
)
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="a moment is a date"):
        parse_moment(text)
