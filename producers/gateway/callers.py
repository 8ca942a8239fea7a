"""The callers of API keys. Known keys are remembered; unknown keys are looked up together, in one query.

So requests with made-up keys, however many, cost at most one query per LOOK_UP_EVERY_S, and do not delay callers.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, NamedTuple

from cachetools import LRUCache, TLRUCache
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.errors import NotAllowed
from tombola.producers.gateway.readers import Readers
from tombola.producers.storage import api_keys, clock
from tombola.producers.storage.api_keys import Holder
from tombola.producers.storage.faults import explain

REMEMBERED_S: Final = 5.0  # a revoked key is accepted this long at most; an expired one is not
REMEMBERED_MAX: Final = 10_000
LOOK_UP_EVERY_S: Final = 0.05
LOOK_UP_SIZE_MAX: Final = 100


class Known(NamedTuple):
    """The holder of a key, and how long it is remembered: the end by `time.monotonic`, before the key expires."""

    holder: Holder
    until: float


class Callers:
    """Callers by the `Authorization` header that they send."""

    def __init__(self, engine: Engine, readers: Readers) -> None:
        self._engine = engine
        self._readers = readers
        self._found: TLRUCache[bytes, Known] = TLRUCache(REMEMBERED_MAX, lambda _header, known, _now: known.until)
        self._once_found: LRUCache[bytes, None] = LRUCache(REMEMBERED_MAX)
        self._asked: dict[str, asyncio.Future[Known | None]] = {}
        self._looking: asyncio.Task[None] | None = None

    def recall(self, authorization: bytes) -> Holder | None:
        """The key's holder, if the key was found within REMEMBERED_S and has not expired since."""
        try:
            return self._found[authorization].holder  # TLRUCache.get takes three times as long
        except KeyError:
            return None

    def is_familiar(self, authorization: bytes) -> bool:
        """Whether a caller has used this header before; the key may be revoked by now."""
        return authorization in self._once_found

    async def find(self, authorization: bytes) -> Holder | None:
        """The key's holder; None for a key that does not exist, is revoked or has expired.

        Raises NotAllowed for a header without a key, and ServiceUnavailable when the database does not answer.
        """
        scheme, _, text = authorization.decode("latin-1").partition(" ")
        api_key = text.strip()
        if scheme.lower() != "bearer" or not api_keys.is_api_key(api_key):
            raise NotAllowed
        known = await self._look_up(api_key)
        if known is None:
            return None
        self._found[authorization] = known
        self._once_found[authorization] = None
        return known.holder

    async def _look_up(self, api_key: str) -> Known | None:
        future = self._asked.get(api_key)
        if future is None:
            future = self._asked[api_key] = asyncio.get_running_loop().create_future()
            if self._looking is None:
                self._looking = asyncio.create_task(self._look())
        return await asyncio.shield(future)  # other requests with this key may wait for it

    async def _look(self) -> None:
        """Look up keys until no request waits for one."""
        while self._asked:
            asked = dict(list(self._asked.items())[:LOOK_UP_SIZE_MAX])
            try:
                found = await self._readers.run(lambda keys=tuple(asked): self._find(keys))  # type: ignore[misc]
            except Exception as error:
                for api_key, future in asked.items():
                    del self._asked[api_key]
                    future.set_exception(error)
                    future.exception()  # marks it as retrieved: the request may have been cancelled
            else:
                for api_key, future in asked.items():
                    del self._asked[api_key]
                    future.set_result(found.get(api_key))
            if self._asked:
                await asyncio.sleep(LOOK_UP_EVERY_S)
        self._looking = None

    def _find(self, keys: tuple[str, ...]) -> dict[str, Known]:
        """Query the database; runs in a reading thread."""
        try:
            with self._engine.connect().execution_options(read_only=True) as connection:
                found = api_keys.holders_of(connection, keys)
                now, since = clock.now(connection), time.monotonic()
        except SQLAlchemyError as error:
            raise explain(error) from error
        ends = {it: holder.expires_at for it, holder in found.items() if holder.expires_at is not None}
        valid_s = {it: (end - now).total_seconds() for it, end in ends.items()}
        return {
            it: Known(holder, since + min(REMEMBERED_S, valid_s.get(it, REMEMBERED_S))) for it, holder in found.items()
        }
