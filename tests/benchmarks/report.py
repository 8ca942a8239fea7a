"""What was measured, against its target: the table, the JSON, the chart."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from tests.benchmarks.rounds import Ratio

GREY: Final = "#767676"  # readable on white and on black alike
OURS, THEIRS = "#2f81f7", "#a0a0a0"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. `reached` is None where there is no target."""

    group: str
    what: str
    value: float
    unit: str
    target: str = ""
    reached: bool | None = None
    bar: str = ""  # its label in the chart, if it is in there
    spread: tuple[float, float] | None = None  # the lowest and the highest of the rounds

    @property
    def measured(self) -> str:
        digits = 0 if abs(self.value) >= 100 else 2
        spread = "" if self.spread is None else f" ({self.spread[0]:,.{digits}f} to {self.spread[1]:,.{digits}f})"
        return f"{self.value:,.{digits}f}{spread} {self.unit}"


def at_least(group: str, what: str, value: float, unit: str, bound: float) -> Finding:
    """A finding that should not be below `bound`."""
    return Finding(group, what, value, unit, f"≥ {bound:,g}", value >= bound)


def beside(group: str, what: str, ratio: Ratio, bound: float | None = None) -> Finding:
    """A finding of the rounds' ratios, which should not be below `bound`."""
    spread = (ratio.low, ratio.high) if ratio.low != ratio.high else None
    if bound is None:
        return Finding(group, what, ratio.median, "×", spread=spread)
    return Finding(group, what, ratio.median, "×", f"≥ {bound:,g}", ratio.median >= bound, spread=spread)


def at_most(group: str, what: str, value: float, unit: str, bound: float) -> Finding:
    """A finding that should not be above `bound`."""
    return Finding(group, what, value, unit, f"≤ {bound:,.4g}", value <= bound)


def print_table(findings: Sequence[Finding], console: Console) -> None:
    """The table of `make bench`."""
    table = Table(title="tombola, measured")
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_column("target", justify="right")
    table.add_column("")
    group = ""
    for finding in findings:
        if group not in ("", finding.group):
            table.add_section()
        group = finding.group
        verdict = {True: "[green]reached[/]", False: "[red]missed[/]", None: ""}[finding.reached]
        table.add_row(finding.what, finding.measured, finding.target, verdict)
    console.print(table)


def write_json(findings: Sequence[Finding], path: Path) -> None:
    """All findings, with the Python they were made with."""
    document = {"python": platform.python_version(), "findings": [asdict(finding) for finding in findings]}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_chart(findings: Sequence[Finding], path: Path) -> bool:
    """Bars of the rates on a logarithmic scale; whether there was anything to draw."""
    import matplotlib

    bars = [finding for finding in findings if finding.bar]
    if not bars:
        return False
    matplotlib.use("svg")
    # Text as text and a fixed salt: a small file that changes only when the figures do.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tombola", "font.size": 11})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(bars) + 0.9))
    for row, bar in enumerate(reversed(bars)):
        axes.barh(row, bar.value, color=OURS if bar.bar.startswith("tombola") else THEIRS, height=0.7)
        axes.text(bar.value * 1.08, row, f"{bar.value:,.0f}", va="center", color=GREY)
    axes.set_yticks(range(len(bars)), [bar.bar for bar in reversed(bars)], color=GREY)
    axes.set_xscale("log")
    axes.set_xlim(100, max(bar.value for bar in bars) * 3)
    axes.set_xlabel("draws settled per second (log scale): MariaDB with durable commits, 2 cores for all", color=GREY)
    axes.tick_params(colors=GREY, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GREY)
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return True
