"""The callers of API keys. Known keys are remembered; unknown keys are looked up together, in one query.

So requests with made-up keys, however many, cost at most one query per LOOK_UP_EVERY_S, and do not delay callers.
"""

from __future__ import annotations

import asyncio
from typing import Final

from cachetools import LRUCache, TTLCache
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.errors import NotAllowed
from tombola.producers.gateway.readers import Readers
from tombola.producers.storage import api_keys
from tombola.producers.storage.api_keys import Holder
from tombola.producers.storage.faults import explain

REMEMBERED_S: Final = 5.0  # a revoked key is accepted this long at most
REMEMBERED_MAX: Final = 10_000
LOOK_UP_EVERY_S: Final = 0.05
LOOK_UP_SIZE_MAX: Final = 100


class Callers:
    """Callers by the `Authorization` header that they send."""

    def __init__(self, engine: Engine, readers: Readers) -> None:
        self._engine = engine
        self._readers = readers
        self._found: TTLCache[bytes, Holder] = TTLCache(REMEMBERED_MAX, REMEMBERED_S)
        self._once_found: LRUCache[bytes, None] = LRUCache(REMEMBERED_MAX)
        self._asked: dict[str, asyncio.Future[Holder | None]] = {}
        self._looking: asyncio.Task[None] | None = None

    def recall(self, authorization: bytes) -> Holder | None:
        """The key's holder, if the key was found within REMEMBERED_S."""
        try:
            return self._found[authorization]  # TTLCache.get takes three times as long
        except KeyError:
            return None

    def is_familiar(self, authorization: bytes) -> bool:
        """Whether a caller has used this header before; the key may be revoked by now."""
        return authorization in self._once_found

    async def find(self, authorization: bytes) -> Holder | None:
        """The key's holder; None for a key that does not exist or is revoked.

        Raises NotAllowed for a header without a key, and ServiceUnavailable when the database does not answer.
        """
        scheme, _, text = authorization.decode("latin-1").partition(" ")
        api_key = text.strip()
        if scheme.lower() != "bearer" or not api_keys.is_api_key(api_key):
            raise NotAllowed
        holder = await self._look_up(api_key)
        if holder is not None:
            self._found[authorization] = holder
            self._once_found[authorization] = None
        return holder

    async def _look_up(self, api_key: str) -> Holder | None:
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

    def _find(self, keys: tuple[str, ...]) -> dict[str, Holder]:
        """Query the database; runs in a reading thread."""
        try:
            with self._engine.connect().execution_options(read_only=True) as connection:
                return api_keys.holders_of(connection, keys)
        except SQLAlchemyError as error:
            raise explain(error) from error
