"""The `tombola` command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from tombola.producers.domain.errors import ConfigurationError, DrawError
from tombola.worker.cli.terminal import out, plain_streams


def _draws() -> typer.Typer:
    from tombola.worker.cli import draws

    return draws.app


def _processes() -> typer.Typer:
    from tombola.worker.cli import processes

    return processes.app


def _books() -> typer.Typer:
    from tombola.worker.cli import books

    return books.app


def _sealed_books() -> typer.Typer:
    from tombola.worker.cli import sealed_books

    return sealed_books.app


def _receipts() -> typer.Typer:
    from tombola.worker.cli import receipts

    return receipts.app


def _proofs() -> typer.Typer:
    from tombola.worker.cli import proofs

    return proofs.app


def _dead_letters() -> typer.Typer:
    from tombola.worker.cli import dead_letters

    return dead_letters.app


def _refunds() -> typer.Typer:
    from tombola.worker.cli import refunds

    return refunds.app


def _doctor() -> typer.Typer:
    from tombola.worker.cli import doctor

    return doctor.app


def _access() -> typer.Typer:
    from tombola.worker.cli import access

    return access.app


def _campaigns() -> typer.Typer:
    from tombola.worker.cli import campaigns

    return campaigns.app


def _seeds() -> typer.Typer:
    from tombola.worker.cli import seeds

    return seeds.app


def _webhooks() -> typer.Typer:
    from tombola.worker.cli import webhooks

    return webhooks.app


def _migrate() -> typer.Typer:
    from tombola.worker.cli import migrate

    return migrate.app


def _grants() -> typer.Typer:
    from tombola.worker.cli import grants

    return grants.app


def _users() -> typer.Typer:
    from tombola.worker.cli import users

    return users.app


def _legacy() -> typer.Typer:
    from tombola.worker.cli import legacy

    return legacy.app


# The module of each command, imported when the command is called: importing all modules takes two seconds.
MODULES: Final[dict[str, Callable[[], typer.Typer]]] = {
    "up": _processes,
    "enqueue": _draws,
    "result": _draws,
    "transactions": _draws,
    "receipt": _receipts,
    "proof": _proofs,
    "draw": _refunds,
    "audit": _books,
    "books": _sealed_books,
    "relay": _processes,
    "gateway": _processes,
    "account": _books,
    "campaign": _campaigns,
    "seed": _seeds,
    "webhook": _webhooks,
    "fulfilment": _webhooks,
    "dead-letters": _dead_letters,
    "console": _processes,
    "doctor": _doctor,
    "api-key": _access,
    "receipt-key": _receipts,
    "user": _users,
    "grants": _grants,
    "migrate": _migrate,
    "legacy": _legacy,
}
# The extra that installs what each command needs beside the base.
EXTRAS: Final = {
    "up": "embedded",
    "relay": "worker",
    "webhook": "worker",
    "dead-letters": "worker",
    "legacy": "worker",
    "migrate": "worker",
    "gateway": "gateway",
    "console": "console",
    "user": "console",
}
PLAIN: Final[dict[str, Any]] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}


class LazyCommands(TyperGroup):
    """The commands by name, each imported when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        module = MODULES.get(cmd_name)
        if module is None:
            return None
        whole = typer.Typer(**PLAIN)
        try:
            whole.add_typer(module())
        except ModuleNotFoundError as error:
            return _stand_in(cmd_name, _missing_extra(cmd_name, error))
        return typer.main.get_group(whole).commands[cmd_name]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:  # some commands import modules when they run
            raise _missing_extra(ctx.invoked_subcommand, error) from error


def _missing_extra(command: str, error: ModuleNotFoundError) -> ConfigurationError:
    """The error that names the extra to install for `command`; raises `error` if no extra contains the module."""
    library = (error.name or "").partition(".")[0]
    if command not in EXTRAS or library in ("", "tombola"):
        raise error
    return ConfigurationError(
        f"`tombola {command}` needs {library}, which is not installed: pip install 'tombola[{EXTRAS[command]}]'"
    )


def _stand_in(command: str, why: ConfigurationError) -> Any:
    """A command that is listed without its library; called with any arguments, it raises `why`."""
    whole = typer.Typer(**PLAIN)

    @whole.command(
        command,
        help=f"Not installed: pip install 'tombola[{EXTRAS[command]}]'.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def say_why() -> None:
        raise why

    return typer.main.get_command(whole)


app = typer.Typer(
    cls=LazyCommands,
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
    context_settings={"help_option_names": ["-h", "--help"]},
    **PLAIN,
)


def main() -> None:
    """Run the command; a DrawError or a database's error becomes one line on stderr and exit code 1."""
    plain_streams()
    if (unreadable := next((it for it in sys.argv if not _is_text(it)), None)) is not None:
        _fail(f"this argument is not text in {sys.getfilesystemencoding()}: {unreadable!r:.80}")
    try:
        app()
    except DrawError as error:
        _fail(str(error))
    except Exception as error:
        # Imported here: `tombola --version` needs no SQLAlchemy.
        from sqlalchemy.exc import SQLAlchemyError

        from tombola.producers.storage.faults import explain

        if not isinstance(error, SQLAlchemyError):
            raise
        _fail(str(explain(error)))


def _is_text(argument: str) -> bool:
    """Whether the argument is valid text: Python keeps other bytes as lone surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fail(message: str) -> None:
    from rich.console import Console
    from rich.markup import escape

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
