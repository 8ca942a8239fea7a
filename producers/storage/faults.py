"""Database errors: what each one asks for (run again, wait, or refuse), and what to say of it."""

from __future__ import annotations

import enum
import sqlite3
from typing import Final

import pymysql
from pymysql.constants import CR
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError

from tombola.producers.domain.errors import ConfigurationError, DrawError, InternalError, ServiceUnavailable


class RowsChanged(Exception):
    """Rows are no longer as this transaction read them: another transaction has changed them."""


class Fault(enum.Enum):
    """What a database error asks for."""

    CONFLICT = "run the whole transaction again: it collided with another one"
    OUTAGE = "wait: the database cannot be used now, and nothing is wrong with the draws"
    REFUSED = "do not run it again: the database refuses these values"


# 1020 record changed (snapshot isolation), 1062 duplicate key, 1180 error during COMMIT, 1205 lock wait, 1213 deadlock
# (on Galera also at COMMIT), 3101 group replication conflict.
_CONFLICTS: Final = frozenset({1020, 1062, 1180, 1205, 1213, 3101})
# A statement exceeded its limit: MariaDB's max_statement_time, MySQL's max_execution_time, NOWAIT.
_TIMEOUTS: Final = frozenset({1205, 1969, 3024, 3572})
# The server cannot serve any session now, or not this one (MySQL manual, Server Error Message Reference).
_OUTAGES: Final = frozenset(
    {
        *(1040, 1042, 1043, 1129, 1130, 1135, 1152, 1158, 1159, 1160, 1161, 1184, 1203, 1226, 4031),  # connections
        *(1015, 1016, 1017, 1021, 1023, 1026, 1028, 1030, 1034, 1114, 1194, 1195, 1712),  # disk full, files, tables
        *(1037, 1038, 1041, 1206),  # memory
        *(1036, 1209, 1223, 1290, 1792, 1836, 1874, 3032),  # read-only
        *(1047, 1053, 1077, 1079, 1105, 1317, 1815, 1927, 3168, 3169),  # shutting down, killed, not (yet) in a cluster
        *(1044, 1045, 1049, 1142, 1143, 1227, 1370),  # missing privileges
        *(1054, 1136, 1146, 1305, 1356, 1364, 1449),  # tables, columns or triggers differ from this release's
    }
)


def code_of(error: BaseException) -> int | None:
    """The number of a MySQL or MariaDB error, raw or wrapped by SQLAlchemy; None for any other error."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    code = error.args[0] if isinstance(error, pymysql.MySQLError) and error.args else None
    return code if isinstance(code, int) else None


def fault_of(error: BaseException) -> Fault:
    """What an error inside a transaction asks for.

    An outage never dead-letters a draw, and every worker waits for its end. So only an error that says that the server
    cannot be used is an outage. Any other *answer* of the server concerns the values of this transaction, or is a
    mistake of tombola's with these draws, and must not stop other draws.
    """
    code = code_of(error)
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    if code in _CONFLICTS or code in _TIMEOUTS or is_duplicate_key(error) or isinstance(error, RowsChanged):
        return Fault.CONFLICT
    if isinstance(error, pymysql.MySQLError):
        # The client library's own errors, from 2000 on or without a number: the server did not answer.
        return Fault.OUTAGE if not code or code in _OUTAGES or 2000 <= code < 3000 else Fault.REFUSED
    if isinstance(error, sqlite3.Error):
        return Fault.OUTAGE if type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError) else Fault.REFUSED
    if isinstance(error, StatementError):  # a value that the column's type refuses
        return Fault.REFUSED
    return Fault.OUTAGE if isinstance(error, SQLAlchemyError | OSError | DrawError) else Fault.REFUSED


def is_answered(error: BaseException) -> bool:
    """Whether the server has answered, with a conflict or a refusal: the connection is usable."""
    return isinstance(error, pymysql.MySQLError) and fault_of(error) is not Fault.OUTAGE


def is_duplicate_key(error: BaseException) -> bool:
    """Whether a unique constraint refused the row: the key exists."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    if isinstance(error, sqlite3.IntegrityError):
        return "UNIQUE" in str(error)
    return isinstance(error, pymysql.MySQLError) and error.args[:1] == (1062,)


def is_lock_conflict(error: BaseException) -> bool:
    """Whether another transaction's lock caused the error, and not the draw itself."""
    return (code := code_of(error)) is not None and code != 1062 and fault_of(error) is Fault.CONFLICT


def is_outdated(error: BaseException) -> bool:
    """Whether the transaction's snapshot is older than a row that it wanted to lock: MariaDB has rolled all of it back.

    https://mariadb.com/docs/server/server-usage/storage-engines/innodb/innodb-system-variables#innodb_snapshot_isolation
    """
    return code_of(error) == 1020


def is_lock_timeout(error: BaseException) -> bool:
    """Whether the statement reached its time limit, which here is spent waiting for locks."""
    return code_of(error) in _TIMEOUTS


def explain(error: BaseException) -> ServiceUnavailable | ConfigurationError | InternalError:
    """A database error as the error to raise, with one sentence that says what to do.

    ServiceUnavailable only for an outage or a conflict. InternalError for values that the database refuses, and for
    mistakes of tombola's: another try does not help.
    """
    fault = fault_of(error)
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    code = error.args[0] if error.args else None
    text = " ".join(str(error.args[-1] if error.args else error).split())
    if code == 1146 or "no such table" in text or code == 1054 or "no such column" in text:
        return ConfigurationError(f"the database is not migrated ({text}): run `tombola migrate`")
    if code in (1044, 1045, 1049):
        return ConfigurationError(f"the database refuses this login ({text}): check TOMBOLA_DATABASE_URL")
    if code in (CR.CR_AUTH_PLUGIN_CANNOT_LOAD, CR.CR_AUTH_PLUGIN_ERR):
        return ConfigurationError(f"logging in to the database needs a package that is not installed: {text}")
    if code in (1142, 1143, 1227, 1370):
        return ConfigurationError(f"the database's user lacks a privilege ({text}): grant it")
    if code in (1136, 1305, 1356, 1364, 1449):
        return ConfigurationError(f"the database does not fit this release: {text}")
    if "unable to open database file" in text:
        return ConfigurationError("the SQLite file cannot be opened: check the folder in TOMBOLA_DATABASE_URL")
    if fault is Fault.REFUSED:
        is_answer = isinstance(error, pymysql.MySQLError | sqlite3.Error)
        return InternalError(f"{'the database refuses this' if is_answer else type(error).__name__}: {text}")
    if fault is Fault.CONFLICT:
        return ServiceUnavailable(f"the database is busy: {text}")
    return ServiceUnavailable(f"the database does not answer: {text}")


# 1047 a Galera node outside its cluster, 1290 --read-only, 1792 1836 1874 read-only in other words, 3032 offline mode.
_WRONG_SERVER: Final = frozenset({1047, 1290, 1792, 1836, 1874, 3032})


def is_wrong_server(error: BaseException) -> bool:
    """Whether this server refuses all writes: after a failover another server behind the same address takes them."""
    return isinstance(error, pymysql.MySQLError) and bool(error.args) and error.args[0] in _WRONG_SERVER
