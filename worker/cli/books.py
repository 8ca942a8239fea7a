"""The books: `tombola audit` and `tombola account`."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from tombola.producers.domain import keys
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, wheels
from tombola.producers.domain.errors import DrawError
from tombola.producers.domain.operations.recharge import RECHARGE
from tombola.producers.storage.ledger import find_account
from tombola.worker.audit import audits
from tombola.worker.audit.audit import audit as audit_of
from tombola.worker.cli import account_views
from tombola.worker.cli.base import (
    AccountOption,
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
from tombola.worker.embedded import sample
from tombola.worker.ledger import accounts
from tombola.worker.operators.actions import checked_reason, shell_operator

app = typer.Typer()
account_app = typer.Typer(help="Open, recharge and show accounts.", no_args_is_help=True)
app.add_typer(account_app, name="account")
account_app.add_typer(account_views.app)


@app.command()
def audit(as_json: JsonOption = False) -> None:
    """Prove that the books balance. Exit code 1 if they do not, or if a part could not be checked."""
    settings = settings_with("database_url")
    engine = engine_of(settings)
    report = audit_of(engine, wheels(settings.seed_bytes))
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
    with under_key(key or keys.make_act_key("account_add")) as once:
        opened = accounts.add(
            engine_of(), user_id=user, asset_code=asset, balance=amount_of(balance), key=once, by=shell_operator(),
            reason=_checked(reason),
        )  # fmt: skip
    repeat = f": opened before under the key {once}, nothing was done" if opened.is_repeat else ""
    out.print(f"account {opened.account_id} (user {opened.user_id}, {opened.balance:.2f} {opened.asset_code}){repeat}")


@account_app.command("recharge")
def account_recharge(
    account: AccountOption,
    amount: Annotated[str, typer.Option(help="The amount to add.")],
    key: OnceOption = "",
    reason: OptionalReasonOption = "",
) -> None:
    """Add to an account's balance, once per key."""
    with under_key(key or keys.make_standalone_key(RECHARGE, account)) as once:
        done = accounts.recharge(
            engine_of(), account, amount_of(amount), key=once, by=shell_operator(), reason=_checked(reason)
        )
    if done.is_repeat:
        out.print(
            f"account {account}: recharged before under this key, to {done.balance_after:.2f} then; nothing was done"
        )
    else:
        out.print(f"account {account}: balance {done.balance_after:.2f}")
    out.print(f"key {once}")


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
