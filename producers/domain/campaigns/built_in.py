"""The odds of the built-in campaign `default`, in the shape that the other campaigns have.

`default` is not drawn by these odds (producers.domain.draw draws it), but by the same chances under the same hash.
"""

from __future__ import annotations

from typing import Final

from tombola.producers.domain import draw
from tombola.producers.domain.campaigns.odds import Grant, Odds, Prize


def odds_of_built_in(campaign: draw.Campaign) -> Odds:
    """The odds of a campaign of producers.domain.draw; the code of a prize is its amount, which results tell."""
    return Odds(
        name=campaign.name,
        asset_code=campaign.asset_code,
        cost={1: campaign.cost},
        prizes=tuple(
            Prize(
                code=str(it.amount),
                weight=it.weight,
                grants=(Grant(campaign.asset_code, it.amount),) if it.amount else (),
                value=it.amount,
            )
            for it in campaign.prizes
        ),
        canonical=campaign.canonical,
    )


DEFAULT_ODDS: Final = odds_of_built_in(draw.DEFAULT_CAMPAIGN)
