"""An operator's act: one transaction, run again after a conflict."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import pymysql
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.storage.faults import RowsChanged, explain
from tombola.producers.storage.transactions import again_after_conflicts

TRIES_MAX: Final = 5

T = TypeVar("T")


def once(engine: Engine, act: Callable[[Connection], T]) -> T:
    """Run `act` in a transaction, again when another transaction took its key or its lock; return its result.

    Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    with explained():
        return again_after_conflicts(engine, act, tries_max=TRIES_MAX)


@contextmanager
def explained() -> Iterator[None]:
    """Turn a database's error inside, SQLAlchemy's or the driver's own, into the DrawError of `explain`."""
    try:
        yield
    except (SQLAlchemyError, pymysql.MySQLError, sqlite3.Error, RowsChanged) as error:
        raise explain(error) from error
