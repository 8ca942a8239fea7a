"""Campaigns that are played without a server: by the code that draws for players, recorded as the ledger records it.

An honest player draws under fresh keys. An insider tries keys until one wins: then every pull of his wins.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from tombola.producers.domain.campaigns.drawing import Drawing
from tombola.producers.domain.campaigns.odds import Odds, Prize
from tombola.producers.domain.campaigns.record import DrawNotes, read_draw_notes
from tombola.worker.conformity.questions import LUCKIEST, Account, Drawn
from tombola.worker.conformity.report import ALPHA, Counted, Report, report
from tombola.worker.conformity.tails import Sums
from tombola.worker.conformity.tally import Tally

BEGIN = datetime(2026, 11, 1, tzinfo=UTC)
HOURS = 24
CALLERS = ("", "shop", "app")
COHORTS = 6


@dataclass
class Player:
    """What the next pull of an account depends on."""

    since_hit: tuple[int, ...]
    spent: Decimal = Decimal(0)
    won: Counter[str] = field(default_factory=Counter)


class Game:
    """One campaign: its players, its stock, and what its draws came to."""

    def __init__(self, odds: Odds, seed: int) -> None:
        self.odds = odds
        self.random = random.Random(seed)
        self.key = self.random.randbytes(32)
        self.stock = {prize.code: prize.stock for prize in odds.prizes if prize.stock is not None}
        self.players: dict[int, Player] = {}
        self.tally = Tally.of(odds)
        self.drawn = 0

    def draw(self, account: int, *, picks: frozenset[str] = frozenset(), hour: int | None = None) -> bool:
        """Draw once for an account; whether it won. Who `picks` prizes tries keys until the draw is one of them."""
        odds, player = self.odds, self.players.get(account)
        if player is None:
            player = self.players[account] = Player(tuple(0 for _ in odds.guarantees))
        tier = odds.tier_of(player.spent)

        def is_available(prize: Prize) -> bool:
            is_left = self.stock.get(prize.code, 1) > 0
            return is_left and (prize.per_account is None or player.won[prize.code] < prize.per_account)

        while True:
            self.drawn += 1
            drawing = Drawing(self.key, odds, account, f"r{self.drawn}")
            prize, gone, since_hit = drawing.pull(1, tier, player.since_hit, is_available)
            if not picks or (gone[0] if gone else prize.code) in picks:
                break
        notes = DrawNotes(
            odds.odds_hash, "0" * 16, (prize.code,), tier, None, player.since_hit, tuple((1, code) for code in gone)
        )
        player.since_hit = since_hit
        player.spent += odds.cost[1]
        player.won[prize.code] += 1
        if prize.code in self.stock:
            self.stock[prize.code] -= 1
        at = BEGIN + timedelta(hours=self.random.randrange(HOURS) if hour is None else hour)
        for pull in self.tally.compared.pulls_of(read_draw_notes(notes.written())):
            self.tally.add(account, at, CALLERS[account % len(CALLERS)], pull)
        return prize.code in self.tally.compared.wins

    def play(self, draws: int, accounts: int) -> None:
        """Honest draws. Players stop when they like: some after a win, some after a loss, most at any time."""
        playing = list(range(1, accounts + 1))
        self.random.shuffle(playing)
        for _ in range(draws):
            at = self.random.randrange(min(len(playing), 200))
            account = playing[at]
            has_won = self.draw(account)
            stops = self.random.random() < (0.5 if account % 3 == has_won else 0.02)
            if stops and len(playing) > 200:
                playing[at] = playing[-1]
                playing.pop()

    def report(self, alpha: float = ALPHA) -> Report:
        """What the report of these draws says."""
        return reported(self.odds, self.tally, alpha)


def reported(odds: Odds, tally: Tally, alpha: float = ALPHA) -> Report:
    """The report of what was tallied."""
    return report("game", [Counted(odds.odds_hash, 1, drawn_of(tally))], alpha=alpha)


def drawn_of(tally: Tally) -> Drawn:
    """As worker.conformity.reading reads it from the tables. Cohorts are accounts by their ids."""
    accounts = tally.by_account()
    ranked = sorted((Account(id, luck) for id, luck in accounts.items()), key=lambda it: (it.luck.bound, it.id))
    cohorts = {
        f"{number}": _sum(it.sums for id, it in accounts.items() if id % COHORTS == number) for number in range(COHORTS)
    }
    return Drawn(tally.compared, tally.cells, len(accounts), ranked[:LUCKIEST], cohorts)


def _sum(parts: Iterable[Sums]) -> Sums:
    whole = Sums()
    for it in parts:
        whole = whole.plus(it)
    return whole
