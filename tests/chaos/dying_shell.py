"""A `tombola` command that kills itself, with SIGKILL, at one place of its transaction. Started by the chaos tests.

DIE_AT=before_commit python -m tests.chaos.dying_shell account recharge --account 6 --amount 5 --key k

before_commit    the transaction is complete but for its COMMIT
after_commit     it is committed, and nothing is printed
"""

import os
import signal
import threading
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection, Engine

from tombola.producers.storage.transactions import again_after_conflicts
from tombola.worker.cli import main
from tombola.worker.operators import once

T = TypeVar("T")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


def dying(engine: Engine, act: Callable[[Connection], T], *, tries_max: int) -> T:
    def dying_act(connection: Connection) -> T:
        done = act(connection)
        if os.environ["DIE_AT"] == "before_commit":
            die()
        return done

    done = again_after_conflicts(engine, dying_act, tries_max=tries_max)
    die()
    return done


if __name__ == "__main__":
    assert hasattr(once, "again_after_conflicts"), "this would kill nobody"
    once.again_after_conflicts = dying
    main()
