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
    """The threads that read the database. A read, with its wait for a free thread, takes READ_WAIT_S at most.

    A frozen server soon occupies all threads: reads that wait for one are cancelled then, and do not pile up.
    """

    def __init__(self, name: str = "read") -> None:
        self.pool = ThreadPoolExecutor(READERS, thread_name_prefix=name)

    async def run(self, function: Callable[[], T]) -> T:
        """The result of `function`, called in one of the threads. Raises ServiceUnavailable after READ_WAIT_S."""
        future = self.pool.submit(function)  # cancelled with the wait, unless a thread has begun it
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), READ_WAIT_S)
        except TimeoutError:
            raise ServiceUnavailable(f"the database does not answer: nothing in {READ_WAIT_S:g} s") from None
