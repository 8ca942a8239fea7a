"""`tombola books`: the trial balance, sealing, verifying, exporting and reconciling."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tombola.producers.domain.books.checkpoints import PrivateKey, PublicKey
from tombola.producers.domain.errors import DrawError, InvalidRequest
from tombola.producers.settings import Settings
from tombola.producers.storage import books
from tombola.worker.books import anchors, exporting, reconciling, verification
from tombola.worker.books.anchors import Anchored
from tombola.worker.books.balance import TrialBalance, trial_balance
from tombola.worker.books.reconciling import Payment, Reconciled, Wanted
from tombola.worker.books.sealer import Sealer, signing_key
from tombola.worker.cli.base import JsonOption, engine_of, out, print_json, print_table, settings_with
from tombola.worker.operators.actions import shell_operator

app = typer.Typer()
group = typer.Typer(help="The sealed books: balance, verify, export, reconcile, seal.", no_args_is_help=True)
app.add_typer(group, name="books")

SHOWN_MAX = 100  # of each kind; JSON has all of them
DAY = "%Y-%m-%d"
SinceOption = Annotated[
    datetime | None, typer.Option("--since", formats=[DAY], help="The first day, in UTC.", metavar="DAY")
]
UntilOption = Annotated[
    datetime | None, typer.Option("--until", formats=[DAY], help="The last day, in UTC.", metavar="DAY")
]


@group.command()
def balance(as_json: JsonOption = False) -> None:
    """Print the trial balance: per asset, users and house add up to zero. Exit code 1 if they do not."""
    found = trial_balance(engine_of())
    if as_json:
        print_json(msgspec.json.encode(_told(found)))
    else:
        _show(found)
    raise typer.Exit(1 if found.wrong else 0)


def _told(found: TrialBalance) -> dict[str, Any]:
    return {
        "balances": not found.wrong,
        "wrong": found.wrong,
        "blocks": found.blocks,
        "unsealed_rows": found.unsealed_rows,
        "is_legacy": found.is_legacy,
        "assets": [
            {
                "asset_code": it.asset_code,
                "accounts": it.accounts,
                "users": f"{it.users:.2f}",
                "house": {
                    line.account: {"sealed": f"{line.sealed:.2f}", "unsealed": f"{line.unsealed:.2f}"}
                    for line in it.house
                },
                "difference": f"{it.difference:.2f}",
            }
            for it in found.assets
        ],
        "campaigns": [
            {
                "campaign": it.campaign,
                "asset_code": it.asset_code,
                "issued": f"{it.issued:.2f}",
                "published": None if it.published is None else f"{it.published:.2f}",
            }
            for it in found.liabilities
        ],
    }


def _show(found: TrialBalance) -> None:
    for it in found.assets:
        rows = [(f"users ({it.accounts:,} accounts)", "", "", f"{it.users:,.2f}")]
        rows += [
            (line.account, f"{line.sealed:,.2f}", f"{line.unsealed:,.2f}", f"{line.balance:,.2f}") for line in it.house
        ]
        print_table(
            [it.asset_code, "sealed", "unsealed", "balance"], [*rows, ("together", "", "", f"{it.difference:,.2f}")]
        )
        out.print()
    limited = [it for it in found.liabilities if it.published is not None]
    if limited:
        rows = [(it.campaign, it.asset_code, f"{it.issued:,.2f}", f"{it.published:,.2f}") for it in limited]
        print_table(["campaign", "asset", "prizes issued", "stock allows"], rows)
        out.print()
    out.print(f"{found.blocks:,} blocks are sealed; {found.unsealed_rows:,} ledger rows are not sealed yet.")
    if found.is_legacy:
        out.print("Old code opened accounts here whose first balance no row explains: a difference proves nothing.")
    for line in found.wrong:
        out.print(f"[bold red]{escape(line)}[/]")
    if not found.wrong:
        out.print("Users and house add up to zero.")


# ---- sealing ---------------------------------------------------------------------------------------------------------


@group.command()
def seal() -> None:
    """Seal all ledger rows that are old enough, sign the head and write it outside, as a relay does every second."""
    settings = settings_with("database_url")
    sealer = Sealer.from_settings(settings)
    try:
        rows = sealer.run_once(time_s_max=None)
    finally:
        sealer.close()
    with engine_of(settings).connect().execution_options(read_only=True) as connection:
        last = books.last_sealed(connection)
    out.print(f"{rows:,} ledger rows sealed; the last block is {last.block.number if last else 'none'}")


@group.command()
def key(
    name: Annotated[str, typer.Argument(help="A name that belongs to you, such as shop.example/books.")],
) -> None:
    """Make a key that signs the head of the books. Prints the secret for TOMBOLA_BOOKS_KEY, and the public key."""
    made = PrivateKey.make(name)
    out.print(f"TOMBOLA_BOOKS_KEY={escape(made.text)}", soft_wrap=True)
    out.print(f"public key: {escape(made.public.text)}", soft_wrap=True)
    out.print("Keep the public key where auditors find it, outside of the database and of this machine.")


# ---- verifying -------------------------------------------------------------------------------------------------------


@group.command()
def verify(
    against: Annotated[
        Path | None, typer.Option(help="The folder of checkpoints that the sealer has written.", metavar="FOLDER")
    ] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option("--key", help="The public key that signed them, once for each key. Default: that of this setup."),
    ] = None,
    from_block: Annotated[int, typer.Option("--from", help="Begin at this block.", min=1)] = 1,
    as_json: JsonOption = False,
) -> None:
    """Prove that no sealed ledger row was changed, inserted or deleted. Exit code 1 if one was.

    Without --against, a chain that was rebuilt as a whole is not found, and neither is a missing end.
    """
    settings = settings_with("database_url")
    engine = engine_of(settings)
    public = _public_keys(keys or [], settings) if against is not None else []
    with engine.connect().execution_options(read_only=True) as connection:
        last = books.last_sealed(connection)
    number = 0 if last is None else last.block.number
    with _progress("blocks", as_json) as on_progress:
        tampered = list(
            verification.check_blocks(
                engine, from_block=from_block, on_block=lambda block: on_progress(block.number, number)
            )
        )
    anchored = anchors.check_anchors(engine, against, public) if against is not None else None
    is_clean = not tampered and (anchored is None or not anchored.wrong)
    if as_json:
        found = {
            "is_clean": is_clean,
            "blocks": number,
            "tampered": [it._asdict() for it in tampered],
            "anchored": None if anchored is None else anchored._asdict(),
        }
        print_json(msgspec.json.encode(found))
    else:
        _show_verified([str(it) for it in tampered], anchored, number)
    raise typer.Exit(0 if is_clean else 1)


def _public_keys(texts: list[str], settings: Settings) -> list[PublicKey]:
    """The keys given, else that of TOMBOLA_BOOKS_KEY; raises InvalidRequest without either."""
    if texts:
        return [PublicKey.read(it) for it in texts]
    own = signing_key(settings)
    if own is None:
        raise InvalidRequest("say with --key which public key signed the checkpoints: `tombola books key` printed it")
    return [own.public]


def _show_verified(tampered: list[str], anchored: Anchored | None, number: int) -> None:
    wrong = tampered + list(anchored.wrong if anchored else ())
    for line in wrong[:SHOWN_MAX]:
        out.print(f"[bold red]{escape(line)}[/]")
    if len(wrong) > SHOWN_MAX:
        out.print(f"and {len(wrong) - SHOWN_MAX:,} more")
    if not tampered:
        out.print(f"{number:,} blocks are what they were sealed from.")
    if anchored is None:
        out.print("Not compared with checkpoints: a rebuilt chain, or a missing end, would not be found (--against).")
        return
    if anchored.upto:
        out.print(f"Blocks 1 to {anchored.upto:,} are anchored by {anchored.checkpoints:,} checkpoints.")
    if anchored.upto < anchored.blocks:
        out.print(f"Blocks {anchored.upto + 1:,} to {anchored.blocks:,} are not anchored.")


# ---- export, reconcile -----------------------------------------------------------------------------------------------


@group.command()
def export(
    format: Annotated[Literal["beancount", "csv"], typer.Option(help="What to print.")] = "beancount",
    since: SinceOption = None,
    until: UntilOption = None,
) -> None:
    """Print the sealed books for accountants: what each house account moved, per day and asset."""
    engine, first = engine_of(), _day(since)
    found = exporting.entries(engine, since=first, until=_day(until))
    if format == "csv":
        lines = exporting.as_csv(found)
    else:
        lines = exporting.as_beancount(found, exporting.opening(engine, first) if first else {}, first)
    for line in lines:
        sys.stdout.write(line)


@group.command()
def reconcile(
    file: Annotated[Path, typer.Argument(help="The payment provider's CSV file, with a header.", metavar="FILE")],
    reference: Annotated[str, typer.Option(help="The column of references.")] = "reference",
    amount: Annotated[str, typer.Option(help="The column of amounts.")] = "amount",
    channel: Annotated[str, typer.Option(help="Only recharges of this channel.")] = "",
    since: SinceOption = None,
    until: UntilOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a payment provider's file with the recharges. Exit code 1 unless everything matches."""
    there = reconciling.read_file(file, reference=reference, amount=amount)
    wanted = Wanted(channel, _day(since), _day(until))
    engine = engine_of()
    with _progress("ledger rows", as_json) as on_progress:
        here = list(reconciling.recharges(engine, wanted, on_progress))
    found = reconciling.reconcile(there, here)
    try:
        reconciling.record(engine, found, file=file.name, by=shell_operator())
    except DrawError as error:  # a database user who can only read can reconcile as well
        typer.echo(f"this is not on record: {error}", err=True)
    if as_json:
        print_json(msgspec.json.encode({"is_complete": found.is_complete, **_parts(found)}))
    else:
        _show_reconciled(found)
    raise typer.Exit(0 if found.is_complete else 1)


def _parts(found: Reconciled) -> dict[str, Any]:
    def told(it: Payment) -> dict[str, Any]:
        return {"reference": it.reference, "amount": f"{it.amount:.2f}", "account_id": it.account_id}

    return {
        "matched": found.matched,
        "only_here": [told(it) for it in found.only_here],
        "only_there": [told(it) for it in found.only_there],
        "differing": [{"there": told(there), "here": told(here)} for there, here in found.differing],
        "repeated": found.repeated,
    }


def _show_reconciled(found: Reconciled) -> None:
    rows: list[tuple[object, ...]] = [
        *(("only here", it.reference, f"{it.amount:,.2f}", "", it.account_id) for it in found.only_here),
        *(("only there", it.reference, "", f"{it.amount:,.2f}", "") for it in found.only_there),
        *(("differs", a.reference, f"{b.amount:,.2f}", f"{a.amount:,.2f}", b.account_id) for a, b in found.differing),
        *(("repeated", it, "", "", "") for it in found.repeated),
    ]
    if rows:
        print_table(["what", "reference", "here", "there", "account"], rows[:SHOWN_MAX])
    if len(rows) > SHOWN_MAX:
        out.print(f"and {len(rows) - SHOWN_MAX:,} more: --json has all of them")
    out.print(f"{found.matched:,} payments match; {len(rows):,} do not.")


def _day(moment: datetime | None) -> date | None:
    return None if moment is None else moment.date()


@contextmanager
def _progress(what: str, is_quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; nothing without a terminal."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=is_quiet or not out.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
