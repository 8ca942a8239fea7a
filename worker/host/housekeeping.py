"""Whether housekeeping is done: does a relay run, does beat run, what did the last audit and conformity reports find?

For the console's overview and for `tombola doctor`; the alert rules in monitoring/ say the same in PromQL.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Final, NamedTuple

from tombola.worker.audit.audits import Audited
from tombola.worker.conformity.nightly import Examined

AUDIT_AGE_S_MAX: Final = 26 * 3600.0  # one audit a night, and two hours to spare
CONFORMITY_AGE_S_MAX: Final = 26 * 3600.0  # reports every night, and two hours to spare
EVERYTHING_AGE_S_MAX: Final = 8 * 86_400.0  # one audit of everything a week, and a day to spare


class Lapse(NamedTuple):
    """Housekeeping that is not done: what is missing, and the cure."""

    what: str
    cure: str


def of_relay(roles: Collection[str]) -> Lapse | None:
    """The lapse when no process relays; `roles` are those of the live processes. With beat, workers relay."""
    if "relay" in roles or {"beat", "worker"} <= set(roles):
        return None
    return Lapse(
        "no relay shows a pulse: requests that the broker loses are not published again, and none times out",
        "start `tombola relay`",
    )


def of_beat(roles: Collection[str]) -> Lapse | None:
    """The lapse when beat does not run; `roles` are those of the live processes."""
    if "beat" in roles:
        return None
    return Lapse(
        "beat shows no pulse: there is no nightly audit, and nothing is archived",
        "start beat: celery -A tombola.worker beat",
    )


def of_audit(last: Audited | None, now: datetime) -> Lapse | None:
    """The lapse when the last audit is missing, too old, or not clean, or the last one of everything is too old."""
    if last is None:
        return Lapse("no audit is on record", "run `tombola audit`; beat and a worker do it every night")
    if not last.is_clean:
        return Lapse(f"the last audit was not clean ({last})", "run `tombola audit`: it lists what is wrong")
    age_s = (now - last.at).total_seconds()
    if age_s > AUDIT_AGE_S_MAX:
        return Lapse(
            f"the last audit was {age_s / 3600:,.0f} hours ago",
            "run `tombola audit`, and check that beat and a worker run: they do it every night",
        )
    if last.everything_at is None or (now - last.everything_at).total_seconds() > EVERYTHING_AGE_S_MAX:
        since = "never" if last.everything_at is None else f"last on {last.everything_at:%Y-%m-%d}"
        return Lapse(
            f"everything was {since} audited: the other audits go on from the one before",
            "run `tombola audit --all`, and check that beat and a worker run: they do it every Sunday",
        )
    return None


def of_conformity(last: Examined | None, now: datetime) -> Lapse | None:
    """The lapse when the last conformity reports are missing or too old, or draws deviate from their odds."""
    if last is None:
        return Lapse("no conformity report is on record", "beat and a worker make one every night: check that they run")
    if last.deviations:
        return Lapse(
            f"draws are not as their odds say ({last})",
            "run `tombola campaign conformity` for that campaign: it says what deviates, and how far",
        )
    age_s = (now - last.at).total_seconds()
    if age_s > CONFORMITY_AGE_S_MAX:
        return Lapse(
            f"the last conformity reports were {age_s / 3600:,.0f} hours ago",
            "check that beat and a worker run: they make them every night",
        )
    return None
