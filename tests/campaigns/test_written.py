"""Odds written as TOML are the same odds, whatever is in them."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.domain.test_manifest import WINTER
from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.canonical import canonical_form
from tombola.producers.domain.campaigns.odds import Grant, Odds, Prize
from tombola.worker.campaigns.written import written
from tombola.worker.embedded.sample_campaigns import samples

SMALLEST = 'name = "a"\nasset = "POINT"\ncost = { 1 = "1" }\n[[prize]]\ncode = "x"\nweight = 1\n'


# Prizes whose codes are words of the manifest, and numbers.
WORDS = WINTER.replace("phone", "asset").replace("nothing", "notify").replace('"five"', '"10"')


@pytest.mark.parametrize(
    "odds", [manifest.parse(it) for it in (WINTER, SMALLEST, WORDS)] + samples(), ids=lambda it: it.odds_hash[:8]
)
def test_what_is_written_says_the_same(odds: Odds) -> None:
    assert manifest.parse(written(odds)) == odds


printable = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")) | st.just(" "), max_size=40)
moments = st.datetimes(datetime(2000, 1, 1), datetime(2090, 1, 1)).map(lambda it: it.replace(microsecond=0, tzinfo=UTC))


@given(title=printable, opens=st.none() | moments, weights=st.lists(st.integers(1, 10**6), min_size=1, max_size=5))
def test_any_title_time_and_weights(title: str, opens: datetime | None, weights: list[int]) -> None:
    prizes = tuple(
        Prize(f"p{number}", weight, (Grant("POINT", Decimal("1.00")),), title=title, value=Decimal("1.00"))
        for number, weight in enumerate(weights)
    )
    draft = Odds("a", "POINT", {1: Decimal("1.00"), 10: Decimal("9.50")}, prizes, b"", title=title, opens=opens)
    odds = dataclasses.replace(draft, canonical=canonical_form(draft))
    assert manifest.parse(written(odds)) == odds


def test_it_reads_like_a_manifest_that_a_person_wrote() -> None:
    lines = written(manifest.parse(WINTER)).split("\n")
    assert lines[0] == 'name = "winter-2026"'
    assert 'cost = { 1 = "10.00", 10 = "90.00" }' in lines
    assert "opens = 2026-11-30T16:00:00Z" in lines
    assert lines[lines.index("[[prize]]") + 1 :][:2] == ['code = "phone"', "weight = 1"]
