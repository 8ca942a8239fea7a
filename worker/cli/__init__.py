"""The `tombola` command."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer
from alembic.util import CommandError
from rich.console import Console
from rich.markup import escape
from sqlalchemy.exc import SQLAlchemyError

from producers.database import explain
from producers.errors import DrawError
from worker.cli import access, dead_letters, draws, legacy, watch
from worker.cli.terminal import out, plain_streams

app = typer.Typer(
    name="tombola",
    help="The draw queue that never charges twice.",
    epilog=(
        "\b\nExamples:\n"
        "  tombola up\n"
        "  tombola enqueue --account 6\n"
        "  tombola result SESSION\n"
        "  tombola dead-letters groups\n"
        "  tombola doctor\n"
        "  tombola audit\n"
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (draws, dead_letters, watch, access, legacy):
    app.add_typer(part.app)


def main() -> None:
    """Run the command; every error that has a name becomes one line and exit code 1."""
    plain_streams()
    if (unreadable := next((it for it in sys.argv if not _is_text(it)), None)) is not None:
        _fail(f"this argument is no text in {sys.getfilesystemencoding()}: {unreadable!r:.80}")
    try:
        app()
    except DrawError as error:
        _fail(str(error))
    except CommandError as error:
        _fail(str(error))
    except SQLAlchemyError as error:
        _fail(str(explain(error)))


def _is_text(argument: str) -> bool:
    """Whether it is what somebody typed: bytes that are no text stand there as halves of characters."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fail(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}")
    sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"tombola {version('tombola')}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """The draw queue that never charges twice."""
