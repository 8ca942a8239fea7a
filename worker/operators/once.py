"""An operator's act: one transaction, run again after a conflict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.storage.faults import explain
from tombola.producers.storage.transactions import again_after_conflicts

TRIES_MAX: Final = 5

T = TypeVar("T")


def once(engine: Engine, act: Callable[[Connection], T]) -> T:
    """Run `act` in a transaction, again when another transaction took its key or its lock; return its result.

    Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    try:
        return again_after_conflicts(engine, act, tries_max=TRIES_MAX)
    except SQLAlchemyError as error:
        raise explain(error) from error
