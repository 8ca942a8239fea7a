"""The audits on record: when the last one ended, and what it found. worker.audit.audit says what an audit proves."""

from __future__ import annotations

from datetime import datetime
from typing import Final, NamedTuple

import msgspec
from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import operator_actions as table
from tombola.worker.audit import marks
from tombola.worker.audit.report import Report
from tombola.worker.operators import actions

AUDIT: Final = "audit"
_SINCE: Final = '{"everything":false,'  # how the details begin of an audit that went on from another one
COUNT_MAX: Final = 2**31 - 1  # the column's


class Audited(NamedTuple):
    """An audit on record: the number of violations, and the invariants that were not examined.

    `everything_at` is when the last audit of everything ended, which may be this one; None if there is none.
    """

    at: datetime
    by: str
    violations: int
    not_looked_at: tuple[str, ...]
    everything_at: datetime | None

    @property
    def is_clean(self) -> bool:
        """Whether every invariant was examined, and held."""
        return not self.violations and not self.not_looked_at

    def __str__(self) -> str:
        if self.is_clean:
            whole = (
                "" if self.everything_at in (None, self.at) else f", everything examined {self.everything_at:%Y-%m-%d}"
            )
            return f"the books balance{whole}"
        parts = [f"{self.violations:,} violations"] if self.violations else []
        if self.not_looked_at:
            parts.append(f"not looked at: {', '.join(self.not_looked_at)}")
        return "; ".join(parts)


def record(engine: Engine, report: Report, *, by: str) -> None:
    """Put an audit on record, with the mark that the next one goes on from.

    Raises ServiceUnavailable, ConfigurationError or InternalError: then neither is written.
    """
    details = {
        "everything": report.is_of_everything,
        "after": report.after_id,
        "up_to": report.up_to_id,
        "violated": {name: count for name, count in report.counts.items() if count},
        "not_looked_at": [name for name, state in report.states.items() if state == "not looked at"],
        **{name: getattr(report, name) for name in ("requests", "rows", "accounts")},
    }
    count = min(COUNT_MAX, sum(report.counts.values()))
    try:
        with engine.begin() as connection:
            actions.record(connection, operator=by, action=AUDIT, reason="", count=count, details=details)
            if report.reached is not None:
                marks.keep(connection, report.reached)
    except SQLAlchemyError as error:
        raise explain(error) from error


def last(connection: Connection) -> Audited | None:
    """The last audit on record; None if there is none."""
    query = select(table).where(table.c.action == AUDIT).order_by(table.c.id.desc()).limit(1)
    row = connection.execute(query).mappings().first()
    if row is None:
        return None
    not_looked_at = msgspec.json.decode(row["details"]).get("not_looked_at", ())
    # The audits of older releases, which do not say so, were audits of everything.
    everything = query.where(table.c.details.not_like(f"{_SINCE}%"))
    found = connection.execute(everything).mappings().first()
    return Audited(
        row["at"], row["operator"], row["count"], tuple(not_looked_at), None if found is None else found["at"]
    )
