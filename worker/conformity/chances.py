"""What a pull is compared with: the exact chances of each prize where its account stood. Pure, no I/O.

The prize of a pull is the one that its ticket said: the first one of the `instead` chain, whether it was sold out or
not. Its chances depend on the tier and on the counters of guarantees alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from tombola.producers.domain.campaigns import figures
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.campaigns.record import DrawNotes
from tombola.producers.domain.errors import InvalidRequest

# The shares of what a player has that three bets stake on a win, at each pull.
STAKES: Final = (0.05, 0.3, 0.9)
WINS_SHARE_MAX: Final = 0.5  # of all pulls, by the weights


class State(NamedTuple):
    """Where an account stood before a pull: its tier (empty: none), and the pulls since each guarantee's last hit."""

    tier: str
    since_hit: tuple[int, ...]


class Pull(NamedTuple):
    """A pull: where its account stood, and the code of the prize that its ticket said."""

    state: State
    drawn: str


class Chances(NamedTuple):
    """The exact chances in a state, by the prize's code. `win` is that of a prize that counts as a win.

    `growth` says for each prize and each of STAKES the logarithm of the factor by which a player's capital changes, who
    stakes that share on the wins that are possible here, in equal parts, at true odds. Its mean factor is 1.
    """

    by_code: dict[str, float]
    win: float
    growth: dict[str, tuple[float, ...]]


class Compared:
    """One version of a campaign, as its pulls are compared with it."""

    def __init__(self, odds: Odds) -> None:
        self.odds = odds
        self.wins = winning(odds)
        self.chances = lru_cache(maxsize=None)(self._chances)
        self._tiers = {"", *(tier.name for tier in odds.tiers)}

    def pulls_of(self, notes: DrawNotes) -> list[Pull]:
        """The pulls that the notes of a charge record. Raises InvalidRequest for notes that no draw by these odds has.

        States with equal chances are one state.
        """
        odds = self.odds
        said: dict[int, str] = {}
        for number, code in notes.gone:
            said.setdefault(number, code)
        if notes.tier not in self._tiers or len(notes.since_hit) != len(odds.guarantees) or not notes.prizes:
            raise InvalidRequest(f"not the notes of a draw by odds {odds.odds_hash:.16}: {notes.written():.100}")
        counters, pulls = notes.since_hit, []
        for number, code in enumerate(notes.prizes, start=1):
            drawn = said.get(number, code)
            if drawn not in odds.by_code:
                raise InvalidRequest(f"odds {odds.odds_hash:.16} have no prize {drawn:.40}")
            pulls.append(Pull(State(notes.tier, self.reduced(counters)), drawn))
            counters = tuple(
                0 if code in guarantee.prizes else count + 1
                for guarantee, count in zip(odds.guarantees, counters, strict=True)
            )
        return pulls

    def reduced(self, since_hit: Sequence[int]) -> tuple[int, ...]:
        """Counters with the same chances, of which there are few: where a guarantee adds no tickets, its count is 0."""
        return tuple(
            guarantee.hard_at - 1 if guarantee.is_due(count) else count if guarantee.tickets(count) else 0
            for guarantee, count in zip(self.odds.guarantees, since_hit, strict=True)
        )

    def _chances(self, state: State) -> Chances:
        by_code = figures.chances_at(self.odds, state.tier, state.since_hit)
        possible = [code for code in self.wins if by_code[code] > 0]
        growth = {}
        for code, chance in by_code.items():
            # What a unit that is staked on this prize alone pays; nothing is staked where no win is possible.
            paid = 1 / (chance * len(possible)) if code in possible else 0.0
            growth[code] = tuple(
                math.log(1 - stake + stake * paid) if possible and chance > 0 else 0.0 for stake in STAKES
            )
        return Chances(by_code, min(1.0, math.fsum(by_code[code] for code in possible)), growth)


def winning(odds: Odds) -> frozenset[str]:
    """The prizes that count as wins: the rarest that hand something out, in up to half of all pulls; at least one.

    Empty where there is one prize, or none hands out anything.
    """
    total, share = sum(odds.weights), 0.0
    found: list[str] = []
    ranked = sorted((it for it in odds.prizes if it.grants and it.weight), key=lambda it: (it.weight, it.code))
    for prize in ranked:
        share += prize.weight / total
        if found and share > WINS_SHARE_MAX:
            break
        found.append(prize.code)
    return frozenset(found if len(odds.prizes) > 1 else ())
