"""`tombola migrate`: the schema, from wherever tombola is installed. Alembic is imported when it is needed."""

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
from tombola.worker.cli.base import JsonOption, out, print_json
from tombola.worker.doctor.database import reading

app = typer.Typer()
group = typer.Typer(
    epilog=(
        "\b\nExamples:\n"
        "  tombola migrate                        to the newest revision; safe to run again\n"
        "  tombola migrate --sql > script.sql     what it would run, for somebody who runs it by hand\n"
        "  tombola migrate --sql --from base      for an empty database, without connecting to one\n"
        "  tombola migrate status --json\n"
        "  tombola migrate downgrade 0003\n"
    ),
)
app.add_typer(group, name="migrate")

SqlOption = Annotated[bool, typer.Option("--sql", help="Print the statements, and run none.")]
StartOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="REVISION",
        help="With --sql: where the database is, or `base` if it is empty. Then nothing is connected to.",
        show_default="the database is asked",
    ),
]


LEGACY = "asset_transactions is old code's: start with `tombola legacy inspect`"


def _url() -> str:
    """TOMBOLA_DATABASE_URL and nothing else: a container without it must not migrate an embedded database."""
    return Settings.from_env().need("database_url")


def _say(line: str) -> None:
    out.print(escape(line))


def _tell_each(run: Callable[[migrations.Say], None], *, of_none: str) -> None:
    """Print what `run` says as it goes, or that there was nothing to do."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        _say(line)

    run(say)
    if not said:
        out.print(f"{of_none}: nothing to do")


@group.callback(invoke_without_command=True)
def migrate(
    context: typer.Context,
    sql: SqlOption = False,
    start: StartOption = None,
) -> None:
    """Bring the database to this release's newest revision; what an earlier run left half-made is finished."""
    if context.invoked_subcommand is not None:
        if sql or start is not None:
            raise typer.BadParameter(f"--sql and --from go behind {context.invoked_subcommand}")
        return
    if sql:
        url = _url()
        before, start = ("", start) if start else _start(url)
        typer.echo(before + migrations.upgrade_script(url, start=start), nl=False)
        return
    if start is not None:
        raise typer.BadParameter("--from goes with --sql: without it the database itself says where it is")
    url = _url()
    _tell_each(lambda say: migrations.upgrade(url, say=say), of_none=f"at {migrations.head_revision()}, the newest")


@group.command("status")
def status(as_json: JsonOption = False) -> None:
    """Say which revision the database is at, and what is pending. Only reads; exit code 1 if workers cannot start."""
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
            out.print("a newer release has made this revision: upgrade tombola here, too")
        if must_wait:
            _say(f"first     {must_wait}")
    raise typer.Exit(1 if at.pending or must_wait else 0)


def _start(url: str) -> tuple[str, str]:
    """Where a script begins that is for the database as it is: what comes before it, and the revision.

    Raises ConfigurationError where no script can say what would be run.
    """
    with reading(url) as engine, engine.connect() as connection:
        at, former = migrations.current_revision(connection), history.former_revision(connection)
        if former is not None:
            history.refuse_doubtful(connection, former)
            return f"{history.RENAME};\n\n", former
        if at is not None:
            return "", at
        if inspect(connection).has_table(migrations.VERSION_TABLE):
            raise ConfigurationError("an upgrade broke off here: run `tombola migrate` itself, which sees what is left")
        if legacy.is_legacy(connection):
            raise ConfigurationError(LEGACY)
        history.refuse_namesakes(connection)
        return "", migrations.BASE


def _must_wait(connection: Connection) -> str | None:
    """What is to be done before, or instead of, `tombola migrate`."""
    if legacy.is_legacy(connection):
        return LEGACY
    if (former := history.former_revision(connection)) is not None:
        return f"the history, at {former}, is in alembic_version: `tombola migrate` takes it over"
    try:
        history.refuse_namesakes(connection)
    except ConfigurationError as error:
        return str(error)
    return legacy.why_workers_must_wait(connection)


@group.command("downgrade")
def downgrade(
    revision: Annotated[str, typer.Argument(help="Where to go back to, or `base`: no tables at all.")],
    sql: SqlOption = False,
    start: StartOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: for scripts.")] = False,
) -> None:
    """Take the schema back, for an older release. Tables and columns that it does not know are dropped."""
    if sql:
        url = _url()
        before, start = ("", start) if start else _start(url)
        typer.echo(before + migrations.downgrade_script(url, revision, start=start), nl=False)
        return
    if start is not None:
        raise typer.BadParameter("--from goes with --sql: without it the database itself says where it is")
    migrations.refuse_unknown(revision)
    url = _url()
    if not yes:
        typer.confirm(f"What {revision} has no room for is dropped. Go on?", abort=True)
    _tell_each(lambda say: migrations.downgrade(url, revision, say=say), of_none=f"at {revision} already")
