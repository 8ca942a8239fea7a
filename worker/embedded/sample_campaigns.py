"""The sample campaigns of `tombola up`, beside the built-in one: published and opened at the first start, once."""

from __future__ import annotations

from importlib import resources
from typing import Final

from sqlalchemy import Engine

from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.storage.campaigns import Campaigns, CampaignState
from tombola.worker.campaigns import versions

FILES: Final = ("raffle.toml", "stars.toml")  # in this folder
BY: Final = "tombola up"
REASON: Final = "a sample to look at, to draw by and to change"


def samples() -> list[Odds]:
    """The odds of the sample campaigns."""
    folder = resources.files("tombola.worker.embedded")
    return [manifest.parse(folder.joinpath(name).read_bytes()) for name in FILES]


def publish_and_open(engine: Engine) -> None:
    """Publish and open each sample campaign whose name is free. What an operator has made of one stays as it is.

    A start that ended half-way left a draft, which nobody but this function makes of a sample: it is opened now.
    """
    for odds in samples():
        campaign = Campaigns(engine).find(odds.name)
        if campaign is None:
            versions.publish(engine, odds, bounds=versions.Bounds(), operator=BY, reason=REASON)
        elif campaign.state is not CampaignState.DRAFT or campaign.odds != odds:
            continue
        versions.move(engine, odds.name, CampaignState.OPEN, operator=BY, reason=REASON)
