"""inspect: describe the legacy table, its differences from the guide, and the rows that would be obstacles.

Only reads. Rows are read by primary key in chunks. Checks that need all rows of a session at once (keys that collide,
rewards without a charge) run in parts by a hash of `business_id`, each part a statement of seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, Engine, text

from tombola.migrations.legacy import checksums, running_out, shapes, tables
from tombola.migrations.legacy import status as standing
from tombola.migrations.legacy.session import OnProgress, each_by_itself
from tombola.migrations.legacy.shapes import IS_ASCII, Shape
from tombola.migrations.legacy.tables import (
    ACCOUNT_COLUMNS,
    ACCOUNT_COLUMNS_ADDED,
    ACCOUNTS,
    KEY,
    LEDGER,
    LEDGER_COLUMNS,
    SESSION,
    Definition,
)

CHUNK_ROWS: Final = 20_000
PART_ROWS: Final = 500_000
SAMPLES: Final = 5
OWN_INDEXES: Final = (tables.KEY_INDEX, tables.SESSION_INDEX)

OWN_SESSION: Final = (
    "give these rows one, or run `tombola legacy backfill --own-session`: each gets a session of its own, tx_{id}"
)


@dataclass(slots=True)
class Finding:
    """One fact to know before the migration. `expand` does not begin while there is a blocking finding."""

    name: str
    what: str
    cure: str
    count: int = 0
    samples: list[Any] = field(default_factory=list)
    is_blocking: bool = False

    def add(self, sample: Any, count: int = 1) -> None:
        self.count += count
        if len(self.samples) < SAMPLES:
            self.samples.append(sample)


@dataclass(slots=True)
class Inspection:
    """The report."""

    server: str
    shape: str | None  # a to d as in the guide; None: tombola made the ledger, or a step has run
    shape_is: str
    next: str
    table: dict[str, Any]
    columns: list[dict[str, Any]]
    indexes: list[str]
    differences: list[str]
    account_columns_beside_ours: list[str]
    findings: list[Finding]
    rows: int = 0

    @property
    def can_begin(self) -> bool:
        return not any(finding.is_blocking for finding in self.findings)


def inspect(engine: Engine, *, on_progress: OnProgress, with_rows: bool = True) -> Inspection:
    """Inspect the definitions, and with `with_rows` every row."""
    with each_by_itself(engine) as connection:
        ledger, accounts = tables.ledger(connection), tables.accounts(connection)
        now = standing.status_of(connection)
        shape = shapes.shape_of(connection, ledger) if now.is_untouched else None
        findings = [*obstacles(ledger, accounts), *(namesakes(connection) if now.is_untouched else ())]
        is_blocked = any(finding.is_blocking for finding in findings)
        found = Inspection(
            server=str(connection.execute(text("SELECT VERSION()")).scalar_one()),
            shape=shape and shape.value,
            shape_is=str(shape) if shape else now.stage,
            next=now.next if shape is None else "" if is_blocked else shape.command,
            table={
                "engine": ledger.engine,
                "collation": ledger.collation,
                "rows_estimated": ledger.rows,
                "size_bytes": ledger.size_bytes,
                "triggers": list(ledger.triggers),
            },
            columns=[
                {"name": it.name, "type": it.type, "null": it.is_nullable, "collation": it.collation}
                for it in ledger.columns.values()
            ],
            indexes=[it.definition for it in ledger.indexes.values()],
            differences=list(_differences(ledger, shape)),
            account_columns_beside_ours=[
                name for name in accounts.columns if name not in (*ACCOUNT_COLUMNS, *ACCOUNT_COLUMNS_ADDED)
            ],
            findings=[*findings, *_running_out(connection, ledger, accounts)],
        )
        if with_rows and found.can_begin:
            found.rows, seen = _walk(connection, ledger, on_progress)
            found.findings += seen
            found.findings += _keys(connection, ledger, on_progress)
            found.findings += _sessions(connection, found.rows, on_progress)
    return found


# ---- definitions -----------------------------------------------------------------------------------------------------


def obstacles(ledger: Definition, accounts: Definition) -> list[Finding]:
    """The findings in the definitions alone."""
    return [*_of_ledger(ledger), *_of_accounts(accounts)]


def namesakes(connection: Connection) -> Iterator[Finding]:
    """Tables with the names of tombola's but other columns: the guide has a table of requests as well."""
    for name in tables.own_tables():
        found = tables.read(connection, name)
        missing = [] if found is None else [it for it in tables.own_columns(name) if it not in found.columns]
        if missing:
            yield _blocking("tables", f"there is a table {name} without {', '.join(missing)}", "give it another name")


def _of_ledger(ledger: Definition) -> Iterator[Finding]:
    if ledger.engine != "InnoDB":
        yield _blocking("engine", f"{LEDGER} is on {ledger.engine}", "it needs transactions: convert it to InnoDB")
    primary = ledger.indexes.get("PRIMARY")
    if primary is None or primary.columns != (tables.quoted("transaction_id"),):
        yield _blocking("primary key", "transaction_id is not the primary key", "every step relies on it")
    missing = [name for name in LEDGER_COLUMNS if name not in ledger.columns]
    if missing:
        yield _blocking("columns", f"{LEDGER} lacks {', '.join(missing)}", "add them, nullable: workers write them")
    for column in ledger.columns.values():
        if column.name not in (*LEDGER_COLUMNS, KEY, SESSION) and column.is_needed_on_insert:
            yield _blocking("columns", f"{LEDGER}.{column.name} has no default", "give it one: workers do not know it")
        if column.name in ("delta_amount", "balance_before", "balance_after"):
            yield from _of_amount(LEDGER, column)
        if column.kind == "enum" and column.name == "business_type":
            lacking = [name for name in ("lottery_consume", "lottery_reward") if f"'{name}'" not in column.type]
            if lacking:
                yield _blocking("columns", f"business_type has no {', '.join(lacking)}", "add what workers write")
    for what, cure in shapes.unfit(ledger):
        yield _blocking("keys", what, cure)
    if ledger.triggers:
        yield Finding(
            "triggers",
            f"{LEDGER} has triggers: {', '.join(ledger.triggers)}",
            "make sure that they leave rows alone whose two new columns are updated",
            len(ledger.triggers),
        )
    if name := tables.unique_on_business_id_alone(ledger):
        yield Finding(
            "unique business_id",
            f"{name} covers business_id alone: a draw's second row cannot hold the session's id",
            "new workers do not start before it is dropped: `tombola legacy contract --drop-business-unique`",
            1,
            [name],
        )


def _of_accounts(accounts: Definition) -> Iterator[Finding]:
    missing = [name for name in ACCOUNT_COLUMNS if name not in accounts.columns]
    if missing:
        yield _blocking("accounts", f"{ACCOUNTS} lacks {', '.join(missing)}", "draws are charged to it")
    elif accounts.indexes.get("PRIMARY", None) is None or accounts.indexes["PRIMARY"].columns != ("`id`",):
        yield _blocking("accounts", f"id is not the primary key of {ACCOUNTS}", "its row is what draws lock")
    if accounts.engine != "InnoDB":
        yield _blocking("engine", f"{ACCOUNTS} is on {accounts.engine}", "it needs row locks: convert it to InnoDB")
    if "balance" in accounts.columns:
        yield from _of_amount(ACCOUNTS, accounts.columns["balance"])
    needed = [
        it.name
        for it in accounts.columns.values()
        if it.is_needed_on_insert and it.name not in (*ACCOUNT_COLUMNS, *ACCOUNT_COLUMNS_ADDED)
    ]
    if needed:
        yield Finding(
            "accounts",
            f"{ACCOUNTS} requires {', '.join(needed)} for every new account",
            "old code goes on opening accounts; `tombola account open` cannot",
            len(needed),
            needed,
        )


def _of_amount(table: str, column: tables.Column) -> Iterator[Finding]:
    if column.kind != "decimal" or (column.scale or 0) < 2:
        yield _blocking(
            "amounts", f"{table}.{column.name} is {column.type}", "it must be DECIMAL with two places, as DECIMAL(10,2)"
        )


def _blocking(name: str, what: str, cure: str) -> Finding:
    return Finding(name, what, cure, 1, is_blocking=True)


def _running_out(connection: Connection, *its_tables: Definition) -> Iterator[Finding]:
    for table in its_tables:
        for what, highest in running_out.warnings(connection, table):
            yield Finding("id runs out", what, running_out.CURE, 1, [highest])


def _differences(ledger: Definition, shape: Shape | None) -> Iterator[str]:
    """The differences from the guide's table."""
    for name in (KEY, SESSION):
        column = ledger.columns.get(name)
        if column is None:
            yield f"no column {name}" + (f": `{shape.command}` adds it" if shape else "")
        elif not column.compares_bytes:
            yield f"{name} compares by {column.collation}, keys compare byte by byte: contract changes it"
    for name in (*OWN_INDEXES, tables.ACCOUNT_INDEX):
        if name not in ledger.indexes:
            yield f"no index {name}"
    for name in ledger.columns.keys() - {*LEDGER_COLUMNS, KEY, SESSION}:
        yield f"a column of its own: {name}, left as it is"
    business_id = ledger.columns.get("business_id")
    if business_id is not None and business_id.is_nullable:
        yield "business_id may be null"
    if business_id is not None and business_id.collation not in (None, "ascii_bin"):
        yield f"business_id compares by {business_id.collation}, keys compare byte by byte"
    if "DEFAULT current_timestamp" in ledger.sql or "ON UPDATE" in ledger.sql.upper():
        yield "columns that the server sets by itself: the backfill does not change them"
    if not ledger.foreign_keys:
        yield "no foreign key to the accounts: contract adds one if every row has its account"


# ---- rows ------------------------------------------------------------------------------------------------------------


def _walk(connection: Connection, ledger: Definition, on_progress: OnProgress) -> tuple[int, list[Finding]]:
    """The findings in every row, in the order of the primary key."""
    has_session = f"WHEN {SESSION} IS NOT NULL THEN 0 " if SESSION in ledger.columns else ""
    null = Finding("business_id null", "rows without a business_id", OWN_SESSION)
    empty = Finding("business_id empty", "rows whose business_id is empty or blank", OWN_SESSION)
    long = Finding("business_id too long", "rows whose business_id is longer than 100 characters", OWN_SESSION)
    foreign = Finding("business_id not ascii", "rows whose business_id is not ASCII", OWN_SESSION)
    orphans = Finding(
        "no account", "rows whose account does not exist", "they are left as they are; no foreign key is added"
    )
    sums = Finding("sum", "rows whose balance_after is not balance_before + delta_amount", "they are left as they are")
    gaps = Finding(
        "chain",
        "rows that do not begin where the account's row before ended",
        "they are left as they are: find out why",
    )
    accounts = {
        int(it)
        for it in connection.execute(text(f"SELECT id FROM {ACCOUNTS}").execution_options(yield_per=5000)).scalars()
    }
    last: dict[int, Decimal] = {}
    rows, last_id, highest = 0, 0, tables.highest_id(connection)
    while True:
        chunk = connection.execute(
            text(
                "SELECT transaction_id, account_id, delta_amount, balance_before, balance_after, "
                f"CASE {has_session}WHEN business_id IS NULL THEN 1 WHEN business_id = '' THEN 2 "
                f"WHEN CHAR_LENGTH(business_id) > 100 THEN 3 WHEN NOT {IS_ASCII} THEN 4 ELSE 0 END FROM {LEDGER} "
                "WHERE transaction_id > :last AND transaction_id <= :highest ORDER BY transaction_id LIMIT :size"
            ),
            {"last": last_id, "highest": highest, "size": CHUNK_ROWS},
        ).all()
        for transaction_id, account_id, delta, before, after, trouble in chunk:
            if trouble:
                (null, empty, long, foreign)[trouble - 1].add(transaction_id)
            if account_id not in accounts:
                orphans.add(transaction_id)
            if before + delta != after:
                sums.add(transaction_id)
            if last.get(account_id, before) != before:
                gaps.add(transaction_id)
            last[account_id] = after
        rows += len(chunk)
        if len(chunk) < CHUNK_ROWS:
            break
        last_id = chunk[-1][0]
        on_progress("rows", last_id, highest)
    on_progress("rows", highest, highest)
    return rows, [it for it in (null, empty, long, foreign, orphans, sums, gaps) if it.count]


def _sessions(connection: Connection, rows: int, on_progress: OnProgress) -> list[Finding]:
    """The findings that need all rows of a business_id together."""
    colliding = Finding(
        "collision",
        "business_ids that differ only in case or trailing blanks: equal for old code, different as keys",
        "each becomes a session of its own; check whether they belong together",
    )
    alone = Finding(
        "reward alone", "sessions with a reward and no charge", "they stay as they are: verify lists them as well"
    )
    twice = Finding(
        "charged twice",
        "business_ids with more than one lottery_consume",
        "old code charged these more than once: check them",
    )
    parts = max(1, rows // PART_ROWS)
    folded = "LOWER(TRIM(TRAILING ' ' FROM CONVERT(business_id USING utf8mb4)))"
    for part in range(parts):
        found = connection.execute(
            text(
                f"SELECT MIN(business_id), COUNT(DISTINCT CAST(business_id AS BINARY)), "
                f"MAX(charges), MAX(rewards > 0 AND charges = 0) FROM (SELECT business_id, {folded} AS folded, "
                f"SUM(business_type = 'lottery_consume') AS charges, SUM(business_type = 'lottery_reward') AS rewards "
                f"FROM {LEDGER} WHERE business_id IS NOT NULL AND CRC32({folded}) % {parts} = {part} "
                f"GROUP BY CAST(business_id AS BINARY), business_id, {folded}) AS exact GROUP BY folded "
                f"HAVING COUNT(DISTINCT CAST(business_id AS BINARY)) > 1 OR MAX(charges) > 1 "
                "OR MAX(rewards > 0 AND charges = 0)"
            )
        )
        for business_id, spellings, charges, has_reward_alone in found:
            if spellings > 1:
                colliding.add(business_id)
            if charges > 1:
                twice.add(business_id)
            if has_reward_alone:
                alone.add(business_id)
        on_progress("sessions", part + 1, parts)
    return [it for it in (colliding, alone, twice) if it.count]


def _keys(connection: Connection, ledger: Definition, on_progress: OnProgress) -> list[Finding]:
    """The values in the two columns that cannot be a key or a session, or not in their row."""
    foreign = Finding(
        "key not ascii",
        f"rows whose {KEY} is empty or not ASCII",
        "give each another key: contract cannot keep it",
    )
    misplaced = Finding(
        "key of another row",
        f"rows whose {KEY} is the key that the backfill gives another row",
        "give each a key of its own",
    )
    unfit = Finding(
        "session not usable",
        f"rows whose {SESSION} is empty, not ASCII, or longer than 100 characters",
        "give them another session, or NULL: then the backfill gives them their business_id",
    )
    troubles: dict[str, Finding] = {}
    if KEY in ledger.columns:
        troubles |= {
            f"{KEY} = '' OR LENGTH(CONVERT({KEY} USING utf8mb4)) <> CHAR_LENGTH({KEY})": foreign,
            f"{KEY} REGEXP '^tx_[0-9]+$' AND {KEY} <> CONCAT('tx_', transaction_id)": misplaced,
        }
    if SESSION in ledger.columns:
        troubles[
            f"{SESSION} = '' OR CHAR_LENGTH({SESSION}) > 100 OR "
            f"LENGTH(CONVERT({SESSION} USING utf8mb4)) <> CHAR_LENGTH({SESSION})"
        ] = unfit
    if not troubles:
        return []
    cases = " ".join(f"WHEN {condition} THEN {number}" for number, condition in enumerate(troubles))
    found, highest = list(troubles.values()), tables.highest_id(connection)
    for first, last in checksums.ranges(connection, 0, highest, CHUNK_ROWS):
        for transaction_id, number in connection.execute(
            text(
                f"SELECT * FROM (SELECT transaction_id, CASE {cases} END AS trouble FROM {LEDGER} "
                "WHERE transaction_id BETWEEN :first AND :last) AS seen WHERE trouble IS NOT NULL"
            ),
            {"first": first, "last": last},
        ):
            found[int(number)].add(transaction_id)
        on_progress("keys", last, highest)
    return [*(it for it in found if it.count), *_twice(connection, ledger)]


def _twice(connection: Connection, ledger: Definition) -> Iterator[Finding]:
    """Keys that several rows have, where no unique index prevents that."""
    if KEY not in ledger.columns or shapes.has_unique_keys(ledger):
        return
    twice = Finding(
        "key twice",
        f"values of {KEY} that several rows have",
        "give each row a key of its own: there is no unique index yet",
    )
    # Compared as tombola's column would, whatever this column's collation.
    as_ours = f"CAST(CONVERT({KEY} USING utf8mb4) AS BINARY)"
    for key, count in connection.execute(
        text(
            f"SELECT MIN({KEY}), COUNT(*) FROM {LEDGER} WHERE {KEY} IS NOT NULL GROUP BY {as_ours} HAVING COUNT(*) > 1"
        )
    ):
        twice.add(key, count)
    if twice.count:
        yield twice
