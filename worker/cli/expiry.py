"""`tombola account expire`: points that were valid until this month, or another one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

import msgspec
import typer
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from tombola.producers.domain.draw import DEFAULT_CAMPAIGN
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.settings import Settings
from tombola.producers.storage import clock
from tombola.worker.cli.base import JsonOption, OptionalReasonOption, engine_of, out, print_json, settings_with
from tombola.worker.movements import expiry
from tombola.worker.movements.expiry import Expired, Expiry, Month
from tombola.worker.operators.actions import checked_reason, shell_operator

expire_commands = typer.Typer()


@expire_commands.command("expire")
def account_expire(
    asset: Annotated[str, typer.Option(help="The asset's code.")] = DEFAULT_CAMPAIGN.asset_code,
    month: Annotated[str, typer.Option(help="The month, such as 2026-11; default: this one.", show_default=False)] = "",
    is_dry: Annotated[bool, typer.Option("--dry-run", help="Say what is due, and take nothing.")] = False,
    reason: OptionalReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Take points that were earned before their validity (TOMBOLA_POINTS_VALID_DAYS), and not spent; once per month.

    Ctrl-C stops between two transactions; the same command goes on. Exit code 1 unless all accounts were looked at and
    all that was due has expired.
    """
    settings = settings_with("database_url")
    engine = engine_of(settings)
    why = checked_reason(reason) if reason else ""
    of = Month.parse(month) if month else Month.of(clock.now(engine))
    due = Expiry(asset, of, _valid_days(settings, asset))
    progress = Progress(TextColumn("{task.description}"), TimeElapsedColumn(), console=out, disable=as_json)
    with progress, _stopped_by_ctrl_c() as stopping:
        bar = progress.add_task("expiry")

        def on_progress(it: Expired) -> None:
            text = f"expiry  {it.looked_at:,} accounts, {it.due:,} due, {it.expired:,} expired"
            progress.update(bar, description=text)

        stopped = stopping.is_set
        if is_dry:
            done = expiry.foretell(engine, due, is_stopped=stopped, on_progress=on_progress)
        else:
            by = shell_operator()
            done = expiry.expire(engine, due, by=by, reason=why, is_stopped=stopped, on_progress=on_progress)
    _tell(due, done, is_dry=is_dry, as_json=as_json)
    raise typer.Exit(0 if done.is_whole and not done.refused else 1)


def _valid_days(settings: Settings, asset: str) -> int:
    valid_days = dict(settings.points_valid_days).get(asset)
    if valid_days is None:
        raise InvalidRequest(f"{asset} does not expire: TOMBOLA_POINTS_VALID_DAYS has no {asset}=DAYS")
    return valid_days


@contextmanager
def _stopped_by_ctrl_c() -> Iterator[threading.Event]:
    """The event is set at Ctrl-C or SIGTERM."""
    stopping = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(due: Expiry, done: Expired, *, is_dry: bool, as_json: bool) -> None:
    if as_json:
        about = {"asset": due.asset_code, "month": str(due.month), "until": due.until, "is_dry_run": is_dry}
        print_json(msgspec.json.encode(about | asdict(done)))
        return
    verb, number = ("would expire", done.due) if is_dry else ("expired", done.expired)
    out.print(
        f"{due.month}: {done.amount:,.2f} {due.asset_code} {verb} on {number:,} of {done.looked_at:,} accounts, "
        f"earned before {due.until:%Y-%m-%d} and not spent"
    )
    if done.repeated:
        out.print(f"{done.repeated:,} accounts have expired before in this month, and have points back since")
    if done.held:
        out.print(f"{done.held:,} accounts are held by other transactions: run the command again")
    if done.refused:
        out.print(f"{done.refused:,} accounts were refused: the log says why")
    if not done.is_through:
        out.print("Stopped before all accounts were looked at: run the command again, it goes on.")
