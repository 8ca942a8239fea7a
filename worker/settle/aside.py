"""Draws set aside: another transaction holds a row that they need, so they stay in hand and are tried again, apart.

Such draws are in order, and new draws of other accounts must not wait behind them. Draws that wait for the same account
(or for the same request, when its account is free) are tried again together, after a wait that doubles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from tombola.worker.deliveries import Delivery

WAIT_S_MIN: Final = 0.1
WAIT_S_MAX: Final = 2.0

Held = int | str  # an account id, or a request key


@dataclass(slots=True)
class _Queue:
    """The deliveries that wait for one account or request."""

    due_at: float
    wait_s: float = WAIT_S_MIN
    is_tried: bool = False  # and so far not added again
    deliveries: list[Delivery] = field(default_factory=list)


class Aside:
    """Up to `count_max` deliveries in hand, by the account or request that they wait for. For one thread."""

    def __init__(self, count_max: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._count_max = count_max
        self._clock = clock
        self._queues: dict[Held, _Queue] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Held, Delivery]]:
        return ((held, delivery) for held, queue in self._queues.items() for delivery in queue.deliveries)

    def is_held(self, held: Held) -> bool:
        """Whether deliveries wait for this account or request already: later ones need not try."""
        return held in self._queues

    def add(self, held: Held, delivery: Delivery) -> bool:
        """Set a delivery aside; False if there is no room."""
        queue = self._queues.get(held)
        if queue is None:
            queue = self._queues[held] = _Queue(self._clock() + WAIT_S_MIN)
        queue.is_tried = False
        if self._count >= self._count_max:
            return False
        queue.deliveries.append(delivery)
        self._count += 1
        return True

    def take_due(self, count_max: int) -> list[Delivery]:
        """Up to `count_max` deliveries to try now. The caller adds again what is still held, then calls `end_try`."""
        now = self._clock()
        taken: list[Delivery] = []
        for queue in self._queues.values():
            if queue.due_at <= now and len(taken) < count_max:
                room = count_max - len(taken)
                taken += queue.deliveries[:room]
                del queue.deliveries[:room]
                queue.is_tried = True
                queue.wait_s = min(WAIT_S_MAX, 2 * queue.wait_s)
                queue.due_at = now + queue.wait_s
        self._count -= len(taken)
        return taken

    def end_try(self) -> None:
        """All taken deliveries have been tried. An account or request that was not added again is free: its other
        deliveries are due at once."""
        self._queues = {held: it for held, it in self._queues.items() if it.deliveries or not it.is_tried}
        for queue in self._queues.values():
            if queue.is_tried:
                queue.due_at, queue.wait_s = 0.0, WAIT_S_MIN

    @property
    def due_in_s(self) -> float:
        """Seconds until the next try; infinite when nothing is set aside."""
        return max(0.0, min((it.due_at for it in self._queues.values()), default=float("inf")) - self._clock())

    def clear(self) -> None:
        """Forget all deliveries: they are in hand no more."""
        self._queues.clear()
        self._count = 0
