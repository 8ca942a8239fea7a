"""A consumer's telemetry: metrics, a span for each batch, the pulse."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tombola.producers.domain.contract import DrawRequest
from tombola.producers.telemetry import tracing
from tombola.producers.telemetry.pulse import Pulse
from tombola.worker import metrics
from tombola.worker.deliveries import Delivery
from tombola.worker.settle.answers import Repeat, Settled


class Watch:
    """Counts the work of one consumer. `with_latency` measures every draw, and costs about 1 % of the time it takes."""

    def __init__(self, pulse: Pulse | None = None, *, with_latency: bool = False) -> None:
        self._pulse = pulse
        self._with_latency = with_latency

    @contextmanager
    def batch(self, fetched: Sequence[Delivery], began_at: float) -> Iterator[None]:
        """A context for the work on one batch, which `began_at` this `perf_counter`: counts it, and spans it."""
        metrics.BATCH_DRAWS.observe(len(fetched))
        metrics.REDELIVERED.inc(sum(delivery.count > 1 for delivery in fetched))
        with tracing.settling((delivery.headers for delivery in fetched), len(fetched), since=began_at):
            yield
        metrics.BATCH_SECONDS.observe(time.perf_counter() - began_at)

    def count(self, settled: Sequence[Settled | Repeat], deferred: int, *, since: float) -> None:
        """Count draws and movements that are settled, with their results put, and those to try again later.

        Their batch began at this `perf_counter`.
        """
        repeats = sum(it.is_repeat for it in settled)
        rejected = sum(it.is_rejected for it in settled)
        counts = {"settled": len(settled) - repeats - rejected, "rejected": rejected, "repeats": repeats}
        counters = (metrics.DRAWS_SETTLED, metrics.DRAWS_REJECTED, metrics.DRAWS_REPEATED)
        for counter, count in zip(counters, counts.values(), strict=True):
            counter.inc(count)
        for it in [it for it in settled if it.request.kind != DrawRequest.kind]:
            outcome = "repeat" if it.is_repeat else "rejected" if it.is_rejected else "settled"
            metrics.MOVEMENTS.labels(it.request.kind, outcome).inc()
        metrics.DEFERRED.inc(deferred)
        if self._pulse is not None:
            for what, count in counts.items():
                self._pulse.add(what, count)
        if self._with_latency:
            # Both times are by the database's clock (producers.storage.clock), and `settled_at` is when the batch
            # began: add the time since then.
            since_s = time.perf_counter() - since
            for it in settled:
                if isinstance(it, Settled) and it.accepted_at is not None:
                    metrics.LATENCY.observe((it.settled_at - it.accepted_at).total_seconds() + since_s)

    def count_parked(self, cause: str) -> None:
        """Count a parked message."""
        metrics.MESSAGES_PARKED.labels(cause).inc()
        if self._pulse is not None:
            self._pulse.add("parked")
