"""Retention: archive requests that settled long ago, and delete fulfilments that were delivered long ago.

A repeat still gets its first result, rebuilt from the ledger. What is not delivered is kept.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.storage import clock, requests
from tombola.producers.storage.chunks import IN_LIST_MAX
from tombola.producers.storage.faults import explain
from tombola.worker.fulfilments import fulfilments


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


def forget_fulfilments(engine: Engine, *, older_than_s: float, steps_max: int, rows_max: int = IN_LIST_MAX) -> None:
    """Delete fulfilments that were delivered more than `older_than_s` ago, `rows_max` rows in a transaction.

    Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    after_id: int | None = 0
    try:
        for _ in range(steps_max):
            if after_id is None:
                break
            with engine.begin() as connection:
                ended_before = clock.now(connection) - timedelta(seconds=older_than_s)
                after_id = fulfilments.forget_delivered(connection, ended_before, after_id=after_id, rows_max=rows_max)
    except SQLAlchemyError as error:
        raise explain(error) from error
