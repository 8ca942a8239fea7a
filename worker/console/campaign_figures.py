"""The figures on campaigns' pages: computed once for all who look at the same time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Final

from cachetools import LRUCache, TTLCache

from tombola.producers.domain.campaigns.odds import Odds
from tombola.worker.campaigns import live
from tombola.worker.campaigns.live import Live
from tombola.worker.campaigns.outlook import Outlook
from tombola.worker.console import shown
from tombola.worker.console.pages import Services

OUTLOOKS_MAX: Final = 64
LIVE_KEPT_MAX: Final = 64
LIVE_KEPT_S: Final = 5.0


class CampaignFigures:
    """Exact figures, which never change for one version, and live ones, which are kept for LIVE_KEPT_S."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._lock = threading.Lock()
        self._outlooks: LRUCache[str, Outlook] = LRUCache(OUTLOOKS_MAX)
        self._live: TTLCache[str, Live] = TTLCache(LIVE_KEPT_MAX, LIVE_KEPT_S)

    def outlook(self, odds: Odds) -> Outlook:
        """The exact figures of these odds."""
        with self._lock:
            known: Outlook | None = self._outlooks.get(odds.odds_hash)
        if known is None:
            known = Outlook.of(odds)
            with self._lock:
                self._outlooks[odds.odds_hash] = known
        return known

    def live(self, odds: Odds) -> Live:
        """What the latest pulls of the campaign with this live version came to, at most LIVE_KEPT_S ago."""
        with self._lock:
            known: Live | None = self._live.get(odds.odds_hash)
        if known is None:
            known = self._services.read(live.look, odds)
            with self._lock:
                self._live[odds.odds_hash] = known
        return known


def live_shown(outlook: Outlook, found: Live, left: Mapping[str, int], issued: Mapping[str, int]) -> dict[str, Any]:
    """Live figures as texts by name, and shares in per cent by name: first for the template and then for its script."""
    figures = {
        "pulls": f"{found.campaign.count:,}",
        "rate": f"{found.pulls_per_minute:,.1f}",
        "spent": f"{found.campaign.spent:,} {outlook.odds.asset_code}",
        "version pulls": f"{found.version.count:,}",
        "rows": f"{found.rows:,}",
        "since": shown.utc(found.since),
    }
    for name, pulls in (("", found.campaign), ("version ", found.version)):
        figures[f"{name}return"] = shown.percent(pulls.return_to_player) if pulls.count else ""
        figures[f"{name}expected"] = shown.percent(pulls.return_expected) if pulls.count else ""
    bars = {}
    for prize in outlook.odds.prizes:
        figures[f"won {prize.code}"] = f"{found.version.prizes[prize.code]:,}"
        figures[f"share {prize.code}"] = shown.percent(found.version.share(prize.code)) if found.version.count else ""
        if prize.is_stocked:
            figures[f"left {prize.code}"] = f"{left.get(prize.code, 0):,}"
            bars[f"left {prize.code}"] = round(100 * left.get(prize.code, 0) / max(1, issued.get(prize.code, 0)), 2)
    return {"figures": figures, "bars": bars}
