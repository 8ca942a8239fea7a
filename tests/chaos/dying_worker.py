"""A worker that kills itself, with SIGKILL, at one place. Started by the chaos tests; it is no part of
the product, which has no failpoints.

    DIE_AT=before_commit DIE_ON=3 python -m tests.chaos.dying_worker

    before_commit    the third transaction that settles draws is complete but for its COMMIT
    after_commit     it is committed, its results are not put
    after_results    its results are put, it is not acked
    in_task          a pool process has committed a `tombola.draw` and put nothing: it alone dies, and once
    on_key           draws are settled and DIE_ON is the request key among them (before anything is written)

With TOGETHER=8 the first eight deliveries are one batch, however slowly the broker hands them over.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery.bin.celery import main
from sqlalchemy import Engine

from tombola.producers.domain.contract import DrawRequest
from tombola.producers.results import ResultStore, StoredResult
from tombola.producers.storage.transactions import Transaction, transaction
from tombola.worker.deliveries import Deliveries, Delivery, open_deliveries
from tombola.worker.host import tasks
from tombola.worker.settle import batch, consumer, tries

DIE_AT = os.environ["DIE_AT"]
DIE_ON = os.environ["DIE_ON"]
TOGETHER = int(os.environ.get("TOGETHER", "0"))

_calls = 0
_counting = threading.Lock()


def die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()  # until the signal is here: no other thread of ours gets any further either


def count_down() -> None:
    """Die on the DIE_ON-th call; other lanes stand still meanwhile."""
    global _calls
    with _counting:
        _calls += 1
        if _calls >= int(DIE_ON):
            die()


@contextmanager
def dying_transaction(engine: Engine) -> Iterator[Transaction]:
    with transaction(engine) as open_transaction:
        yield open_transaction
        count_down()


class DyingResultStore(ResultStore):
    def put(self, results: Sequence[StoredResult]) -> None:
        if results:
            count_down()
        super().put(results)


class DyingTaskResultStore(ResultStore):
    def put(self, results: Sequence[StoredResult]) -> None:
        died = Path("died")  # in the folder of this one worker; what a forked process remembers dies with it
        if not died.exists():
            died.touch()
            die()
        super().put(results)


def gathered_deliveries(*args: Any, **kwargs: Any) -> Deliveries:
    source = open_deliveries(*args, **kwargs)
    fetch = source.fetch
    gathered: list[Delivery] = []

    def fetch_together(count_max: int, *, wait_s: float) -> list[Delivery]:
        source.fetch = fetch  # type: ignore[method-assign]
        while len(gathered) < TOGETHER:
            gathered.extend(fetch(count_max, wait_s=wait_s))
        return gathered

    source.fetch = fetch_together  # type: ignore[method-assign]
    return source


def dying_deliveries(*args: Any, **kwargs: Any) -> Deliveries:
    source = gathered_deliveries(*args, **kwargs)
    ack = source.ack

    def dying_ack(deliveries: Sequence[Delivery]) -> None:
        if deliveries:
            count_down()
        ack(deliveries)

    source.ack = dying_ack  # type: ignore[method-assign]
    return source


def dying_settle(settle: Callable[..., Any]) -> Callable[..., Any]:
    def with_eyes_on_keys(transaction: Transaction, draws: Sequence[DrawRequest], *args: Any, **options: Any) -> Any:
        if any(draw.request_key == DIE_ON for draw in draws):
            die()
        return settle(transaction, draws, *args, **options)

    return with_eyes_on_keys


PATCHES: dict[str, tuple[Any, str, Any]] = {
    "before_commit": (tries, "transaction", dying_transaction),
    "after_commit": (consumer, "ResultStore", DyingResultStore),
    "after_results": (consumer, "open_deliveries", dying_deliveries),
    "in_task": (tasks, "ResultStore", DyingTaskResultStore),
    "on_key": (batch, "settle_in", dying_settle(batch.settle_in)),
}

if __name__ == "__main__":
    setattr(consumer, "open_deliveries", gathered_deliveries)  # noqa: B010 - to mypy it is not theirs to give
    module, name, replacement = PATCHES[DIE_AT]
    assert hasattr(module, name), f"{module.__name__} has no {name}: this would kill nobody"
    setattr(module, name, replacement)
    sys.argv = ["celery", "-A", "tombola.worker", "worker", "--loglevel=INFO"]
    main()
