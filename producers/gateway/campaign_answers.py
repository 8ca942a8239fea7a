"""The gateway's answers about campaigns. Strangers get them as well: each is made once, for a version in a state.

The exact chances of a version may take seconds of computing: one thread does that, once per version. Whether a campaign
has changed is asked every LOOK_EVERY_S at most, for all requests together; the bytes of a version are read for one
request at a time. So strangers, however many, occupy two of the threads that read for callers, and no event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, NamedTuple

import msgspec
from cachetools import LRUCache

from tombola.producers.domain.campaigns.built_in import DEFAULT_ODDS
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.errors import CampaignNotFound, ServiceUnavailable
from tombola.producers.gateway.campaign_views import entry_of, view_of
from tombola.producers.gateway.messages import CampaignList, CampaignView
from tombola.producers.gateway.readers import READ_WAIT_S, Readers
from tombola.producers.storage.campaigns import LISTED, Campaign, Campaigns, CampaignState

LOOK_EVERY_S: Final = 0.25  # Campaigns itself asks the database once a second at most
VIEWS_MAX: Final = 100
VERSIONS_MAX: Final = 100  # whose bytes are kept here
CHANCES_WAIT_S: Final = 4.0
DEFAULT: Final = Campaign(DEFAULT_ODDS.name, CampaignState.OPEN, DEFAULT_ODDS)

_is_hash = re.compile(r"[0-9a-f]{64}").fullmatch
_encode: Final = msgspec.json.Encoder().encode


class Answer(NamedTuple):
    """A whole body, with what names these bytes to caches."""

    body: bytes
    etag: str
    media_type: str = "application/json"


class CampaignAnswers:
    """Answers about campaigns, for one event loop."""

    def __init__(self, campaigns: Campaigns, readers: Readers) -> None:
        self._campaigns = campaigns
        self._readers = readers
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="chances")
        self._by_name: Mapping[str, Campaign] = {}
        self._look_at = 0.0  # monotonic
        self._looking: asyncio.Task[None] | None = None
        self._views: LRUCache[str, asyncio.Task[CampaignView]] = LRUCache(VIEWS_MAX)  # by odds hash
        self._shown: LRUCache[tuple[str, CampaignState], Answer] = LRUCache(VIEWS_MAX)
        self._listed: tuple[list[Campaign], Answer] | None = None
        self._versions: LRUCache[str, Answer] = LRUCache(VERSIONS_MAX)
        self._reading = asyncio.Lock()

    async def listed(self) -> Answer:
        """The open and the paused campaigns. Raises ServiceUnavailable or ConfigurationError."""
        standing = [DEFAULT, *(it for it in (await self._look()).values() if it.odds and it.state in LISTED)]
        if self._listed is None or self._listed[0] != standing:
            entries = [entry_of(it.odds, it.state) for it in standing if it.odds]
            self._listed = standing, _answer(CampaignList(entries))
        return self._listed[1]

    async def shown(self, name: str) -> Answer:
        """A campaign that has been open, with its odds.

        Raises CampaignNotFound; ServiceUnavailable or ConfigurationError when the database cannot be used,
        ServiceUnavailable also while the chances are being computed.
        """
        found = DEFAULT if name == DEFAULT.name else (await self._look()).get(name)
        if found is None or found.odds is None or found.state is CampaignState.DRAFT:
            raise CampaignNotFound(f"there is no campaign {name!r:.80}")
        key = found.odds.odds_hash, found.state
        if key not in self._shown:
            view = await self._view(found.odds)
            self._shown[key] = _answer(msgspec.structs.replace(view, state=found.state))
        return self._shown[key]

    async def version(self, odds_hash: str) -> Answer:
        """The bytes that `odds_hash` is the SHA-256 of. Raises as `shown` does."""
        if odds_hash == DEFAULT_ODDS.odds_hash:
            return Answer(DEFAULT_ODDS.canonical, f'"{odds_hash}"', "text/plain")
        if odds_hash not in self._versions and _is_hash(odds_hash):
            try:
                async with asyncio.timeout(READ_WAIT_S), self._reading:
                    found = await self._readers.run(partial(self._campaigns.version, odds_hash))
            except TimeoutError:
                raise ServiceUnavailable("the database does not answer: too many ask for odds") from None
            if found is not None:
                self._versions[odds_hash] = Answer(found.canonical, f'"{odds_hash}"')
        if odds_hash not in self._versions:
            raise CampaignNotFound(f"no version of a campaign has the odds hash {odds_hash!r:.80}")
        return self._versions[odds_hash]

    def close(self) -> None:
        """Compute no further chances."""
        self._computing.shutdown(wait=False, cancel_futures=True)

    async def _look(self) -> Mapping[str, Campaign]:
        """Every campaign by name, as it stood a moment ago; one look for all requests that wait for it."""
        if self._looking is None and time.monotonic() >= self._look_at:
            self._looking = asyncio.create_task(self._look_now())
        if self._looking is not None:
            await asyncio.shield(self._looking)
        return self._by_name

    async def _look_now(self) -> None:
        try:
            self._by_name = {it.name: it for it in await self._readers.run(self._campaigns.all)}
            self._look_at = time.monotonic() + LOOK_EVERY_S
        finally:
            self._looking = None

    async def _view(self, odds: Odds) -> CampaignView:
        """The view of a version, whatever its campaign's state; computed once, in the thread for that."""
        task = self._views.get(odds.odds_hash)
        if task is None:
            task = self._views[odds.odds_hash] = asyncio.create_task(self._compute(odds))
        try:
            return await asyncio.wait_for(asyncio.shield(task), CHANCES_WAIT_S)
        except TimeoutError:
            raise ServiceUnavailable(f"the chances of campaign {odds.name} are being computed: ask again") from None

    async def _compute(self, odds: Odds) -> CampaignView:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._computing, view_of, odds, CampaignState.OPEN)
        except BaseException:
            self._views.pop(odds.odds_hash, None)  # the next request tries again
            raise


def _answer(body: CampaignList | CampaignView) -> Answer:
    encoded = _encode(body)
    return Answer(encoded, f'"{hashlib.sha256(encoded).hexdigest()[:32]}"')
