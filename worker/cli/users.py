"""`tombola user`: the users of the console."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.keys import make_act_key
from tombola.worker.cli.base import (
    JsonOption,
    OnceOption,
    OptionalReasonOption,
    engine_of,
    out,
    print_json,
    print_table,
    under_key,
)
from tombola.worker.operators import users as operators
from tombola.worker.operators.actions import Done, shell_operator

app = typer.Typer()
user_app = typer.Typer(help="Manage users of the console: viewers look, operators act.", no_args_is_help=True)
app.add_typer(user_app, name="user")

NameArgument = Annotated[str, typer.Argument(help="The user's name.")]
PasswordStdinOption = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from the standard input.")
]


@user_app.command("add")
def user_add(
    name: Annotated[str, typer.Argument(help="1 to 64 characters of A-Z a-z 0-9 . _ and -.")],
    role: Annotated[str, typer.Option(help="viewer or operator.")] = "viewer",
    password_stdin: PasswordStdinOption = False,
    key: OnceOption = "",
    reason: OptionalReasonOption = "",
) -> None:
    """Add a user of the console. Asks for a password."""
    password = _password(password_stdin)
    with under_key(key or make_act_key("user_add")) as once:
        done = operators.add(engine_of(), name, role, password, by=shell_operator(), reason=reason, key=once)
    _tell(done, f"{name} can {_can(role)}")


@user_app.command("password")
def user_password(
    name: NameArgument,
    password_stdin: PasswordStdinOption = False,
    key: OnceOption = "",
    reason: OptionalReasonOption = "",
) -> None:
    """Change a user's password. The user's sessions end."""
    password = _password(password_stdin)
    with under_key(key or make_act_key("user_password")) as once:
        done = operators.change_password(engine_of(), name, password, by=shell_operator(), reason=reason, key=once)
    _tell(done, f"{name} has a new password")


@user_app.command("role")
def user_role(
    name: NameArgument,
    role: Annotated[str, typer.Argument(help="viewer or operator.")],
    key: OnceOption = "",
    reason: OptionalReasonOption = "",
) -> None:
    """Change a user's role: a viewer can look, an operator can look and act."""
    with under_key(key or make_act_key("user_role")) as once:
        done = operators.change_role(engine_of(), name, role, by=shell_operator(), reason=reason, key=once)
    _tell(done, f"{name} can {_can(role)}")


@user_app.command("list")
def user_list(as_json: JsonOption = False) -> None:
    """List the console's users."""
    found = operators.list_all(engine_of())
    if as_json:
        print_json(msgspec.json.encode([user._asdict() for user in found]))
        return
    rows = [(user.name, user.role, f"{user.created_at:%Y-%m-%d %H:%M}") for user in found]
    print_table(["name", "role", "since"], rows)


@user_app.command("remove")
def user_remove(name: NameArgument, key: OnceOption = "", reason: OptionalReasonOption = "") -> None:
    """Remove a user. The user's sessions end at once."""
    with under_key(key or make_act_key("user_remove")) as once:
        done = operators.remove(engine_of(), name, by=shell_operator(), reason=reason, key=once)
    _tell(done, f"{name} is no longer a user")


def _tell(done: Done, outcome: str) -> None:
    out.print(f"{outcome}: so it was done before under this key; nothing was done" if done.is_repeat else outcome)


def _can(role: str) -> str:
    return "look and act" if role == "operator" else "look"


def _password(from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\n")
    if not sys.stdin.isatty():
        raise InvalidRequest("no terminal to ask for a password on: use --password-stdin")
    typed: str = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    return typed
