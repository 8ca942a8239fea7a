"""What is there: the tables' definitions as the server knows them, and how far the steps have come."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, text
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import CreateIndex, CreateTable

import worker.schema  # noqa: F401  all tables, those behind the broker as well
from producers.database import utc_now
from producers.errors import ConfigurationError
from producers.schema import metadata

LEDGER: Final = "asset_transactions"
ACCOUNTS: Final = "account_asset_balances"
KEY, SESSION = "idempotency_key", "lottery_session_id"
KEY_INDEX, SESSION_INDEX, ACCOUNT_INDEX = "uk_idempotency_key", "idx_lottery_session_id", "idx_account_created"
FOREIGN_KEY: Final = "fk_asset_transactions_account_id"
BUSINESS_UNIQUE: Final = "uk_business_idempotency"
KEY_TYPE: Final = "VARCHAR(100) CHARACTER SET ascii COLLATE ascii_bin"
STEPS: Final = ("expand", "backfill", "verify", "contract", "drop_business_unique", "rollback")
RUNNING, DONE, ROLLED_BACK = "running", "done", "rolled back"

# What old code has in its ledger, and what a worker writes there besides the two new columns.
LEDGER_COLUMNS: Final = (
    "transaction_id", "account_id", "business_id", "business_type", "asset_code", "delta_amount", "balance_before",
    "balance_after", "notes", "created_at", "updated_at",
)  # fmt: skip
# What the accounts must have, and what we can add ourselves.
ACCOUNT_COLUMNS: Final = ("id", "asset_code", "balance")
ACCOUNT_COLUMNS_ADDED: Final = {
    "user_id": "BIGINT NULL",
    "created_at": "DATETIME(6) NULL",
    "updated_at": "DATETIME(6) NULL",
}

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
)


def quoted(name: str) -> str:
    """`name` as an identifier."""
    return f"`{name.replace('`', '``')}`"


# ---- definitions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    type: str
    is_nullable: bool
    default: str | None
    extra: str
    collation: str | None
    length: int | None
    scale: int | None

    @property
    def kind(self) -> str:
        """The type without its length: bigint, varchar, decimal."""
        return re.split(r"[ (]", self.type, maxsplit=1)[0].lower()

    @property
    def is_needed_on_insert(self) -> bool:
        return not self.is_nullable and self.default is None and not self.extra


@dataclass(frozen=True, slots=True)
class Index:
    name: str
    columns: tuple[str, ...]
    is_unique: bool

    @property
    def definition(self) -> str:
        """As it is added; `columns` hold what a prefix says, too."""
        return f"{'UNIQUE ' if self.is_unique else ''}INDEX {quoted(self.name)} ({', '.join(self.columns)})"


@dataclass(frozen=True, slots=True)
class Definition:
    """A table as the server describes it."""

    name: str
    sql: str
    engine: str
    collation: str
    rows: int
    size_bytes: int
    columns: dict[str, Column]
    indexes: dict[str, Index]
    foreign_keys: tuple[str, ...]
    triggers: tuple[str, ...]

    @property
    def plain_sql(self) -> str:
        """SHOW CREATE TABLE without what moves."""
        return plain(self.sql)

    def has_index_on(self, column: str) -> bool:
        """Whether a look-up by `column` finds an index that begins with it."""
        return any(index.columns[0] == quoted(column) for index in self.indexes.values())


def plain(sql: str) -> str:
    """A definition without its counter."""
    return re.sub(r" AUTO_INCREMENT=\d+", "", sql)


def read(connection: Connection, name: str) -> Definition | None:
    """The definition of table `name`; None if there is none."""
    here = {"name": name}
    table = connection.execute(
        text(
            "SELECT engine, table_collation, table_rows, data_length + index_length FROM information_schema.tables "
            "WHERE table_schema = DATABASE() AND table_name = :name AND table_type = 'BASE TABLE'"
        ),
        here,
    ).first()
    if table is None:
        return None
    columns = connection.execute(
        text(
            "SELECT column_name, column_type, is_nullable, column_default, extra, collation_name, "
            "character_maximum_length, numeric_scale FROM information_schema.columns "
            "WHERE table_schema = DATABASE() AND table_name = :name ORDER BY ordinal_position"
        ),
        here,
    ).all()
    parts: dict[str, list[str]] = {}
    unique: dict[str, bool] = {}
    for index, column, sub_part, non_unique in connection.execute(
        text(
            "SELECT index_name, column_name, sub_part, non_unique FROM information_schema.statistics "
            "WHERE table_schema = DATABASE() AND table_name = :name ORDER BY index_name, seq_in_index"
        ),
        here,
    ):
        # An index on an expression, which MySQL knows, has no column.
        parts.setdefault(index, []).append((quoted(column) if column else "?") + (f"({sub_part})" if sub_part else ""))
        unique[index] = not int(non_unique)
    return Definition(
        name=name,
        sql=str(connection.execute(text(f"SHOW CREATE TABLE {quoted(name)}")).one()[1]),
        engine=str(table[0]),
        collation=str(table[1]),
        rows=int(table[2] or 0),
        size_bytes=int(table[3] or 0),
        columns={
            it[0]: Column(it[0], _text(it[1]), it[2] == "YES", _default(it[3]), _text(it[4] or ""), *it[5:])
            for it in columns
        },
        indexes={index: Index(index, tuple(columns), unique[index]) for index, columns in parts.items()},
        foreign_keys=_names(
            connection,
            "SELECT constraint_name FROM information_schema.table_constraints WHERE table_schema = DATABASE() "
            "AND table_name = :name AND constraint_type = 'FOREIGN KEY'",
            here,
        ),
        triggers=_names(
            connection,
            "SELECT trigger_name FROM information_schema.triggers WHERE event_object_schema = DATABASE() "
            "AND event_object_table = :name",
            here,
        ),
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _default(value: Any) -> str | None:
    # MariaDB writes the word where a column's default is null; a column without one has none at all.
    return None if value is None or _text(value) == "NULL" else _text(value)


def _names(connection: Connection, statement: str, here: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(str(name) for name in connection.execute(text(statement), here).scalars())


def ledger(connection: Connection) -> Definition:
    """The ledger's definition; raises ConfigurationError without one."""
    found = read(connection, LEDGER)
    if found is None:
        raise ConfigurationError(f"there is no table {LEDGER} in this database: nothing to migrate")
    return found


def accounts(connection: Connection) -> Definition:
    """The accounts' definition; raises ConfigurationError without one."""
    found = read(connection, ACCOUNTS)
    if found is None:
        raise ConfigurationError(f"there is no table {ACCOUNTS} in this database: old code's accounts are expected")
    return found


def has_table(connection: Connection, name: str) -> bool:
    return bool(
        connection.execute(
            text(
                "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = :name"
            ),
            {"name": name},
        ).scalar_one()
    )


def unique_on_business_id_alone(table: Definition) -> str | None:
    """The unique index that lets a session have one row only; None without one."""
    for index in table.indexes.values():
        if index.is_unique and index.columns == (quoted("business_id"),):
            return index.name
    return None


def own_tables() -> list[str]:
    """Our tables besides the two that old code brings, in the order in which they are made."""
    return [str(table.name) for table in metadata.sorted_tables if table.name not in (LEDGER, ACCOUNTS)]


def create_own(name: str) -> list[str]:
    """The statements that make one of our tables, its indexes included."""
    table = metadata.tables[name]
    dialect = mysql.dialect()
    made = [str(CreateTable(table).compile(dialect=dialect)).strip()]
    made += [str(CreateIndex(it).compile(dialect=dialect)) for it in sorted(table.indexes, key=lambda it: str(it.name))]
    return made


def highest_id(connection: Connection) -> int:
    return int(connection.execute(text(f"SELECT COALESCE(MAX(transaction_id), 0) FROM {LEDGER}")).scalar_one())


def is_contracted(table: Definition) -> bool:
    """Whether the ledger takes rows with keys only."""
    return all(name in table.columns and not table.columns[name].is_nullable for name in (KEY, SESSION))


# ---- how far the steps have come -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One row of `legacy_migration`."""

    step: str
    status: str
    started_at: Any
    ended_at: Any
    details: dict[str, Any]


def steps(connection: Connection) -> dict[str, Step]:
    """All that is on record, by step; empty before the first expand."""
    if not has_table(connection, "legacy_migration"):
        return {}
    found = connection.execute(text("SELECT step, status, started_at, ended_at, details FROM legacy_migration")).all()
    return {it[0]: Step(it[0], it[1], it[2], it[3], msgspec.json.decode(it[4])) for it in found}


def begin(connection: Connection, step: str, details: Mapping[str, Any]) -> Step:
    """Put on record that `step` runs; one that was begun before goes on with the details it has."""
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
    """Put on record that `step` is over."""
    connection.execute(
        text("UPDATE legacy_migration SET status = :status, ended_at = :now, details = :details WHERE step = :step"),
        {"step": step, "status": status, "now": _now(), "details": as_json(details)},
    )


def end_all(connection: Connection) -> None:
    """Put on record that all of it was rolled back: at once, so that no two steps say different things."""
    connection.execute(
        text("UPDATE legacy_migration SET status = :status, ended_at = :now"), {"status": ROLLED_BACK, "now": _now()}
    )


def _now() -> Any:
    return utc_now().replace(tzinfo=None)


def as_json(details: Mapping[str, Any]) -> str:
    """A step's details as they are kept."""
    return msgspec.json.encode(dict(details)).decode()


def recorded(connection: Connection) -> Step:
    """What expand put on record; raises ConfigurationError before it."""
    known = steps(connection).get("expand")
    if known is None:
        raise ConfigurationError("this database was not expanded: run `tombola legacy inspect`, then `… expand`")
    return known


def column_list(names: Sequence[str]) -> str:
    return ", ".join(quoted(name) for name in names)
