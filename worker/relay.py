"""The relay as it is run behind the broker: what it gives up is a dead letter, what was replayed is followed up."""

from __future__ import annotations

import functools

from sqlalchemy import Engine

from producers.metrics import are_wanted
from producers.outbox import Relay
from producers.settings import Settings
from worker import parking
from worker.metrics import DeadLetterCount


def open_relay(settings: Settings) -> Relay:
    """A relay for `settings`; it connects at first use."""
    count = DeadLetterCount()

    def afterwards(engine: Engine) -> None:
        parking.follow_up_once(engine)
        if are_wanted(settings):
            count.look(engine)

    return Relay.from_settings(
        settings,
        bury=functools.partial(parking.bury, worker=f"relay@{parking.here()}"),
        afterwards=afterwards,
    )
