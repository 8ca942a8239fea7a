"""status: where the database stands, and what comes next. Also what a worker asks before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine

import migrations
from migrations.legacy import tables
from migrations.legacy.backfill import index_statement, without_key
from migrations.legacy.contract import business_unique
from migrations.legacy.session import each_by_itself
from migrations.legacy.tables import KEY, SESSION


@dataclass(slots=True)
class Status:
    """Where the database stands."""

    stage: str
    next: str
    revision: str | None
    rows_without_key: int | None
    workers: str
    steps: list[dict[str, Any]] = field(default_factory=list)


def status(engine: Engine) -> Status:
    """What information_schema says, with what is on record beside it."""
    with each_by_itself(engine) as connection:
        ledger, known = tables.ledger(connection), tables.steps(connection)
        has_columns = {KEY, SESSION} <= ledger.columns.keys()
        has_indexes = has_columns and index_statement(ledger) is None
        if known.get("rollback") is not None and known["rollback"].status == tables.RUNNING:
            stage, following = "rolling back", "tombola legacy rollback"
        elif not known or known["expand"].status != tables.DONE:
            is_begun = bool(known) and known["expand"].status == tables.RUNNING
            stage = "expanding" if is_begun else "rolled back" if known else "legacy"
            following = "tombola legacy expand" if is_begun else "tombola legacy inspect"
        elif tables.is_contracted(ledger):
            is_done = "contract" in known and known["contract"].status == tables.DONE
            stage = "contracted" if is_done else "contracting"
            following = (
                "" if is_done and business_unique(ledger) is None
                else "tombola legacy contract" + (" --drop-business-unique" if is_done else "")
            )  # fmt: skip
        elif has_indexes and "backfill" in known and known["backfill"].status == tables.DONE:
            stage, following = "backfilled", "tombola legacy verify, then tombola legacy contract"
        else:
            stage = "backfilling" if "backfill" in known else "expanded"
            following = "tombola legacy backfill"
        return Status(
            stage=stage,
            next=following,
            revision=migrations.current_revision(connection),
            rows_without_key=without_key(connection) if has_indexes else None,
            workers=why_workers_must_wait(connection) or "may run",
            steps=[
                {
                    "step": it.step,
                    "status": it.status,
                    "started_at": str(it.started_at),
                    "ended_at": it.ended_at and str(it.ended_at),
                }
                for it in sorted(known.values(), key=lambda it: it.started_at)
                if it.step in tables.STEPS
            ],
        )


def is_legacy(connection: Connection) -> bool:
    """Whether the ledger here is old code's, without our columns."""
    if connection.dialect.name == "sqlite":
        return False
    found = tables.read(connection, tables.LEDGER)
    return found is not None and KEY not in found.columns


def why_workers_must_wait(connection: Connection) -> str | None:
    """Why no worker may settle here yet; None if one may, as wherever the ledger never was old code's."""
    if connection.dialect.name == "sqlite" or not tables.has_table(connection, "legacy_migration"):
        return None
    ledger, known = tables.ledger(connection), tables.steps(connection)
    if not known or known["expand"].status != tables.DONE:
        return "the legacy ledger is not expanded: see `tombola legacy status`"
    if not {KEY, SESSION} <= ledger.columns.keys():
        return "the legacy ledger lacks its new columns: see `tombola legacy status`"
    if not {tables.KEY_INDEX, tables.SESSION_INDEX} <= ledger.indexes.keys():
        return "the legacy ledger has no indexes for keys and sessions yet: `tombola legacy backfill` builds them"
    if name := tables.unique_on_business_id_alone(ledger):
        return (
            f"{name} lets a session have one row only, a won draw has two: "
            "`tombola legacy contract --drop-business-unique` first"
        )
    return None
