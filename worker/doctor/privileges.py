"""Whether the database user of this process may change what only grows: the ledger, the record, the sealed books."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from tombola.producers.storage.grants import APPEND_ONLY
from tombola.producers.storage.schema import metadata
from tombola.worker.doctor.checks import CannotLook, Verdict, ok, warn

DENIED: Final = frozenset({1142, 1143})  # for a table, for a column
MISSING: Final = 1146


def look_at_privileges(connection: Connection) -> Verdict:
    """Ask the server, statement by statement: grants may come from roles, wildcards and columns alike.

    EXPLAIN needs the privileges of the statement that it explains, and executes nothing.
    """
    # The doctor's sessions only read: there the server would refuse an UPDATE whatever the user may do.
    connection.exec_driver_sql("START TRANSACTION READ WRITE")
    found = [f"{what} {name}" for name in APPEND_ONLY for what in _allowed(connection, name)]
    if found:
        return warn(
            f"this process's database user may {', '.join(found)}",
            "give each process a user of its own, who may not: `tombola grants --sql` prints them",
        )
    return ok(f"this process's database user may not change or delete rows of {', '.join(APPEND_ONLY)}")


def _allowed(connection: Connection, name: str) -> Iterator[str]:
    columns = [it.name for it in metadata.tables[name].columns]
    changed = [it for it in columns if _is_allowed(connection, f"UPDATE {name} SET {it} = NULL WHERE 1 = 0")]
    if changed:
        yield "UPDATE" if len(changed) == len(columns) else f"UPDATE ({', '.join(changed)})"
    if _is_allowed(connection, f"DELETE FROM {name} WHERE 1 = 0"):
        yield "DELETE"


def _is_allowed(connection: Connection, statement: str) -> bool:
    try:
        connection.execute(text(f"EXPLAIN {statement}"))
    except DBAPIError as error:
        code = error.orig.args[0] if error.orig is not None and error.orig.args else None
        if code == MISSING:
            raise CannotLook("there are no tables yet") from error
        if error.connection_invalidated or not isinstance(code, int):
            raise
        # Any other refusal, such as that of a NULL, comes after that of the user.
        return code not in DENIED
    return True
