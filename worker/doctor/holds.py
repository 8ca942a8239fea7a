"""The check of holds: are those that have expired voided?"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection

from tombola.producers.settings import Settings
from tombola.worker.doctor.checks import Facts, Verdict, ok, warn
from tombola.worker.movements.holds import OVERDUE_S, count_overdue

COUNTED_MAX: Final = 10_000


def look_at_holds(connection: Connection, _settings: Settings, _found: Facts) -> Verdict:
    """Warns of open holds that expired OVERDUE_S ago, and more."""
    overdue = count_overdue(connection, count_max=COUNTED_MAX)
    if not overdue:
        return ok("none is overdue")
    at_least = "at least " if overdue == COUNTED_MAX else ""
    return warn(
        f"{at_least}{overdue:,} open holds have expired more than {OVERDUE_S / 60:.0f} minutes ago",
        "a relay and a worker must be running; of a full account end them yourself: tombola account holds ID, then "
        "tombola account void HOLD",
    )
