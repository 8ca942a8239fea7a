"""The definitions of tables, as the server reports them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, text
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import CreateIndex, CreateTable

from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.storage.schema import metadata

LEDGER: Final = "asset_transactions"
ACCOUNTS: Final = "account_asset_balances"
KEY, SESSION = "idempotency_key", "lottery_session_id"
KEY_INDEX, SESSION_INDEX, ACCOUNT_INDEX = "uk_idempotency_key", "idx_lottery_session_id", "idx_account_created"
FOREIGN_KEY: Final = "fk_asset_transactions_account_id"
BUSINESS_UNIQUE: Final = "uk_business_idempotency"
KEY_TYPE: Final = "VARCHAR(100) CHARACTER SET ascii COLLATE ascii_bin"

# The columns of old code's ledger; a worker writes them, and the two new columns.
LEDGER_COLUMNS: Final = (
    "transaction_id", "account_id", "business_id", "business_type", "asset_code", "delta_amount", "balance_before",
    "balance_after", "notes", "created_at", "updated_at",
)  # fmt: skip
# The columns that the accounts must have, and the columns that expand can add.
ACCOUNT_COLUMNS: Final = ("id", "asset_code", "balance")
ACCOUNT_COLUMNS_ADDED: Final = {
    "user_id": "BIGINT NULL",
    "created_at": "DATETIME(6) NULL",
    "updated_at": "DATETIME(6) NULL",
}


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
    def compares_bytes(self) -> bool:
        """Whether `ABC` and `abc` are different values in this column."""
        return self.collation is not None and self.collation.endswith("_bin")

    @property
    def is_generated(self) -> bool:
        """Whether the server computes the column; DEFAULT_GENERATED is only a computed default."""
        return re.search(r"\b(virtual|stored|persistent)\b", self.extra, re.IGNORECASE) is not None

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
        """The index as ALTER TABLE … ADD takes it; `columns` have the lengths of prefixes, too."""
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
        """SHOW CREATE TABLE without the AUTO_INCREMENT counter."""
        return plain(self.sql)

    def sql_of(self, column: str) -> str:
        """The definition of `column` after its name."""
        return column_sql(self.sql, column)

    def has_index_on(self, column: str) -> bool:
        """Whether an index begins with `column`."""
        return any(index.columns[0] == quoted(column) for index in self.indexes.values())


def plain(sql: str) -> str:
    """A definition without its AUTO_INCREMENT counter."""
    return re.sub(r" AUTO_INCREMENT=\d+", "", sql)


def column_sql(sql: str, column: str) -> str:
    """The definition of `column` after its name, in a table's definition."""
    found = re.search(rf"^\s*{re.escape(quoted(column))} (.*?),?$", sql, re.MULTILINE)
    if found is None:
        raise LookupError(f"no column {column} in {sql}")
    return found[1]


def is_same(one: str, other: str, collation: str) -> bool:
    """Whether two definitions of a table are equal; `collation` is the table's.

    The order of indexes and constraints, in which they were added, does not matter.
    """
    return _parts(one, collation) == _parts(other, collation)


def is_same_column(one: str, other: str, collation: str) -> bool:
    """Whether two definitions of a column are equal, in a table of `collation`."""
    return _short(one, collation) == _short(other, collation)


def _parts(sql: str, collation: str) -> tuple[list[str], set[str]]:
    lines = [_short(line.strip().removesuffix(","), collation) for line in plain(sql).splitlines()]
    unordered = {line for line in lines if re.match(r"((UNIQUE|FULLTEXT|SPATIAL) )?KEY |CONSTRAINT ", line)}
    return [line for line in lines if line not in unordered], unordered


def _short(line: str, collation: str) -> str:
    """A column's definition without the table's defaults, which MySQL repeats once a statement has named them."""
    charset = collation.partition("_")[0]
    line = re.sub(r" CHARACTER SET (\w+)(?= COLLATE \1_)", "", line)
    return re.sub(rf"( CHARACTER SET {charset}| COLLATE {collation})\b", "", line)


def read(connection: Connection, name: str) -> Definition | None:
    """The definition of table `name`; None where the table does not exist."""
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
        # MySQL's index on an expression has no column.
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
    # MariaDB reports the word NULL for a default of NULL, and nothing for a column without a default.
    return None if value is None or _text(value) == "NULL" else _text(value)


def _names(connection: Connection, statement: str, here: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(str(name) for name in connection.execute(text(statement), here).scalars())


def ledger(connection: Connection) -> Definition:
    """The ledger's definition; raises ConfigurationError where the table does not exist."""
    found = read(connection, LEDGER)
    if found is None:
        raise ConfigurationError(f"there is no table {LEDGER} in this database: nothing to migrate")
    return found


def accounts(connection: Connection) -> Definition:
    """The accounts' definition; raises ConfigurationError where the table does not exist."""
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
    """The unique index that allows a session only one row; None without such an index."""
    for index in table.indexes.values():
        if index.is_unique and index.columns == (quoted("business_id"),):
            return index.name
    return None


def own_tables() -> list[str]:
    """Tombola's tables except the two that old code has, in the order in which they are made."""
    return [str(table.name) for table in metadata.sorted_tables if table.name not in (LEDGER, ACCOUNTS)]


def own_columns(name: str) -> list[str]:
    """The columns of one of tombola's tables."""
    return [str(column.name) for column in metadata.tables[name].columns]


def create_own(name: str) -> list[str]:
    """The statements that make one of tombola's tables and its indexes."""
    table = metadata.tables[name]
    dialect = mysql.dialect()
    made = [str(CreateTable(table).compile(dialect=dialect)).strip()]
    made += [str(CreateIndex(it).compile(dialect=dialect)) for it in sorted(table.indexes, key=lambda it: str(it.name))]
    return made


def highest_id(connection: Connection) -> int:
    return int(connection.execute(text(f"SELECT COALESCE(MAX(transaction_id), 0) FROM {LEDGER}")).scalar_one())


def takes_keys_only(table: Definition) -> bool:
    """Whether the ledger refuses rows without a key or a session."""
    return all(name in table.columns and not table.columns[name].is_nullable for name in (KEY, SESSION))


def is_contracted(table: Definition) -> bool:
    """Whether the ledger refuses rows without a key or a session, and compares both byte by byte."""
    return takes_keys_only(table) and all(table.columns[name].compares_bytes for name in (KEY, SESSION))


def column_list(names: Sequence[str]) -> str:
    return ", ".join(quoted(name) for name in names)
