"""contract: make both columns NOT NULL and compare bytes, add the foreign key; by a switch, drop the old unique index.

Afterwards the ledger takes only rows with keys: old code's inserts fail. So contract first checks that old code writes
no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from tombola import migrations
from tombola.migrations import history
from tombola.migrations.legacy import backfill, checksums, record, tables
from tombola.migrations.legacy.session import CANNOT, OnProgress, Say, alter, code_of, each_by_itself, turn
from tombola.migrations.legacy.tables import ACCOUNTS, BUSINESS_UNIQUE, FOREIGN_KEY, KEY, LEDGER, SESSION, Definition
from tombola.producers.domain.errors import ConfigurationError

QUIET_S: Final = 10.0
ONLINE_LOG_MAX: Final = 8 * 2**30
OVERFLOW: Final = 1799
HAS_NULL: Final = (1048, 1138, 1265)  # NULL in a column that becomes NOT NULL

NO_ASCII: Final = (1366, 1406)  # a value that does not fit the column's new type
ADD_FOREIGN_KEY: Final = (
    f"ALTER TABLE {LEDGER} ADD CONSTRAINT {FOREIGN_KEY} FOREIGN KEY (account_id) REFERENCES {ACCOUNTS} (id), "
    "ALGORITHM=INPLACE, LOCK=NONE"
)


def not_null(ledger: Definition, *, writers_wait: bool) -> list[str]:
    """Variants of the ALTER of both columns, of which the first that the server supports is run; empty if it is done.

    A column with another collation gets ascii_bin, as keys compare byte by byte. Most servers do that only by copying
    the table, while writers wait.
    """
    if tables.is_contracted(ledger):
        return []
    changes = ", ".join(f"MODIFY {name} {_kept_or_ours(ledger.columns[name])} NOT NULL" for name in (KEY, SESSION))
    ways = ["ALGORITHM=INPLACE, LOCK=NONE"]
    if not all(ledger.columns[name].compares_bytes for name in (KEY, SESSION)):
        ways = ways_to_convert(writers_wait=writers_wait)
    return [f"ALTER TABLE {LEDGER} {changes}, {way}" for way in ways]


def ways_to_convert(*, writers_wait: bool) -> list[str]:
    """How a column gets another character set: MariaDB 11.2 copies beside the writers, other servers block writers."""
    return ["ALGORITHM=COPY, LOCK=NONE", *(["ALGORITHM=COPY, LOCK=SHARED"] if writers_wait else [])]


def _kept_or_ours(column: tables.Column) -> str:
    if not column.compares_bytes or column.collation is None:
        return f"{column.type} CHARACTER SET ascii COLLATE ascii_bin"
    return f"{column.type} CHARACTER SET {column.collation.partition('_')[0]} COLLATE {column.collation}"


def drop_unique(name: str) -> str:
    return f"ALTER TABLE {LEDGER} DROP INDEX {tables.quoted(name)}, ALGORITHM=INPLACE, LOCK=NONE"


def statements(engine: Engine, *, drop_business_unique: bool) -> list[str]:
    """The statements that are left of this step, to run by hand."""
    with each_by_itself(engine) as connection:
        ledger = tables.ledger(connection)
        found = not_null(ledger, writers_wait=True)[-1:]
        if why_no_foreign_key(connection, ledger) is None:
            found += ["SET SESSION foreign_key_checks = 0", ADD_FOREIGN_KEY, "SET SESSION foreign_key_checks = 1"]
        name = business_unique(ledger) if drop_business_unique else None
        return found + ([drop_unique(name)] if name else [])


def contract(
    engine: Engine,
    *,
    drop_business_unique: bool,
    quiet_s: float,
    say: Say,
    on_progress: OnProgress,
    writers_wait: bool = False,
) -> None:
    """Do what is left of this step; with `writers_wait` also the changes for which this server blocks writers.

    Raises ConfigurationError when an earlier step is not done, or old code still writes.
    """
    with turn(engine, say) as connection:
        expanded, ledger = record.recorded(connection), tables.ledger(connection)
        if not tables.is_contracted(ledger) or (expanded.shape.has_columns and _is_open(connection)):
            _check_readiness(connection)
            if not tables.takes_keys_only(ledger):
                backfill.catch_up(engine, own_session=False)
                _look_for_old_code(connection, expanded.details["barrier"], quiet_s, say)
                backfill.catch_up(engine, own_session=False)
            record.begin(connection, "contract", {})
            upto = tables.highest_id(connection)
            if variants := not_null(ledger, writers_wait=writers_wait):
                _rebuild(connection, variants, say)
                checksums.take(connection, expanded.details, upto, on_progress)
            backfill.restore_keys(connection)
        known = record.begin(connection, "contract", {}) if _is_open(connection) else None
        _add_foreign_key(connection, tables.ledger(connection), say)
        if known is not None:
            record.end(connection, "contract", known.details)
        say("contracted: every row has a key, and the ledger takes no other")
        if drop_business_unique:
            _drop_business_unique(connection, say)


def _is_open(connection: Connection) -> bool:
    known = record.steps(connection).get("contract")
    return known is None or known.status != record.DONE


def _check_readiness(connection: Connection) -> None:
    known = record.steps(connection)
    if "backfill" not in known or known["backfill"].status != record.DONE:
        raise ConfigurationError("backfill is not done: run `tombola legacy backfill` first")
    if backfill.index_statement(tables.ledger(connection)) is not None:
        raise ConfigurationError("the indexes are missing: run `tombola legacy backfill`, which builds them")
    if migrations.current_revision(connection) is None:
        if history.former_revision(connection) is not None:
            raise ConfigurationError("the history is an earlier release's: run `tombola migrate`, which takes it over")
        raise ConfigurationError(f"the database has no revision: run `{known['expand'].shape.command}` again")
    verified = known.get("verify")
    if verified is None or verified.status != record.DONE or verified.details["problems"]:
        raise ConfigurationError("the rows are not verified: run `tombola legacy verify` until it finds no problem")


def _look_for_old_code(connection: Connection, barrier: int, quiet_s: float, say: Say) -> None:
    """Raise ConfigurationError when old code adds rows without a key during `quiet_s`."""
    say(f"looking for {quiet_s:g} s whether old code still writes")
    before = tables.highest_id(connection)
    time.sleep(quiet_s)
    by_old_code = f"({KEY} IS NULL OR {SESSION} IS NULL OR {KEY} = CONCAT('tx_', transaction_id))"
    number, newest = connection.execute(
        text(f"SELECT COUNT(*), MAX(transaction_id) FROM {LEDGER} WHERE transaction_id > :id AND {by_old_code}"),
        {"id": before},
    ).one()
    if not number:
        return
    all_of_them, since = connection.execute(
        text(f"SELECT COUNT(*), MIN(created_at) FROM {LEDGER} WHERE transaction_id > :id AND {by_old_code}"),
        {"id": barrier},
    ).one()
    raise ConfigurationError(
        f"old code is still writing rows without a key: {number:,} in the last {quiet_s:g} s, the newest is "
        f"transaction_id {newest}; {all_of_them:,} since expand, from {since} on. Stop it first: after contract its "
        "inserts fail"
    )


def _rebuild(connection: Connection, variants: list[str], say: Say) -> None:
    say("both columns become NOT NULL, and compare byte by byte: the table is rebuilt")
    with _online_log(connection) as grow:
        while True:
            try:
                return alter(connection, variants, say)
            except DBAPIError as error:
                if code_of(error) in CANNOT:
                    raise must_wait(tables.ledger(connection), "keys compare byte by byte") from None
                if code_of(error) in NO_ASCII and error.orig is not None:
                    raise ConfigurationError(
                        f"a key or a session cannot be one of 100 ASCII characters ({error.orig.args[-1]}); nothing "
                        "has changed. `tombola legacy inspect` lists such rows: give each another one"
                    ) from None
                if code_of(error) in HAS_NULL:
                    raise ConfigurationError(
                        "old code has added a row without a key while the table was rebuilt; nothing has changed. Stop "
                        "it, run `tombola legacy backfill`, then this again"
                    ) from None
                if code_of(error) != OVERFLOW:
                    raise
                if not grow():
                    raise ConfigurationError(
                        "writers were faster than innodb_online_alter_log_max_size allows; nothing has changed: raise "
                        "it (the memory is used only while the table is rebuilt), or run this at a quieter hour"
                    ) from None
                say("the writers' log overflowed: trying again with a log of four times the size")


def must_wait(ledger: Definition, why: str) -> ConfigurationError:
    """The error where this server converts a column only while writers wait."""
    return ConfigurationError(
        f"{why}, and this server changes a column's collation only by copying the table, some {ledger.rows:,} rows, "
        "while writers wait; nothing has changed. At a quiet hour run this with --writers-wait"
    )


@contextmanager
def _online_log(connection: Connection) -> Iterator[Callable[[], bool]]:
    """The server's log of concurrent writes, which can grow; its setting is restored at the end."""
    usual = int(connection.execute(text("SELECT @@GLOBAL.innodb_online_alter_log_max_size")).scalar_one())
    size = usual

    def grow() -> bool:
        nonlocal size
        if size >= ONLINE_LOG_MAX:
            return False
        try:
            connection.execute(text(f"SET GLOBAL innodb_online_alter_log_max_size = {size * 4}"))
        except DBAPIError:
            return False  # the privilege is missing
        size *= 4
        return True

    try:
        yield grow
    finally:
        if size != usual:
            connection.execute(text(f"SET GLOBAL innodb_online_alter_log_max_size = {usual}"))


# ---- the foreign key -------------------------------------------------------------------------------------------------


def why_no_foreign_key(connection: Connection, ledger: Definition) -> str | None:
    """Why no foreign key to the accounts can be added; None if it can."""
    if ledger.foreign_keys:
        return "there is one"
    accounts = tables.accounts(connection)
    if ledger.columns["account_id"].type != accounts.columns["id"].type:
        return f"account_id is {ledger.columns['account_id'].type}, the accounts' id is {accounts.columns['id'].type}"
    for first, last in checksums.ranges(connection, 0, tables.highest_id(connection), 50_000):
        orphan = connection.execute(
            text(
                f"SELECT it.transaction_id FROM {LEDGER} AS it LEFT JOIN {ACCOUNTS} AS account "
                "ON account.id = it.account_id "
                "WHERE it.transaction_id BETWEEN :first AND :last AND account.id IS NULL LIMIT 1"
            ),
            {"first": first, "last": last},
        ).scalar()
        if orphan is not None:
            return f"transaction_id {orphan} has no account"
    return None


def _add_foreign_key(connection: Connection, ledger: Definition, say: Say) -> None:
    if (why := why_no_foreign_key(connection, ledger)) is not None:
        if why != "there is one":
            say(f"no foreign key to the accounts: {why}")
        return
    # Only so does the server add it beside the writers: it skips the check of the rows, which has just been done above.
    connection.execute(text("SET SESSION foreign_key_checks = 0"))
    try:
        alter(connection, [ADD_FOREIGN_KEY], say)
    except DBAPIError as error:
        say(f"no foreign key to the accounts: {error.orig}")
    finally:
        connection.execute(text("SET SESSION foreign_key_checks = 1"))


# ---- the old unique index --------------------------------------------------------------------------------------------


def business_unique(ledger: Definition) -> str | None:
    """The name of the old unique index, found by its name or by its column; None without one."""
    if BUSINESS_UNIQUE in ledger.indexes:
        return BUSINESS_UNIQUE
    return tables.unique_on_business_id_alone(ledger)


def _drop_business_unique(connection: Connection, say: Say) -> None:
    """Drop it only here, where the ledger takes no row without a key: no code relies on the index any more."""
    name = business_unique(tables.ledger(connection))
    known = record.steps(connection).get("drop_business_unique")
    if name is None:
        if known is not None and known.status == record.RUNNING:
            record.end(connection, "drop_business_unique", known.details)
        say("there is no old unique index to drop")
        return
    details = {"name": name, "definition": record.recorded(connection).details["indexes"][name]}
    record.begin(connection, "drop_business_unique", details)
    alter(connection, [drop_unique(name)], say)
    record.end(connection, "drop_business_unique", details)
    say(f"{name} is dropped")
