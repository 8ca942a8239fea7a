"""The `tombola` command."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from importlib.metadata import version
from types import FrameType
from typing import Annotated

import msgspec
import typer
from alembic.util import CommandError
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from producers import api_keys
from producers.client import DrawClient
from producers.contract import CAMPAIGN_DEFAULT, DrawRequest, DrawResult
from producers.database import explain, open_engine
from producers.errors import ConfigurationError, DrawError, InvalidRequest
from producers.gateway.serve import serve
from producers.ledger import get_lottery_session_transactions
from producers.outbox import Relay
from producers.schema import account_asset_balances as accounts
from producers.settings import Settings
from worker import audit as audits
from worker import embedded, ledger, sample
from worker.draw import DEFAULT_CAMPAIGN, wheels
from worker.embedded import GATEWAY_PORT

log = logging.getLogger(__name__)
out = Console(highlight=False, soft_wrap=True)

app = typer.Typer(
    name="tombola",
    help="The draw queue that never charges twice.",
    epilog=(
        "Examples:  tombola up  ·  tombola enqueue --account 6  ·  tombola result SESSION  ·  "
        "tombola account add --balance 100  ·  tombola audit"
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
account_app = typer.Typer(help="Open accounts, recharge them, look at them.", no_args_is_help=True)
app.add_typer(account_app, name="account")
api_key_app = typer.Typer(help="Say who may call the gateway.", no_args_is_help=True)
app.add_typer(api_key_app, name="api-key")

AccountOption = Annotated[int, typer.Option("--account", help="The account that pays.", metavar="ID")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def main() -> None:
    """Run the command; every error that has a name becomes one line and exit code 1."""
    try:
        app()
    except DrawError as error:
        _fail(str(error))
    except CommandError as error:
        _fail(str(error))
    except SQLAlchemyError as error:
        _fail(str(explain(error)))


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


@app.command()
def up(
    draws: Annotated[int, typer.Option(help="How many sample draws to send.", min=0, max=10_000_000)] = 20_000,
    port: Annotated[int, typer.Option(help="The gateway's port, if it is free.", min=1, max=65535)] = GATEWAY_PORT,
    leave: Annotated[bool, typer.Option("--exit", help="Leave after the summary instead of staying up.")] = False,
) -> None:
    """Run everything on this machine: SQLite, a private Redis, a worker, a relay, a gateway; sample draws, an audit.

    Needs no server and no setting. State is kept in the user's data folder (or TOMBOLA_HOME).
    """
    home = embedded.Home.find()
    with _until_interrupted() as interrupted, embedded.run(home, port=port) as running:
        engine = open_engine(running.settings.need("database_url"))
        out.print(
            f"[bold]tombola[/] {version('tombola')}  SQLite, {running.redis_name}, a Celery worker, a relay, a gateway"
        )
        out.print(f"state in {home.path}, with a log of each\n")
        sample.open_accounts(engine)
        balanced = True
        if draws:
            with DrawClient.from_settings(running.settings) as client:
                summary = sample.run(engine, client, draws, out)
            balanced = sample.show(summary, engine, wheels(running.settings.seed_bytes), out)
        if leave:
            raise typer.Exit(0 if balanced else 1)
        out.print(f"\nIt stays up. A page that draws: {running.gateway_url}/  (the API: {running.gateway_url}/docs)")
        out.print("From a second terminal (in this checkout: .venv/bin/tombola):\n")
        for line in ("enqueue --account 6", "account add --balance 100", "audit"):
            out.print(f"    tombola {line}")
        out.print("\nCtrl-C ends it.")
        while not interrupted.wait(1):
            if (part := running.ended()) is not None:
                raise DrawError(f"the {part.name} ended by itself: see {part.log}")
    out.print("\nStopped. What was settled is kept for the next start.")


@contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """Turn SIGTERM into what Ctrl-C does, and Ctrl-C into an orderly end with exit code 0."""
    interrupted = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        if interrupted.is_set():
            return  # already on the way out: the parts stop in their order
        interrupted.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    except KeyboardInterrupt:
        out.print("\nStopped. What was settled is kept for the next start.")
        raise typer.Exit(0) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
def enqueue(
    account: AccountOption,
    key: Annotated[str, typer.Option(help="The request key; made here if not given. A repeat is harmless.")] = "",
    session: Annotated[str, typer.Option(help="The lottery session id; default: the request key.")] = "",
    campaign: Annotated[str, typer.Option(help="The odds to draw by.")] = CAMPAIGN_DEFAULT,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the result; 0 does not wait.", min=0)] = 5.0,
    as_json: JsonOption = False,
) -> None:
    """Enqueue one draw and wait for its result."""
    request = DrawRequest(account_id=account, request_key=key, lottery_session_id=session, campaign=campaign)
    with DrawClient.from_settings(_settings("broker_url")) as client:
        ticket = client.enqueue(request)
        if not as_json:
            out.print(f"session {ticket.lottery_session_id}" + (f"  {ticket.reason}" if ticket.reason else ""))
        result = ticket.result
        if result is None and wait:
            result = client.wait(ticket.lottery_session_id, timeout_s=wait)
    if as_json:
        shown = {"request_key": ticket.request_key, "lottery_session_id": ticket.lottery_session_id}
        typer.echo(msgspec.json.encode({**shown, "reason": ticket.reason, "result": result}).decode())
    elif result is not None:
        _show(result)


@app.command()
def result(
    session: Annotated[str, typer.Argument(help="The lottery session id.")],
    wait: Annotated[float, typer.Option(help="Seconds to wait for it.", min=0)] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Show the result of a draw."""
    with DrawClient.from_settings(_settings("result_url")) as client:
        found = client.wait(session, timeout_s=wait) if wait else client.result(session)
    if as_json:
        typer.echo(found.encode().decode())
    else:
        _show(found)


def _show(found: DrawResult) -> None:
    if found.status == "rejected":
        out.print(f"account {found.account_id}: rejected, {found.reason}; nothing was charged")
        return
    prize = f"[bold green]won {found.prize_amount}[/]" if found.won else "no prize"
    out.print(f"account {found.account_id}: {prize}, balance {found.balance_after}")
    for row in found.transactions:
        out.print(f"  {row.business_type:<16} {row.delta_amount:>8} {row.asset_code}  {row.idempotency_key}")


@app.command()
def transactions(session: Annotated[str, typer.Argument(help="The lottery session id.")]) -> None:
    """List the ledger rows of a session."""
    rows = get_lottery_session_transactions(session, engine=_engine())
    if not rows:
        raise DrawError(f"no ledger row has the lottery session {session}")
    table = Table("id", "account", "type", "delta", "before", "after", "idempotency key", box=None)
    for row in rows:
        cells = ("transaction_id", "account_id", "business_type", "delta_amount", "balance_before", "balance_after")
        table.add_row(*(str(row[cell]) for cell in cells), row["idempotency_key"])
    out.print(table)


@app.command()
def audit(as_json: JsonOption = False) -> None:
    """Prove that the books balance. Exit code 1 when they do not."""
    settings = _settings("database_url")
    report = audits.audit(_engine(settings), wheels(settings.seed_bytes))
    if as_json:
        typer.echo(msgspec.json.encode({"violated": report.counts, "violations": report.violations}).decode())
    else:
        sample.show_audit(report, out)
    raise typer.Exit(0 if report.is_clean else 1)


@app.command()
def relay(
    once: Annotated[bool, typer.Option("--once", help="Publish what is overdue now, and end.")] = False,
) -> None:
    """Publish accepted draws again that never came through. Any number of relays may run."""
    relaying = Relay.from_settings(_settings("database_url", "broker_url"))
    try:
        if once:
            out.print(f"{relaying.run_once():,} overdue requests published")
            return
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        stopping = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopping.set())
        log.info("relaying")
        relaying.run(stopping)
    finally:
        relaying.close()


@app.command()
def gateway(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.", min=0, max=65535)] = 8000,
    processes: Annotated[int, typer.Option(help="How many processes share the port.", min=1, max=64)] = 1,
) -> None:
    """Serve the HTTP API for web frontends."""
    _settings("database_url", "broker_url", "result_url")  # one line now, rather than a traceback in each process
    serve(host=host, port=port, processes=processes)


@api_key_app.command("add")
def api_key_add(
    caller: Annotated[str, typer.Argument(help="Whose key: idempotency keys are the caller's own.")],
) -> None:
    """Make an API key. It is shown this once."""
    typer.echo(api_keys.add(_engine(), caller))


@api_key_app.command("list")
def api_key_list(as_json: JsonOption = False) -> None:
    """List the API keys, without their secrets."""
    found = api_keys.list_all(_engine())
    if as_json:
        typer.echo(msgspec.json.encode([key._asdict() for key in found]).decode())
        return
    table = Table("key", "caller", "made", "revoked", box=None)
    for key in found:
        revoked = "" if key.revoked_at is None else f"{key.revoked_at:%Y-%m-%d %H:%M}"
        table.add_row(f"{api_keys.PREFIX}_{key.key_id}_…", key.caller, f"{key.created_at:%Y-%m-%d %H:%M}", revoked)
    out.print(table)


@api_key_app.command("revoke")
def api_key_revoke(key: Annotated[str, typer.Argument(help="The key, or its id as listed.")]) -> None:
    """Let a key in no more, within seconds."""
    api_keys.revoke(_engine(), key)
    out.print(f"revoked {key.removeprefix(f'{api_keys.PREFIX}_')[:16]}")


@account_app.command("add")
def account_add(
    balance: Annotated[str, typer.Option(help="What it begins with.")] = "0",
    user: Annotated[int | None, typer.Option(help="Whose it is; default: the next free number.", min=1)] = None,
    asset: Annotated[str, typer.Option(help="What it holds.")] = DEFAULT_CAMPAIGN.asset_code,
) -> None:
    """Open an account."""
    engine, amount = _engine(), _amount(balance)
    if user is None:
        with engine.connect().execution_options(read_only=True) as connection:
            user = (connection.execute(select(func.max(accounts.c.user_id))).scalar_one() or 0) + 1
    try:
        account_id = ledger.open_account(engine, user_id=user, asset_code=asset, balance=amount)
    except IntegrityError:
        raise InvalidRequest(f"user {user} has a {asset} account already") from None
    out.print(f"account {account_id} (user {user}, {amount:.2f} {asset})")


@account_app.command("recharge")
def account_recharge(account: AccountOption, amount: Annotated[str, typer.Option(help="How much to add.")]) -> None:
    """Add to an account's balance."""
    out.print(f"account {account}: balance {ledger.recharge(_engine(), account, _amount(amount)):.2f}")


@account_app.command("show")
def account_show(account: Annotated[int, typer.Argument(help="The account's id.", metavar="ID")]) -> None:
    """Show an account."""
    with _engine().connect().execution_options(read_only=True) as connection:
        row = connection.execute(select(accounts).where(accounts.c.id == account)).first()
    if row is None:
        raise DrawError(f"there is no account {account}")
    out.print(f"account {row.id} (user {row.user_id}): balance {row.balance:.2f} {row.asset_code}")


def _settings(*needed: str) -> Settings:
    settings = embedded.settings_from_anywhere()
    if settings.need("database_url").startswith("sqlite") and not all(settings.has(name) for name in needed):
        raise ConfigurationError("tombola is not up: start it with `tombola up` in another terminal")
    for name in needed:
        settings.need(name)
    return settings


def _engine(settings: Settings | None = None) -> Engine:
    settings = settings or _settings("database_url")
    return open_engine(settings.need("database_url"), lock_wait_s=settings.lock_wait_s)


def _amount(text: str) -> Decimal:
    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise typer.BadParameter(f"not an amount: {text}") from None
    if not amount.is_finite() or amount < 0:
        raise typer.BadParameter(f"an amount is 0 or more: {text}")
    return amount
