"""`tombola legacy`: migrate a ledger of old code, online, with checks and a rollback (migrations/README.md)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec
import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine

from tombola.migrations.legacy import backfill as backfilling
from tombola.migrations.legacy import contract as contracting
from tombola.migrations.legacy import expand as expanding
from tombola.migrations.legacy import inspection
from tombola.migrations.legacy import rollback as rolling
from tombola.migrations.legacy import status as standing
from tombola.migrations.legacy import verify as verifying
from tombola.migrations.legacy.session import OnProgress, open_session
from tombola.worker.cli.base import JsonOption, YesOption, out, settings_with

app = typer.Typer()
group = typer.Typer(
    help="Migrate the asset_transactions of old code to tombola's definition, while old code goes on writing.",
    no_args_is_help=True,
    epilog=(
        "\b\nIn this order; each can be run again:\n"
        "  tombola legacy inspect\n"
        "  tombola legacy expand        (or adopt, as inspect says)\n"
        "  tombola legacy backfill --follow\n"
        "  tombola legacy verify\n"
        "  tombola legacy contract --drop-business-unique\n"
        "To go back at any time: tombola legacy rollback\n"
    ),
)
app.add_typer(group, name="legacy")

SqlOption = Annotated[bool, typer.Option("--sql", help="Print the statements that would run; run none.")]
WritersWaitOption = Annotated[
    bool,
    typer.Option("--writers-wait", help="Block writers during the copy if the server cannot copy the table online."),
]
OwnSessionOption = Annotated[
    bool,
    typer.Option("--own-session", help="Give a row whose business_id is not a session id its own session, tx_{id}."),
]


@contextmanager
def _engine() -> Iterator[Engine]:
    engine = open_session(settings_with("database_url").need("database_url"))
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """A progress bar per task, with its rate and the time left; nothing without a terminal."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        bars: dict[str, TaskID] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total, rate="")
            speed = progress.tasks[bars[what]].speed
            progress.update(bars[what], completed=done, total=total, rate=f"{speed:,.0f}/s" if speed else "")

        yield on_progress


def _say(line: str) -> None:
    out.print(escape(line))


def _print_sql(statements: list[str]) -> None:
    for statement in statements:
        typer.echo(statement if statement.startswith("--") else f"{statement};")


# ---- look ------------------------------------------------------------------------------------------------------------


@group.command("inspect")
def inspect(
    no_rows: Annotated[bool, typer.Option("--no-rows", help="Read the definitions only, not the rows: quick.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Inspect the table of old code: its shape, its differences, the rows that would stop a migration. Only reads."""
    with _engine() as engine, _progress() as on_progress:
        found = inspection.inspect(engine, on_progress=on_progress, with_rows=not no_rows)
    if as_json:
        typer.echo(msgspec.json.encode({"can_begin": found.can_begin, **msgspec.to_builtins(found)}).decode())
    else:
        _show(found)
    raise typer.Exit(0 if found.can_begin else 1)


def _show(found: inspection.Inspection) -> None:
    table = found.table
    out.print(
        f"asset_transactions on {escape(found.server)}: {escape(table['engine'])}, {escape(table['collation'])}, "
        f"about {found.rows or table['rows_estimated']:,} rows, {table['size_bytes'] / 2**20:,.0f} MiB"
    )
    shape = f" (shape {found.shape})" if found.shape else ""
    out.print(f"It is {escape(found.shape_is)}{shape}.")
    for name, lines in (
        ("columns", [f"{it['name']} {it['type']}{'' if it['null'] else ' not null'}" for it in found.columns]),
        ("indexes", found.indexes),
        ("differences from the guide", found.differences),
        ("further columns of the accounts", found.account_columns_beside_ours),
    ):
        if lines:
            out.print(f"\n[bold]{name}[/]")
            for line in lines:
                _say(f"  {line}")
    following = f"next is `{found.next}`" if found.next else "nothing left to do"
    if not found.findings:
        out.print(f"\n[green]nothing is in the way[/]: {following}")
        return
    out.print("\n[bold]in the way[/]" if found.can_begin else "\n[bold]in the way, to be repaired first[/]")
    shown = Table(box=None)
    for name in ("", "count", "what", "such as", "what to do"):
        shown.add_column(name, overflow="fold")
    for it in found.findings:
        mark = Text("must", style="bold red") if it.is_blocking else Text("look", style="yellow")
        samples = ", ".join(map(str, it.samples))
        shown.add_row(mark, f"{it.count:,}", Text(it.what), Text(samples), Text(it.cure))
    out.print(shown)
    if found.can_begin:
        out.print(following)


@group.command("status")
def status(as_json: JsonOption = False) -> None:
    """Show the stage of the migration, and the next step."""
    with _engine() as engine:
        found = standing.status(engine)
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
        return
    table = Table(show_header=False, box=None)
    rows: list[tuple[str, Any]] = [
        ("stage", found.stage),
        ("next", found.next or "nothing"),
        ("revision", found.revision or "none"),
        ("rows without a key", "not counted yet" if found.rows_without_key is None else f"{found.rows_without_key:,}"),
        ("workers", found.workers),
    ]
    for step in found.steps:
        rows.append((step["step"], f"{step['status']}, {step['started_at']} to {step['ended_at'] or 'now'}"))
    for name, value in rows:
        table.add_row(name, Text(str(value)))
    out.print(table)


@group.command("verify")
def verify(as_json: JsonOption = False) -> None:
    """Check keys and sessions, and compare all other columns with their checksums from before the migration."""
    with _engine() as engine, _progress() as on_progress:
        found = verifying.verify(engine, on_progress=on_progress)
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
        raise typer.Exit(0 if found.is_clean else 1)
    out.print(f"{found.rows:,} rows in {found.chunks:,} chunks compared with their checksums from before")
    if found.rows_total:
        out.print(
            f"{found.rows_total:,} rows, {found.keys_distinct:,} distinct keys, {found.duplicates:,} duplicates, "
            f"{found.rows_without_key:,} rows without a key yet"
        )
    if found.rewards_alone_old:
        _say(f"rewards without a charge, from before the migration: {', '.join(found.rewards_alone_old)} …")
    for problem in found.problems[:20]:
        out.print(f"[bold red]wrong:[/] {escape(problem)}")
    if not found.is_clean:
        out.print(f"{len(found.problems):,} problems")
        raise typer.Exit(1)
    out.print("[green]all columns as before, all keys correct[/]")


# ---- change ----------------------------------------------------------------------------------------------------------


@group.command("expand")
def expand(sql: SqlOption = False) -> None:
    """Add both columns, nullable, and what else tombola needs; compute the checksums. Old code goes on writing."""
    with _engine() as engine:
        if sql:
            _print_sql(expanding.statements(engine))
            return
        with _progress() as on_progress:
            expanding.expand(engine, say=_say, on_progress=on_progress)


@group.command("adopt")
def adopt(sql: SqlOption = False) -> None:
    """Instead of expand, if the table has the guide's columns already: keep their values, add what is missing."""
    with _engine() as engine:
        if sql:
            _print_sql(expanding.statements(engine))
            return
        with _progress() as on_progress:
            expanding.adopt(engine, say=_say, on_progress=on_progress)


@group.command("backfill")
def backfill(
    own_session: OwnSessionOption = False,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with new rows of old code, until contract.")] = False,
    sql: SqlOption = False,
) -> None:
    """Give every row of old code its key and session, in small transactions with pauses; build both indexes."""
    with _engine() as engine:
        if sql:
            _print_sql(backfilling.statements(engine, own_session=own_session))
            return
        with _until_signalled() as stopping, _progress() as on_progress:
            filled = backfilling.backfill(
                engine, own_session=own_session, follow=follow, say=_say, on_progress=on_progress, stopping=stopping
            )
        out.print(f"{filled:,} rows were given keys")


@group.command("contract")
def contract(
    drop_business_unique: Annotated[
        bool, typer.Option("--drop-business-unique", help="Drop the old unique index on business_id as well.")
    ] = False,
    quiet_s: Annotated[
        float, typer.Option(min=0.0, help="Wait this many seconds first; fail if old code adds a row.")
    ] = contracting.QUIET_S,
    writers_wait: WritersWaitOption = False,
    yes: YesOption = False,
    sql: SqlOption = False,
) -> None:
    """Make both columns NOT NULL, compared byte by byte. Old code, which gives no keys, cannot write any more."""
    with _engine() as engine:
        if sql:
            _print_sql(contracting.statements(engine, drop_business_unique=drop_business_unique))
            return
        _ask("After this step the ledger accepts only rows with keys: inserts of old code fail. Go on?", yes)
        with _progress() as on_progress:
            contracting.contract(
                engine,
                drop_business_unique=drop_business_unique,
                quiet_s=quiet_s,
                writers_wait=writers_wait,
                say=_say,
                on_progress=on_progress,
            )


@group.command("rollback")
def rollback(
    keep_new_rows: Annotated[
        bool,
        typer.Option(
            "--keep-new-rows", help="Go back even if tombola wrote rows: they stay, their keys in a table aside."
        ),
    ] = False,
    writers_wait: WritersWaitOption = False,
    yes: YesOption = False,
    sql: SqlOption = False,
) -> None:
    """Go back to the definition before the migration, from any step."""
    with _engine() as engine:
        if sql:
            _print_sql(rolling.statements(engine))
            return
        _ask("Stop tombola's workers first: after this step they cannot write. Go on?", yes)
        rolling.rollback(engine, keep_new_rows=keep_new_rows, writers_wait=writers_wait, say=_say)


def _ask(question: str, yes: bool) -> None:
    if not yes:
        typer.confirm(question, abort=True)


@contextmanager
def _until_signalled() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM sets the event, so that the current chunk is finished; the next one interrupts."""
    stopping = threading.Event()

    def end(_number: int, _frame: object) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    before: dict[int, Callable[..., Any] | int | None] = {
        number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
