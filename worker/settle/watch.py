"""What a consumer tells of its work while it goes on: metrics, a span for each batch, the pulse."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tombola.producers.telemetry import tracing
from tombola.producers.telemetry.pulse import Pulse
from tombola.worker import metrics
from tombola.worker.deliveries import Delivery
from tombola.worker.settle.batch import Settled


class Watch:
    """What a consumer tells of its work: metrics, a span per batch, and the pulse.

    `with_latency` looks at every single draw, for which it takes one in a hundred parts of settling it.
    """

    def __init__(self, pulse: Pulse | None = None, *, with_latency: bool = False) -> None:
        self._pulse = pulse
        self._with_latency = with_latency
        self._began = time.perf_counter()

    @contextmanager
    def batch(self, fetched: Sequence[Delivery]) -> Iterator[None]:
        """Around all that is done with one batch."""
        self._began = began = time.perf_counter()
        metrics.BATCH_DRAWS.observe(len(fetched))
        metrics.REDELIVERED.inc(sum(delivery.count > 1 for delivery in fetched))
        with tracing.settling((delivery.headers for delivery in fetched), len(fetched)):
            yield
        metrics.BATCH_SECONDS.observe(time.perf_counter() - began)

    def tell(self, settled: Sequence[Settled], deferred: int) -> None:
        """These draws are settled, and their results stored."""
        repeats = sum(it.is_repeat for it in settled)
        rejected = sum(it.is_rejected for it in settled)
        counts = {"settled": len(settled) - repeats - rejected, "rejected": rejected, "repeats": repeats}
        for counter, count in zip((metrics.SETTLED, metrics.REJECTED, metrics.REPEATS), counts.values(), strict=True):
            counter.inc(count)
        metrics.DEFERRED.inc(deferred)
        if self._pulse is not None:
            for what, count in counts.items():
                self._pulse.add(what, count)
        if self._with_latency:
            # Both times are the database's (producers.storage.clock): what has gone by since the batch began comes on
            # top.
            since_s = time.perf_counter() - self._began
            for it in settled:
                if it.accepted_at is not None:
                    metrics.LATENCY.observe((it.settled_at - it.accepted_at).total_seconds() + since_s)

    def tell_parked(self, cause: str) -> None:
        """A message is parked."""
        metrics.PARKED.labels(cause).inc()
        if self._pulse is not None:
            self._pulse.add("parked")
