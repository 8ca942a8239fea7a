"""Odds and simulations as the commands show them: tables and bars for people, JSON values for scripts."""

from __future__ import annotations

from typing import Any, Final

from rich.table import Table

from tombola.producers.domain.campaigns import figures
from tombola.producers.domain.campaigns.odds import Odds
from tombola.worker.campaigns.simulation import Simulation
from tombola.worker.cli.terminal import out

BAR_WIDTH: Final = 30
STREAK: Final = 20  # losses in a row whose chance is shown


# ---- for scripts -----------------------------------------------------------------------------------------------------


def exact(odds: Odds) -> dict[str, Any]:
    """The exact figures of `odds`, as JSON values."""
    base, effective = figures.base_chances(odds), figures.effective_chances(odds)
    return {
        "campaign": odds.name,
        "prizes": [
            {
                "code": prize.code,
                "chance": str(base[prize.code]),
                "effective": effective[prize.code],
                "stock": prize.stock,
                "value": str(prize.value),
            }
            for prize in odds.prizes
        ],
        "per_pull": {
            it.asset_code: {"expectation": it.expectation, "deviation": it.deviation}
            for it in figures.assets(odds, effective)
        },
        "return_to_player": {str(pulls): figures.return_to_player(odds, effective, pulls) for pulls in odds.cost},
        "liability": str(figures.liability(odds)),
        "stock_lasts_pulls": {it.code: [it.early, it.median, it.late] for it in figures.stock_lasts(odds, effective)},
        "losing_streak_of_20": figures.losing_streak(odds, STREAK),
    }


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


def show_prizes(odds: Odds, found: Simulation | None = None) -> None:
    """A line per prize: its chance, with guarantees (effective), and what was drawn."""
    base, effective = figures.base_chances(odds), figures.effective_chances(odds)
    largest = max(effective.values())
    table = Table(box=None, pad_edge=False)
    for name in ("prize", "weight", "chance", "effective", *(("drawn", "share") if found else ()), "stock", "value"):
        table.add_column(name, justify="left" if name == "prize" else "right", no_wrap=True)
    table.add_column("")
    for prize in odds.prizes:
        drawn: tuple[str, ...] = ()
        if found is not None:
            number = found.prizes[prize.code]
            drawn = (f"{number:,}", f"{number / found.pulls:.4%}")
        table.add_row(
            prize.code,
            f"{prize.weight:,}",
            f"{float(base[prize.code]):.4%}",
            f"{effective[prize.code]:.4%}",
            *drawn,
            "codes" if prize.has_codes else "" if prize.stock is None else f"{prize.stock:,}",
            f"{prize.value}",
            "█" * round(BAR_WIDTH * effective[prize.code] / largest),
        )
    out.print(table)


def show_figures(odds: Odds, found: Simulation | None = None, per_day: int | None = None) -> None:
    """What a pull pays, what comes back, how long each stock lasts; days at `per_day` pulls a day."""
    effective = figures.effective_chances(odds)
    for it in figures.assets(odds, effective):
        simulated = f"; drawn: {found.expectation(it.asset_code):.4f}" if found else ""
        out.print(f"a pull pays {it.expectation:.4f} {it.asset_code}, deviation {it.deviation:.4f}{simulated}")
    for pulls, cost in odds.cost.items():
        share = figures.return_to_player(odds, effective, pulls)
        out.print(f"{pulls} pull(s) for {cost} {odds.asset_code}: {share:.2%} of the price comes back in value")
    if found is not None:
        out.print(f"drawn: {found.return_to_player:.2%} came back; at most {found.longest_losing} losses in a row")
    if liability := figures.liability(odds):
        out.print(f"all stock is worth {liability:,} {odds.asset_code}")
    for lasts in figures.stock_lasts(odds, effective):
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
    out.print(f"{STREAK} losses in a row: {figures.losing_streak(odds, STREAK):.4%}")


def _day(pulls: float, per_day: int) -> int:
    return int((pulls - 1) // per_day) + 1


def show_returns(found: Simulation) -> None:
    """How the accounts fared: a bar for each tenth of what they had paid."""
    if not found.returns:
        return
    out.print("\nvalue that came back to an account, as a share of what it had paid:")
    buckets = [0] * 21
    for share in found.returns:
        buckets[min(20, int(share * 10))] += 1
    last = max(number for number, count in enumerate(buckets) if count)
    for number, count in enumerate(buckets[: last + 1]):
        label = f"{number * 10:3d} % and more" if number == 20 else f"{number * 10:3d} to {number * 10 + 10:3d} %"
        out.print(f"{label:>14} {count:8,} {'█' * round(BAR_WIDTH * count / max(buckets))}")
