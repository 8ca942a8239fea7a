"""What answers about campaigns cost: each is made once, apart from the event loop, however many ask."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Coroutine
from fractions import Fraction
from typing import Any

import pytest

from tests.domain.test_manifest import WINTER
from tests.gateway.campaigns import GARDEN
from tombola.producers.domain.campaigns import figures, manifest, words
from tombola.producers.domain.campaigns.built_in import DEFAULT_ODDS
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN
from tombola.producers.domain.errors import CampaignNotFound, ServiceUnavailable
from tombola.producers.gateway import campaign_answers
from tombola.producers.gateway.campaign_answers import CampaignAnswers
from tombola.producers.gateway.campaign_views import percent_text
from tombola.producers.gateway.readers import Readers
from tombola.producers.storage.campaigns import Campaign, CampaignState

ODDS = manifest.parse(WINTER)
STRANGERS = 50
BUSY_S = 0.3
OPEN, PAUSED = CampaignState.OPEN, CampaignState.PAUSED


class Shelf:
    """In place of Campaigns: counts what it is asked, and takes its time."""

    def __init__(self, *odds: Odds, takes_s: float = 0.0) -> None:
        self.state = OPEN
        self.asked = 0
        self.at_once_max = 0
        self._odds = odds
        self._takes_s = takes_s
        self._at_once = 0
        self._lock = threading.Lock()

    def all(self) -> list[Campaign]:
        self._ask()
        return [Campaign(it.name, self.state, it) for it in self._odds]

    def version(self, odds_hash: str) -> Odds | None:
        self._ask()
        return next((it for it in self._odds if it.odds_hash == odds_hash), None)

    def _ask(self) -> None:
        with self._lock:
            self.asked += 1
            self._at_once += 1
            self.at_once_max = max(self.at_once_max, self._at_once)
        time.sleep(self._takes_s)
        with self._lock:
            self._at_once -= 1


def run(shelf: Shelf, work: Callable[[CampaignAnswers], Coroutine[Any, Any, None]]) -> None:
    """Run `work` with answers from `shelf`, in a loop of its own."""

    async def in_loop() -> None:
        readers = Readers()
        answers = CampaignAnswers(shelf, readers)  # type: ignore[arg-type]
        try:
            await work(answers)
        finally:
            answers.close()
            readers.pool.shutdown()

    asyncio.run(in_loop())


async def longest_pause(until: asyncio.Future[Any]) -> float:
    """How long the event loop answered nobody, in seconds, until the future is done."""
    longest = 0.0
    while not until.done():
        began = time.monotonic()
        await asyncio.sleep(0.005)
        longest = max(longest, time.monotonic() - began)
    return longest


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tiers whose chances were computed; each takes BUSY_S."""
    tiers: list[str] = []
    exactly = figures.effective_chances

    def slowly(odds: Odds, tier: str = "") -> dict[str, float]:
        time.sleep(BUSY_S)
        tiers.append(tier)
        return exactly(odds, tier)

    monkeypatch.setattr(figures, "effective_chances", slowly)
    return tiers


def test_chances_are_computed_once_and_nobody_waits_for_the_event_loop(computed: list[str]) -> None:
    shelf = Shelf(ODDS)

    async def work(answers: CampaignAnswers) -> None:
        asking = asyncio.gather(*[answers.shown(ODDS.name) for _ in range(STRANGERS)])
        pause_s = await longest_pause(asking)
        assert len({it.body for it in await asking}) == 1
        assert pause_s < BUSY_S
        shelf.state = PAUSED  # another state is another answer, of the same chances
        await asyncio.sleep(campaign_answers.LOOK_EVERY_S)
        assert b'"state":"paused"' in (await answers.shown(ODDS.name)).body
        assert computed == ["", "vip"]

    run(shelf, work)


def test_a_question_that_takes_too_long_is_answered_later(computed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign_answers, "CHANCES_WAIT_S", BUSY_S / 3)

    async def work(answers: CampaignAnswers) -> None:
        with pytest.raises(ServiceUnavailable, match="being computed"):
            await answers.shown(ODDS.name)
        await asyncio.sleep(3 * BUSY_S)
        assert (await answers.shown(ODDS.name)).body
        assert computed == ["", "vip"]

    run(Shelf(ODDS), work)


def test_a_failure_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async def work(answers: CampaignAnswers) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(figures, "effective_chances", broken)
            with pytest.raises(ZeroDivisionError):
                await answers.shown(ODDS.name)
        assert (await answers.shown(ODDS.name)).body

    run(Shelf(ODDS), work)


def test_one_look_is_for_all_who_ask() -> None:
    shelf = Shelf(ODDS, takes_s=0.05)

    async def work(answers: CampaignAnswers) -> None:
        listed = await asyncio.gather(*[answers.listed() for _ in range(STRANGERS)])
        assert len({it.body for it in listed}) == 1
        await asyncio.gather(*[answers.shown(ODDS.name) for _ in range(STRANGERS)])
        assert shelf.asked == 1
        with pytest.raises(CampaignNotFound):
            await answers.shown("other")
        await answers.shown("default")

    run(shelf, work)


def test_made_up_hashes_are_read_one_at_a_time() -> None:
    shelf = Shelf(ODDS, takes_s=0.002)

    async def work(answers: CampaignAnswers) -> None:
        made_up = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(STRANGERS)]
        told = await asyncio.gather(*[answers.version(it) for it in made_up], return_exceptions=True)
        assert {type(it) for it in told} == {CampaignNotFound}
        assert (shelf.asked, shelf.at_once_max) == (STRANGERS, 1)
        for wrong in ("x", "0" * 63, "F" * 64, "0" * 65, "0" * 63 + "\n"):
            with pytest.raises(CampaignNotFound):
                await answers.version(wrong)
        assert shelf.asked == STRANGERS  # no database needed for these
        for _ in range(3):
            assert (await answers.version(ODDS.odds_hash)).body == ODDS.canonical
        assert shelf.asked == STRANGERS + 1

    run(shelf, work)


def test_hashes_asked_for_behind_a_database_that_hangs_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign_answers, "READ_WAIT_S", 0.2)

    async def work(answers: CampaignAnswers) -> None:
        began = time.monotonic()
        made_up = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(STRANGERS)]
        told = await asyncio.gather(*[answers.version(it) for it in made_up], return_exceptions=True)
        assert {type(it) for it in told} == {ServiceUnavailable}
        assert time.monotonic() - began < 1.0

    run(Shelf(ODDS, takes_s=1.0), work)


# ---- what they say ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (Fraction(3, 10), "30"),
        (Fraction(1, 10_000), "0.01"),
        (Fraction(1, 3), "33.3333"),
        (Fraction(2, 3), "66.6667"),
        (Fraction(1, 2**32), "0.0000000232831"),
        (Fraction(0), "0"),
        (Fraction(1), "100"),
        (0.1 + 0.2, "30"),
        (1 / 3, "33.3333"),
        (0.999_999_999, "100"),
    ],
)
def test_percentages_are_written_out(share: Fraction | float, expected: str) -> None:
    assert percent_text(share) == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        *((1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (10, "10th"), (11, "11th"), (12, "12th"), (13, "13th")),
        *((21, "21st"), (90, "90th"), (100, "100th"), (101, "101st"), (111, "111th"), (1_002, "1,002nd")),
    ],
)
def test_ordinals(number: int, expected: str) -> None:
    assert words.ordinal(number) == expected


def test_a_guarantee_without_soft_steps_is_one_sentence() -> None:
    odds = manifest.parse(GARDEN)
    said = words.guarantee_in_words(odds, odds.guarantees[0])
    assert said == "One of A phone, 5.00 POINT at the latest at every 10th pull."


def test_the_built_in_campaign_has_the_chances_and_the_hash_that_it_is_drawn_by() -> None:
    assert DEFAULT_ODDS.odds_hash == DEFAULT_CAMPAIGN.odds_hash
    assert DEFAULT_CAMPAIGN.canonical == b"default,POINT,1.00,30x5.00,70x0.00"
    assert DEFAULT_CAMPAIGN.odds_hash == hashlib.sha256(DEFAULT_CAMPAIGN.canonical).hexdigest()
    assert [it.weight for it in DEFAULT_ODDS.prizes] == [it.weight for it in DEFAULT_CAMPAIGN.prizes]
    assert dict(DEFAULT_ODDS.cost) == {1: DEFAULT_CAMPAIGN.cost}
