"""The gateway's answers about seed epochs: chains with their anchors, epochs with commitments and revealed secrets.

Strangers get them as well, so one read of the database serves all who ask for the same page meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, Final

import msgspec
from cachetools import TTLCache
from sqlalchemy import Connection

from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.domain.seeds import parse_epoch_name
from tombola.producers.gateway.readers import READ_WAIT_S
from tombola.producers.storage import clock, seeds
from tombola.producers.storage.seeds import Chain, Epoch

KEPT_S: Final = 5.0
PAGES_MAX: Final = 200
EPOCHS_MAX: Final = 100  # of a page
AROUND: Final = 7  # epochs before and after the open one

Hex = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class ChainView(msgspec.Struct, frozen=True):
    """A chain of epochs. Its secrets hash down to `anchor` by SHA-256: the one of epoch n in n steps.

    Chain 0 stands for draws of before the epochs: its anchor is the SHA-256 of their seed.
    """

    chain: int
    anchor: Hex
    epochs: int
    begun_at: datetime


class EpochView(msgspec.Struct, frozen=True):
    """An epoch: draws that are accepted while it is open are drawn under keys from its secret.

    `commitment` is the SHA-256 of `tombola-commitment-1` and the 32 bytes of the secret. `secret` is null until no draw
    can be bound to the epoch any more.
    """

    epoch: Annotated[str, msgspec.Meta(description="Its chain and its number: `1.17`.")]
    opens_at: datetime
    closes_at: datetime | None
    commitment: Hex
    secret: Hex | None


class SeedsView(msgspec.Struct, frozen=True):
    """All chains, and a page of epochs; `next` is the `after` of the next page, null on the last one."""

    chains: list[ChainView]
    epochs: list[EpochView]
    next: str | None


class SeedAnswers:
    """Answers about seed epochs, for one event loop; `read` runs a function of a connection in a thread."""

    def __init__(self, read: Callable[..., Awaitable[Any]]) -> None:
        self._read = read
        self._pages: TTLCache[str, SeedsView] = TTLCache(PAGES_MAX, KEPT_S)
        self._reading = asyncio.Lock()

    async def page(self, after: str) -> SeedsView:
        """The epochs behind the one with the name `after`; without a name those around the open one.

        Raises InvalidRequest for what is no name, ServiceUnavailable or ConfigurationError.
        """
        from_id = None if not after else seeds.id_of(parse_epoch_name(after)) + 1
        try:
            async with asyncio.timeout(READ_WAIT_S), self._reading:
                found: SeedsView | None = self._pages.get(after)
                if found is None:
                    found = self._pages[after] = await self._read(_page, from_id)
                return found
        except TimeoutError:
            raise ServiceUnavailable("the database does not answer: too many ask for seeds") from None


def _page(connection: Connection, from_id: int | None) -> SeedsView:
    rows_max = EPOCHS_MAX
    if from_id is None:
        open_now = seeds.open_at(connection, clock.now(connection))
        from_id, rows_max = (0 if open_now is None else max(0, open_now.id - AROUND)), 2 * AROUND + 1
    rows = seeds.epochs_from(connection, from_id, rows_max=rows_max + 1)
    more = str(rows[rows_max - 1].name) if len(rows) > rows_max else None
    return SeedsView([_chain(it) for it in seeds.all_chains(connection)], [_epoch(it) for it in rows[:rows_max]], more)


def _chain(chain: Chain) -> ChainView:
    return ChainView(chain.chain, chain.anchor.hex(), chain.epochs, chain.begun_at)


def _epoch(it: Epoch) -> EpochView:
    secret = None if it.revealed is None else it.revealed.hex()
    return EpochView(str(it.name), it.opens_at, it.closes_at, it.commitment, secret)
