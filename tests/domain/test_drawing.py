"""Drawing by odds, and what the odds come to: observed and exact figures agree, and no promise is missed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import pytest

from tests.domain.test_manifest import WINTER
from tombola.producers.domain.campaigns import figures, manifest
from tombola.producers.domain.campaigns.drawing import Drawing, plain_prize
from tombola.producers.domain.campaigns.odds import Odds, Prize

SEED = bytes(range(32))
PULLS = 20_000
# The 99.9 % quantile of the chi-squared distribution, by degrees of freedom.
CHI_SQUARED_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47}

NESTED = (
    WINTER.replace(
        "hard_at = 90\nsoft_from = 75\nsoft_step = 300", "hard_at = 12\nsoft_from = 8\nsoft_step = 900"
    ).replace('instead = "nothing"', 'instead = "five"')
    + '[[guarantee]]\nname = "any"\nprizes = ["phone", "five", "coupon"]\nhard_at = 4\n'
)


def pulls_of(odds: Odds, number: int, *, tier: str = "") -> list[Prize]:
    """The prizes of an account that pulls `number` times, a request each, everything available."""
    since_hit = tuple(0 for _ in odds.guarantees)
    prizes = []
    for index in range(number):
        prize, _, since_hit = Drawing(SEED, odds, 6, f"key-{index}").pull(1, tier, since_hit)
        prizes.append(prize)
    return prizes


def chi_squared(prizes: list[Prize], chances: dict[str, float]) -> float:
    observed = Counter(prize.code for prize in prizes)
    return sum(
        (observed[code] - len(prizes) * chance) ** 2 / (len(prizes) * chance)
        for code, chance in chances.items()
        if chance * len(prizes) >= 5
    )


def test_the_same_request_draws_the_same_again_whatever_ran_before() -> None:
    odds = manifest.parse(WINTER)
    first = [Drawing(SEED, odds, 6, "key-1").pull(pull, "", (3,)).prize.code for pull in range(1, 11)]

    drawing = Drawing(SEED, odds, 6, "key-1")
    assert [drawing.pull(pull, "", (3,)).prize.code for pull in range(10, 0, -1)] == first[::-1]


def test_golden_vectors() -> None:
    """What others compute by the description: these never change."""
    odds = manifest.parse(WINTER)
    assert odds.odds_hash == "1977fe9b6e387bcefab7aa4b7a7c6c9848cd9f6a68741fee91ac1cdd54f6bb0f"

    drawn = [Drawing(SEED, odds, 6, "key-1", b"nonce").pull(pull, "vip", (80,)).prize.code for pull in range(1, 11)]
    assert drawn == ["nothing", "five", "five", "five", "coupon", "nothing", "nothing", "nothing", "nothing", "nothing"]


@pytest.mark.parametrize("what", ["seed", "account", "key", "nonce", "odds"])
def test_all_that_is_drawn_by_changes_the_prizes(what: str) -> None:
    odds = manifest.parse(WINTER)
    other = manifest.parse(WINTER.replace('"blacklist-1"', '"blacklist-2"')) if what == "odds" else odds
    drawings = [
        Drawing(SEED, odds, 6, "key-1", b"nonce"),
        Drawing(
            bytes(32) if what == "seed" else SEED,
            other,
            7 if what == "account" else 6,
            "key-2" if what == "key" else "key-1",
            b"other" if what == "nonce" else b"nonce",
        ),
    ]

    one, two = ([it.pull(pull, "", (0,)).prize.code for pull in range(1, 101)] for it in drawings)
    assert one != two


@pytest.mark.parametrize("tier", ["", "vip"])
def test_the_observed_frequencies_fit_the_weights(tier: str) -> None:
    odds = dataclasses.replace(manifest.parse(WINTER), guarantees=())
    chances = figures.effective_chances(odds, tier)

    assert chances == {code: float(chance) for code, chance in figures.base_chances(odds, tier).items()}
    assert chi_squared(pulls_of(odds, PULLS, tier=tier), chances) < CHI_SQUARED_999[3]


@pytest.mark.parametrize("tier", ["", "vip"])
@pytest.mark.parametrize("text", [WINTER, NESTED], ids=["one", "nested"])
def test_the_observed_frequencies_fit_the_exact_effective_odds(text: str, tier: str) -> None:
    """Pulls under a guarantee depend on each other: the statistic is no larger than that of independent ones."""
    odds = manifest.parse(text)
    chances = figures.effective_chances(odds, tier)

    assert math.isclose(sum(chances.values()), 1)
    assert chi_squared(pulls_of(odds, PULLS, tier=tier), chances) < CHI_SQUARED_999[3]


def test_a_guarantee_makes_its_prizes_likelier_and_keeps_their_ratio() -> None:
    odds = manifest.parse(NESTED)
    base = figures.base_chances(odds)
    effective = figures.effective_chances(odds)

    assert effective["five"] > base["five"]
    assert math.isclose(effective["five"] / effective["phone"], base["five"] / base["phone"])


def test_no_guarantee_is_ever_missed() -> None:
    odds = manifest.parse(NESTED)
    since = {guarantee.name: 0 for guarantee in odds.guarantees}
    longest = dict(since)

    for prize in pulls_of(odds, PULLS):
        for guarantee in odds.guarantees:
            since[guarantee.name] = 0 if prize.code in guarantee.prizes else since[guarantee.name] + 1
            longest[guarantee.name] = max(longest[guarantee.name], since[guarantee.name])

    assert longest["any"] == 3  # a hit at the fourth pull at the latest
    assert longest["ssr"] <= 11


def test_the_time_until_a_hit_fits_the_exact_chain() -> None:
    odds = manifest.parse(NESTED)
    exact = figures.pulls_until_hit(odds)
    assert math.isclose(sum(exact), 1)
    assert len(exact) == 12

    observed: Counter[int] = Counter()
    length = 0
    for prize in pulls_of(odds, PULLS):
        length += 1
        if prize.code in odds.guarantees[0].prizes:
            observed[length] += 1
            length = 0
    cycles = observed.total()
    statistic = sum((observed[n] - cycles * p) ** 2 / (cycles * p) for n, p in enumerate(exact, 1))
    assert statistic < 31.26  # 99.9 %, 11 degrees of freedom


def test_what_is_unavailable_is_passed_on_and_told() -> None:
    odds = manifest.parse(WINTER)
    always = dataclasses.replace(odds, prizes=tuple(it for it in odds.prizes if it.code != "nothing"))
    first = Drawing(SEED, always, 6, "key-1").pull(1, "", (89,))
    assert first.prize.code == "five"  # of phone and five, at 1 : 2,000

    weights = tuple(dataclasses.replace(it, weight=10**6 if it.code == "phone" else 1) for it in odds.prizes)
    drawn = Drawing(SEED, dataclasses.replace(odds, prizes=weights), 6, "key-1").pull(1, "", (89,), lambda _: False)
    assert (drawn.prize.code, drawn.unavailable, drawn.since_hit) == ("five", ("phone",), (0,))


def test_what_a_pull_pays_on_average() -> None:
    odds = dataclasses.replace(manifest.parse(WINTER), guarantees=())
    paid = {it.asset_code: it for it in figures.assets(odds, figures.effective_chances(odds))}

    assert math.isclose(paid["POINT"].expectation, 5 * 0.2)
    assert math.isclose(paid["POINT"].deviation, math.sqrt(25 * 0.2 - 1))
    assert math.isclose(paid["COUPON.10"].expectation, 0.0999)


def test_return_to_player_and_liability() -> None:
    odds = dataclasses.replace(manifest.parse(WINTER), guarantees=())
    chances = figures.effective_chances(odds)

    assert math.isclose(figures.return_to_player(odds, chances, 1), (0.3999 + 0.999 + 1) / 10)
    assert math.isclose(figures.return_to_player(odds, chances, 10), (0.3999 + 0.999 + 1) / 9)
    assert figures.liability(odds) == Decimal("11997.00")


def test_losing_streaks() -> None:
    plain = dataclasses.replace(manifest.parse(WINTER), guarantees=())

    assert math.isclose(figures.losing_streak(plain, 10), float(Fraction(7, 10) ** 10))
    assert figures.losing_streak(manifest.parse(NESTED), 4) == 0
    assert 0 < figures.losing_streak(manifest.parse(NESTED), 3) < 1


def test_how_long_a_stock_lasts() -> None:
    plain = dataclasses.replace(manifest.parse(WINTER), guarantees=())
    (phone,) = figures.stock_lasts(plain, {**figures.effective_chances(plain), "phone": 0.01})

    # Three units at 1 %: that many pulls until the third win, counted from the negative binomial distribution.
    def gone_by(pulls: int) -> float:
        return 1 - sum(math.comb(pulls, k) * 0.01**k * 0.99 ** (pulls - k) for k in range(3))

    for pulls, share in ((phone.early, 0.05), (phone.median, 0.5), (phone.late, 0.95)):
        assert gone_by(int(pulls) - 1) < share <= gone_by(int(pulls))


def test_large_stocks_are_taken_for_normally_distributed() -> None:
    plain = dataclasses.replace(manifest.parse(WINTER), guarantees=())
    prizes = tuple(dataclasses.replace(it, stock=20_000 if it.code == "phone" else None) for it in plain.prizes)
    (phone,) = figures.stock_lasts(
        dataclasses.replace(plain, prizes=prizes), {**figures.effective_chances(plain), "phone": 0.1}
    )

    assert math.isclose(phone.median, 200_000, rel_tol=0.001)
    assert math.isclose(phone.late - phone.median, 1.645 * math.sqrt(20_000 * 0.9) / 0.1, rel_tol=0.02)


def test_the_short_way_of_a_single_pull_is_the_same_draw() -> None:
    odds = dataclasses.replace(manifest.parse(WINTER), guarantees=(), tiers=())
    for number in range(500):
        key = f"key-{number}"
        for nonce in (b"", b"n" * 16, b"%064d" % number):
            drawing = Drawing(SEED, odds, number + 1, key, nonce)
            assert plain_prize(SEED, odds, number + 1, key, nonce) is drawing.pull(1, "", ()).prize
