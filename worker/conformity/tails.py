"""Probabilities of tails. Pure; tests/conformity/test_tails.py compares them with scipy.

Each is exact up to rounding where it says so. No library of the worker has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import Final, NamedTuple

_STANDARD: Final = NormalDist()
_TINY: Final = 1e-300
_STEPS_MAX: Final = 200_000  # of a continued fraction, which needs some sqrt(pulls)
_SADDLE_MAX: Final = 60.0
_SADDLE_STEPS_MAX: Final = 200
_TRIALS_MAX: Final = 1e9  # of a matched binomial: beyond them it is a Poisson distribution to five digits


def normal_tail(z: float) -> float:
    """The probability that a standard normal variable exceeds `z`."""
    return 0.5 * math.erfc(z / math.sqrt(2))


def normal_quantile(tail: float) -> float:
    """The z that a standard normal variable exceeds with probability `tail`, 0 < tail < 1."""
    return -_STANDARD.inv_cdf(tail)


def chi_squared_tail(statistic: float, degrees: int) -> float:
    """The probability that a chi-squared variable with so many degrees of freedom exceeds `statistic`: exact.

    Degrees of freedom are whole numbers, so the incomplete gamma function is a finite sum.
    """
    half = statistic / 2
    if half <= 0:
        return 1.0
    tail = math.erfc(math.sqrt(half)) if degrees % 2 else 0.0
    step = 0.5 if degrees % 2 else 0.0
    return min(
        1.0,
        tail
        + math.fsum(
            math.exp((k + step) * math.log(half) - half - math.lgamma(k + step + 1)) for k in range(degrees // 2)
        ),
    )


def beta_share(share: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_share(a, b), by Lentz's continued fraction; a and b above 0."""
    if share <= 0 or share >= 1:
        return float(share >= 1)
    if share > (a + 1) / (a + b + 2):
        return 1.0 - beta_share(1 - share, b, a)
    log_front = (
        math.lgamma(a + b)
        - math.lgamma(a)
        - math.lgamma(b)
        + a * math.log(share)
        + b * math.log1p(-share)
        - math.log(a)
    )
    return min(1.0, math.exp(min(0.0, log_front)) * _fraction(share, a, b)) if log_front > -745 else 0.0


def _fraction(share: float, a: float, b: float) -> float:
    """The continued fraction of the incomplete beta function."""
    above, below = 1.0, 1.0 - (a + b) * share / (a + 1)
    below = 1 / (below if abs(below) > _TINY else _TINY)
    value = below
    for step in range(1, _STEPS_MAX):
        for part in (
            step * (b - step) * share / ((a + 2 * step - 1) * (a + 2 * step)),
            -(a + step) * (a + b + step) * share / ((a + 2 * step) * (a + 2 * step + 1)),
        ):
            below = 1 + part * below
            below = 1 / (below if abs(below) > _TINY else _TINY)
            above = 1 + part / above
            above = above if abs(above) > _TINY else _TINY
            value *= below * above
        if abs(below * above - 1) < 1e-15:
            break
    return value


def at_least(count: int, trials: float, chance: float) -> float:
    """P(X >= count) for X binomial: exact. `trials` may be a fraction, of a distribution that is matched."""
    if count <= 0:
        return 1.0
    return 0.0 if count > trials else beta_share(chance, count, trials - count + 1)


def at_most(count: int, trials: float, chance: float) -> float:
    """P(X <= count) for X binomial: exact. `trials` may be a fraction, of a distribution that is matched."""
    if count < 0:
        return 0.0
    return 1.0 if count >= trials else beta_share(1 - chance, trials - count, count + 1)


class Trials(NamedTuple):
    """So many pulls with the same chance of a win, neither 0 nor 1."""

    pulls: int
    chance: float


class Sums(NamedTuple):
    """Wins among `pulls` pulls: `wins` came, `expected` is the sum of their chances p, `variance` that of p(1 - p).

    `trials` are the pulls by their chances, where that is known; else empty.
    """

    pulls: int = 0
    wins: int = 0
    expected: float = 0.0
    variance: float = 0.0
    trials: tuple[Trials, ...] = ()

    @classmethod
    def of(cls, wins: int, trials: Iterable[Trials]) -> Sums:
        """So many wins among these pulls."""
        of = tuple(trials)
        return cls(
            sum(it.pulls for it in of),
            wins,
            math.fsum(it.pulls * it.chance for it in of),
            math.fsum(it.pulls * it.chance * (1 - it.chance) for it in of),
            of,
        )

    @property
    def excess(self) -> float:
        """How many more wins came than were expected."""
        return self.wins - self.expected

    @property
    def z(self) -> float:
        """The excess in standard deviations; 0 where nothing was left to chance."""
        return self.excess / math.sqrt(self.variance) if self.variance > 0 else 0.0

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        return Sums(
            self.pulls + other.pulls,
            self.wins + other.wins,
            self.expected + other.expected,
            self.variance + other.variance,
        )


def more_wins(found: Sums) -> float:
    """The probability of as many wins or more: exact where all chances are equal.

    Of unequal chances it is the saddlepoint approximation, which is off by a few per cent. Where only their sums are
    known, it is the tail of the binomial distribution with the same mean and variance, and beyond its end that of as
    many trials as pulls, which is an upper bound (Hoeffding 1956, Annals of Mathematical Statistics 27).
    """
    if found.variance <= 0:
        return float(found.excess < 0.5)
    if len(found.trials) > 1:
        return _saddle(found.trials, found.wins)
    trials, chance = _matched(found)
    if found.wins > trials:
        return at_least(found.wins, found.pulls, found.expected / found.pulls)
    return at_least(found.wins, trials, chance)


def fewer_wins(found: Sums) -> float:
    """The probability of as many wins or fewer, as `more_wins`."""
    if found.variance <= 0:
        return float(found.excess > -0.5)
    if len(found.trials) > 1:  # the losses, seen from the other side
        return _saddle([Trials(it.pulls, 1 - it.chance) for it in found.trials], found.pulls - found.wins)
    trials, chance = _matched(found)
    return at_most(found.wins, trials, chance)


def other_wins(found: Sums) -> float:
    """The probability of a number of wins that is as far off, to either side: twice the smaller tail."""
    return min(1.0, 2 * min(more_wins(found), fewer_wins(found)))


def _matched(found: Sums) -> tuple[float, float]:
    """Trials and chance of the binomial distribution with this mean and variance."""
    chance = 1 - found.variance / found.expected
    trials = found.expected / max(chance, found.expected / _TRIALS_MAX)
    if abs(trials - found.pulls) < 1e-6 * found.pulls:  # all chances are equal, but for rounding
        trials = found.pulls
    return trials, found.expected / trials


def _saddle(trials: Sequence[Trials], count: int) -> float:
    """P(X >= count) for a sum of trials with unequal chances (Poisson binomial), by the saddlepoint approximation.

    Lugannani and Rice (1980, Advances in Applied Probability 12), with the continuity correction for whole numbers.
    """
    if count <= 0:
        return 1.0
    target, low, high, t = count - 0.5, -_SADDLE_MAX, _SADDLE_MAX, 0.0
    for _ in range(_SADDLE_STEPS_MAX):
        factor, mean, variance = math.exp(t), 0.0, 0.0
        for it in trials:
            tilted = it.chance * factor / (1 - it.chance + it.chance * factor)
            mean += it.pulls * tilted
            variance += it.pulls * tilted * (1 - tilted)
        if abs(mean - target) <= 1e-9 * target:
            break
        low, high = (low, t) if mean > target else (t, high)
        t = t - (mean - target) / variance if variance > 0 else high
        t = t if low < t < high else (low + high) / 2
    if abs(t) < 1e-4:  # next to the mean
        return 0.5
    cumulant = math.fsum(it.pulls * math.log1p(it.chance * math.expm1(t)) for it in trials)
    w = math.copysign(math.sqrt(max(1e-12, 2 * (t * target - cumulant))), t)
    u = 2 * math.sinh(t / 2) * math.sqrt(variance)
    density = math.exp(-w * w / 2) / math.sqrt(2 * math.pi)
    return min(1.0, max(0.0, normal_tail(w) + density * (1 / u - 1 / w)))


class GTest(NamedTuple):
    """A G-test: the statistic, its degrees of freedom, and the probability of one at least as large."""

    statistic: float
    degrees: int
    p_value: float


def g_test(observed: Sequence[float], expected: Sequence[float]) -> GTest:
    """Whether counts fit their expectations, of the same sum: the likelihood ratio 2 sum O ln(O/E)."""
    statistic = 2 * math.fsum(
        count * math.log(count / share) for count, share in zip(observed, expected, strict=True) if count
    )
    degrees = max(0, len(observed) - 1)
    return GTest(max(0.0, statistic), degrees, chi_squared_tail(statistic, degrees) if degrees else 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for each other (Holm 1979): at most `alpha` is right by chance in a share `alpha` at most.

    Holds whatever depends on what.
    """
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted
