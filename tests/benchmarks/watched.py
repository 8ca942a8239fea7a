"""A Celery worker as always, which notes the CPU time of its parts: `python -m tests.benchmarks.watched -A worker …`.

A part is a few calls for each batch, so watching costs nothing that could be measured. When the worker ends, it writes
the seconds of each part to the file that BENCH_PARTS names.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Final

import pymysql.connections
from celery.__main__ import main

from tombola.producers.results import ResultStore
from tombola.worker.deliveries.queues import QueueDeliveries
from tombola.worker.deliveries.streams import StreamDeliveries
from tombola.worker.settle import batch
from tombola.worker.settle.handler import Handler

FILE: Final = "BENCH_PARTS"
DRIVER, RESULTS, BROKER, PARSING, SETTLING = "driver", "results", "broker", "parsing", "settling"
WATCHED: Final = (
    (pymysql.connections.Connection, "query", DRIVER),
    (pymysql.connections.Connection, "begin", DRIVER),
    (pymysql.connections.Connection, "commit", DRIVER),
    (pymysql.connections.Connection, "rollback", DRIVER),
    (ResultStore, "put", RESULTS),
    (ResultStore, "renew", RESULTS),
    *((it, name, BROKER) for it in (StreamDeliveries, QueueDeliveries) for name in ("fetch", "ack")),
    (Handler, "_sort", PARSING),
    (batch, "settle_in", SETTLING),  # with the driver's calls in it
)

_seconds: dict[str, float] = {}
_adding = threading.Lock()
_is_inside = threading.local()


def _watch(owner: Any, name: str, part: str) -> None:
    watched: Callable[..., Any] = getattr(owner, name)

    @wraps(watched)
    def call(*args: Any, **options: Any) -> Any:
        if getattr(_is_inside, part, False):
            return watched(*args, **options)
        setattr(_is_inside, part, True)
        began = time.thread_time()
        try:
            return watched(*args, **options)
        finally:
            took = time.thread_time() - began
            setattr(_is_inside, part, False)
            with _adding:
                _seconds[part] = _seconds.get(part, 0.0) + took

    setattr(owner, name, call)


if __name__ == "__main__":
    for watched in WATCHED:
        _watch(*watched)
    pid = os.getpid()
    atexit.register(lambda: os.getpid() == pid and Path(os.environ[FILE]).write_text(json.dumps(_seconds)))
    sys.argv[0] = "celery"
    sys.exit(main())
