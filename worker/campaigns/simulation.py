"""Monte Carlo: many pulls by the odds, through the same code that draws for players. Pure, no I/O.

Each simulated account pulls the same number of times, one account after the other within a round, so stock is taken in
the order in which a campaign's accounts would take it. Stock, guarantees, tiers and limits per account hold; days do
not pass, so a limit per day is left out.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

from tombola.producers.domain.campaigns.drawing import Drawing
from tombola.producers.domain.campaigns.odds import Odds, Prize
from tombola.producers.domain.errors import InvalidRequest

DRAWS_MAX: Final = 100_000_000
PROGRESS_EVERY: Final = 1_000  # draws
BUCKETS: Final = 21  # of accounts by what came back, a tenth of what was paid each


@dataclass(slots=True)
class Player:
    """One account of the simulation: what the next pull depends on, and what came of the last ones."""

    since_hit: tuple[int, ...]
    pulls: int = 0
    spent: Decimal = Decimal(0)
    value: Decimal = Decimal(0)
    losses: int = 0  # in a row
    won: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Simulation:
    """What the pulls came to. `paid` and `squares` are sums over pulls, by asset code."""

    odds: Odds
    pulls: int = 0
    refused: int = 0  # over the limit per account
    prizes: Counter[str] = field(default_factory=Counter)
    paid: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    squares: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    spent: Decimal = Decimal(0)
    value: Decimal = Decimal(0)
    sold_out_at: dict[str, int] = field(default_factory=dict)  # prize code: the pull that took the last unit
    longest_losing: int = 0
    returns: list[float] = field(default_factory=list)  # value per unit spent, one of each account

    def by_return(self) -> list[tuple[str, int]]:
        """How the accounts fared: how many got back 0 to 10 % of what they had paid, 10 to 20 %, …, 200 % and more.

        The list ends at the last share that an account got back.
        """
        counts = Counter(min(BUCKETS - 1, int(share * 10)) for share in self.returns)
        return [
            (
                f"{number * 10} % and more" if number == BUCKETS - 1 else f"{number * 10} to {number * 10 + 10} %",
                counts[number],
            )
            for number in range(max(counts, default=-1) + 1)
        ]

    @property
    def return_to_player(self) -> float:
        """The value that came back per unit paid."""
        return float(self.value / self.spent) if self.spent else 0.0

    def expectation(self, asset_code: str) -> float:
        """What a pull paid in this asset on average."""
        return self.paid[asset_code] / max(1, self.pulls)

    def deviation(self, asset_code: str) -> float:
        """The standard deviation of what a single pull paid in this asset."""
        return math.sqrt(max(0.0, self.squares[asset_code] / max(1, self.pulls) - self.expectation(asset_code) ** 2))


def simulate(
    odds: Odds,
    *,
    draws: int,
    accounts: int,
    pulls: int = 1,
    seed: str = "simulation",
    on_progress: Callable[[int], None] = lambda _draws: None,
) -> Simulation:
    """Draw `draws` requests of `pulls` pulls each, by `accounts` accounts in turn. The same seed, the same outcome.

    `on_progress` is called every PROGRESS_EVERY draws with the number of draws since the last call. Raises
    InvalidRequest for numbers out of range, and for `pulls` that the campaign does not sell.
    """
    for name, value in (("draws", draws), ("accounts", accounts)):
        if not 1 <= value <= DRAWS_MAX:
            raise InvalidRequest(f"{name} are 1 to {DRAWS_MAX:,}, not {value:,}")
    if pulls not in odds.cost:
        raise InvalidRequest(f"campaign {odds.name} sells {', '.join(map(str, odds.cost))} pulls at once, not {pulls}")
    key = hashlib.sha256(seed.encode()).digest()
    found = Simulation(odds)
    stock = {prize.code: prize.stock for prize in odds.prizes if prize.stock is not None}
    players = [Player(tuple(0 for _ in odds.guarantees)) for _ in range(min(accounts, draws))]
    for number in range(draws):
        account = number % len(players)
        player = players[account]
        if odds.per_account is not None and player.pulls + pulls > odds.per_account:
            found.refused += 1
        else:
            _draw(found, player, Drawing(key, odds, account + 1, str(number)), pulls, stock)
        if (number + 1) % PROGRESS_EVERY == 0:
            on_progress(PROGRESS_EVERY)
    on_progress(draws % PROGRESS_EVERY)
    found.returns = [float(it.value / it.spent) for it in players if it.spent]
    return found


def _draw(found: Simulation, player: Player, drawing: Drawing, pulls: int, stock: dict[str, int]) -> None:
    """One request of one account."""
    odds = found.odds
    tier = odds.tier_of(player.spent)

    def is_available(prize: Prize) -> bool:
        is_left = stock.get(prize.code, 1) > 0
        return is_left and (prize.per_account is None or player.won[prize.code] < prize.per_account)

    player.spent += odds.cost[pulls]
    found.spent += odds.cost[pulls]
    for pull in range(1, pulls + 1):
        prize, _, player.since_hit = drawing.pull(pull, tier, player.since_hit, is_available)
        found.pulls += 1
        player.pulls += 1
        player.won[prize.code] += 1
        found.prizes[prize.code] += 1
        if prize.code in stock:
            stock[prize.code] -= 1
            if not stock[prize.code]:
                found.sold_out_at[prize.code] = found.pulls
        player.value += prize.value
        found.value += prize.value
        _pay(found, prize)
        player.losses = 0 if prize.grants else player.losses + 1
        found.longest_losing = max(found.longest_losing, player.losses)


def _pay(found: Simulation, prize: Prize) -> None:
    paid: dict[str, float] = defaultdict(float)
    for grant in prize.grants:
        if grant.asset_code:
            paid[grant.asset_code] += float(grant.amount)
    for asset_code, amount in paid.items():
        found.paid[asset_code] += amount
        found.squares[asset_code] += amount * amount
