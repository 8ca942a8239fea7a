"""Alembic runs this file for every command: it chooses the database, and connects."""

from __future__ import annotations

from contextlib import closing
from typing import Any, NoReturn

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError

from tombola import migrations
from tombola.migrations import history
from tombola.migrations.legacy import status as legacy
from tombola.producers.domain.errors import ConfigurationError, DrawError
from tombola.producers.settings import Settings
from tombola.producers.storage.engines import SQL_MODE, open_engine
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import metadata

# A statement that changes a table waits for all transactions that read the table, and all later ones wait for the
# statement: failing, and a later try, are better than a blocked service. The server's default is a day.
TABLE_LOCK_WAIT_S = 10
# Of two upgrades at once the second waits for the first, and then finds no revision pending.
TURN_WAIT_S = 60

OPTIONS: dict[str, Any] = {
    "target_metadata": metadata,
    "version_table": migrations.VERSION_TABLE,
    "compare_server_default": True,
}


def _configured() -> Engine | str:
    given: Engine | str | None = context.config.attributes.get("engine_or_url")
    if given is not None:
        return given
    try:
        return Settings.from_env().need("database_url")
    except DrawError as error:
        raise CommandError(str(error)) from None


def _url(engine_or_url: Engine | str) -> str:
    if isinstance(engine_or_url, Engine):
        return engine_or_url.url.render_as_string(hide_password=False)
    return engine_or_url


def _patient_engine(url: str) -> Engine:
    """An engine without a read timeout, for statements that rewrite a large table."""
    engine = open_engine(url, lock_wait_s=TURN_WAIT_S // 5)  # SQLite waits five times as long
    if engine.dialect.name != "sqlite":

        @event.listens_for(engine, "do_connect")
        def without_read_timeout(_dialect: Any, _record: Any, _args: Any, keywords: dict[str, Any]) -> None:
            keywords["read_timeout"] = None

    return engine


def _run_offline(url: str) -> None:
    context.configure(url=url, literal_binds=True, transactional_ddl=url.startswith("sqlite"), **OPTIONS)
    with context.begin_transaction():
        if not url.startswith("sqlite"):  # the script runs in a session of another program
            context.execute(f"SET SESSION sql_mode='{SQL_MODE}'")
        context.run_migrations()


def _run_online(connection: Connection) -> None:
    connection.detach()  # its session variables must not return to the pool of the calling code's engine
    _take_turn(connection)
    _look_around(connection)
    connection.rollback()  # Alembic commits only transactions that it began itself
    context.configure(
        connection=connection,
        # open_engine sends BEGIN itself, so that on SQLite an upgrade is atomic.
        transactional_ddl=connection.dialect.name == "sqlite",
        on_version_apply=_report,
        **OPTIONS,
    )
    with context.begin_transaction():
        context.run_migrations()


def _take_turn(connection: Connection) -> None:
    """Lock out other upgrades until this connection ends. On SQLite BEGIN IMMEDIATE does that."""
    if connection.dialect.name == "sqlite":
        return
    connection.exec_driver_sql(f"SET SESSION lock_wait_timeout = {TABLE_LOCK_WAIT_S}")
    if connection.exec_driver_sql(f"SELECT GET_LOCK({migrations.TURN_LOCK}, {TURN_WAIT_S})").scalar() != 1:
        raise CommandError(f"another upgrade of this database has been running for {TURN_WAIT_S} s: try again")
    connection.commit()


def _report(ctx: Any, step: Any, heads: Any, run_args: Any) -> None:
    verb = "upgraded to" if step.is_upgrade else "downgraded from"
    _say(f"{verb} {step.up_revision_id}: {step.up_revision.doc}")


def _say(line: str) -> None:
    if (say := context.config.attributes.get("say")) is not None:
        say(line)
    # cmd_opts: only the command `alembic` sets them; a function call prints nothing.
    elif context.config.cmd_opts is not None and not getattr(context.config.cmd_opts, "quiet", False):
        context.config.print_stdout(line)


def _look_around(connection: Connection) -> None:
    """Before the first statement, refuse tables that tombola did not make, by their names."""
    at = migrations.current_revision(connection)
    if at is not None and not migrations.knows(at):
        raise CommandError(f"the database is at {at}, which a newer release made: upgrade tombola here, too")
    # Old code's tables have the same names, and need `tombola legacy`.
    if legacy.is_legacy(connection):
        raise CommandError("asset_transactions is old code's, with rows to keep: start with `tombola legacy inspect`")
    try:
        if taken_over := history.take_over(connection):
            _say(
                f"{history.FORMER_VERSION_TABLE}, at {taken_over}, was tombola's: it is {migrations.VERSION_TABLE} now"
            )
        history.refuse_namesakes(connection)
    except ConfigurationError as error:
        raise CommandError(str(error)) from None


def _refuse(error: DBAPIError) -> NoReturn:
    raise CommandError(str(explain(error))) from error


def _main() -> None:
    engine_or_url = _configured()
    if context.is_offline_mode():
        _run_offline(_url(engine_or_url))
        return
    engine = engine_or_url if isinstance(engine_or_url, Engine) else _patient_engine(engine_or_url)
    try:
        with closing(engine.connect()) as connection:
            _run_online(connection)
    except DBAPIError as error:
        _refuse(error)
    finally:
        if engine is not engine_or_url:
            engine.dispose()


_main()
