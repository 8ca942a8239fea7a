"""The clock that decides: the database's, so that all processes agree on what is overdue, timed out, or over.

    with engine.begin() as connection:
        now = clock.now(connection)

A process whose own clock is a day off must not give up what another one has just accepted. The database is asked once
in ASK_EVERY_S; in between its time is carried on by a clock that nobody sets. SQLite has no clock but this machine's.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Final
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine

ASK_EVERY_S: Final = 10.0


def utc_now() -> datetime:
    """Now, aware, in UTC."""
    return datetime.now(UTC)


def now(database: Engine | Connection) -> datetime:
    """Now by the clock of `database`, aware, in UTC; asked on this very connection, if it is time to ask.

    Raises SQLAlchemy's errors when the database must be asked and does not answer.
    """
    if database.dialect.name == "sqlite":
        return utc_now()
    engine = database.engine
    reading = _readings.get(engine)
    if reading is None or not 0 <= _elapsed_s() - reading[1] < ASK_EVERY_S:
        if reading is not None:
            # The other threads go on with what is known, rather than ask all at once.
            _readings[engine] = (reading[0] + timedelta(seconds=(since := _elapsed_s()) - reading[1]), since)
        reading = _ask(database)
        _readings[engine] = reading
    theirs, asked_at = reading
    return theirs + timedelta(seconds=_elapsed_s() - asked_at)


# What each engine's database said, and when by _elapsed_s.
_readings: WeakKeyDictionary[Engine, tuple[datetime, float]] = WeakKeyDictionary()


def _ask(database: Engine | Connection) -> tuple[datetime, float]:
    if isinstance(database, Engine):
        with database.connect() as connection:
            return _ask(connection)
    began = _elapsed_s()
    try:
        theirs: datetime = database.exec_driver_sql("SELECT UTC_TIMESTAMP(6)").scalar_one()
    except BaseException:
        _readings.pop(database.engine, None)
        raise
    return theirs.replace(tzinfo=UTC), (began + _elapsed_s()) / 2  # half-way there it was that late


def _elapsed_s() -> float:
    """Seconds since some moment; they go on while the machine sleeps, where there is such a clock."""
    return time.clock_gettime(_CLOCK)


_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
