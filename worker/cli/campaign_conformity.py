"""`tombola campaign conformity`: do the draws that were made for players come as often as the odds say?"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Final

import msgspec
import typer
from rich.markup import escape
from sqlalchemy import Engine

from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.settings import Settings
from tombola.worker.cli.base import out, print_json, print_table
from tombola.worker.conformity import counting, reading, revealed
from tombola.worker.conformity.questions import Account
from tombola.worker.conformity.report import Period, Report, Version
from tombola.worker.conformity.tails import more_wins
from tombola.worker.conformity.tickets import Tickets

DAY: Final = "%Y-%m-%d"
SinceOption = Annotated[
    datetime | None, typer.Option("--since", formats=[DAY], help="The first day, in UTC.", metavar="DAY")
]
UntilOption = Annotated[
    datetime | None, typer.Option("--until", formats=[DAY], help="The last day, in UTC.", metavar="DAY")
]


def period_of(since: datetime | None, until: datetime | None) -> Period:
    """From the beginning of the first day to the end of the last one."""
    return Period(
        None if since is None else reading.day(since),
        None if until is None else reading.day(until) + timedelta(days=1),
    )


def show_conformity(engine: Engine, settings: Settings, campaign: str, period: Period, *, as_json: bool) -> bool:
    """Count what is sealed, and print the report of the campaign; return whether nothing deviates.

    Raises CampaignNotFound; ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    with engine.connect().execution_options(read_only=True) as connection:
        reading.versions_of(connection, campaign)
    try:
        counting.count(engine)
    except ConfigurationError as error:  # a user who can only read
        if not as_json:
            out.print(f"Not counted here, only read: {escape(str(error))}")
    found = reading.report_on(engine, campaign, period=period, key_of=revealed.key_of(settings))
    if as_json:
        print_json(msgspec.json.encode(found.told()))
    else:
        _show(found)
    return not found.deviations


def _show(found: Report) -> None:
    out.print(f"{found.campaign}: {found.pulls:,} pulls in the ledger's blocks up to {found.block:,}.")
    if found.unreadable:
        out.print(f"{found.unreadable:,} charges say no draw by known odds: run `tombola audit`.")
    for version in found.versions:
        _show_version(version)
    if not found.versions:
        out.print("No draw of this campaign is sealed and counted in that period.")
        return
    for line in found.deviations:
        out.print(f"[bold red]{escape(line)}[/]")
    if not found.deviations:
        out.print(
            f"The draws are as the odds say. By chance, a report like this deviates in {found.alpha:.0%} at most."
        )


def _show_version(version: Version) -> None:
    name = f"version {version.number}" if version.number else "built in"
    out.print(f"\n{name}, odds hash {version.odds_hash}: {version.examined.pulls:,} pulls")
    print_table(
        ["prize", "drawn", "expected", "deviations", "p-value"],
        [
            (f"{it.code}{' (win)' if it.is_win else ''}", f"{it.sums.wins:,}", f"{it.sums.expected:,.1f}",
             f"{it.sums.z:+.2f}", _p(it.p_value))
            for it in version.examined.prizes
        ],
    )  # fmt: skip
    out.print()
    print_table(
        ["question", "p-value", "adjusted", "furthest off", "it could have seen"],
        [
            (it.question.what, _p(it.question.p_value), _p(it.adjusted) + (" deviates" if it.deviates else ""),
             it.question.found, it.detects)
            for it in version.answers
        ],
    )  # fmt: skip
    if version.tickets is not None:
        out.print(f"\n{_of_tickets(version.tickets)}")
    _show_luckiest(version.luckiest, version.accounts)


def _of_tickets(tickets: Tickets) -> str:
    said = f"Tickets of {len(tickets.places):,} pulls, of the newest draws."
    if tickets.unknown:
        said += f" {tickets.unknown:,} draws are not provable yet: their secret is not revealed."
    if tickets.other:
        said += f" {tickets.other:,} draws name another prize than their ticket: run `tombola audit`."
    return said


def _show_luckiest(luckiest: Sequence[Account], accounts: int) -> None:
    out.print(f"\nthe luckiest of {accounts:,} accounts:")
    print_table(
        ["account", "pulls", "wins", "expected", "so many or more", "at most, whenever it stops"],
        [
            (str(it.id), f"{it.luck.pulls:,}", f"{it.luck.wins:,}", f"{it.luck.expected:,.2f}",
             _p(more_wins(it.luck.sums)), _p(it.luck.bound))
            for it in luckiest
        ],
    )  # fmt: skip


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.001 else f"{value:.1e}"
