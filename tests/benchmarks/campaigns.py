"""Draws by an operator's campaign beside draws of the built-in one: stock in eight rows and in one, and ten-pulls."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

from tests.benchmarks.lab import ACCOUNTS, Lab, Say, Sizes, make_draws
from tests.benchmarks.report import Finding, beside
from tests.benchmarks.rounds import interleaved
from tombola.producers import DrawRequest
from tombola.producers.domain.campaigns import manifest
from tombola.producers.storage.campaigns import CampaignState
from tombola.worker.campaigns import versions

# As the built-in campaign: three of ten win 5.00.
STOCKED: Final = """
name = "stocked"
asset = "POINT"
cost = {{ 1 = "1.00", 10 = "10.00" }}

[[prize]]
code = "five"
weight = 30
stock = {stock}
instead = "nothing"
grants = [{{ asset = "POINT", amount = "5.00" }}]

[[prize]]
code = "nothing"
weight = 70
"""
IN_ONE_ROW, IN_EIGHT_ROWS = 1_000, 1_001
UNITS: Final = 10_000_000
BY: Final = {"operator": "bench", "reason": "benchmark"}


def campaigns(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """Each in turn, a Stream and one worker; every round ends with the audit."""
    pulls = max(1, sizes.draws // 10)
    contenders: dict[str, Callable[[], float]] = {
        "default": lambda: _rate(lab, make_draws(sizes.draws)),
        "eight rows": lambda: _rate(lab, _draws(sizes.draws), IN_EIGHT_ROWS),
        "one row": lambda: _rate(lab, _draws(sizes.draws), IN_ONE_ROW),
        "ten-pulls": lambda: 10 * _rate(lab, _draws(pulls, pulls=10), IN_EIGHT_ROWS),
    }
    rounds = interleaved(contenders, sizes.rounds, say)
    group = "campaigns"
    return [
        Finding(group, "the built-in campaign", rounds.median("default"), "draws/s"),
        Finding(group, "a stocked prize, eight rows", rounds.median("eight rows"), "draws/s"),
        Finding(group, "a stocked prize, one row", rounds.median("one row"), "draws/s"),
        Finding(group, "ten-pulls of a stocked prize", rounds.median("ten-pulls"), "pulls/s"),
        beside(group, "eight rows : built-in", rounds.beside("eight rows", "default"), 0.9),
        beside(group, "one row : built-in", rounds.beside("one row", "default"), 0.7),
        beside(group, "ten-pulls : single draws, in pulls", rounds.beside("ten-pulls", "eight rows"), 4),
    ]


def _draws(count: int, *, pulls: int | None = None) -> list[DrawRequest]:
    return [DrawRequest(account_id=random.randint(1, ACCOUNTS), campaign="stocked", pulls=pulls) for _ in range(count)]


def _rate(lab: Lab, draws: Sequence[DrawRequest], stock: int | None = None) -> float:
    """The rate at which one worker settles `draws` from a full queue, with the campaign if `stock` is said."""
    lab.clear()
    if stock is not None:
        odds = manifest.parse(STOCKED.format(stock=stock))
        versions.publish(lab.engine, odds, bounds=versions.Bounds(return_max=2.0), **BY)
        versions.move(lab.engine, odds.name, CampaignState.OPEN, **BY)
        versions.restock(lab.engine, odds.name, "five", UNITS, **BY)
    contestant = lab.stream()
    contestant.fill(draws)
    with lab.worker(contestant) as worker:
        lab.drain(contestant, worker, len(draws), is_done=lambda: lab.settled(draws) == len(draws))
    lab.check_books(len(draws))
    return lab.settle_rate(draws)
