"""The record of the steps, in tables of their own: the state before, checkpoints, when each step ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, text

from tombola.migrations.legacy.shapes import Shape
from tombola.migrations.legacy.tables import KEY, SESSION, has_table
from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.storage.clock import utc_now

STEPS: Final = ("expand", "backfill", "verify", "contract", "drop_business_unique", "rollback")
RUNNING, DONE, ROLLED_BACK = "running", "done", "rolled back"

STATE_TABLES: Final = (
    "CREATE TABLE IF NOT EXISTS legacy_migration (step VARCHAR(32) NOT NULL, status VARCHAR(16) NOT NULL, "
    "started_at DATETIME(6) NOT NULL, ended_at DATETIME(6) NULL, details MEDIUMTEXT NOT NULL COMMENT 'JSON', "
    "PRIMARY KEY (step)) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin",
    "CREATE TABLE IF NOT EXISTS legacy_migration_chunks (first_id BIGINT NOT NULL, last_id BIGINT NOT NULL, "
    "row_count BIGINT NOT NULL, checksum CHAR(32) NOT NULL, PRIMARY KEY (first_id)) "
    "ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin "
    "COMMENT='every untouched column of these rows, before'",
    f"CREATE TABLE IF NOT EXISTS legacy_migration_keys (transaction_id BIGINT NOT NULL, {KEY} VARCHAR(100) NOT NULL, "
    f"{SESSION} VARCHAR(100) NOT NULL, PRIMARY KEY (transaction_id)) ENGINE=InnoDB DEFAULT CHARSET=ascii "
    "COLLATE=ascii_bin COMMENT='of draws by new code that were rolled back with their rows kept'",
    "CREATE TABLE IF NOT EXISTS legacy_migration_blanks (column_name VARCHAR(32) NOT NULL, first_id BIGINT NOT NULL, "
    "last_id BIGINT NOT NULL, PRIMARY KEY (column_name, first_id)) ENGINE=InnoDB DEFAULT CHARSET=ascii "
    "COLLATE=ascii_bin COMMENT='rows without this value, before, in a table that was adopted'",
)


@dataclass(frozen=True, slots=True)
class Step:
    """One row of `legacy_migration`."""

    step: str
    status: str
    started_at: Any
    ended_at: Any
    details: dict[str, Any]

    @property
    def shape(self) -> Shape:
        """The table's shape before, in expand's record. The first release knew only the shape OLD."""
        return Shape(self.details.get("shape", Shape.OLD.value))


def steps(connection: Connection) -> dict[str, Step]:
    """All recorded steps, by name; empty before the first expand."""
    if not has_table(connection, "legacy_migration"):
        return {}
    found = connection.execute(text("SELECT step, status, started_at, ended_at, details FROM legacy_migration")).all()
    return {it[0]: Step(it[0], it[1], it[2], it[3], msgspec.json.decode(it[4])) for it in found}


def begin(connection: Connection, step: str, details: Mapping[str, Any]) -> Step:
    """Record that `step` runs; a step that was interrupted continues with its recorded details."""
    known = steps(connection).get(step)
    if known is not None and known.status == RUNNING:
        return known
    connection.execute(
        text(
            "REPLACE INTO legacy_migration (step, status, started_at, ended_at, details) "
            "VALUES (:step, :status, :now, NULL, :details)"
        ),
        {"step": step, "status": RUNNING, "now": _now(), "details": as_json(details)},
    )
    return steps(connection)[step]


def note(connection: Connection, step: str, details: Mapping[str, Any]) -> None:
    """Replace a step's details: its checkpoint."""
    connection.execute(
        text("UPDATE legacy_migration SET details = :details WHERE step = :step"),
        {"step": step, "details": as_json(details)},
    )


def end(connection: Connection, step: str, details: Mapping[str, Any], *, status: str = DONE) -> None:
    """Record that `step` has ended."""
    connection.execute(
        text("UPDATE legacy_migration SET status = :status, ended_at = :now, details = :details WHERE step = :step"),
        {"step": step, "status": status, "now": _now(), "details": as_json(details)},
    )


def end_all(connection: Connection) -> None:
    """Record for all steps at once that they are rolled back, so that the records agree at any moment."""
    connection.execute(
        text("UPDATE legacy_migration SET status = :status, ended_at = :now"), {"status": ROLLED_BACK, "now": _now()}
    )


def _now() -> Any:
    return utc_now().replace(tzinfo=None)


def as_json(details: Mapping[str, Any]) -> str:
    """A step's details as they are stored."""
    return msgspec.json.encode(dict(details)).decode()


def recorded(connection: Connection) -> Step:
    """The record of expand or adopt; raises ConfigurationError before that step."""
    known = steps(connection).get("expand")
    if known is None:
        raise ConfigurationError(
            "this database was neither expanded nor adopted: `tombola legacy inspect` says which of the two comes first"
        )
    return known


def filled_before(details: Mapping[str, Any]) -> list[str]:
    """Which of the two columns existed before, from expand's details."""
    return [name for name in (KEY, SESSION) if name in details["columns"]]
