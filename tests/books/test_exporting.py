"""What is exported is valid beancount, by another reading of its syntax than the one that wrote it."""

from __future__ import annotations

import re
from collections import defaultdict
from datetime import date
from decimal import Decimal

from tombola.worker.books import exporting
from tombola.worker.books.exporting import Entry


class Beancount:
    """A reading of beancount's syntax: https://beancount.github.io/docs/beancount_language_syntax.html"""

    ACCOUNT = r"(?:Assets|Liabilities|Equity|Income|Expenses)(?::[A-Z0-9][A-Za-z0-9-]*)+"
    COMMODITY = r"[A-Z][A-Z0-9'._-]{0,22}[A-Z0-9]"
    DAY = r"(\d{4}-\d{2}-\d{2})"

    def __init__(self, ledger: str) -> None:
        self.opened: dict[str, str] = {}
        self.commodities: set[str] = set()
        self.balances: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
        self.transactions = self.assertions = 0
        open_entry: dict[str, Decimal] | None = None
        for line in [*ledger.splitlines(), ""]:
            if open_entry is not None and not line.startswith("  "):
                assert open_entry, "a transaction without postings"
                assert set(open_entry.values()) == {0}, f"not balanced: {open_entry}"
                open_entry = None
            if not line or re.fullmatch(r'option "title" ".*"', line) or re.fullmatch(r'  [a-z][\w-]*: ".*"', line):
                continue
            if found := re.fullmatch(rf"{self.DAY} commodity ({self.COMMODITY})", line):
                self.commodities.add(found[2])
            elif found := re.fullmatch(rf"{self.DAY} open ({self.ACCOUNT})", line):
                assert found[2] not in self.opened
                self.opened[found[2]] = found[1]
            elif found := re.fullmatch(rf'{self.DAY} \* "[^"]*" "[^"]*"', line):
                self.transactions += 1
                open_entry, day = defaultdict(Decimal), found[1]
            elif found := re.fullmatch(rf"  ({self.ACCOUNT}) +(-?\d+\.\d\d) ({self.COMMODITY})", line):
                assert open_entry is not None, line
                assert self.opened[found[1]] <= day, f"not open: {line}"
                assert found[3] in self.commodities
                open_entry[found[3]] += Decimal(found[2])
                self.balances[found[1], found[3]] += Decimal(found[2])
            elif found := re.fullmatch(rf"{self.DAY} balance ({self.ACCOUNT}) +(-?\d+\.\d\d) ({self.COMMODITY})", line):
                self.assertions += 1
                assert self.balances[found[2], found[4]] == Decimal(found[3]), line
            else:
                raise AssertionError(f"not beancount: {line!r}")


ODD = [
    Entry(date(2026, 1, 2), "ITEM.golden cat", 1, 2, {"house/a.b/prizes": Decimal(-3), "users": Decimal(3)}),
    Entry(date(2026, 1, 2), "é", 1, 2, {"house/a_b/prizes": Decimal(-3), "users": Decimal(3)}),
    Entry(date(2026, 1, 3), "x", 3, 3, {"house/-/sales": Decimal("0.01"), "users": Decimal("-0.01")}),
    Entry(date(2026, 1, 3), "A" * 50, 3, 3, {"house/unknown": Decimal(1), "users": Decimal(-1)}),
    Entry(date(2026, 1, 3), "A" * 49, 3, 3, {"house/legacy": Decimal(1), "users": Decimal(-1)}),
    Entry(date(2026, 1, 3), "item.GOLDEN.cat", 3, 3, {"house/holds": Decimal(1), "users": Decimal(-1)}),
]


def test_odd_names_are_valid_names_and_stay_apart() -> None:
    opening = {("house/issued", "POINT"): Decimal(-10), ("house/breakage", "POINT"): Decimal(4)}
    ledger = Beancount("".join(exporting.as_beancount(ODD, opening, date(2026, 1, 1))))
    assert len(ledger.opened) == len({it for entry in ODD for it in entry.moved} | {it for it, _ in opening})
    assert len(ledger.commodities) == len({it.asset_code for it in ODD} | {"POINT"})
    assert ledger.balances["Assets:House:Issued", "POINT"] == 10
    assert ledger.balances["Income:House:Breakage", "POINT"] == -4
