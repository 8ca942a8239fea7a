"""All pulls of one request: limits, lists, stock, counters, and the names of the rows."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import msgspec
import pytest

from tests.domain.test_drawing import NESTED, SEED
from tests.domain.test_manifest import WINTER
from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.drawing import Drawing
from tombola.producers.domain.campaigns.odds import Odds, Prize
from tombola.producers.domain.campaigns.pulls import NEW, Standing, pull_all, why_rejected
from tombola.producers.domain.campaigns.record import DrawNotes, GrantNotes, read_draw_notes, read_grant_notes
from tombola.producers.domain.errors import InvalidRequest

OPEN = datetime(2026, 12, 5, 15, 0, tzinfo=UTC)  # the day before midnight in Shanghai


def none(_name: str) -> bool:
    return False


def only(odds: Odds, code: str) -> Odds:
    """The same odds, with nearly every ticket on one prize, and without guarantees."""
    prizes = tuple(dataclasses.replace(it, weight=10**9 if it.code == code else 1) for it in odds.prizes)
    cost = {pulls: Decimal(pulls) for pulls in range(1, 11)}
    return dataclasses.replace(odds, prizes=prizes, guarantees=(), tiers=(), cost=cost)


def pulled(odds: Odds, pulls: int, standing: Standing = NEW, *, units: int = 1_000, key: str = "key-1"):  # type: ignore[no-untyped-def]
    return pull_all(odds, Drawing(SEED, odds, 6, key), pulls, standing, OPEN, lambda _code: units)


# ---- who may draw ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "reason"),
    [
        (datetime(2026, 11, 30, 15, 59, 59, tzinfo=UTC), "CAMPAIGN_CLOSED"),
        (datetime(2026, 11, 30, 16, 0, tzinfo=UTC), None),
        (datetime(2026, 12, 31, 15, 59, 59, tzinfo=UTC), None),
        (datetime(2026, 12, 31, 16, 0, tzinfo=UTC), "CAMPAIGN_CLOSED"),
    ],
)
def test_the_window_is_that_of_the_time_of_acceptance(moment: datetime, reason: str | None) -> None:
    assert why_rejected(manifest.parse(WINTER), 1, NEW, moment, none) == reason


@pytest.mark.parametrize(
    ("deny", "allow", "listed", "reason"),
    [
        ("bad", "", "bad", "NOT_ELIGIBLE"),
        ("bad", "", "good", None),
        ("", "good", "good", None),
        ("", "good", "bad", "NOT_ELIGIBLE"),
        ("bad", "good", "bad", "NOT_ELIGIBLE"),
    ],
)
def test_lists_deny_and_allow(deny: str, allow: str, listed: str, reason: str | None) -> None:
    odds = dataclasses.replace(manifest.parse(WINTER), deny=deny, allow=allow)
    assert why_rejected(odds, 1, NEW, OPEN, lambda name: name == listed) == reason


def test_a_limit_counts_pulls_and_is_never_passed_by_a_part() -> None:
    odds = manifest.parse(WINTER)  # 20 a day, 200 in all
    today = Standing(pulls=15, day="2026-12-05", pulls_today=15)

    assert why_rejected(odds, 5, today, OPEN, none) is None
    assert why_rejected(odds, 6, today, OPEN, none) == "LIMIT_REACHED"
    assert why_rejected(odds, 10, Standing(pulls=190), OPEN, none) is None
    assert why_rejected(odds, 10, Standing(pulls=191), OPEN, none) == "LIMIT_REACHED"


def test_the_day_ends_at_midnight_of_the_campaigns_zone() -> None:
    odds = manifest.parse(WINTER)
    full = Standing(pulls=20, day="2026-12-05", pulls_today=20)

    assert why_rejected(odds, 1, full, OPEN + timedelta(minutes=59), none) == "LIMIT_REACHED"
    assert why_rejected(odds, 1, full, OPEN + timedelta(minutes=60), none) is None


def test_a_request_accepted_before_midnight_and_settled_late_counts_on_the_day_that_has_begun() -> None:
    odds = manifest.parse(WINTER)
    tomorrow = Standing(pulls=3, day="2026-12-06", pulls_today=3)

    after = pulled(odds, 1, tomorrow).after
    assert (after.day, after.pulls_today) == ("2026-12-06", 4)


# ---- what is won -----------------------------------------------------------------------------------------------------


def test_stock_is_taken_to_the_last_unit_and_then_passed_on() -> None:
    odds = only(manifest.parse(WINTER), "phone")
    odds = dataclasses.replace(odds, prizes=tuple(dataclasses.replace(it, per_account=None) for it in odds.prizes))

    it = pulled(odds, 10, units=3)
    assert [prize.code for prize in it.prizes] == ["phone"] * 3 + ["five"] * 7
    assert it.taken == {"phone": 3}
    assert it.gone == tuple((pull, "phone") for pull in range(4, 11))


def test_a_prize_is_won_as_often_as_an_account_may() -> None:
    odds = only(manifest.parse(WINTER), "phone")

    first = pulled(odds, 10)
    assert [prize.code for prize in first.prizes] == ["phone"] + ["five"] * 9
    assert first.after.won == {"phone": 1}
    assert pulled(odds, 1, first.after, key="key-2").prizes[0].code == "five"


def test_counters_survive_a_new_version_by_their_guarantees_name() -> None:
    odds = manifest.parse(NESTED)
    standing = Standing(since_hit={"ssr": 11, "any": 0, "old": 5})

    it = pulled(odds, 1, standing)
    assert it.prizes[0].code in ("phone", "five")  # due at the twelfth
    assert it.after.since_hit == {"ssr": 0, "any": 0, "old": 5}


def test_what_was_spent_reaches_the_next_tier_with_the_next_request() -> None:
    odds = manifest.parse(WINTER)
    almost = Standing(pulls=99, spent=Decimal("990.00"))

    it = pulled(odds, 1, almost)
    assert (it.tier, it.after.spent) == ("", Decimal("1000.00"))
    assert pulled(odds, 10, it.after, key="key-2").tier == "vip"


def test_a_standing_is_the_same_after_it_was_stored() -> None:
    standing = pulled(manifest.parse(WINTER), 10).after
    assert msgspec.json.decode(msgspec.json.encode(standing), type=Standing) == standing
    assert msgspec.json.encode(NEW) == b"{}"


# ---- rows ------------------------------------------------------------------------------------------------------------


def names(odds: Odds, pulls: int) -> list[str]:
    return [won.entry for won in pulled(odds, pulls).grants()]


def test_rows_of_a_single_pull_are_named_as_ever() -> None:
    odds = manifest.parse(WINTER)
    assert names(only(odds, "five"), 1) == ["reward"]
    assert names(only(odds, "coupon"), 1) == ["coupon", "notice"]
    assert names(only(odds, "phone"), 1) == ["item"]
    assert names(only(odds, "nothing"), 1) == []


def test_rows_of_several_pulls_name_the_pull() -> None:
    odds = manifest.parse(WINTER)
    assert names(only(odds, "coupon"), 2) == ["coupon_1", "notice_1", "coupon_2", "notice_2"]


def test_a_second_grant_of_a_kind_is_numbered() -> None:
    odds = only(manifest.parse(WINTER), "five")
    twice = tuple(dataclasses.replace(it, grants=it.grants * 3) for it in odds.prizes)
    assert names(dataclasses.replace(odds, prizes=twice), 1) == ["reward", "reward_1_2", "reward_1_3"]
    assert names(dataclasses.replace(odds, prizes=twice), 2)[:4] == ["reward_1", "reward_1_2", "reward_1_3", "reward_2"]


# ---- notes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "notes",
    [
        DrawNotes("ab" * 32, "cd" * 8, ("five",)),
        DrawNotes("ab" * 32, "cd" * 8, ("five", "nothing"), "vip", 17, (3, 80), ((2, "phone"), (2, "coupon"))),
    ],
)
def test_notes_of_a_draw_read_as_they_were_written(notes: DrawNotes) -> None:
    assert read_draw_notes(notes.written()) == notes


def test_notes_of_a_grant_read_as_they_were_written() -> None:
    for code in ("", "WINTER-0001"):
        notes = GrantNotes("ab" * 32, "coupon", 2, code)
        assert read_grant_notes(notes.written()) == notes


@pytest.mark.parametrize(
    "text", ["", "on record", "odds=ab", "odds=a seed=b prizes=c pulls=x", "odds=a prize=b pull=x"]
)
def test_other_notes_are_refused(text: str) -> None:
    for read in (read_draw_notes, read_grant_notes):
        with pytest.raises(InvalidRequest):
            read(text)


def test_what_is_drawn_again_from_the_notes_is_the_same() -> None:
    """The audit's way: the recorded inputs and the seed, and nothing else."""
    odds = manifest.parse(NESTED)
    standing = Standing(pulls=17, spent=Decimal("1200.00"), since_hit={"ssr": 9, "any": 2})
    it = pulled(odds, 10, standing, units=0)
    gone = set(it.gone)
    drawing, counters = Drawing(SEED, odds, 6, "key-1"), standing.counters(odds)

    again: list[Prize] = []
    for pull in range(1, 11):

        def is_available(prize: Prize, pull: int = pull) -> bool:
            return (pull, prize.code) not in gone

        prize, _, counters = drawing.pull(pull, it.tier, counters, is_available)
        again.append(prize)
    assert tuple(again) == it.prizes
