"""status: the stage of the migration, and the next command; also the check that a worker makes before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine

from tombola import migrations
from tombola.migrations import history
from tombola.migrations.legacy import record, tables
from tombola.migrations.legacy.backfill import index_statement, without_key
from tombola.migrations.legacy.contract import business_unique
from tombola.migrations.legacy.session import each_by_itself
from tombola.migrations.legacy.tables import KEY, SESSION


@dataclass(slots=True)
class Status:
    """The stage of the migration."""

    stage: str
    next: str
    revision: str | None
    rows_without_key: int | None
    workers: str
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_untouched(self) -> bool:
        """Whether no step has changed anything, or all changes were rolled back."""
        return self.stage in ("legacy", "rolled back")


def status(engine: Engine) -> Status:
    """The stage, from information_schema and the recorded steps."""
    with each_by_itself(engine) as connection:
        return status_of(connection)


def status_of(connection: Connection) -> Status:
    """`status` on an open connection."""
    ledger, known = tables.ledger(connection), record.steps(connection)
    has_indexes = {KEY, SESSION} <= ledger.columns.keys() and index_statement(ledger) is None
    stage, following = _stage(connection, ledger, known, has_indexes)
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
            if it.step in record.STEPS
        ],
    )


def _stage(
    connection: Connection, ledger: tables.Definition, known: dict[str, record.Step], has_indexes: bool
) -> tuple[str, str]:
    """The name of the stage, and the next command."""

    def is_done(step: str) -> bool:
        return step in known and known[step].status == record.DONE

    if "rollback" in known and known["rollback"].status == record.RUNNING:
        return "rolling back", "tombola legacy rollback"
    if not known:
        return ("legacy", "tombola legacy inspect") if is_legacy(connection) else ("ours from the beginning", "")
    shape = known["expand"].shape
    if known["expand"].status == record.ROLLED_BACK:
        return "rolled back", "tombola legacy inspect"
    if not is_done("expand"):
        return "adopting" if shape.has_columns else "expanding", shape.command
    if tables.is_contracted(ledger) and ("contract" in known or not shape.has_columns):
        if not is_done("contract"):
            return "contracting", "tombola legacy contract"
        is_unique_left = business_unique(ledger) is not None
        return "contracted", "tombola legacy contract --drop-business-unique" if is_unique_left else ""
    if has_indexes and is_done("backfill"):
        return "backfilled", "tombola legacy verify, then tombola legacy contract"
    if "backfill" in known:
        return "backfilling", "tombola legacy backfill"
    return "adopted" if shape.has_columns else "expanded", "tombola legacy backfill"


def is_legacy(connection: Connection) -> bool:
    """Whether the ledger is old code's, in any shape: no revision of tombola made it or took it over."""
    if connection.dialect.name == "sqlite" or tables.has_table(connection, migrations.VERSION_TABLE):
        return False
    found = tables.read(connection, tables.LEDGER)
    return found is not None and "business_id" in found.columns and history.former_revision(connection) is None


def why_workers_must_wait(connection: Connection) -> str | None:
    """Why no worker may settle on this ledger yet; None if workers may, as on any ledger that is not old code's."""
    if connection.dialect.name == "sqlite" or not tables.has_table(connection, "legacy_migration"):
        return None
    ledger, known = tables.ledger(connection), record.steps(connection)
    if not known or known["expand"].status != record.DONE:
        return "the legacy ledger is not expanded: see `tombola legacy status`"
    is_swept = "backfill" in known and known["backfill"].status == record.DONE
    if not {KEY, SESSION} <= ledger.columns.keys():
        return "the legacy ledger lacks its new columns: see `tombola legacy status`"
    if not {tables.KEY_INDEX, tables.SESSION_INDEX} <= ledger.indexes.keys():
        return "the legacy ledger has no indexes for keys and sessions yet: `tombola legacy backfill` builds them"
    if known["expand"].shape.has_columns and not is_swept:
        return "rows of the legacy ledger may have no key or no session yet: `tombola legacy backfill` first"
    if name := tables.unique_on_business_id_alone(ledger):
        return (
            f"{name} lets a session have one row only, a won draw has two: "
            "`tombola legacy contract --drop-business-unique` first"
        )
    return None
