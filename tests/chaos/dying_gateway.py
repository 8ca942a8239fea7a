"""`tombola gateway` that kills itself, with SIGKILL, in one gap of an accept. Started by the tests; it is no part of
the product, which has no failpoints.

    DIE_AT=after_accept python -m tests.chaos.dying_gateway --port 8000

    before_accept    nothing is written yet
    after_accept     it is committed, nothing is published and nobody was answered
    after_publish    the broker has the message, nobody was answered
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from sqlalchemy import Engine

from tombola.producers import entry
from tombola.producers.gateway import intake
from tombola.producers.storage.transactions import Transaction, statement
from tombola.worker.cli import app

DIE_AT = os.environ["DIE_AT"]


def die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


@contextmanager
def dying_statement(engine: Engine) -> Iterator[Transaction]:
    with statement(engine) as open_statement:
        if DIE_AT == "before_accept":
            die()
        yield open_statement
    if DIE_AT == "after_accept":
        die()


class DyingPublisher(intake.Publisher):
    """Publishes, and dies. The answer is on its way by then, or not: a client cannot tell."""

    def publish(self, messages: Sequence[tuple[bytes, Mapping[str, str]]]) -> None:
        super().publish(messages)
        self.check().result()
        die()


if __name__ == "__main__":
    entry.statement = dying_statement  # type: ignore[attr-defined]
    if DIE_AT == "after_publish":
        intake.Publisher = DyingPublisher  # type: ignore[misc]
    app(["gateway", *sys.argv[1:]])
