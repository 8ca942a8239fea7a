"""Retention: archive requests that settled long ago. A repeat still gets its first result, rebuilt from the ledger."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.storage import clock, requests
from tombola.producers.storage.chunks import IN_LIST_MAX
from tombola.producers.storage.faults import explain


def archive_once(engine: Engine, *, older_than_s: float, rows_max: int = IN_LIST_MAX) -> int:
    """Archive up to `rows_max` requests that settled more than `older_than_s` ago; return how many.

    Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    try:
        with engine.begin() as connection:
            settled_before = clock.now(connection) - timedelta(seconds=older_than_s)
            return requests.archive(connection, settled_before, rows_max=rows_max)
    except SQLAlchemyError as error:
        raise explain(error) from error
