"""What odds come to: every exact figure of one version, computed once, for all who show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

from tombola.producers.domain.campaigns import figures
from tombola.producers.domain.campaigns.figures import Asset, Lasts
from tombola.producers.domain.campaigns.odds import Odds

STREAK: Final = 20  # losses in a row whose chance is told


@dataclass(frozen=True, slots=True)
class Outlook:
    """The exact figures of `odds`; chances are by prize code.

    `base` are the chances by weight alone, `effective` those in the long run, guarantees included; `by_tier` are the
    effective ones of each tier. `returns` is the value that comes back per unit paid, by the number of pulls at once.
    """

    odds: Odds
    base: Mapping[str, Fraction]
    effective: Mapping[str, float]
    by_tier: Mapping[str, Mapping[str, float]]
    assets: Sequence[Asset]
    returns: Mapping[int, float]
    liability: Decimal
    lasts: Sequence[Lasts]
    losing_streak: float

    @classmethod
    def of(cls, odds: Odds) -> Outlook:
        """The figures of these odds: milliseconds for most, seconds for long guarantees over many prizes."""
        effective = figures.effective_chances(odds)
        return cls(
            odds=odds,
            base=figures.base_chances(odds),
            effective=effective,
            by_tier={tier.name: figures.effective_chances(odds, tier.name) for tier in odds.tiers},
            assets=figures.assets(odds, effective),
            returns={pulls: figures.return_to_player(odds, effective, pulls) for pulls in odds.cost},
            liability=figures.liability(odds),
            lasts=tuple(figures.stock_lasts(odds, effective)),
            losing_streak=figures.losing_streak(odds, STREAK),
        )

    def told(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "campaign": self.odds.name,
            "prizes": [
                {
                    "code": prize.code,
                    "chance": str(self.base[prize.code]),
                    "effective": self.effective[prize.code],
                    "stock": prize.stock,
                    "value": str(prize.value),
                }
                for prize in self.odds.prizes
            ],
            "per_pull": {
                it.asset_code: {"expectation": it.expectation, "deviation": it.deviation} for it in self.assets
            },
            "return_to_player": {str(pulls): share for pulls, share in self.returns.items()},
            "liability": str(self.liability),
            "stock_lasts_pulls": {it.code: [it.early, it.median, it.late] for it in self.lasts},
            f"losing_streak_of_{STREAK}": self.losing_streak,
        }
