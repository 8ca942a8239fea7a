"""Campaigns for the gateway's tests, and how an operator puts them into a state."""

from __future__ import annotations

from sqlalchemy import Engine

from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.storage.campaigns import CampaignState
from tombola.worker.campaigns import versions

BY = {"operator": "ann", "reason": "for Monday"}
BOUNDS = versions.Bounds(return_max=1_000.0)
SEEN_WITHIN_S = 20.0  # by a gateway; it looks every second or two

GARDEN = """\
name = "garden"
title = "Winter garden"
asset = "POINT"
cost = { 1 = "10.00", 10 = "90.00" }
day = "Asia/Shanghai"

[limits]
per_day = 1000

[[prize]]
code = "phone"
title = "A phone"
weight = 1
stock = 3
per_account = 1
value = "100.00"
instead = "five"
grants = [{ asset = "ITEM.PHONE", amount = "1" }]

[[prize]]
code = "five"
weight = 2999
grants = [{ asset = "POINT", amount = "5.00" }]

[[prize]]
code = "nothing"
weight = 7000

[[guarantee]]
name = "sure"
prizes = ["phone", "five"]
hard_at = 10
"""


def published(engine: Engine, text: str, *states: CampaignState) -> Odds:
    """Publish a manifest, and move its campaign through `states`."""
    odds = manifest.parse(text)
    versions.publish(engine, odds, bounds=BOUNDS, **BY)
    for state in states:
        versions.move(engine, odds.name, state, **BY)
    return odds
