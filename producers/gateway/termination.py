"""SIGINT and SIGTERM, noticed before the server acts on them."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def on_termination(call: Callable[[], None]) -> Iterator[None]:
    """Call `call` in the running loop at SIGINT and SIGTERM; the handlers that were set before run as well.

    Outside the main thread, which alone may handle signals, `call` is never called.
    """
    loop = asyncio.get_running_loop()
    handlers: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        loop.call_soon_threadsafe(call)
        handlers[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        # Signals without a handler keep their default action.
        handlers |= {it: found for it in (signal.SIGINT, signal.SIGTERM) if callable(found := signal.getsignal(it))}
    for number in handlers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
