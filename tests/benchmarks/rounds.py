"""Contestants in turn, round by round: figures that bear a machine which others use as well."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tests.benchmarks.lab import Say


class Ratio(NamedTuple):
    """The median of the rounds' ratios, and the lowest and the highest of them."""

    median: float
    low: float
    high: float


class Rounds:
    """What was measured: a figure of each contestant for each round."""

    def __init__(self, seen: Mapping[str, list[float]]) -> None:
        self._seen = seen

    def median(self, name: str) -> float:
        return statistics.median(self._seen[name])

    def beside(self, name: str, *others: str) -> Ratio:
        """One contestant against another, or against the best of several, in the same round.

        What else the machine did then hit both, which a ratio of two medians would not know.
        """
        ratios = [
            mine / max(theirs)
            for mine, *theirs in zip(self._seen[name], *(self._seen[it] for it in others), strict=True)
        ]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def interleaved(contestants: Mapping[str, Callable[[], float]], rounds: int, say: Say) -> Rounds:
    """Measure each contestant once in every round, each round beginning with another one."""
    seen: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(1, rounds + 1):
        # The second contestant of a round meets another machine than the first.
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seen[name].append(contestants[name]())
            say(f"round {number}: {name} {seen[name][-1]:,.0f}/s")
    return Rounds(seen)
