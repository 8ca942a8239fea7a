"""Draws: run, enqueue, look, serve, relay; and the accounts that pay."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated

import msgspec
import typer
from rich.markup import escape
from sqlalchemy import select

from producers import keys
from producers.client import DrawClient
from producers.contract import CAMPAIGN_DEFAULT, DrawRequest, DrawResult
from producers.database import open_engine
from producers.draw import DEFAULT_CAMPAIGN, wheels
from producers.errors import DrawDead, DrawError, ResultNotReady, ServiceUnavailable
from producers.gateway.serve import serve
from producers.ledger import RECHARGE, get_lottery_session_transactions
from producers.logs import set_up_logging
from producers.redis_clients import refuse_unsupported
from producers.schema import account_asset_balances as accounts
from producers.settings import Settings
from worker import accounts as acts
from worker import audits, embedded, sample
from worker.actions import checked_reason, shell_operator
from worker.audit import audit as audit_of
from worker.cli.base import (
    JsonOption,
    WhyOption,
    amount_of,
    engine_of,
    out,
    print_json,
    print_table,
    settings_with,
    until_interrupted,
)
from worker.embedded import CONSOLE_USER, GATEWAY_PORT
from worker.relay import open_relay
from worker.schema import dead_letters as letters

log = logging.getLogger(__name__)

app = typer.Typer()
account_app = typer.Typer(help="Open accounts, recharge them, look at them.", no_args_is_help=True)
app.add_typer(account_app, name="account")

AccountOption = Annotated[int, typer.Option("--account", help="The account that pays.", metavar="ID")]
OnceOption = Annotated[
    str, typer.Option("--key", help="Done once under one key: the same again changes nothing. Made here if not given.")
]


@app.command()
def up(
    draws: Annotated[int, typer.Option(help="How many sample draws to send.", min=0, max=10_000_000)] = 20_000,
    port: Annotated[int, typer.Option(help="The gateway's port, if it is free.", min=1, max=65535)] = GATEWAY_PORT,
    leave: Annotated[bool, typer.Option("--exit", help="Leave after the summary instead of staying up.")] = False,
) -> None:
    """Run everything on this machine: SQLite, a private Redis, worker, relay, gateway, console; sample draws, an audit.

    Needs no server and no setting. State is kept in the user's data folder (or TOMBOLA_HOME).
    """
    home = embedded.Home.find()
    with until_interrupted() as interrupted, embedded.run(home, port=port) as running:
        engine = open_engine(running.settings.need("database_url"))
        parts = ", ".join(["SQLite", running.redis_name, *(f"a {part.name}" for part in running.parts)])
        out.print(f"[bold]tombola[/] {version('tombola')}  {parts}")
        out.print(f"state in {home.path}, with a log of each\n")
        if running.notice:
            out.print(f"[yellow]{escape(running.notice)}[/]\n")
        sample.open_accounts(engine)
        balanced = True
        if draws:
            with DrawClient.from_settings(running.settings) as client:
                summary = sample.run(engine, client, draws, out)
            balanced = sample.show(summary, engine, wheels(running.settings.seed_bytes), out)
        if leave:
            raise typer.Exit(0 if balanced else 1)
        out.print(f"\nIt stays up. A page that draws: {running.gateway_url}/  (the API: {running.gateway_url}/docs)")
        out.print(f"The operators' console: {running.console_url}/  (user {CONSOLE_USER}, ", end="")
        if running.password is None:
            out.print("with the password that was printed at the first start)")
        else:
            out.print(f"password [bold]{escape(running.password)}[/], printed this once)")
        out.print("From a second terminal (in this checkout: .venv/bin/tombola):\n")
        for line in ("enqueue --account 6", "account add --balance 100", "audit"):
            out.print(f"    tombola {line}")
        out.print("\nCtrl-C ends it.")
        while not interrupted.wait(1):
            if (part := running.ended()) is not None:
                raise DrawError(f"the {part.name} ended by itself: see {part.log}")
    out.print("\nStopped. What was settled is kept for the next start.")


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
    settings = settings_with("broker_url")
    with _says_why(settings, request.lottery_session_id), DrawClient.from_settings(settings) as client:
        ticket = client.enqueue(request)
        if not as_json:
            out.print(f"session {ticket.lottery_session_id}" + (f"  {ticket.reason}" if ticket.reason else ""))
        result = ticket.result
        if result is None and wait:
            result = client.wait(ticket.lottery_session_id, timeout_s=wait)
    if as_json:
        shown = {"request_key": ticket.request_key, "lottery_session_id": ticket.lottery_session_id}
        print_json(msgspec.json.encode({**shown, "reason": ticket.reason, "result": result}))
    elif result is not None:
        _show(result)


@app.command()
def result(
    session: Annotated[str, typer.Argument(help="The lottery session id.")],
    wait: Annotated[float, typer.Option(help="Seconds to wait for it.", min=0)] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Show the result of a draw."""
    if not session.isascii():
        raise DrawError(f"nobody asked for the lottery session {session}")
    settings = settings_with("result_url")
    with _says_why(settings, session), DrawClient.from_settings(settings) as client:
        found = client.wait(session, timeout_s=wait) if wait else client.result(session)
    if as_json:
        print_json(found.encode())
    else:
        _show(found)


@contextmanager
def _says_why(settings: Settings, session: str) -> Iterator[None]:
    """Add to what is said of a draw without a result what its dead letter says."""
    try:
        yield
    except (DrawDead, ResultNotReady) as error:
        with engine_of(settings).connect().execution_options(read_only=True) as connection:
            query = select(letters).where(letters.c.lottery_session_id == session).order_by(letters.c.id.desc())
            letter = connection.execute(query.limit(1)).first()
        if letter is None:
            raise
        # Any message may name a session: only the request's own row says that it is dead.
        said = f"{error}. Dead letter {letter.id} names this session; {letter.state}, {letter.cause}: {letter.error}"
        raise type(error)(said.replace("..", ".")) from None


def _show(found: DrawResult) -> None:
    if found.status == "rejected":
        out.print(f"account {found.account_id}: rejected, {found.reason}; nothing was charged")
        return
    prize = f"[bold green]won {found.prize_amount}[/]" if found.won else "no prize"
    out.print(f"account {found.account_id}: {prize}, balance {found.balance_after}")
    for row in found.transactions:
        out.print(f"  {row.business_type:<15} {row.delta_amount:>8} {row.asset_code}  {row.idempotency_key}")


@app.command()
def transactions(session: Annotated[str, typer.Argument(help="The lottery session id.")]) -> None:
    """List the ledger rows of a session."""
    # MariaDB refuses to compare a column of ASCII with anything else.
    rows = get_lottery_session_transactions(session, engine=engine_of()) if session.isascii() else []
    if not rows:
        raise DrawError(f"no ledger row has the lottery session {session}")
    cells = ("transaction_id", "account_id", "business_type", "delta_amount", "balance_before", "balance_after")
    print_table(
        ["id", "account", "type", "delta", "before", "after", "idempotency key"],
        [(*(row[cell] for cell in cells), row["idempotency_key"]) for row in rows],
    )


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


@app.command()
def relay(
    once: Annotated[bool, typer.Option("--once", help="Publish what is overdue now, and end.")] = False,
) -> None:
    """Publish accepted draws again that never came through. Any number of relays may run."""
    settings = settings_with("database_url", "broker_url")
    refuse_unsupported(settings.need("broker_url"))
    relaying = open_relay(settings)
    try:
        if once:
            out.print(f"{relaying.run_once():,} overdue requests published")
            return
        set_up_logging(settings.log_format)
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
    # One line now, rather than a traceback in each process.
    settings = settings_with("database_url", "broker_url", "result_url")
    refuse_unsupported(settings.need("broker_url"), settings.need("result_url"))
    serve(host=host, port=port, processes=processes)


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
