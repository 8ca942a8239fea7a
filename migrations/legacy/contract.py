"""contract: both columns NOT NULL, the foreign key, and on its own switch the old unique index goes.

From then on the ledger takes rows with keys only: old code's inserts fail. Hence it looks first whether any come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

import migrations
from migrations.legacy import backfill, checksums, tables
from migrations.legacy.session import Say, Tell, alter, code_of, each_by_itself, turn
from migrations.legacy.tables import ACCOUNTS, BUSINESS_UNIQUE, FOREIGN_KEY, KEY, KEY_TYPE, LEDGER, SESSION, Definition
from producers.errors import ConfigurationError

QUIET_S: Final = 10.0
ONLINE_LOG_MAX: Final = 8 * 2**30
OVERFLOW: Final = 1799
HAS_NULL: Final = (1048, 1138, 1265)  # of a column that is to have none

NOT_NULL: Final = (
    f"ALTER TABLE {LEDGER} MODIFY {KEY} {KEY_TYPE} NOT NULL, MODIFY {SESSION} {KEY_TYPE} NOT NULL, "
    "ALGORITHM=INPLACE, LOCK=NONE"
)
ADD_FOREIGN_KEY: Final = (
    f"ALTER TABLE {LEDGER} ADD CONSTRAINT {FOREIGN_KEY} FOREIGN KEY (account_id) REFERENCES {ACCOUNTS} (id), "
    "ALGORITHM=INPLACE, LOCK=NONE"
)


def drop_unique(name: str) -> str:
    return f"ALTER TABLE {LEDGER} DROP INDEX {tables.quoted(name)}, ALGORITHM=INPLACE, LOCK=NONE"


def statements(engine: Engine, *, drop_business_unique: bool) -> list[str]:
    """What is left of this step, for somebody who runs it by hand."""
    with each_by_itself(engine) as connection:
        ledger = tables.ledger(connection)
        found = [] if tables.is_contracted(ledger) else [NOT_NULL]
        if why_no_foreign_key(connection, ledger) is None:
            found += ["SET SESSION foreign_key_checks = 0", ADD_FOREIGN_KEY, "SET SESSION foreign_key_checks = 1"]
        name = business_unique(ledger) if drop_business_unique else None
        return found + ([drop_unique(name)] if name else [])


def contract(engine: Engine, *, drop_business_unique: bool, quiet_s: float, say: Say, tell: Tell) -> None:
    """Do what is left of this step. Raises ConfigurationError when it is too early."""
    with turn(engine, say) as connection:
        expanded = tables.recorded(connection)
        if not tables.is_contracted(tables.ledger(connection)):
            _check_readiness(connection)
            backfill.catch_up(engine, own_session=False)
            _look_for_old_code(connection, expanded.details["barrier"], quiet_s, say)
            backfill.catch_up(engine, own_session=False)
            tables.begin(connection, "contract", {})
            upto = tables.highest_id(connection)
            say("both columns become NOT NULL: the table is rebuilt, online")
            _rebuild(connection, say)
            checksums.take(connection, expanded.details["columns"], upto, tell)
        known = tables.begin(connection, "contract", {}) if _is_open(connection) else None
        _add_foreign_key(connection, tables.ledger(connection), say)
        if known is not None:
            tables.end(connection, "contract", known.details)
        say("contracted: every row has a key, and the ledger takes no other")
        if drop_business_unique:
            _drop_business_unique(connection, say)


def _is_open(connection: Connection) -> bool:
    known = tables.steps(connection).get("contract")
    return known is None or known.status != tables.DONE


def _check_readiness(connection: Connection) -> None:
    known = tables.steps(connection)
    if "backfill" not in known or known["backfill"].status != tables.DONE:
        raise ConfigurationError("backfill is not done: run `tombola legacy backfill` first")
    if backfill.index_statement(tables.ledger(connection)) is not None:
        raise ConfigurationError("the indexes are not there: run `tombola legacy backfill`, which builds them")
    if migrations.current_revision(connection) is None:
        raise ConfigurationError("the database has no revision: run `tombola legacy expand` again")
    verified = known.get("verify")
    if verified is None or verified.status != tables.DONE or verified.details["problems"]:
        raise ConfigurationError("nothing proves that all is well: run `tombola legacy verify` until it finds nothing")


def _look_for_old_code(connection: Connection, barrier: int, quiet_s: float, say: Say) -> None:
    """Raises ConfigurationError when rows without a key come in during `quiet_s`."""
    say(f"looking for {quiet_s:g} s whether old code still writes")
    before = tables.highest_id(connection)
    time.sleep(quiet_s)
    by_old_code = f"({KEY} IS NULL OR {KEY} = CONCAT('tx_', transaction_id))"
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


def _rebuild(connection: Connection, say: Say) -> None:
    with _online_log(connection) as grow:
        while True:
            try:
                return alter(connection, [NOT_NULL], say)
            except DBAPIError as error:
                if code_of(error) in HAS_NULL:
                    raise ConfigurationError(
                        "old code has added a row without a key while the table was rebuilt; nothing has changed. Stop "
                        "it, run `tombola legacy backfill`, then this again"
                    ) from None
                if code_of(error) != OVERFLOW:
                    raise
                if not grow():
                    raise ConfigurationError(
                        "writers were faster than innodb_online_alter_log_max_size has room for; nothing has changed: "
                        "raise it (it is taken only while the table is rebuilt), or come back at a quieter hour"
                    ) from None
                say("the writers' log overflowed: again, with room for four times as much")


@contextmanager
def _online_log(connection: Connection) -> Iterator[Callable[[], bool]]:
    """Room for what writers do meanwhile; the server's own setting comes back at the end."""
    usual = int(connection.execute(text("SELECT @@GLOBAL.innodb_online_alter_log_max_size")).scalar_one())
    size = usual

    def grow() -> bool:
        nonlocal size
        if size >= ONLINE_LOG_MAX:
            return False
        try:
            connection.execute(text(f"SET GLOBAL innodb_online_alter_log_max_size = {size * 4}"))
        except DBAPIError:
            return False  # that takes a privilege
        size *= 4
        return True

    try:
        yield grow
    finally:
        if size != usual:
            connection.execute(text(f"SET GLOBAL innodb_online_alter_log_max_size = {usual}"))


# ---- the foreign key -------------------------------------------------------------------------------------------------


def why_no_foreign_key(connection: Connection, ledger: Definition) -> str | None:
    """Why rows are not tied to their accounts by the server; None if they can be."""
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
    # Only so does the server add one beside its writers: it does not look at the rows, which we have just done.
    connection.execute(text("SET SESSION foreign_key_checks = 0"))
    try:
        alter(connection, [ADD_FOREIGN_KEY], say)
    except DBAPIError as error:
        say(f"no foreign key to the accounts: {error.orig}")
    finally:
        connection.execute(text("SET SESSION foreign_key_checks = 1"))


# ---- the old unique index --------------------------------------------------------------------------------------------


def business_unique(ledger: Definition) -> str | None:
    """The old unique index: by its name, or by what it covers."""
    if BUSINESS_UNIQUE in ledger.indexes:
        return BUSINESS_UNIQUE
    return tables.unique_on_business_id_alone(ledger)


def _drop_business_unique(connection: Connection, say: Say) -> None:
    """Only here, where the ledger takes no row without a key: no code can rely on it any more."""
    name = business_unique(tables.ledger(connection))
    known = tables.steps(connection).get("drop_business_unique")
    if name is None:
        if known is not None and known.status == tables.RUNNING:
            tables.end(connection, "drop_business_unique", known.details)
        say("there is no old unique index to drop")
        return
    details = {"name": name, "definition": tables.recorded(connection).details["indexes"][name]}
    tables.begin(connection, "drop_business_unique", details)
    alter(connection, [drop_unique(name)], say)
    tables.end(connection, "drop_business_unique", details)
    say(f"{name} is gone")
