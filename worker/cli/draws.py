"""Draws: enqueue one, show its result and its ledger rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import msgspec
import typer
from sqlalchemy import select

from tombola.producers.client import DrawClient
from tombola.producers.domain.contract import CAMPAIGN_DEFAULT, DrawRequest, DrawResult, PullsResult
from tombola.producers.domain.errors import DrawDead, DrawError, ResultNotReady
from tombola.producers.settings import Settings
from tombola.producers.storage.ledger import get_lottery_session_transactions
from tombola.producers.storage.schema import dead_letters as letters
from tombola.worker.cli.base import AccountOption, JsonOption, engine_of, out, print_json, print_table, settings_with

app = typer.Typer()


@app.command()
def enqueue(
    account: AccountOption,
    key: Annotated[str, typer.Option(help="The request key; default: a new one. Repeats are not charged.")] = "",
    session: Annotated[str, typer.Option(help="The lottery session id; default: the request key.")] = "",
    campaign: Annotated[str, typer.Option(help="The campaign, whose odds decide.")] = CAMPAIGN_DEFAULT,
    pulls: Annotated[int | None, typer.Option(help="So many pulls for one charge; default: a single pull.")] = None,
    nonce: Annotated[str, typer.Option(help="A client nonce, 16 to 64 characters: the outcome depends on it.")] = "",
    wait: Annotated[float, typer.Option(help="Seconds to wait for the result; 0 does not wait.", min=0)] = 5.0,
    as_json: JsonOption = False,
) -> None:
    """Enqueue one draw and wait for its result."""
    request = DrawRequest(
        account_id=account,
        request_key=key,
        lottery_session_id=session,
        campaign=campaign,
        pulls=pulls,
        client_nonce=nonce,
    )
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
    wait: Annotated[float, typer.Option(help="Seconds to wait for the result.", min=0)] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Show the result of a draw."""
    if not session.isascii():
        raise DrawError(f"no request has the lottery session {session}")
    settings = settings_with("result_url")
    with _says_why(settings, session), DrawClient.from_settings(settings) as client:
        found = client.wait(session, timeout_s=wait) if wait else client.result(session)
    if as_json:
        print_json(found.encode())
    else:
        _show(found)


@contextmanager
def _says_why(settings: Settings, session: str) -> Iterator[None]:
    """Add the latest dead letter of the session to the message of DrawDead and ResultNotReady."""
    try:
        yield
    except (DrawDead, ResultNotReady) as error:
        with engine_of(settings).connect().execution_options(read_only=True) as connection:
            query = select(letters).where(letters.c.lottery_session_id == session).order_by(letters.c.id.desc())
            letter = connection.execute(query.limit(1)).first()
        if letter is None:
            raise
        # Any message may name any session: only the request's own row proves that the draw is dead.
        message = f"{error}. Dead letter {letter.id} names this session; {letter.state}, {letter.cause}: {letter.error}"
        raise type(error)(message.replace("..", ".")) from None


def _show(found: DrawResult) -> None:
    if found.status == "rejected":
        out.print(f"account {found.account_id}: rejected, {found.reason}; nothing was charged")
        return
    prize = f"[bold green]won {found.prize_amount}[/]" if found.won else "no prize"
    out.print(f"account {found.account_id}: {prize}, balance {found.balance_after}")
    for pull in found.prizes if isinstance(found, PullsResult) else ():
        codes = "".join(f", code {grant.code}" for grant in pull.grants if grant.code)
        out.print(f"  pull {pull.pull:>3}  {pull.code}{codes}")
    for row in found.transactions:
        out.print(f"  {row.business_type:<15} {row.delta_amount:>8} {row.asset_code}  {row.idempotency_key}")


@app.command()
def transactions(session: Annotated[str, typer.Argument(help="The lottery session id.")]) -> None:
    """List the ledger rows of a session."""
    # MariaDB raises an error when it compares other text with an ASCII column.
    rows = get_lottery_session_transactions(session, engine=engine_of()) if session.isascii() else []
    if not rows:
        raise DrawError(f"no ledger row has the lottery session {session}")
    cells = ("transaction_id", "account_id", "business_type", "delta_amount", "balance_before", "balance_after")
    print_table(
        ["id", "account", "type", "delta", "before", "after", "idempotency key"],
        [(*(row[cell] for cell in cells), row["idempotency_key"]) for row in rows],
    )
