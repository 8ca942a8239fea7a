"""The relay as it is run behind the broker: what it gives up is a dead letter, what was replayed is followed up."""

from __future__ import annotations

import functools
import time
from typing import Final

from sqlalchemy import Engine

from tombola.producers.settings import Settings
from tombola.producers.telemetry.metrics import are_wanted
from tombola.worker.dead_letters import parking
from tombola.worker.relay.lookout import OperatorsLookout
from tombola.worker.relay.outbox import Relay

LOOK_FOR_UNSEEN_EVERY_S: Final = 600.0


def open_relay(settings: Settings) -> Relay:
    """A relay for `settings`; it connects at first use."""
    lookout = OperatorsLookout()
    worker = f"relay@{parking.here()}"
    next_look = 0.0

    def afterwards(engine: Engine) -> None:
        nonlocal next_look
        parking.follow_up_once(engine)
        if time.monotonic() >= next_look:
            while parking.bury_unseen_once(engine, worker=worker) == parking.ROWS_MAX:
                pass
            next_look = time.monotonic() + LOOK_FOR_UNSEEN_EVERY_S
        if are_wanted(settings):
            lookout.look(engine)

    return Relay.from_settings(
        settings,
        bury=functools.partial(parking.bury, worker=worker),
        afterwards=afterwards,
    )
