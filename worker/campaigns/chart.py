"""A bar chart as SVG, for a file and for a page: no library draws it, and it needs no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

LABEL_WIDTH: Final = 130
BAR_WIDTH_MAX: Final = 420
NUMBER_WIDTH: Final = 90
ROW_HEIGHT: Final = 22
MARGIN: Final = 8
WIDTH: Final = LABEL_WIDTH + BAR_WIDTH_MAX + NUMBER_WIDTH + 2 * MARGIN


def bars(title: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """An SVG element with a horizontal bar for each row: its label, its length, and the number beside it.

    Lengths are relative to the longest one. Text has the colour of the page (`currentColor`).
    """
    longest = max((length for _, length, _ in rows), default=0.0) or 1.0
    height = MARGIN * 2 + ROW_HEIGHT * (len(rows) + 1)
    drawn = []
    for number, (label, length, beside) in enumerate(rows, 1):
        top = MARGIN + ROW_HEIGHT * number
        width = BAR_WIDTH_MAX * length / longest
        baseline = top + ROW_HEIGHT - 7
        drawn.append(
            f'<text x="{MARGIN + LABEL_WIDTH - 8}" y="{baseline}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{MARGIN + LABEL_WIDTH}" y="{top + 3}" width="{width:.1f}" height="{ROW_HEIGHT - 6}" rx="2" '
            f'fill="#4299e1"/>'
            f'<text x="{MARGIN + LABEL_WIDTH + width + 6:.1f}" y="{baseline}">{escape(beside)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="12" fill="currentColor">'
        f'<text x="{MARGIN}" y="{MARGIN + 12}" font-weight="600">{escape(title)}</text>{"".join(drawn)}</svg>'
    )


def of_returns(by_return: Sequence[tuple[str, int]]) -> str:
    """The chart of `Simulation.by_return`: how many accounts got back which share of what they had paid."""
    rows = [(label, float(count), f"{count:,}") for label, count in by_return]
    return bars("accounts by the share of what they paid that came back in value", rows)
