"""Blocking calls of pages, in threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import anyio
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.storage.faults import explain

T = TypeVar("T")

PAGE_WAIT_S: Final = 7.0


async def in_thread(function: Callable[[], T], *, limiter: anyio.CapacityLimiter | None = None) -> T:
    """The result of `function`, called in a thread.

    Raises ServiceUnavailable after PAGE_WAIT_S, the wait for a free thread included. The thread itself runs on, and its
    result is dropped: for reading only. Without this limit a page would wait for a frozen server much longer.
    """
    try:
        with anyio.fail_after(PAGE_WAIT_S):
            return await anyio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=limiter)
    except TimeoutError:
        raise ServiceUnavailable(f"the database does not answer: nothing in {PAGE_WAIT_S:g} s") from None


def explained(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function`, with errors of the database raised as errors of ours."""

    def run() -> Any:
        try:
            return function()
        except SQLAlchemyError as error:
            raise explain(error) from error

    return run
