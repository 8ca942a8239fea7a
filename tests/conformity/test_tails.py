"""The probabilities of tails are those of scipy; sums of unequal chances are those of exact enumeration."""

from __future__ import annotations

import math
from collections import Counter

import numpy
import pytest
from scipy import stats

from tombola.worker.conformity.tails import (
    Sums,
    Trials,
    at_least,
    at_most,
    chi_squared_tail,
    fewer_wins,
    g_test,
    holm,
    more_wins,
    normal_quantile,
    normal_tail,
    other_wins,
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 20, 59, 60, 99])
@pytest.mark.parametrize("statistic", [0.0, 0.01, 0.5, 1.0, 3.84, 10.0, 30.0, 60.0, 150.0])
def test_the_tail_of_chi_squared(statistic: float, degrees: int) -> None:
    assert chi_squared_tail(statistic, degrees) == pytest.approx(
        stats.chi2.sf(statistic, degrees), rel=1e-9, abs=1e-300
    )


def test_a_variable_that_does_not_vary_always_fits() -> None:
    assert chi_squared_tail(0.0, 0) == 1.0


@pytest.mark.parametrize("z", [-3.0, 0.0, 1.0, 2.5758, 6.0, 20.0])
def test_the_normal_tail(z: float) -> None:
    assert normal_tail(z) == pytest.approx(stats.norm.sf(z), rel=1e-12)
    if z <= 6:
        assert normal_quantile(normal_tail(z)) == pytest.approx(z, abs=1e-9)


@pytest.mark.parametrize("trials", [1, 2, 30, 100, 3_000, 1_000_000])
@pytest.mark.parametrize("chance", [1e-6, 0.001, 0.3, 0.5, 0.97])
def test_binomial_tails_far_out_and_in_the_middle(trials: int, chance: float) -> None:
    spread = math.sqrt(trials * chance * (1 - chance))
    for off in (-9, -3, -1, 0, 1, 3, 9, 20):
        count = min(trials, max(0, round(trials * chance + off * spread)))
        exact = stats.binom(trials, chance)
        assert at_least(count, trials, chance) == pytest.approx(exact.sf(count - 1), rel=1e-6, abs=1e-290)
        assert at_most(count, trials, chance) == pytest.approx(exact.cdf(count), rel=1e-6, abs=1e-290)
    assert at_least(trials + 1, trials, chance) == at_most(-1, trials, chance) == 0.0
    assert at_least(0, trials, chance) == at_most(trials, trials, chance) == 1.0


def enumerated(chances: list[float]) -> list[float]:
    """The distribution of the number of wins, exactly."""
    found = numpy.array([1.0])
    for chance in chances:
        found = numpy.convolve(found, [1 - chance, chance])
    return list(found)


def sums_of(chances: list[float], wins: int) -> Sums:
    """Where nothing but the sums is known."""
    return trials_of(chances, wins)._replace(trials=())


def trials_of(chances: list[float], wins: int) -> Sums:
    return Sums.of(wins, [Trials(count, chance) for chance, count in Counter(chances).items()])


def test_wins_with_equal_chances_are_exact() -> None:
    chances = [0.3] * 40
    exact = enumerated(chances)
    for wins in range(41):
        for found in (sums_of(chances, wins), trials_of(chances, wins)):
            assert more_wins(found) == pytest.approx(sum(exact[wins:]), rel=1e-9)
            assert fewer_wins(found) == pytest.approx(sum(exact[: wins + 1]), rel=1e-9)


@pytest.mark.parametrize(
    "chances",
    [
        [0.2] * 30 + [0.3] * 30,
        [0.001] * 500 + [0.01] * 300,
        [0.05, 0.1, 0.2, 0.4] * 25,
        [0.2] * 74 + [0.2 + step * 0.05 for step in range(16)],
        [0.01] * 300 + [0.1, 0.4, 0.7, 0.9] * 10,
    ],
    ids=["tiers", "rare", "mixed", "a soft guarantee", "a rare prize under one"],
)
def test_wins_with_unequal_chances_are_close_to_the_exact_distribution(chances: list[float]) -> None:
    """Where it decides, from 5 % to one in 10^8, a p-value is off by a tenth at most.

    By a half where only sums are known, of chances that are not as far apart as those of a guarantee.
    """
    exact = enumerated(chances)
    looked_at = 0
    for wins in range(len(chances) + 1):
        more, fewer = sum(exact[wins:]), sum(exact[: wins + 1])
        if 1e-8 < more < 0.05:
            assert more_wins(trials_of(chances, wins)) == pytest.approx(more, rel=0.1), wins
            if max(chances) < 0.5:
                assert more_wins(sums_of(chances, wins)) == pytest.approx(more, rel=0.5), wins
            looked_at += 1
        if 1e-8 < fewer < 0.05:
            assert fewer_wins(trials_of(chances, wins)) == pytest.approx(fewer, rel=0.1), wins
            if max(chances) < 0.5:
                assert fewer_wins(sums_of(chances, wins)) == pytest.approx(fewer, rel=0.5), wins
            looked_at += 1
    assert looked_at >= 5


def test_more_wins_than_the_matched_distribution_has_are_bounded() -> None:
    chances = [0.9] * 10 + [0.01] * 10
    found, exact = more_wins(sums_of(chances, 20)), enumerated(chances)[20]
    assert exact < found < 1e-5


def test_wins_that_are_certain_leave_nothing_to_chance() -> None:
    assert other_wins(Sums(5, 5, 5.0, 0.0)) == 1.0
    assert other_wins(Sums(5, 4, 5.0, 0.0)) == 0.0
    assert other_wins(Sums(5, 1, 0.0, 0.0)) == 0.0


def test_the_g_test() -> None:
    observed, expected = [18.0, 55.0, 27.0], [30.0, 50.0, 20.0]
    found = g_test(observed, expected)
    statistic, p_value = stats.power_divergence(observed, expected, lambda_="log-likelihood")
    assert (found.statistic, found.p_value) == pytest.approx((statistic, p_value))
    assert found.degrees == 2
    assert g_test([7.0], [7.0]).p_value == 1.0
    assert g_test([0.0, 10.0], [5.0, 5.0]).p_value == pytest.approx(stats.chi2.sf(20 * math.log(2), 1))


def test_holm() -> None:
    assert holm([]) == []
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
