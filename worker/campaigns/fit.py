"""Goodness of fit: does the drawing do what the odds say? Many pulls by fresh seeds, and a chi-squared test.

Pulls without a guarantee are independent, and Pearson's test fits. With a guarantee the pulls of an account depend on
each other; independent are its cycles, from one hit of the narrowest guarantee to the next. So each account draws one
cycle, and the test takes the covariance of the prizes' counts from the cycles (Wald's test of a ratio of means).
Every prize is available here, as for the effective chances.
"""

from __future__ import annotations

import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from tombola.producers.domain.campaigns import figures
from tombola.producers.domain.campaigns.drawing import Drawing
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.errors import InvalidRequest
from tombola.worker.conformity.tails import chi_squared_tail

# How often a prize is to come at least, to be tested by itself; rarer prizes are tested as one. Pearson's test needs
# fewer, as it knows the variance.
EXPECTED_MIN: Final = 20.0
EXPECTED_IN_CYCLES_MIN: Final = 100.0
CELLS_MAX: Final = 60
P_MIN: Final = 0.001  # below: the frequencies do not fit. One run in a thousand of right odds is below it
PROGRESS_EVERY: Final = 1_000  # pulls


@dataclass(frozen=True, slots=True)
class Fit:
    """What `pulls` pulls of accounts in `tier` came to: how often each prize was drawn, and whether that fits.

    `p_value` is the probability that right odds give frequencies at least as far from the `expected` shares.
    """

    tier: str
    pulls: int
    drawn: Mapping[str, int]
    expected: Mapping[str, float]
    chi_squared: float
    degrees: int
    p_value: float

    def is_fit(self, p_min: float = P_MIN) -> bool:
        """Whether the frequencies fit the exact chances."""
        return self.p_value >= p_min


def fit(
    odds: Odds,
    *,
    draws: int,
    tier: str = "",
    seed: bytes | None = None,
    on_progress: Callable[[int], None] = lambda _pulls: None,
) -> Fit:
    """Draw at least `draws` pulls of accounts in `tier`, and compare. A fresh seed is made if none is given.

    `on_progress` gets the number of pulls since its last call. Raises InvalidRequest for too few draws to test.
    """
    chances = figures.effective_chances(odds, tier)
    least = EXPECTED_IN_CYCLES_MIN if odds.guarantees else EXPECTED_MIN
    cells = _cells(chances, draws, least)
    if len(set(cells.values())) < 2 <= len(cells):
        raise InvalidRequest(f"{draws:,} draws are too few to tell: two prizes are to come {least:g} times each")
    tally = _Tally(cells)
    key = secrets.token_bytes(32) if seed is None else seed
    account_id = told = 0
    while tally.pulls < draws:
        account_id += 1
        tally.add(_cycle(key, odds, tier, account_id))
        if tally.pulls - told >= PROGRESS_EVERY:
            on_progress(tally.pulls - told)
            told = tally.pulls
    on_progress(tally.pulls - told)
    impossible = any(tally.drawn[code] for code, chance in chances.items() if not chance)
    test = tally.wald if odds.guarantees else tally.pearson
    chi_squared, degrees = test(chances)
    p_value = 0.0 if impossible else chi_squared_tail(chi_squared, degrees)
    return Fit(tier, tally.pulls, tally.drawn, chances, chi_squared, degrees, p_value)


def _cycle(seed: bytes, odds: Odds, tier: str, account_id: int) -> Counter[str]:
    """The prizes of a new account's pulls until the narrowest guarantee is hit; one pull without a guarantee."""
    drawn: Counter[str] = Counter()
    since_hit = tuple(0 for _ in odds.guarantees)
    ends = odds.guarantees[0].prizes if odds.guarantees else frozenset(odds.by_code)
    number = 0
    while True:
        number += 1
        prize, _, since_hit = Drawing(seed, odds, account_id, str(number)).pull(1, tier, since_hit)
        drawn[prize.code] += 1
        if prize.code in ends:
            return drawn


def _cells(chances: Mapping[str, float], draws: int, least: float) -> dict[str, int]:
    """The cell in which each prize is counted, from 0: a cell of its own, or that of all rare ones together."""
    likeliest = sorted((it for it in chances if chances[it]), key=lambda it: -chances[it])
    own = [it for it in likeliest if chances[it] * draws >= least][: CELLS_MAX - 1]
    rare = likeliest[len(own) :]
    if rare and sum(chances[it] for it in rare) * draws < least and own:
        rare.append(own.pop())
    return {**{code: number for number, code in enumerate(own)}, **dict.fromkeys(rare, len(own))}


class _Tally:
    """Counts over independent cycles, and what their covariance needs: sums over cycles of products of counts."""

    def __init__(self, cells: Mapping[str, int]) -> None:
        self._cells = cells
        self._size = 1 + max(cells.values(), default=0)
        self.pulls = 0
        self.drawn: Counter[str] = Counter()
        self._lengths_squared = 0
        self._by_length = [0] * self._size  # of each cell: its count times the cycle's length
        self._products: defaultdict[tuple[int, int], int] = defaultdict(int)

    def add(self, drawn: Counter[str]) -> None:
        """Add the prizes of one cycle."""
        length = drawn.total()
        self.pulls += length
        self.drawn.update(drawn)
        self._lengths_squared += length * length
        counts: Counter[int] = Counter()
        for code, count in drawn.items():
            if code in self._cells:
                counts[self._cells[code]] += count
        for cell, count in counts.items():
            self._by_length[cell] += count * length
            for other, more in counts.items():
                self._products[cell, other] += count * more

    def pearson(self, chances: Mapping[str, float]) -> tuple[float, int]:
        """The statistic of independent pulls, and its degrees of freedom."""
        found, shares = self._by_cell(chances)
        statistic = sum(
            (count - share * self.pulls) ** 2 / (share * self.pulls) for count, share in zip(found, shares, strict=True)
        )
        return statistic, self._size - 1

    def wald(self, chances: Mapping[str, float]) -> tuple[float, int]:
        """The statistic of independent cycles, and its degrees of freedom."""
        found, shares = self._by_cell(chances)
        apart = [count - share * self.pulls for count, share in zip(found, shares, strict=True)]
        covariance = [
            [
                self._products[one, two]
                - shares[two] * self._by_length[one]
                - shares[one] * self._by_length[two]
                + shares[one] * shares[two] * self._lengths_squared
                for two in range(self._size)
            ]
            for one in range(self._size)
        ]
        return _quadratic_form(covariance, apart)

    def _by_cell(self, chances: Mapping[str, float]) -> tuple[list[int], list[float]]:
        found, shares = [0] * self._size, [0.0] * self._size
        for code, cell in self._cells.items():
            found[cell] += self.drawn[code]
            shares[cell] += chances[code]
        return found, shares


def _quadratic_form(matrix: list[list[float]], vector: list[float]) -> tuple[float, int]:
    """v M⁻¹ v, and the rank of M, by elimination. A count that the others imply adds nothing to either."""
    scale = [matrix[it][it] for it in range(len(vector))]
    value, rank = 0.0, 0
    for at in range(len(vector)):
        pivot = matrix[at][at]
        if pivot <= 1e-9 * scale[at]:
            continue
        value += vector[at] ** 2 / pivot
        rank += 1
        for row in range(at + 1, len(vector)):
            factor = matrix[row][at] / pivot
            vector[row] -= factor * vector[at]
            for column in range(at + 1, len(vector)):
                matrix[row][column] -= factor * matrix[at][column]
    return value, rank
