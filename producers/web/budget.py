"""How often each of many may do something. Kept in memory: a limit that asked Redis first would fail with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

REMEMBERED_MAX: Final = 10_000


class Budget:
    """`per_s` a second for each name, saved up to one second's worth (a token bucket).

    The oldest of more than REMEMBERED_MAX names begins anew, with all it may have.
    """

    def __init__(self, per_s: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self.per_s = per_s
        self._now = now
        self._left: dict[str, list[float]] = {}  # what is left, and when that was

    def take(self, name: str) -> bool:
        """Take one; False when none is left."""
        bucket = self._fill(name)
        if bucket[0] < 1.0:
            return False
        bucket[0] -= 1.0
        return True

    def take_more(self, name: str, count: int) -> bool:
        """Take `count` more, for something that turned out to be as much; False if they are not left.

        What is more than a second's worth may be taken by a name that has used up nothing else; it is owed then.
        """
        bucket = self._fill(name)
        if bucket[0] < min(count, self.per_s - 1):
            return False
        bucket[0] -= count
        return True

    def has(self, name: str) -> bool:
        """Whether one is left."""
        return self._fill(name)[0] >= 1.0

    def _fill(self, name: str) -> list[float]:
        now = self._now()
        bucket = self._left.get(name)
        if bucket is None:
            if len(self._left) >= REMEMBERED_MAX:
                del self._left[next(iter(self._left))]
            bucket = self._left[name] = [float(self.per_s), now]
            return bucket
        bucket[0] = min(float(self.per_s), bucket[0] + (now - bucket[1]) * self.per_s)
        bucket[1] = now
        return bucket
