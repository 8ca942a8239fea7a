"""Whether the housekeeping goes on: is a relay there, is beat, has the nightly audit run, and what did it find?

Said once for the console's overview and for `tombola doctor`; the alert rules in monitoring/ say the same in PromQL.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Final, NamedTuple

from tombola.worker.audit.audits import Audited

AUDIT_AGE_S_MAX: Final = 26 * 3600.0  # one a night, and two hours for it


class Lapse(NamedTuple):
    """Something that is not done: what, and what to do."""

    what: str
    cure: str


def of_relay(roles: Collection[str]) -> Lapse | None:
    """Whether nobody relays, by the roles of the processes that are alive. With beat, workers do."""
    if "relay" in roles or {"beat", "worker"} <= set(roles):
        return None
    return Lapse(
        "no relay shows a pulse: what the broker loses is not published again, and nothing is timed out",
        "start `tombola relay`",
    )


def of_beat(roles: Collection[str]) -> Lapse | None:
    """Whether beat is away, by the roles of the processes that are alive."""
    if "beat" in roles:
        return None
    return Lapse(
        "beat shows no pulse: there is no nightly audit, and nothing is archived",
        "start one: celery -A tombola.worker beat",
    )


def of_audit(last: Audited | None, now: datetime) -> Lapse | None:
    """What is wrong with the last audit: it is not there, too old, or found something."""
    if last is None:
        return Lapse("no audit is on record", "run `tombola audit`; beat and a worker do it every night")
    if not last.is_clean:
        return Lapse(f"the last audit did not find all in order ({last})", "run `tombola audit`: it says what is wrong")
    age_s = (now - last.at).total_seconds()
    if age_s > AUDIT_AGE_S_MAX:
        return Lapse(
            f"the last audit was {age_s / 3600:,.0f} hours ago",
            "run `tombola audit`, and see that beat and a worker run: they do it every night",
        )
    return None
