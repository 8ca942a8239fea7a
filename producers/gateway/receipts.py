"""Receipts over HTTP: a header beside answers, and the keys that verify it.

A receipt is never a condition of a draw: where the keys cannot be listed or an epoch cannot be read, the answer comes
without its header, and the log says why.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from sqlalchemy import Connection

from tombola.producers.domain.errors import DrawError
from tombola.producers.domain.receipt_keys import jwk_set
from tombola.producers.gateway.readers import Readers
from tombola.producers.receipts import Receipts, state_of
from tombola.producers.storage import requests
from tombola.producers.storage.receipt_keys import list_keys
from tombola.producers.storage.requests import Acceptance, SessionState

log = logging.getLogger(__name__)

RECEIPT: Final = "Tombola-Receipt"
LEARN_EVERY_S: Final = 1.0  # after a failure
KEY_SET_KEPT_S: Final = 1.0


class ReceiptDesk:
    """Makes receipts for one event loop, where a key is set. `read(find, …)` reads the database in a thread."""

    def __init__(self, receipts: Receipts, readers: Readers, read: Callable[..., Awaitable[Any]]) -> None:
        self.is_on: Final = bool(receipts)
        self._receipts = receipts
        self._readers = readers
        self._read = read
        self._learning = asyncio.Lock()
        self._learn_at = 0.0  # monotonic
        self._reading = asyncio.Lock()
        self._key_set: bytes = b""
        self._key_set_until = 0.0  # monotonic

    async def start(self) -> None:
        """List the keys of this process, so that the first receipt can be verified at once."""
        if self.is_on:
            await self._is_ready(None)

    async def of_answer(self, answer: Acceptance) -> str | None:
        """The receipt of what the door has answered, which is no conflict; None where there is none."""
        if not self.is_on:
            return None
        state = state_of(answer)
        if state is None:
            try:
                state = await self._read(requests.state_of_session, answer.request.lottery_session_id)
            except DrawError as error:
                log.warning("%s; a repeat has no receipt", error)
        return None if state is None else await self.of_state(state)

    async def of_state(self, state: SessionState) -> str | None:
        """The receipt of a request in this state; None where no key is set, or it cannot be made now."""
        if not self.is_on:
            return None
        if self._receipts.knows(state.seed_epoch) or await self._is_ready(state.seed_epoch):
            return self._receipts.sign(state)
        return None

    async def key_set(self) -> bytes:
        """The JWK Set of all keys that ever signed, as they stood at most KEY_SET_KEPT_S ago. Raises as `read` does."""
        async with self._reading:
            if time.monotonic() >= self._key_set_until:
                self._key_set = await self._read(_key_set)
                self._key_set_until = time.monotonic() + KEY_SET_KEPT_S
            return self._key_set

    async def _is_ready(self, seed_epoch: int | None) -> bool:
        async with self._learning:
            if self._receipts.knows(seed_epoch):
                return True
            if time.monotonic() < self._learn_at:
                return False
            try:
                await self._readers.run(lambda: self._receipts.learn(seed_epoch))
            except DrawError as error:
                log.warning("%s; there are no receipts", error)
                self._learn_at = time.monotonic() + LEARN_EVERY_S
                return False
            return True


def _key_set(connection: Connection) -> bytes:
    return jwk_set(list_keys(connection))
