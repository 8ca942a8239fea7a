"""The threads in which the gateway reads the database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from tombola.producers.domain.errors import ServiceUnavailable

T = TypeVar("T")

READERS: Final = 4
READ_WAIT_S: Final = 4.0


class Readers:
    """The threads that read the database. Nobody waits longer than READ_WAIT_S for one, nor for what it finds.

    Behind a server that is frozen all of them are soon taken: what waits for one is given up, and cannot pile up.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")

    async def run(self, function: Callable[[], T]) -> T:
        """What `function` returns, called in one of the threads. Raises ServiceUnavailable when that takes too long."""
        future = self.pool.submit(function)  # cancelled with the wait, if it has not begun
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), READ_WAIT_S)
        except TimeoutError:
            raise ServiceUnavailable(f"the database does not answer: nothing in {READ_WAIT_S:g} s") from None
