"""Checks of the database: what the ledger's guarantees require of the server, of our sessions and of the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC
from typing import Any, Final
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from tombola import migrations
from tombola.migrations import history
from tombola.migrations.legacy import status as legacy
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import metadata
from tombola.worker.doctor.checks import (
    ANSWER_TIMEOUT_S,
    MIGRATE,
    CannotLook,
    Check,
    Facts,
    Verdict,
    attempt,
    clock_ahead,
    clock_verdict,
    fail,
    ok,
    release_verdict,
    skipped,
    warn,
)
from tombola.worker.doctor.privileges import look_at_privileges

VERSIONS_MIN: Final = {"MariaDB": (10, 6), "MySQL": (8, 0, 16)}  # before 8.0.16 MySQL ignored CHECK constraints
STRICT: Final = ("STRICT_TRANS_TABLES", "STRICT_ALL_TABLES")
NAMED_MAX: Final = 5


@contextmanager
def reading(url: str) -> Iterator[Engine]:
    """An engine with our sessions, except that they cannot write."""
    if url.startswith("sqlite"):
        # Not open_engine, which would make the file and set its journal mode.
        path = quote(make_url(url).database or "")
        engine = create_engine(f"sqlite:///file:{path}?mode=ro&uri=true", connect_args={"timeout": ANSWER_TIMEOUT_S})
    else:
        engine = open_engine(url)

        @event.listens_for(engine, "do_connect")
        def impatient(_dialect: Any, _record: Any, _args: Any, keywords: dict[str, Any]) -> None:
            keywords["connect_timeout"] = keywords["read_timeout"] = ANSWER_TIMEOUT_S

        @event.listens_for(engine, "connect")
        def read_only(connection: Any, _record: Any) -> None:
            with connection.cursor() as cursor:
                cursor.execute("SET SESSION TRANSACTION READ ONLY")

    try:
        yield engine
    finally:
        engine.dispose()


def examine_database(engine: Engine, found: Facts) -> Iterator[Check]:
    """Every check of the database; the first one says whether the database answers."""

    def first() -> Verdict:
        with engine.connect() as connection:
            verdict = _server(connection)
            found.has_database = True
            return verdict

    yield _refused_is_failed(attempt("database", first))
    names = [name for name, _ in LOOKS]
    if not found.has_database:
        yield from skipped(["migrations", *names], "the database does not answer")
        return
    yield attempt("migrations", lambda: _asked(engine, _migrations))
    if engine.dialect.name == "sqlite":
        yield from skipped(names, "SQLite")
        return
    for name, look in LOOKS:
        yield attempt(name, lambda look=look: _asked(engine, look))  # type: ignore[misc]


def _refused_is_failed(check: Check) -> Check:
    """A database that refuses the login fails its check; only a missing table or privilege skips a check."""
    return replace(check, status="fail", cure="check TOMBOLA_DATABASE_URL") if check.status == "skip" else check


def is_migrated(engine: Engine) -> bool:
    """Whether the database has our tables, at any revision."""
    try:
        with engine.connect() as connection:
            return migrations.current_revision(connection) is not None
    except SQLAlchemyError:
        return False


def _asked(engine: Engine, look: Callable[[Connection], Verdict]) -> Verdict:
    with engine.connect() as connection:
        return look(connection)


def _server(connection: Connection) -> Verdict:
    if connection.dialect.name == "sqlite":
        # At the first read the driver says whether the file can be opened and is a database.
        journal = connection.execute(text("PRAGMA journal_mode")).scalar_one()
        connection.execute(text("SELECT COUNT(*) FROM sqlite_master"))
        version = connection.execute(text("SELECT sqlite_version()")).scalar_one()
        return ok(f"SQLite {version}, journal: {journal}")
    product, version = product_and_version(connection.execute(text("SELECT VERSION()")).scalar_one())
    return release_verdict(product, version, VERSIONS_MIN[product])


def product_and_version(said: str) -> tuple[str, str]:
    """Product and version in the answer to `SELECT VERSION()`; MariaDB may put 5.5.5 in front, for old replicas."""
    if "mariadb" in said.lower():
        return "MariaDB", said.removeprefix("5.5.5-").partition("-")[0]
    return "MySQL", said


def _migrations(connection: Connection) -> Verdict:
    at, head = migrations.current_revision(connection), migrations.head_revision()
    if at is None and legacy.is_legacy(connection):
        return fail("the ledger belongs to old code", "start with `tombola legacy inspect`")
    if why := legacy.why_workers_must_wait(connection):
        return fail(why, "see `tombola legacy status`")
    if at == head:
        return ok(f"at {head}, the newest")
    if at is None and (former := history.former_revision(connection)) is not None:
        return fail(f"at {former} by {history.FORMER_VERSION_TABLE}, where an earlier release kept it", MIGRATE)
    if at is None:
        return fail("there are no tables yet", MIGRATE)
    if migrations.knows(at):
        return fail(f"at {at}, this release needs {head}", MIGRATE)
    return warn(f"at {at}, which a newer release made; this one brings {head}", "upgrade tombola here, too")


def _isolation_level(connection: Connection) -> Verdict:
    level = connection.get_isolation_level()
    if level != "READ COMMITTED":
        return fail(
            f"{level} in our own sessions, which ask for READ COMMITTED",
            "look for a proxy or an init_connect that changes sessions: repeats would not see settled draws",
        )
    return ok(level)


def _strict_mode(connection: Connection) -> Verdict:
    ours, servers = connection.execute(text("SELECT @@SESSION.sql_mode, @@GLOBAL.sql_mode")).one()
    if not any(mode in ours for mode in STRICT):
        return fail(
            f"our own sessions are not strict: {ours or 'no mode at all'}",
            "look for a proxy or an init_connect that changes sessions: the server would cut long keys",
        )
    if not any(mode in servers for mode in STRICT):
        return warn(
            f"our sessions are strict, the server's default is not: {servers or 'no mode at all'}",
            "add STRICT_TRANS_TABLES to sql_mode: the server cuts values that other programs write, and refuses none",
        )
    return ok("strict")


def _durability(connection: Connection) -> Verdict:
    value = int(connection.execute(text("SELECT @@innodb_flush_log_at_trx_commit")).scalar_one())
    found = f"innodb_flush_log_at_trx_commit = {value}"
    if value != 1:
        return fail(found, "set it to 1: a power cut undoes draws whose results were shown")
    return ok(found)


def _binary_log(connection: Connection) -> Verdict:
    is_on, every = connection.execute(text("SELECT @@log_bin, @@sync_binlog")).one()
    if not int(is_on):
        return ok("off")
    if int(every) != 1:
        return warn(
            f"sync_binlog = {every}",
            "set it to 1: after a power cut, primary and replica may have different draws",
        )
    return ok("sync_binlog = 1")


def _tables(connection: Connection) -> Verdict:
    rows = connection.execute(
        text(
            "SELECT table_name, engine, table_collation FROM information_schema.tables "
            "WHERE table_schema = DATABASE() AND table_type = 'BASE TABLE'"
        )
    ).all()
    ours = {name: (engine, collation) for name, engine, collation in rows if name in metadata.tables}
    if not ours:
        raise CannotLook("there are no tables yet")
    foreign = [f"{name} is {engine}" for name, (engine, _) in sorted(ours.items()) if engine != "InnoDB"]
    if foreign:
        return fail(
            _some(foreign), "ALTER TABLE … ENGINE=InnoDB: without transactions half a draw can stay in the ledger"
        )
    other = [
        f"{name} is {collation}" for name, (_, collation) in sorted(ours.items()) if not collation.endswith("_bin")
    ]
    if other:
        return warn(
            _some(other),
            "ALTER TABLE … DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin: new columns would inherit the other one",
        )
    return ok(f"{len(ours)} tables, InnoDB, compared by bytes")


def key_columns() -> set[tuple[str, str]]:
    """Every column that holds a key, as (table, column): the columns that our schema declares as ascii_bin."""
    dialect = mysql.dialect()
    return {
        (table.name, column.name)
        for table in metadata.tables.values()
        for column in table.columns
        if getattr(column.type.dialect_impl(dialect), "collation", None) == "ascii_bin"
    }


def _key_columns(connection: Connection) -> Verdict:
    rows = connection.execute(
        text(
            "SELECT table_name, column_name, collation_name FROM information_schema.columns "
            "WHERE table_schema = DATABASE()"
        )
    ).all()
    keys = key_columns()
    there = {(table, column): collation for table, column, collation in rows if (table, column) in keys}
    if not there:
        raise CannotLook("there are no tables yet")
    # Columns of bytes have no collation, and compare by bytes.
    lax = [
        f"{table}.{column} is {collation}"
        for (table, column), collation in sorted(there.items())
        if collation is not None and not collation.endswith("_bin")
    ]
    if lax:
        return fail(
            _some(lax),
            "ALTER TABLE … MODIFY … CHARACTER SET ascii COLLATE ascii_bin: keys that differ in case compare as equal",
        )
    return ok(f"{len(there)} columns, compared by bytes")


def _clock(connection: Connection) -> Verdict:
    def ask() -> Any:
        return connection.execute(text("SELECT UTC_TIMESTAMP(6)")).scalar_one().replace(tzinfo=UTC)

    return clock_verdict(*clock_ahead(ask))


def _some(found: list[str]) -> str:
    more = f" and {len(found) - NAMED_MAX} more" if len(found) > NAMED_MAX else ""
    return ", ".join(found[:NAMED_MAX]) + more


LOOKS: Final[tuple[tuple[str, Callable[[Connection], Verdict]], ...]] = (
    ("isolation level", _isolation_level),
    ("strict mode", _strict_mode),
    ("durability", _durability),
    ("binary log", _binary_log),
    ("tables", _tables),
    ("key columns", _key_columns),
    ("privileges", look_at_privileges),
    ("clock of the database", _clock),
)
