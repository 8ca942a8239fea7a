"""Pulls added up, as blocks are counted: by state, hour and caller, and by account. Pure, no I/O."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from tombola.producers.domain.campaigns.odds import Odds
from tombola.worker.conformity.chances import STAKES, Compared, Pull
from tombola.worker.conformity.tails import Sums


class Cell(NamedTuple):
    """Pulls in an hour, of a caller's requests (empty: none), that stood alike and drew the same prize."""

    hour: datetime
    caller: str
    pull: Pull


@dataclass(slots=True)
class Luck:
    """What the pulls of an account came to: wins, the sum of their chances p, that of p(1 - p).

    `capital` is what a player has of 1 who stakes a share of STAKES on each pull's win at true odds, as logarithms.
    """

    pulls: int = 0
    wins: int = 0
    expected: float = 0.0
    variance: float = 0.0
    capital: list[float] = field(default_factory=lambda: [0.0] * len(STAKES))

    def add(self, other: Luck) -> None:
        """Add what other pulls of the account came to."""
        self.pulls += other.pulls
        self.wins += other.wins
        self.expected += other.expected
        self.variance += other.variance
        self.capital = [mine + its for mine, its in zip(self.capital, other.capital, strict=True)]

    @property
    def sums(self) -> Sums:
        """Wins beside what was expected."""
        return Sums(self.pulls, self.wins, self.expected, self.variance)

    @property
    def bound(self) -> float:
        """At most the probability that an account at true odds is ever so lucky, whenever it stops, at most 1.

        One over the mean of the capitals (Ville 1939): a player's mean capital at true odds is 1 at any time, whatever
        the next chances depend on.
        """
        most = max(self.capital)
        log_mean = most + math.log(math.fsum(math.exp(it - most) for it in self.capital) / len(self.capital))
        return math.exp(-log_mean) if log_mean > 0 else 1.0


@dataclass
class Tally:
    """What some draws by one version came to; `accounts` by day and id."""

    compared: Compared
    cells: Counter[Cell] = field(default_factory=Counter)
    accounts: dict[tuple[datetime, int], Luck] = field(default_factory=dict)

    def by_account(self) -> dict[int, Luck]:
        """The accounts over all days."""
        found: dict[int, Luck] = {}
        for (_, account_id), luck in self.accounts.items():
            found.setdefault(account_id, Luck()).add(luck)
        return found

    @classmethod
    def of(cls, odds: Odds) -> Tally:
        """An empty tally of draws by these odds."""
        return cls(Compared(odds))

    def add(self, account_id: int, hour: datetime, caller: str, pull: Pull, times: int = 1) -> None:
        """Add equal pulls of one account in one hour."""
        self.cells[Cell(hour, caller, pull)] += times
        day = hour.replace(hour=0)
        luck = self.accounts.get((day, account_id))
        if luck is None:
            luck = self.accounts[day, account_id] = Luck()
        chances = self.compared.chances(pull.state)
        luck.pulls += times
        luck.wins += times * (pull.drawn in self.compared.wins)
        luck.expected += times * chances.win
        luck.variance += times * chances.win * (1 - chances.win)
        for at, growth in enumerate(chances.growth[pull.drawn]):
            luck.capital[at] += times * growth
