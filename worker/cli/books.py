"""The books: `tombola audit` and `tombola account`."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from tombola.producers.domain import keys
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN
from tombola.producers.domain.errors import DrawError
from tombola.producers.storage.ledger import find_account
from tombola.worker.audit import audits
from tombola.worker.audit.audit import audit_by
from tombola.worker.cli import account_views
from tombola.worker.cli.base import (
    JsonOption,
    OnceOption,
    OptionalReasonOption,
    amount_of,
    engine_of,
    out,
    print_json,
    settings_with,
    under_key,
)
from tombola.worker.cli.expiry import expire_commands
from tombola.worker.cli.movements import account_commands
from tombola.worker.embedded import sample
from tombola.worker.ledger import accounts
from tombola.worker.operators.actions import checked_reason, shell_operator

app = typer.Typer()
account_app = typer.Typer(help="Open and show accounts, and move what they hold.", no_args_is_help=True)
for commands in (account_commands, expire_commands, account_views.app):
    account_app.add_typer(commands)
app.add_typer(account_app, name="account")

EverythingOption = Annotated[
    bool, typer.Option("--all", help="Examine everything, not only what has come since the last clean audit.")
]


@app.command()
def audit(everything: EverythingOption = False, as_json: JsonOption = False) -> None:
    """Prove that the books balance: all accounts, and what has come since the last clean audit.

    Exit code 1 if they do not balance, or if a part could not be checked.
    """
    settings = settings_with("database_url")
    engine = engine_of(settings)
    report = audit_by(settings, engine, everything=everything)
    try:
        audits.record(engine, report, by=shell_operator())
    except DrawError as error:  # a database user who can only read can audit as well
        typer.echo(f"this audit is not on record: {error}", err=True)
    if as_json:
        print_json(msgspec.json.encode({**report.as_json(), "violations": report.violations}))
    else:
        sample.show_audit(report, out)
    raise typer.Exit(0 if report.is_clean else 1)


@account_app.command("add")
def account_add(
    balance: Annotated[str, typer.Option(help="The first balance.")] = "0",
    user: Annotated[int | None, typer.Option(help="The user's id; default: the next free number.", min=1)] = None,
    asset: Annotated[str, typer.Option(help="The asset's code.")] = DEFAULT_CAMPAIGN.asset_code,
    key: OnceOption = "",
    reason: OptionalReasonOption = "",
) -> None:
    """Open an account."""
    key = key or keys.make_act_key("account_add")
    with under_key(key):
        opened = accounts.add(
            engine_of(), user_id=user, asset_code=asset, balance=amount_of(balance), key=key, by=shell_operator(),
            reason=_checked(reason),
        )  # fmt: skip
    repeat = f": opened before under the key {key}, nothing was done" if opened.is_repeat else ""
    out.print(f"account {opened.account_id} (user {opened.user_id}, {opened.balance:.2f} {opened.asset_code}){repeat}")


def _checked(reason: str) -> str:
    return checked_reason(reason) if reason else ""


@account_app.command("show")
def account_show(account: Annotated[int, typer.Argument(help="The account's id.", metavar="ID")]) -> None:
    """Show an account."""
    with engine_of().connect().execution_options(read_only=True) as connection:
        found = find_account(connection, account)
    if found is None:
        raise DrawError(f"there is no account {account}")
    held = f", held {found.held:.2f}" if found.held else ""
    out.print(
        f"account {found.account_id} (user {found.user_id}): balance {found.balance:.2f} {found.asset_code}{held}"
    )
