"""Readiness: do the database, the broker and the result store answer?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from tombola.producers.domain.errors import DrawError
from tombola.producers.gateway.intake import CHECK_TIMEOUT_S, Intake
from tombola.producers.gateway.messages import Readiness
from tombola.producers.gateway.results import Results
from tombola.producers.storage import requests

READINESS_KEPT_S: Final = 0.5


class ReadinessChecks:
    """The checks behind /readyz, made once for all probes that come within READINESS_KEPT_S.

    `read(find)` calls `find(connection)` in a reading thread.
    """

    def __init__(self, read: Callable[[Any], Awaitable[Any]], intake: Intake, results: Results) -> None:
        self._read = read
        self._intake = intake
        self._results = results
        self._last: Readiness | None = None
        self._checked_at = 0.0
        self._checking: asyncio.Task[Readiness] | None = None

    async def readiness(self) -> Readiness:
        """The outcome of the last checks, or of new ones if those are older than READINESS_KEPT_S."""
        if self._checking is None and (self._last is None or time.monotonic() > self._checked_at + READINESS_KEPT_S):
            self._checking = asyncio.create_task(self._check())
        return await asyncio.shield(self._checking) if self._checking is not None else self._last  # type: ignore

    async def _check(self) -> Readiness:
        try:
            database, broker, results = await asyncio.gather(
                self._has_database(), self._intake.has_broker(), self._results.ping()
            )
            parts = {"database": database, "broker": broker, "results": results}
            self._last = Readiness(**parts, missing=[name for name, is_there in parts.items() if not is_there])
            self._checked_at = time.monotonic()
            return self._last
        finally:
            self._checking = None

    async def _has_database(self) -> bool:
        """Whether the database answers a query within CHECK_TIMEOUT_S, which is less time than probes have."""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await self._read(requests.count_accepted_once)
        except (DrawError, TimeoutError):
            return False
        return True
