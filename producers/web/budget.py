"""Rate limits by name. Kept in memory: a limit in Redis would fail with Redis."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

REMEMBERED_MAX: Final = 10_000


class Budget:
    """A token bucket for each name: `per_s` tokens a second, at most one second's tokens at once.

    Beyond REMEMBERED_MAX names the oldest one is forgotten, and would begin with a full bucket.
    """

    def __init__(self, per_s: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self.per_s = per_s
        self._now = now
        self._left: dict[str, list[float]] = {}  # tokens left, and the time of that count

    def take(self, name: str) -> bool:
        """Take one token; False if none is left."""
        bucket = self._fill(name)
        if bucket[0] < 1.0:
            return False
        bucket[0] -= 1.0
        return True

    def take_more(self, name: str, count: int) -> bool:
        """Take `count` further tokens, beside the one taken before; False if they are not left.

        A name that took nothing else in the last second can take more than a second's tokens, and owes them then.
        """
        bucket = self._fill(name)
        if bucket[0] < min(count, self.per_s - 1):
            return False
        bucket[0] -= count
        return True

    def has(self, name: str) -> bool:
        """Whether a token is left."""
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
