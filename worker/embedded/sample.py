"""The sample run of `tombola up`: draws through the whole path, with a progress bar, a summary and an audit."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection, Engine, func, select

from tombola.producers.client import DrawClient
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.domain.operations.draw import CONSUME, REWARD
from tombola.producers.settings import Settings
from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.audit import audits
from tombola.worker.audit import report as audit_report
from tombola.worker.audit.audit import audit_by
from tombola.worker.audit.report import INVARIANTS, Report
from tombola.worker.dead_letters import letters as dead_letters
from tombola.worker.ledger import accounts as acts
from tombola.worker.operators.actions import shell_operator

ACCOUNTS: Final = 10
BALANCE: Final = Decimal("100.00")
REPEAT_SHARE: Final = 0.05  # the share of draws sent twice, as after a double click or a lost answer
CHUNK_SIZE: Final = 100
SHOWN_OF_EACH_MAX: Final = 10
STALL_S_MAX: Final = 60.0


@dataclass(frozen=True, slots=True)
class Summary:
    """The sums of a sample run; amounts in POINT."""

    draws: int
    sent: int
    rejected: int
    wins: int
    charged: Decimal
    paid: Decimal
    seconds: float

    @property
    def repeats(self) -> int:
        return self.sent - self.draws


@dataclass(frozen=True, slots=True)
class _Mark:
    """The state of the database at one moment, to subtract from a later one."""

    settled: int
    rejected: int
    transaction_id: int


def open_accounts(engine: Engine) -> None:
    """Open the sample accounts, unless the ledger has accounts."""
    with engine.connect().execution_options(read_only=True) as connection:
        if connection.execute(select(func.count()).select_from(accounts)).scalar_one():
            return
    for user_id in range(1, ACCOUNTS + 1):
        acts.add(engine, user_id=user_id, balance=BALANCE, by=shell_operator(), reason="the sample run")


def run(engine: Engine, client: DrawClient, draws: int, console: Console) -> Summary:
    """Publish `draws` sample draws, some of them twice; return when all are settled.

    Raises ServiceUnavailable when no draw has settled for STALL_S_MAX.
    """
    open_accounts(engine)
    with engine.connect().execution_options(read_only=True) as connection:
        account_ids = list(connection.execute(select(accounts.c.id).order_by(accounts.c.id).limit(ACCOUNTS)).scalars())
        before = _mark(connection)
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    started = time.monotonic()
    sent = 0
    with Progress(*columns, console=console) as progress:
        published = progress.add_task("published", total=draws)
        settled = progress.add_task("settled", total=draws)
        for new, chunk in _chunks(draws, account_ids):
            sent += client.enqueue_many(chunk)
            progress.advance(published, new)
            progress.update(settled, completed=_settled(engine) - before.settled)
        moved_at, done = time.monotonic(), -1
        while (now_done := _settled(engine) - before.settled) < draws:
            if now_done > done:
                moved_at, done = time.monotonic(), now_done
            if time.monotonic() - moved_at > STALL_S_MAX:
                raise ServiceUnavailable(f"{draws - now_done} draws are not settled and nothing moves: see the log")
            progress.update(settled, completed=now_done)
            time.sleep(0.02)
        progress.update(settled, completed=draws)
    seconds = time.monotonic() - started
    return _sum_up(engine, before, draws, sent, seconds)


def _chunks(draws: int, account_ids: list[int]) -> Iterator[tuple[int, list[DrawRequest]]]:
    for start in range(0, draws, CHUNK_SIZE):
        new = [DrawRequest(account_id=random.choice(account_ids)) for _ in range(min(CHUNK_SIZE, draws - start))]
        repeats = [request for request in new if random.random() < REPEAT_SHARE]
        yield len(new), new + repeats


def _settled(engine: Engine) -> int:
    with engine.connect().execution_options(read_only=True) as connection:
        return _settled_in(connection)


def _settled_in(connection: Connection) -> int:
    settled = select(func.count()).select_from(requests).where(requests.c.settled_at.is_not(None))
    return int(connection.execute(settled).scalar_one())


def _mark(connection: Connection) -> _Mark:
    rejected = select(func.count()).select_from(requests).where(requests.c.status == "rejected")
    return _Mark(
        _settled_in(connection),
        connection.execute(rejected).scalar_one(),
        connection.execute(select(func.max(transactions.c.transaction_id))).scalar_one() or 0,
    )


def _sum_up(engine: Engine, before: _Mark, draws: int, sent: int, seconds: float) -> Summary:
    with engine.connect().execution_options(read_only=True) as connection:
        after = _mark(connection)
        moved = {
            business_type: (count, amount)
            for business_type, count, amount in connection.execute(
                select(transactions.c.business_type, func.count(), func.sum(transactions.c.delta_amount))
                .where(transactions.c.transaction_id > before.transaction_id)
                .group_by(transactions.c.business_type)
            )
        }
    wins, paid = moved.get(REWARD, (0, Decimal(0)))
    _, charged = moved.get(CONSUME, (0, Decimal(0)))
    return Summary(draws, sent, after.rejected - before.rejected, wins, -charged, paid, seconds)


def show(summary: Summary, engine: Engine, settings: Settings, console: Console) -> bool:
    """Print the summary, run the audit and print its report; return whether the books balance."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(justify="right")
    table.add_column()
    settled = summary.draws - summary.rejected
    with engine.connect().execution_options(read_only=True) as connection:
        parked = dead_letters.count(connection, dead_letters.Selection())
    rows = (
        (f"{summary.draws:,}", f"draws settled, {summary.rejected:,} of them rejected (INSUFFICIENT_BALANCE)"),
        (f"{summary.wins:,}", f"wins, {summary.wins / settled:.1%} of those paid for" if settled else "wins"),
        (f"{summary.charged:,.2f}", "POINT charged"),
        (f"{summary.paid:,.2f}", "POINT paid out"),
        (f"{summary.repeats:,}", "repeats, all harmless: charged once"),
        (f"{summary.draws / summary.seconds:,.0f}", f"draws per second, on SQLite, {summary.seconds:.1f} s in all"),
        (f"{parked:,}", "dead letters"),
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    report = audit_by(settings, engine, everything=True)
    audits.record(engine, report, by=shell_operator())
    return show_audit(report, console)


def show_audit(report: Report, console: Console) -> bool:
    """Print how each invariant stands, and the violations; return whether all hold."""
    console.print(
        f"\nAudit of {report.requests:,} requests, {report.rows:,} ledger rows, {report.accounts:,} accounts "
        f"({report.range}):",
        highlight=False,
    )
    for invariant, state in report.states.items():
        mark = {
            "holds": "[green]holds[/]",
            "violated": f"[bold red]VIOLATED {report.counts[invariant]:,} times[/]",
            "not provable yet": f"[bold yellow]{report.unproven:,} draws not provable yet[/]",
            "not looked at": f"[bold yellow]NOT LOOKED AT[/] {escape(report.obstacles.get(invariant, ''))}",
        }[state]
        console.print(f"  {invariant:<4} {INVARIANTS[invariant]:<50} {mark}", highlight=False)
    for invariant in INVARIANTS:
        _show_first(report, invariant, console)
    if report.is_cut:
        console.print(
            f"Only the first {audit_report.VIOLATIONS_KEPT_MAX:,} violations of each are kept: --json lists these."
        )
    if report.unproven:
        console.print("Draws can be proven here once the secrets of their epochs are revealed; with TOMBOLA_SEED, now.")
    if report.is_clean:
        console.print("[bold green]The books balance.[/]")
    elif report.violations:
        console.print("[bold red]The books do not balance.[/]")
    else:
        console.print("[bold yellow]Nothing wrong was found, but not everything was looked at.[/]")
    return report.is_clean


def _show_first(report: Report, invariant: str, console: Console) -> None:
    """Print the first violations of an invariant, so that one does not hide the others, and how many more there are."""
    first = [it for it in report.violations if it.invariant == invariant][:SHOWN_OF_EACH_MAX]
    for violation in first:
        console.print(Text(f"  {violation}", style="red"))
    if (more := report.counts[invariant] - len(first)) > 0:
        console.print(Text(f"  {invariant} and {more:,} more", style="red"))
