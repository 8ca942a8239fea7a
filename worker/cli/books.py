"""The books: the accounts that pay, and the audit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import msgspec
import typer
from sqlalchemy import select

from tombola.producers.domain import keys
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, wheels
from tombola.producers.domain.errors import DrawError, ServiceUnavailable
from tombola.producers.storage.ledger import RECHARGE
from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.worker.audit import audits
from tombola.worker.audit.audit import audit as audit_of
from tombola.worker.cli.base import (
    AccountOption,
    JsonOption,
    WhyOption,
    amount_of,
    engine_of,
    out,
    print_json,
    settings_with,
)
from tombola.worker.embedded import sample
from tombola.worker.ledger import accounts as acts
from tombola.worker.operators.actions import checked_reason, shell_operator

app = typer.Typer()
account_app = typer.Typer(help="Open accounts, recharge them, look at them.", no_args_is_help=True)
app.add_typer(account_app, name="account")

OnceOption = Annotated[
    str, typer.Option("--key", help="Done once under one key: the same again changes nothing. Made here if not given.")
]


@app.command()
def audit(as_json: JsonOption = False) -> None:
    """Prove that the books balance. Exit code 1 when they do not, or when something could not be looked at."""
    settings = settings_with("database_url")
    engine = engine_of(settings)
    report = audit_of(engine, wheels(settings.seed_bytes))
    try:
        audits.record(engine, report, by=shell_operator())
    except DrawError as error:  # whoever may only read may audit all the same
        typer.echo(f"this audit is not on record: {error}", err=True)
    if as_json:
        print_json(msgspec.json.encode({**report.told(), "violations": report.violations}))
    else:
        sample.show_audit(report, out)
    raise typer.Exit(0 if report.is_clean else 1)


@account_app.command("add")
def account_add(
    balance: Annotated[str, typer.Option(help="What it begins with.")] = "0",
    user: Annotated[int | None, typer.Option(help="Whose it is; default: the next free number.", min=1)] = None,
    asset: Annotated[str, typer.Option(help="What it holds.")] = DEFAULT_CAMPAIGN.asset_code,
    key: OnceOption = "",
    reason: WhyOption = "",
) -> None:
    """Open an account."""
    with _once(key or keys.make_act_key("account_add")) as once:
        opened = acts.add(
            engine_of(), user_id=user, asset_code=asset, balance=amount_of(balance), key=once, by=shell_operator(),
            reason=_why(reason),
        )  # fmt: skip
    repeat = f": opened already under the key {once}, nothing was done" if opened.is_repeat else ""
    out.print(f"account {opened.account_id} (user {opened.user_id}, {opened.balance:.2f} {opened.asset_code}){repeat}")


@account_app.command("recharge")
def account_recharge(
    account: AccountOption,
    amount: Annotated[str, typer.Option(help="How much to add.")],
    key: OnceOption = "",
    reason: WhyOption = "",
) -> None:
    """Add to an account's balance, once under one key."""
    with _once(key or keys.make_standalone_key(RECHARGE, account)) as once:
        done = acts.recharge(
            engine_of(), account, amount_of(amount), key=once, by=shell_operator(), reason=_why(reason)
        )
    if done.is_repeat:
        out.print(
            f"account {account}: was recharged under this key already, to {done.balance_after:.2f} then; ", end=""
        )
        out.print("nothing was done")
    else:
        out.print(f"account {account}: balance {done.balance_after:.2f}")
    out.print(f"key {once}")


@contextmanager
def _once(key: str) -> Iterator[str]:
    """Around something that is done once under `key`: an unclear outcome is found out by doing it again."""
    try:
        yield key
    except ServiceUnavailable as error:
        raise ServiceUnavailable(
            f"{error}. It may have been done: the same again with --key {key} finds out"
        ) from error


def _why(reason: str) -> str:
    return checked_reason(reason) if reason else ""


@account_app.command("show")
def account_show(account: Annotated[int, typer.Argument(help="The account's id.", metavar="ID")]) -> None:
    """Show an account."""
    with engine_of().connect().execution_options(read_only=True) as connection:
        row = connection.execute(select(accounts).where(accounts.c.id == account)).first()
    if row is None:
        raise DrawError(f"there is no account {account}")
    out.print(f"account {row.id} (user {row.user_id}): balance {row.balance:.2f} {row.asset_code}")
