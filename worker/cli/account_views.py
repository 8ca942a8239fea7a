"""`tombola account list`, `history` and `statement`: what an account holds, and how it came about."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Final, TypeVar

import msgspec
import typer
from sqlalchemy import Connection, Engine

from tombola.producers.domain.errors import AccountNotFound, InvalidRequest
from tombola.producers.domain.moments import parse_moment
from tombola.producers.gateway import account_views as views
from tombola.producers.gateway.messages import AccountRow
from tombola.producers.storage import ledger, statements
from tombola.producers.storage.ledger import Account
from tombola.worker.cli.base import JsonOption, engine_of, out, print_json, print_table

T = TypeVar("T")

ROWS_MAX: Final = 500  # read at once
IdArgument = Annotated[int, typer.Argument(help="The account's id.", metavar="ID", min=1)]

app = typer.Typer()


@app.command("list")
def account_list(
    user: Annotated[int, typer.Option(help="The user's id.", min=1)],
    after: Annotated[int, typer.Option(help="Only accounts behind this id.", min=0)] = 0,
    limit: Annotated[int, typer.Option(help="At most this many.", min=1)] = 100,
    as_json: JsonOption = False,
) -> None:
    """List a user's accounts."""

    def find(connection: Connection) -> list[Account]:
        return ledger.accounts_of_user(connection, user, after_id=after, rows_max=limit)

    found = _read(engine_of(), find)
    if as_json:
        print_json(msgspec.json.encode([views.account(it) for it in found]))
        return
    rows = [(it.account_id, it.user_id, it.asset_code, f"{it.balance:.2f}", f"{it.held:.2f}") for it in found]
    print_table(["account", "user", "asset", "balance", "held"], rows)


@app.command("history")
def account_history(
    account: IdArgument,
    before: Annotated[int | None, typer.Option(help="Only rows before this transaction id.", min=1)] = None,
    limit: Annotated[int, typer.Option(help="At most this many.", min=1)] = 50,
    as_json: JsonOption = False,
) -> None:
    """List the ledger rows of an account, the newest first."""

    def find(connection: Connection) -> list[dict[str, Any]]:
        _account(connection, account)
        return statements.newest_rows(connection, account, before_id=before, rows_max=limit)

    rows = [views.row_of(it) for it in _read(engine_of(), find)]
    if as_json:
        print_json(msgspec.json.encode(rows))
        return
    _print_rows(rows)


@app.command("statement")
def account_statement(
    account: IdArgument,
    since: Annotated[str, typer.Option("--from", help="The period's beginning: 2026-11-01, or a time with its zone.")],
    until: Annotated[str, typer.Option(help="The period ends before it. Default: now.")] = "",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the statement of a period: opening balance, ledger rows, closing balance."""
    period = views.Period(parse_moment(since), parse_moment(until) if until else None)
    if period.until is not None and period.until < period.since:
        raise InvalidRequest("the period ends before it begins: --until is before --from")

    def find(connection: Connection) -> tuple[Account, statements.Statement]:
        return _account(connection, account), statements.statement(connection, account, *period)

    engine = engine_of()
    owner, found = _read(engine, find)
    parts = _parts(engine, account, found)
    if as_csv:
        sys.stdout.write(views.csv_begin(owner, period, found))
        for rows in parts:
            sys.stdout.write(views.csv_rows(rows))
        sys.stdout.write(views.csv_end(owner, period, found))
        return
    rows = [row for part in parts for row in part]
    if as_json:
        print_json(msgspec.json.encode(views.statement(owner, period, found, rows, None)))
        return
    out.print(f"account {account} (user {owner.user_id}), {owner.asset_code}, from {since} until {until or 'now'}")
    out.print(f"opening balance  {found.opening:.2f}")
    _print_rows(rows)
    note = "" if found.is_final else "  (rows may still join this period)"
    out.print(f"closing balance  {found.closing:.2f}{note}")


def _print_rows(rows: Sequence[AccountRow]) -> None:
    shown = ("transaction_id", "created_at", "business_type", "delta_amount", "balance_after", "idempotency_key")
    print_table(
        ["id", "time", "type", "delta", "balance", "idempotency key"],
        [[getattr(row, name) for name in shown] for row in rows],
    )


def _parts(engine: Engine, account: int, found: statements.Statement) -> Iterator[list[AccountRow]]:
    """The rows of a statement, ROWS_MAX at a time: each part is read in a transaction of its own."""
    after: int | None = found.first_id - 1
    while after is not None:

        def find(connection: Connection, after: int = after) -> list[dict[str, Any]]:
            return statements.rows(connection, account, after_id=after, end_id=found.end_id, rows_max=ROWS_MAX + 1)

        rows, after = views.page(_read(engine, find), ROWS_MAX)
        yield rows


def _account(connection: Connection, account: int) -> Account:
    found = ledger.find_account(connection, account)
    if found is None:
        raise AccountNotFound(f"there is no account {account}")
    return found


def _read(engine: Engine, find: Callable[[Connection], T]) -> T:
    with engine.connect().execution_options(read_only=True) as connection:
        return find(connection)
