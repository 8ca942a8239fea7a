"""The database's clock decides which requests are overdue or timed out, so that all processes agree.

    with engine.begin() as connection:
        now = clock.now(connection)

A process whose own clock is a day off must not give up requests that another process has just accepted. The database
is asked every ASK_EVERY_S; in between a monotonic clock carries its time on. SQLite uses this machine's clock.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Final
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine

ASK_EVERY_S: Final = 10.0


def utc_now() -> datetime:
    """Now by the clock of this machine, aware, in UTC."""
    return datetime.now(UTC)


def now(database: Engine | Connection) -> datetime:
    """Now by the clock of `database`, aware, in UTC. A Connection is asked on itself, inside its transaction.

    Raises SQLAlchemy's errors when it is time to ask and the database does not answer.
    """
    if database.dialect.name == "sqlite":
        return utc_now()
    engine = database.engine
    reading = _readings.get(engine)
    if reading is None or not 0 <= _elapsed_s() - reading[1] < ASK_EVERY_S:
        if reading is not None:
            # The other threads go on with the last reading, and do not ask at the same time.
            _readings[engine] = (reading[0] + timedelta(seconds=(since := _elapsed_s()) - reading[1]), since)
        reading = _ask(database)
        _readings[engine] = reading
    theirs, asked_at = reading
    return theirs + timedelta(seconds=_elapsed_s() - asked_at)


# By engine: the time that its database answered, and the moment of the answer by _elapsed_s.
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
    return theirs.replace(tzinfo=UTC), (
        began + _elapsed_s()
    ) / 2  # the server read its clock half-way through the round trip


def _elapsed_s() -> float:
    """Seconds of a monotonic clock, which counts the machine's sleep where the system has such a clock."""
    return time.clock_gettime(_CLOCK)


_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
