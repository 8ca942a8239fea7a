"""`tombola campaign fit`: does the drawing do what the odds say, by fresh seeds?"""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tombola.producers.domain.campaigns.odds import Odds
from tombola.worker.campaigns.fit import P_MIN, Fit, fit
from tombola.worker.cli.base import out, print_json, print_table

MANIFEST_SUFFIX = ".toml"


def is_manifest(what: str) -> bool:
    """Whether `what` names a file, and not a campaign."""
    return what.endswith(MANIFEST_SUFFIX) or Path(what).is_file()


def show_fit(odds: Odds, draws: int, *, as_json: bool) -> bool:
    """Draw, and print how well it fits, for accounts of each tier; return whether all of it fits."""
    tiers = ["", *(tier.name for tier in odds.tiers)]
    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: list[Fit] = []
    with Progress(*columns, console=out, transient=True, disable=as_json or not out.is_terminal) as progress:
        task = progress.add_task("", total=draws * len(tiers))
        for tier in tiers:
            found.append(fit(odds, draws=draws, tier=tier, on_progress=lambda more: progress.advance(task, more)))
    p_min = P_MIN / len(tiers)  # one run in a thousand fails by chance, whatever the number of tiers
    is_fit = all(it.is_fit(p_min) for it in found)
    if as_json:
        tests = [
            {
                "tier": it.tier,
                "pulls": it.pulls,
                "drawn": dict(it.drawn),
                "expected": dict(it.expected),
                "chi_squared": it.chi_squared,
                "degrees_of_freedom": it.degrees,
                "p_value": it.p_value,
            }
            for it in found
        ]
        print_json(msgspec.json.encode({"odds_hash": odds.odds_hash, "fits": is_fit, "tests": tests}))
        return is_fit
    for it in found:
        out.print(f"{it.pulls:,} pulls{f', tier {it.tier}' if it.tier else ''}:")
        rows = [
            (code, f"{it.drawn.get(code, 0):,}", f"{it.drawn.get(code, 0) / it.pulls:.4%}", f"{chance:.4%}")
            for code, chance in it.expected.items()
        ]
        print_table(["prize", "drawn", "share", "effective"], rows)
        out.print(f"chi-squared {it.chi_squared:.2f}, {it.degrees} degrees of freedom, p-value {it.p_value:.4f}\n")
    if is_fit:
        out.print("The frequencies fit the exact chances.")
    else:
        out.print(f"They do not fit: by chance, this happens in one run of {1 / P_MIN:,.0f}. Run it again.")
    return is_fit
