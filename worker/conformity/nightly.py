"""Every night's reports: each campaign's last days are examined, and what deviates is on record.

A report a night would raise false alarms a hundred times as often as one report. So a night spends a 365th of what a
report may spend: the linear spending function of Lan and DeMets (1983, Biometrika 70, 659-663), renewed every year.
Right odds of one campaign raise an alarm in at most one year of a hundred, however much the nights have in common.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple

import msgspec
from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.settings import Settings
from tombola.producers.storage import clock
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import operator_actions as table
from tombola.worker.conformity import counting, reading, revealed
from tombola.worker.conformity.report import ALPHA, Period, Report
from tombola.worker.operators import actions

log = logging.getLogger(__name__)

CONFORMITY: Final = "conformity"
NIGHTS: Final = 365
DAYS: Final = 30  # that a nightly report goes back
DEVIATIONS_KEPT_MAX: Final = 20  # of a campaign, on record


class Examined(NamedTuple):
    """Last night's reports, on record: when and by whom, how many campaigns, how many deviations, and of which."""

    at: datetime
    by: str
    campaigns: int
    deviations: int
    deviating: tuple[str, ...]

    def __str__(self) -> str:
        if self.deviations:
            return f"{self.deviations:,} deviations: {', '.join(self.deviating)}"
        return f"the draws of {self.campaigns:,} campaigns are as their odds say"


def examine(engine: Engine, settings: Settings) -> list[Report]:
    """Count what is sealed, and report on every campaign with draws in the last DAYS.

    Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    counting.count(engine)
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            names, now = reading.campaigns_of(connection), clock.now(connection)
    except SQLAlchemyError as error:
        raise explain(error) from error
    period = Period(reading.day(now) - timedelta(days=DAYS))
    key_of = revealed.key_of(settings)
    found = [reading.report_on(engine, name, period=period, alpha=ALPHA / NIGHTS, key_of=key_of) for name in names]
    return [it for it in found if it.versions]


def record(engine: Engine, reports: Sequence[Report], *, by: str) -> None:
    """Put a night's reports on record. Raises ServiceUnavailable, ConfigurationError or InternalError."""
    details = {
        "alpha": ALPHA / NIGHTS,
        "pulls": {it.campaign: it.pulls for it in reports},
        "deviations": {it.campaign: it.deviations[:DEVIATIONS_KEPT_MAX] for it in reports if it.deviations},
    }
    count = sum(len(it.deviations) for it in reports)
    try:
        with engine.begin() as connection:
            actions.record(connection, operator=by, action=CONFORMITY, reason="", count=count, details=details)
    except SQLAlchemyError as error:
        raise explain(error) from error


def last(connection: Connection) -> Examined | None:
    """The last reports on record; None if there are none."""
    query = select(table).where(table.c.action == CONFORMITY).order_by(table.c.id.desc()).limit(1)
    row = connection.execute(query).mappings().first()
    if row is None:
        return None
    details = msgspec.json.decode(row["details"])
    return Examined(row["at"], row["operator"], len(details["pulls"]), row["count"], tuple(details["deviations"]))
