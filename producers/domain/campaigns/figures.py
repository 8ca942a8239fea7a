"""What odds come to, before anybody draws: exact chances, expectations, deviations, and how long stock lasts.

Chances with guarantees come from an exact Markov chain. A hit of the narrowest guarantee resets every counter, and it
comes at the latest at its `hard_at`-th pull, so the chain is followed from one such hit to the next: finitely many
steps, no iteration to a limit. All figures assume that every prize is available, unless they say otherwise.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from tombola.producers.domain.campaigns.odds import Odds, Prize


class Asset(NamedTuple):
    """What one pull pays in an asset on average, and the standard deviation of a single pull (without its price)."""

    asset_code: str
    expectation: float
    deviation: float


class Lasts(NamedTuple):
    """After how many pulls a prize's stock is gone: 5 %, half and 95 % of campaigns have run out by then."""

    code: str
    early: float
    median: float
    late: float


def base_chances(odds: Odds, tier: str = "") -> dict[str, Fraction]:
    """The chance of each prize by its weight alone, by code: what a pull has that no guarantee touches."""
    weights = odds.weights_of(tier)
    total = sum(weights)
    return {prize.code: Fraction(weight, total) for prize, weight in zip(odds.prizes, weights, strict=True)}


def effective_chances(odds: Odds, tier: str = "") -> dict[str, float]:
    """The share of each prize in the long run, guarantees included, by code."""
    if not odds.guarantees:
        return {code: float(chance) for code, chance in base_chances(odds, tier).items()}
    expected: dict[str, float] = defaultdict(float)
    length = 0.0
    for reached, chances in _cycle(odds, tier):
        length += reached
        for code, chance in chances.items():
            expected[code] += reached * chance
    return {prize.code: expected[prize.code] / length for prize in odds.prizes}


def pulls_until_hit(odds: Odds, tier: str = "") -> list[float]:
    """The chance that the narrowest guarantee's next hit comes at pull 1, 2, 3, …; empty without a guarantee."""
    if not odds.guarantees:
        return []
    hits: list[float] = []
    prizes = odds.guarantees[0].prizes
    step = -1
    for number, reached, chances in _cycle_steps(odds, tier):
        if number != step:
            hits.append(0.0)
            step = number
        hits[-1] += reached * sum(chances[code] for code in prizes)
    return hits


def assets(odds: Odds, chances: Mapping[str, float]) -> list[Asset]:
    """What a pull pays, per asset, at these chances."""
    paid = {prize.code: _paid(prize) for prize in odds.prizes}
    found = []
    for asset_code in (odds.asset_code, *odds.asset_codes):
        mean = math.fsum(chances[code] * paid[code].get(asset_code, 0.0) for code in chances)
        square = math.fsum(chances[code] * paid[code].get(asset_code, 0.0) ** 2 for code in chances)
        found.append(Asset(asset_code, mean, math.sqrt(max(0.0, square - mean**2))))
    return found


def _paid(prize: Prize) -> dict[str, float]:
    paid: dict[str, float] = defaultdict(float)
    for grant in prize.grants:
        if grant.asset_code:
            paid[grant.asset_code] += float(grant.amount)
    return paid


def return_to_player(odds: Odds, chances: Mapping[str, float], pulls: int) -> float:
    """The value that comes back per unit paid, at the price of `pulls` in one request."""
    value = math.fsum(chances[prize.code] * float(prize.value) for prize in odds.prizes)
    return value * pulls / float(odds.cost[pulls])


def liability(odds: Odds) -> Decimal:
    """The value of all stock, in the campaign's asset."""
    return sum(((prize.stock or 0) * prize.value for prize in odds.prizes), Decimal("0.00"))


def losing_streak(odds: Odds, length: int, tier: str = "") -> float:
    """The chance that `length` pulls after a hit of every guarantee (or at the beginning) all win nothing."""
    losing = [prize.code for prize in odds.prizes if not prize.grants]
    if not odds.guarantees:
        chances = base_chances(odds, tier)
        return float(sum((chances[code] for code in losing), Fraction(0)) ** length)
    chance = 1.0
    counters = tuple(0 for _ in odds.guarantees)
    for _ in range(length):
        chances_now = chances_at(odds, tier, counters)
        chance *= sum(chances_now[code] for code in losing)
        counters = tuple(
            min(count + 1, guarantee.hard_at) for guarantee, count in zip(odds.guarantees, counters, strict=True)
        )
        if not chance:
            break
    return chance


def stock_lasts(odds: Odds, chances: Mapping[str, float]) -> Iterator[Lasts]:
    """How many pulls each stock lasts. The pull that takes the last unit is negative binomially distributed."""
    for prize in odds.prizes:
        if prize.stock and (chance := chances[prize.code]) > 0:
            yield Lasts(prize.code, *(_pulls_until(prize.stock, chance, share) for share in (0.05, 0.5, 0.95)))


def _pulls_until(units: int, chance: float, share: float) -> float:
    """The least number of pulls after which at least `units` were won with a probability of `share`."""
    low, high = units, max(units, math.ceil(units / chance))
    while _at_least(units, high, chance) < share:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        if _at_least(units, middle, chance) >= share:
            high = middle
        else:
            low = middle + 1
    return low


def _at_least(units: int, pulls: int, chance: float) -> float:
    """P(X >= units) for X binomial: exact up to 10,000 units, by the normal distribution above."""
    if chance >= 1:
        return float(pulls >= units)
    if units > 10_000:
        deviation = math.sqrt(pulls * chance * (1 - chance))
        return 0.5 * math.erfc((units - 0.5 - pulls * chance) / (deviation * math.sqrt(2)))
    log_chance, log_miss = math.log(chance), math.log1p(-chance)
    log_factorial = math.lgamma(pulls + 1)
    below = math.fsum(
        math.exp(
            log_factorial - math.lgamma(k + 1) - math.lgamma(pulls - k + 1) + k * log_chance + (pulls - k) * log_miss
        )
        for k in range(min(units, pulls + 1))
    )
    return max(0.0, 1.0 - below)


# ---- the chain -------------------------------------------------------------------------------------------------------


def _cycle(odds: Odds, tier: str) -> Iterator[tuple[float, Mapping[str, float]]]:
    for _, reached, chances in _cycle_steps(odds, tier):
        yield reached, chances


def _cycle_steps(odds: Odds, tier: str) -> Iterator[tuple[int, float, Mapping[str, float]]]:
    """From a hit of the narrowest guarantee to the next one: each state, in the order of pulls.

    The pull's number from 0, the probability that it is reached in that state, and its prizes' chances there.
    """
    states: dict[tuple[int, ...], float] = {tuple(0 for _ in odds.guarantees): 1.0}
    narrowest = odds.guarantees[0].prizes
    number = 0
    while states:
        following: dict[tuple[int, ...], float] = defaultdict(float)
        for counters, reached in states.items():
            chances = chances_at(odds, tier, counters)
            yield number, reached, chances
            for code, chance in chances.items():
                if chance and code not in narrowest:
                    after = tuple(
                        0 if code in guarantee.prizes else count + 1
                        for guarantee, count in zip(odds.guarantees, counters, strict=True)
                    )
                    following[after] += reached * chance
        states = following
        number += 1


def chances_at(odds: Odds, tier: str, since_hit: Sequence[int]) -> dict[str, float]:
    """The chances at one pull, by code, with these counters: what Drawing.pull draws by."""
    weights = dict(zip((prize.code for prize in odds.prizes), odds.weights_of(tier), strict=True))
    due = next((it for it, count in zip(odds.guarantees, since_hit, strict=True) if it.is_due(count)), None)
    if due is not None:
        weights = {code: weight if code in due.prizes else 0 for code, weight in weights.items()}
    shares = {code: Fraction(weight) for code, weight in weights.items()}
    total = Fraction(sum(weights.values()))
    for guarantee, count in zip(odds.guarantees, since_hit, strict=True):
        if due is None or guarantee.prizes < due.prizes:
            tickets = guarantee.tickets(count)
            inside = sum(weights[code] for code in guarantee.prizes)
            total += tickets
            for code in guarantee.prizes:
                shares[code] += Fraction(tickets * weights[code], inside)
    return {code: float(share / total) for code, share in shares.items()}
