"""Campaigns as they are read: which are live, in which state, and every version by its hash.

Every process holds a Campaigns. It looks for changes at most once in REFRESH_S, by one number, and only when a request
names a campaign other than the built-in one. Versions never change, so a version is read once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Final, NamedTuple

from cachetools import LRUCache
from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.draw import CAMPAIGNS
from tombola.producers.domain.errors import (
    CampaignClosed,
    CampaignNotOpen,
    CampaignPaused,
    PullsNotSold,
    UnknownCampaign,
)
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import campaign_versions as versions
from tombola.producers.storage.schema import campaigns as table

REFRESH_S: Final = 1.0
UNKNOWN_REFRESH_S: Final = 0.1
VERSIONS_MAX: Final = 1_000  # kept in memory
NAMES_SHOWN_MAX: Final = 20


class CampaignState(StrEnum):
    """A draft has no live version. Only an open campaign accepts requests; closed is for good."""

    DRAFT = "draft"
    OPEN = "open"
    PAUSED = "paused"
    CLOSED = "closed"


LISTED: Final = frozenset({CampaignState.OPEN, CampaignState.PAUSED})  # what callers and players are told of


class Campaign(NamedTuple):
    """A campaign as it stands; `odds` are the live version, None for a draft."""

    name: str
    state: CampaignState
    odds: Odds | None


class Campaigns:
    """The campaigns in a database. Safe to share between threads.

    Every method raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._first_look = threading.Lock()
        self._looked_at: float | None = None  # monotonic
        self._revision: int | None = None  # None until the first look
        self._by_name: Mapping[str, Campaign] = {}
        self._versions: LRUCache[str, Odds] = LRUCache(VERSIONS_MAX)

    def find(self, name: str) -> Campaign | None:
        """The campaign of that name as it stood at most REFRESH_S ago; None if there is none.

        For an unknown name it looks again after UNKNOWN_REFRESH_S: the campaign may have been published just now.
        """
        self._refresh()
        if name not in self._by_name:
            self._refresh(UNKNOWN_REFRESH_S)
        return self._by_name.get(name)

    def bind(self, name: str, pulls: int, moment: datetime) -> str:
        """The hash of the version that a request for `pulls` pulls is drawn by, accepted at `moment`.

        Raises UnknownCampaign, CampaignPaused, CampaignClosed, CampaignNotOpen or PullsNotSold where the campaign does
        not accept the request.
        """
        campaign = self.find(name)
        if campaign is None:
            # A draft is its operator's secret, and a closed campaign is no choice.
            others = sorted(it.name for it in self._by_name.values() if it.state in LISTED)
            known = ", ".join([*sorted(CAMPAIGNS), *others][:NAMES_SHOWN_MAX])
            raise UnknownCampaign(f"there is no campaign {name!r}, nothing was written. There are: {known}")
        odds = campaign.odds
        if campaign.state is CampaignState.PAUSED:
            raise CampaignPaused(f"campaign {name} is paused: nothing was written, try again when it is open")
        if campaign.state is CampaignState.CLOSED or (odds and odds.closes and odds.closes <= moment):
            raise CampaignClosed(f"campaign {name} has ended: nothing was written")
        if campaign.state is CampaignState.DRAFT or odds is None:
            raise CampaignNotOpen(f"campaign {name} is not open yet: nothing was written")
        if odds.opens is not None and moment < odds.opens:
            raise CampaignNotOpen(f"campaign {name} opens at {odds.opens.isoformat()}: nothing was written")
        if pulls not in odds.cost:
            sold = ", ".join(map(str, sorted(odds.cost)))
            raise PullsNotSold(f"campaign {name} sells {sold} pulls at once, not {pulls}: nothing was written")
        return odds.odds_hash

    def all(self) -> list[Campaign]:
        """Every campaign as it stood at most REFRESH_S ago, by name."""
        self._refresh()
        return [self._by_name[name] for name in sorted(self._by_name)]

    def version(self, odds_hash: str) -> Odds | None:
        """The version with that hash, live or not; None if there is none."""
        with self._lock:
            found: Odds | None = self._versions.get(odds_hash)
        if found is not None:
            return found
        try:
            with self._engine.connect().execution_options(read_only=True) as connection:
                return self._read(connection, odds_hash)
        except SQLAlchemyError as error:
            raise explain(error) from error

    def refresh_now(self) -> None:
        """Look for changes at the next call, however short the time since the last look."""
        with self._lock:
            self._looked_at = None

    def _refresh(self, age_s_max: float | None = None) -> None:
        if self._revision is None:
            with self._first_look:  # nothing is known yet: other threads wait
                if self._revision is None:
                    self._look()
            return
        with self._lock:
            age = REFRESH_S if age_s_max is None else age_s_max
            if self._looked_at is not None and time.monotonic() < self._looked_at + age:
                return
            self._looked_at = time.monotonic()  # other threads go on with what is known
        self._look()

    def _look(self) -> None:
        at = time.monotonic()
        try:
            with self._engine.connect().execution_options(read_only=True) as connection:
                revision = connection.execute(select(func.max(table.c.revision))).scalar_one() or 0
                if revision != self._revision:
                    self._by_name = self._read_all(connection)
                    self._revision = revision
            self._looked_at = at
        except SQLAlchemyError as error:
            self.refresh_now()
            raise explain(error) from error

    def _read_all(self, connection: Connection) -> dict[str, Campaign]:
        rows = connection.execute(select(table.c.name, table.c.state, table.c.live_hash)).all()
        return {
            name: Campaign(name, CampaignState(state), None if live is None else self._read(connection, live))
            for name, state, live in rows
        }

    def _read(self, connection: Connection, odds_hash: str) -> Odds | None:
        with self._lock:
            if (known := self._versions.get(odds_hash)) is not None:
                return known
        text = connection.execute(select(versions.c.manifest).where(versions.c.odds_hash == odds_hash)).scalar()
        if text is None:
            return None
        odds = manifest.restore(text.encode())
        with self._lock:
            self._versions[odds_hash] = odds
        return odds
