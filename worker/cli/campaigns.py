"""Campaigns: check a manifest, and see what it would come to before anybody plays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tombola.producers.domain.campaigns import figures, manifest
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.errors import InvalidRequest
from tombola.worker.campaigns.simulation import Simulation, simulate
from tombola.worker.cli.base import JsonOption, out, print_json

app = typer.Typer()
campaign_app = typer.Typer(help="Define campaigns: odds, prizes, stock, limits.", no_args_is_help=True)
app.add_typer(campaign_app, name="campaign")

FileArgument = Annotated[Path, typer.Argument(help="A manifest in TOML.", metavar="FILE", show_default=False)]

BAR_WIDTH = 30
STREAK = 20  # losses in a row whose chance is shown


def odds_of(file: Path) -> Odds:
    """The odds that a file says; raises InvalidManifest, or InvalidRequest for a file that cannot be read."""
    try:
        return manifest.parse(file.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from None


@campaign_app.command()
def check(file: FileArgument, as_json: JsonOption = False) -> None:
    """Check a manifest, and say what it means. Exit code 1 with the line of the first mistake."""
    odds = odds_of(file)
    if as_json:
        print_json(msgspec.json.encode({"odds_hash": odds.odds_hash, **_exact(odds)}))
        return
    out.print(f"{odds.name}: a manifest without mistakes. Its odds hash is {odds.odds_hash}.")
    _show_prizes(odds, None)
    _show_figures(odds)


@campaign_app.command("simulate")
def simulate_command(
    file: FileArgument,
    draws: Annotated[int, typer.Option(help="Requests to draw.", min=1)] = 1_000_000,
    accounts: Annotated[int, typer.Option(help="Accounts that draw, in turn.", min=1)] = 10_000,
    pulls: Annotated[int, typer.Option(help="Pulls in each request.", min=1)] = 1,
    per_day: Annotated[int | None, typer.Option(help="Pulls a day: says on which day a stock runs out.", min=1)] = None,
    seed: Annotated[str, typer.Option(help="Any text: the same text, the same draws.")] = "simulation",
    as_json: JsonOption = False,
) -> None:
    """Say exactly what a campaign comes to, then draw it a million times and compare."""
    odds = odds_of(file)
    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True, disable=as_json or not out.is_terminal) as progress:
        task = progress.add_task("", total=draws)
        found = simulate(
            odds, draws=draws, accounts=accounts, pulls=pulls, seed=seed, tell=lambda more: progress.advance(task, more)
        )
    if as_json:
        print_json(msgspec.json.encode({"odds_hash": odds.odds_hash, **_exact(odds), "simulated": _simulated(found)}))
        return
    _show_prizes(odds, found)
    _show_figures(odds, found, per_day)
    _show_returns(found)


# ---- for scripts -----------------------------------------------------------------------------------------------------


def _exact(odds: Odds) -> dict[str, Any]:
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


def _simulated(found: Simulation) -> dict[str, Any]:
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


def _show_prizes(odds: Odds, found: Simulation | None) -> None:
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


def _show_figures(odds: Odds, found: Simulation | None = None, per_day: int | None = None) -> None:
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


def _show_returns(found: Simulation) -> None:
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
