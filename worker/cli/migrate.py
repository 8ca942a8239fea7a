"""`tombola migrate`: the database's schema. Alembic is imported only when a migration runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
import typer
from rich.markup import escape
from sqlalchemy import Connection, inspect

from tombola import migrations
from tombola.migrations import history
from tombola.migrations.legacy import status as legacy
from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.settings import Settings
from tombola.worker.cli.base import JsonOption, YesOption, out, print_json
from tombola.worker.doctor.database import reading

app = typer.Typer()
group = typer.Typer(
    epilog=(
        "\b\nExamples:\n"
        "  tombola migrate                        to the newest revision; can be run again\n"
        "  tombola migrate --sql > script.sql     print the statements, to run by hand\n"
        "  tombola migrate --sql --from base      the same for an empty database, without connecting\n"
        "  tombola migrate status --json\n"
        "  tombola migrate downgrade 0003\n"
    ),
)
app.add_typer(group, name="migrate")

SqlOption = Annotated[bool, typer.Option("--sql", help="Print the statements that would run; run none.")]
StartOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="REVISION",
        help="With --sql: the database's revision, or `base` if it is empty. No connection is made then.",
        show_default="read from the database",
    ),
]

LEGACY = "asset_transactions belongs to old code: start with `tombola legacy inspect`"
FROM_WITHOUT_SQL = "--from needs --sql: without --sql the revision is read from the database"


def _url() -> str:
    """TOMBOLA_DATABASE_URL, never embedded mode's database: a container without the setting must not migrate that."""
    return Settings.from_env().need("database_url")


def _say(line: str) -> None:
    out.print(escape(line))


def _print_steps(run: Callable[[migrations.Say], None], *, without_steps: str) -> None:
    """Print the steps of `run` as they are made; `without_steps` and that there is nothing to do if it makes none."""
    steps: list[str] = []

    def say(line: str) -> None:
        steps.append(line)
        _say(line)

    run(say)
    if not steps:
        out.print(f"{without_steps}: nothing to do")


@group.callback(invoke_without_command=True)
def migrate(
    context: typer.Context,
    sql: SqlOption = False,
    start: StartOption = None,
) -> None:
    """Upgrade the database to this release's newest revision. Finishes an upgrade that was interrupted."""
    if context.invoked_subcommand is not None:
        if sql or start is not None:
            raise typer.BadParameter(f"--sql and --from come after {context.invoked_subcommand}")
        return
    if sql:
        url = _url()
        before, start = ("", start) if start else _start(url)
        typer.echo(before + migrations.upgrade_script(url, start=start), nl=False)
        return
    if start is not None:
        raise typer.BadParameter(FROM_WITHOUT_SQL)
    url = _url()
    newest = f"at {migrations.head_revision()}, the newest"
    _print_steps(lambda say: migrations.upgrade(url, say=say), without_steps=newest)


@group.command("status")
def status(as_json: JsonOption = False) -> None:
    """Show the database's revision, and pending revisions. Only reads; exit code 1 if workers cannot start."""
    with reading(_url()) as engine, engine.connect() as connection:
        at, must_wait = migrations.position(connection), _must_wait(connection)
    if as_json:
        print_json(
            msgspec.json.encode(
                {
                    "revision": at.revision,
                    "newest": at.newest,
                    "pending": [{"revision": it, "title": title} for it, title in at.pending.items()],
                    "first": must_wait,
                }
            )
        )
    else:
        out.print(f"revision  {escape(at.revision or 'none')}\nnewest    {at.newest}")
        for it, title in at.pending.items():
            _say(f"pending   {it}: {title}")
        if at.revision is not None and not migrations.knows(at.revision):
            out.print("a newer release made this revision: upgrade tombola on this machine, too")
        if must_wait:
            _say(f"first     {must_wait}")
    raise typer.Exit(1 if at.pending or must_wait else 0)


def _start(url: str) -> tuple[str, str]:
    """The start of a script for this database: statements to put before it, and the revision to begin at.

    Raises ConfigurationError if a script cannot foresee the statements.
    """
    with reading(url) as engine, engine.connect() as connection:
        at, former = migrations.current_revision(connection), history.former_revision(connection)
        if former is not None:
            history.refuse_doubtful(connection, former)
            return f"{history.RENAME};\n\n", former
        if at is not None:
            return "", at
        if inspect(connection).has_table(migrations.VERSION_TABLE):
            raise ConfigurationError("an upgrade was interrupted: run `tombola migrate` without --sql to finish it")
        if legacy.is_legacy(connection):
            raise ConfigurationError(LEGACY)
        history.refuse_namesakes(connection)
        return "", migrations.BASE


def _must_wait(connection: Connection) -> str | None:
    """What must be done before, or instead of, `tombola migrate`; None if nothing must."""
    if legacy.is_legacy(connection):
        return LEGACY
    if (former := history.former_revision(connection)) is not None:
        return f"the history is in alembic_version, at {former}: `tombola migrate` takes it over"
    try:
        history.refuse_namesakes(connection)
    except ConfigurationError as error:
        return str(error)
    return legacy.why_workers_must_wait(connection)


@group.command("downgrade")
def downgrade(
    revision: Annotated[str, typer.Argument(help="The revision to go back to, or `base`: no tables at all.")],
    sql: SqlOption = False,
    start: StartOption = None,
    yes: YesOption = False,
) -> None:
    """Downgrade the schema for an older release. Tables and columns that the older revision lacks are dropped."""
    if sql:
        url = _url()
        before, start = ("", start) if start else _start(url)
        typer.echo(before + migrations.downgrade_script(url, revision, start=start), nl=False)
        return
    if start is not None:
        raise typer.BadParameter(FROM_WITHOUT_SQL)
    migrations.refuse_unknown(revision)
    url = _url()
    if not yes:
        typer.confirm(f"Tables and columns that {revision} lacks are dropped, with their data. Go on?", abort=True)
    _print_steps(lambda say: migrations.downgrade(url, revision, say=say), without_steps=f"at {revision} already")
