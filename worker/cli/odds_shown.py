"""Odds and simulations as the commands show them: tables and bars for people, JSON values for scripts."""

from __future__ import annotations

from typing import Any, Final

from rich.table import Table

from tombola.worker.campaigns.live import Live
from tombola.worker.campaigns.outlook import STREAK, Outlook
from tombola.worker.campaigns.simulation import Simulation
from tombola.worker.cli.base import out, print_table, when

BAR_WIDTH: Final = 30


def simulated(found: Simulation) -> dict[str, Any]:
    """What the draws of a simulation came to, as JSON values."""
    return {
        "pulls": found.pulls,
        "refused": found.refused,
        "prizes": {prize.code: found.prizes[prize.code] for prize in found.odds.prizes},
        "per_pull": {
            code: {"expectation": found.expectation(code), "deviation": found.deviation(code)} for code in found.paid
        },
        "return_to_player": found.return_to_player,
        "sold_out_at": found.sold_out_at,
        "longest_losing_streak": found.longest_losing,
    }


# ---- for people ------------------------------------------------------------------------------------------------------


def show_prizes(outlook: Outlook, found: Simulation | None = None) -> None:
    """A line per prize: its chance, with guarantees (effective), and what was drawn."""
    base, effective = outlook.base, outlook.effective
    largest = max(effective.values())
    table = Table(box=None, pad_edge=False)
    for name in ("prize", "weight", "chance", "effective", *(("drawn", "share") if found else ()), "stock", "value"):
        table.add_column(name, justify="left" if name == "prize" else "right", no_wrap=True)
    table.add_column("")
    for prize in outlook.odds.prizes:
        drawn: tuple[str, ...] = ()
        if found is not None:
            number = found.prizes[prize.code]
            drawn = (f"{number:,}", f"{number / max(1, found.pulls):.4%}")
        table.add_row(
            prize.code,
            f"{prize.weight:,}",
            f"{float(base[prize.code]):.4%}",
            f"{effective[prize.code]:.4%}",
            *drawn,
            "codes" if prize.has_codes else "" if prize.stock is None else f"{prize.stock:,}",
            f"{prize.value}",
            _bar(effective[prize.code] / largest),
        )
    out.print(table)


def show_figures(outlook: Outlook, found: Simulation | None = None, per_day: int | None = None) -> None:
    """What a pull pays, what comes back, how long each stock lasts; days at `per_day` pulls a day."""
    odds = outlook.odds
    for it in outlook.assets:
        simulated = f"; drawn: {found.expectation(it.asset_code):.4f}" if found else ""
        out.print(f"a pull pays {it.expectation:.4f} {it.asset_code}, deviation {it.deviation:.4f}{simulated}")
    for pulls, share in outlook.returns.items():
        out.print(
            f"{pulls} pull(s) for {odds.cost[pulls]} {odds.asset_code}: {share:.2%} of the price comes back in value"
        )
    if found is not None:
        out.print(f"drawn: {found.return_to_player:.2%} came back; at most {found.longest_losing} losses in a row")
    if outlook.liability:
        out.print(f"all stock is worth {outlook.liability:,} {odds.asset_code}")
    for lasts in outlook.lasts:
        days = f": day {_day(lasts.early, per_day)} to {_day(lasts.late, per_day)}" if per_day else ""
        gone = (
            f"; drawn: gone at pull {found.sold_out_at[lasts.code]:,}"
            if found and lasts.code in found.sold_out_at
            else ""
        )
        out.print(
            f"{lasts.code}: sold out after {lasts.median:,.0f} pulls, 90 % between {lasts.early:,.0f} and "
            f"{lasts.late:,.0f}{days}{gone}"
        )
    out.print(f"{STREAK} losses in a row: {outlook.losing_streak:.4%}")


def _day(pulls: float, per_day: int) -> int:
    return int((pulls - 1) // per_day) + 1


def show_returns(found: Simulation) -> None:
    """How the accounts fared: a bar for each tenth of what they had paid."""
    shares = found.by_return()
    if not shares:
        return
    out.print("\nvalue that came back to an account, as a share of what it had paid:")
    most = max(count for _, count in shares)
    for label, count in shares:
        out.print(f"{label:>14} {count:8,} {_bar(count / most)}")


def show_live(outlook: Outlook, live: Live) -> None:
    """What the latest pulls came to: of the campaign, and by prize of its live version."""
    since = "" if live.since is None else f", since {when(live.since)} UTC"
    out.print(f"\namong the last {live.rows:,} ledger rows{since}:")
    for what, pulls in (("all versions", live.campaign), ("the live version", live.version)):
        came_back = f"{pulls.return_to_player:.2%} came back, {pulls.return_expected:.2%} expected"
        out.print(f"{what}: {pulls.count:,} pulls{f', {came_back}' if pulls.count else ''}")
    out.print(f"{live.pulls_per_minute:,.1f} pulls a minute")
    if live.version.count:
        rows = [
            (code, f"{live.version.prizes[code]:,}", f"{live.version.share(code):.4%}", f"{chance:.4%}")
            for code, chance in outlook.effective.items()
        ]
        print_table(["prize", "won", "share", "effective"], rows)


def _bar(share: float) -> str:
    return "█" * round(BAR_WIDTH * share)
