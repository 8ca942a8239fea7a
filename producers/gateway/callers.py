"""Whose API key it is. A key that was found is remembered; those that were not are looked up together.

So strangers cost the database a query now and then, however many they are, and keep no caller from being found.
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

REMEMBERED_S: Final = 5.0  # so long a revoked key may still get in
REMEMBERED_MAX: Final = 10_000
LOOK_UP_EVERY_S: Final = 0.05
LOOK_UP_SIZE_MAX: Final = 100


class Callers:
    """The callers by what they send as `Authorization`."""

    def __init__(self, engine: Engine, readers: Readers) -> None:
        self._engine = engine
        self._readers = readers
        self._found: TTLCache[bytes, Holder] = TTLCache(REMEMBERED_MAX, REMEMBERED_S)
        self._once_found: LRUCache[bytes, None] = LRUCache(REMEMBERED_MAX)
        self._asked: dict[str, asyncio.Future[Holder | None]] = {}
        self._looking: asyncio.Task[None] | None = None

    def recall(self, authorization: bytes) -> Holder | None:
        """The caller, if this key was found in the last few seconds."""
        try:
            return self._found[authorization]  # `get` takes three times as long
        except KeyError:
            return None

    def is_familiar(self, authorization: bytes) -> bool:
        """Whether this was a caller's at some time: no stranger's, though the key may be revoked now."""
        return authorization in self._once_found

    async def find(self, authorization: bytes) -> Holder | None:
        """The caller; None for a key that is not known, or was revoked.

        Raises NotAllowed for what is no key at all, and ServiceUnavailable when the database does not answer.
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
        return await asyncio.shield(future)  # others may wait for it

    async def _look(self) -> None:
        """Look up all that are asked for, until there are none."""
        while self._asked:
            asked = dict(list(self._asked.items())[:LOOK_UP_SIZE_MAX])
            try:
                found = await self._readers.run(lambda keys=tuple(asked): self._find(keys))  # type: ignore[misc]
            except Exception as error:
                for api_key, future in asked.items():
                    del self._asked[api_key]
                    future.set_exception(error)
                    future.exception()  # whoever asked may have gone
            else:
                for api_key, future in asked.items():
                    del self._asked[api_key]
                    future.set_result(found.get(api_key))
            if self._asked:
                await asyncio.sleep(LOOK_UP_EVERY_S)
        self._looking = None

    def _find(self, keys: tuple[str, ...]) -> dict[str, Holder]:
        """In a reading thread."""
        try:
            with self._engine.connect().execution_options(read_only=True) as connection:
                return api_keys.holders_of(connection, keys)
        except SQLAlchemyError as error:
            raise explain(error) from error
