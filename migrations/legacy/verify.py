"""verify: the guide's checks, and the checksums of every untouched column.

After a rollback verify compares the definitions with those before, instead of the guide's checks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection, Engine, text

from tombola.migrations.legacy import checksums, record, tables
from tombola.migrations.legacy.session import OnProgress, each_by_itself
from tombola.migrations.legacy.shapes import Shape
from tombola.migrations.legacy.tables import ACCOUNTS, KEY, KEY_INDEX, LEDGER, SESSION, SESSION_INDEX
from tombola.producers.domain.draw import NOTES_PREFIX
from tombola.producers.domain.errors import ConfigurationError

MISMATCHES_MAX: Final = 1000
NOTE_EVERY: Final = 50  # chunks, between two checkpoints
SAMPLES: Final = 5


@dataclass(slots=True)
class Verification:
    """What was checked, and the problems that were found."""

    chunks: int = 0
    rows: int = 0
    rows_total: int = 0
    rows_without_key: int = 0
    keys_distinct: int = 0
    duplicates: int = 0
    rewards_alone_old: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.problems


def verify(engine: Engine, *, on_progress: OnProgress) -> Verification:
    """Check everything; a run after a killed one continues at its checkpoint."""
    with each_by_itself(engine) as connection:
        expanded = record.recorded(connection)
        if not checksums.taken_to(connection) and expanded.status == record.RUNNING:
            raise ConfigurationError(f"`{expanded.shape.command}` is not done: there are no checksums yet")
        found = Verification()
        _compare(connection, checksums.Recipe.of(expanded.details), found, on_progress)
        if expanded.status == record.ROLLED_BACK:
            found.problems += definitions_changed(connection, expanded.details)
        else:
            _keys(connection, expanded.shape, found)
        known = record.steps(connection)["verify"]
        record.end(connection, "verify", known.details | {"problems": found.problems})
    return found


def _compare(connection: Connection, recipe: checksums.Recipe, found: Verification, on_progress: OnProgress) -> None:
    details = record.begin(connection, "verify", {"last_id": 0, "chunks": 0, "rows": 0, "problems": []}).details
    upto = checksums.taken_to(connection)
    chunks = connection.execute(
        text(
            "SELECT first_id, last_id, row_count, checksum FROM legacy_migration_chunks WHERE first_id > :last "
            "ORDER BY first_id"
        ),
        {"last": details["last_id"]},
    ).all()
    for number, (first, last, rows, before) in enumerate(chunks, 1):
        rows_now, now = checksums.checksum(connection, recipe, first, last)
        if (rows_now, now) != (rows, before) and len(details["problems"]) < MISMATCHES_MAX:
            what = "other values than before" if rows_now == rows else f"{rows_now:,} rows, {rows:,} before"
            details["problems"].append(f"transaction_id {first:,} to {last:,}: {what}")
        details |= {"last_id": last, "chunks": details["chunks"] + 1, "rows": details["rows"] + rows_now}
        if number % NOTE_EVERY == 0:
            record.note(connection, "verify", details)
        on_progress("checksums", last, upto)
    found.chunks, found.rows = details["chunks"], details["rows"]
    found.problems += details["problems"]


def _keys(connection: Connection, shape: Shape, found: Verification) -> None:
    """The guide's checks: rows = distinct keys, no duplicates, both indexes, a charge in every won draw's session."""
    ledger = tables.ledger(connection)
    missing = [name for name in (KEY, SESSION) if name not in ledger.columns]
    if missing:
        found.problems.append(f"no column {' and '.join(missing)}")
        return
    has_indexes = {KEY_INDEX, SESSION_INDEX} <= ledger.indexes.keys()
    total, with_key, distinct = connection.execute(
        text(f"SELECT COUNT(*), COUNT({KEY}), COUNT(DISTINCT {KEY}) FROM {LEDGER}")
    ).one()
    found.rows_total, found.rows_without_key, found.keys_distinct = total, total - with_key, distinct
    found.duplicates = with_key - distinct
    if found.duplicates:
        found.problems.append(f"{found.duplicates:,} keys are duplicates")
    if not has_indexes:
        found.problems.append(f"{KEY_INDEX} and {SESSION_INDEX} are missing: `tombola legacy backfill` builds them")
        return
    if tables.takes_keys_only(ledger) and found.rows_without_key:
        found.problems.append(f"{found.rows_without_key:,} rows have no key")
    _rewards(connection, shape, found)


def _rewards(connection: Connection, shape: Shape, found: Verification) -> None:
    # Where other code has written keys as well, only the notes tell the rows of tombola's workers.
    is_old = (
        f"COALESCE(won.notes, '') NOT LIKE '{NOTES_PREFIX}%'"
        if shape.has_columns
        else (f"won.{KEY} = CONCAT('tx_', won.transaction_id)")
    )
    for first, last in checksums.ranges(connection, 0, tables.highest_id(connection), 50_000):
        alone: Any = connection.execute(
            text(
                f"SELECT won.{SESSION}, {is_old} FROM {LEDGER} AS won "
                "WHERE won.transaction_id BETWEEN :first AND :last AND won.business_type = 'lottery_reward' "
                f"AND won.{SESSION} IS NOT NULL AND NOT EXISTS (SELECT 1 FROM {LEDGER} AS charge "
                f"WHERE charge.{SESSION} = won.{SESSION} AND charge.business_type = 'lottery_consume')"
            ),
            {"first": first, "last": last},
        )
        for session_id, is_old in alone:
            if not is_old:
                found.problems.append(f"session {session_id} has a reward and no charge")
            elif len(found.rewards_alone_old) < SAMPLES:
                found.rewards_alone_old.append(session_id)


def definitions_changed(connection: Connection, details: dict[str, Any]) -> list[str]:
    """The tables whose definitions differ from those that expand recorded."""
    return [
        f"the definition of {name} is not the one before"
        for name in (LEDGER, ACCOUNTS)
        for found in [tables.read(connection, name)]
        if found is None or not tables.is_same(found.sql, details["definitions"][name], found.collation)
    ]
