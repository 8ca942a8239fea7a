"""The audit: ledger rows a second, of everything and since the last one; its CPU, memory and longest snapshot."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Final, NamedTuple
from unittest import mock

from tests.benchmarks.lab import WHEELS, BenchmarkFailed, Lab, Say, Sizes, make_draws
from tests.benchmarks.report import Finding, at_least, at_most
from tombola.worker.audit import audits, parts
from tombola.worker.audit.audit import Scope, audit
from tombola.worker.audit.report import Report
from tombola.worker.settle import tries
from tombola.worker.settle.rules import Rules

GROUP: Final = "audit"
BATCH: Final = 800
ROUNDS: Final = 3  # of draws: after each an audit of everything, and after the last one of what has come since
SNAPSHOT_S_MAX: Final = 60.0


class Took(NamedTuple):
    """An audit, and what it took: seconds in all, of this process's CPU and of the server's; resident MiB after it."""

    report: Report
    wall_s: float
    python_s: float
    server_s: float
    rss_mib: float

    @property
    def rate(self) -> float:
        return self.report.rows / self.wall_s

    def __str__(self) -> str:
        return (
            f"{self.report.rows:,} rows in {self.wall_s:.1f} s: {self.rate:,.0f}/s; CPU {self.python_s:.1f} s here, "
            f"{self.server_s:.1f} s of the server; {self.rss_mib:.0f} MiB; longest part "
            f"{self.report.longest_part_s:.2f} s"
        )


def audits_of_draws(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """Audits of ledgers of growing size; nothing settles meanwhile, so all rows are old enough."""
    lab.clear()
    took: list[Took] = []
    with mock.patch.object(parts, "HORIZON_S", 0.0):
        for number in range(ROUNDS):
            _settle(lab, sizes.draws)
            took.append(_audit(lab, Scope()))
            say(f"everything, round {number + 1}: {took[-1]}")
        audits.record(lab.engine, took[-1].report, by="benchmark")
        _settle(lab, sizes.draws)
        since = _audit(lab, Scope(goes_on=True))
        say(f"since then: {since}")
    everything, parts_s = took[-1], [it.report.longest_part_s for it in (*took, since)]
    rows = f"{everything.report.rows:,} rows"
    return [
        at_least(GROUP, f"everything, {rows}", everything.rate, "rows/s", 20_000),
        at_least(GROUP, f"since the last one, {since.report.rows:,} new rows", since.rate, "rows/s", 20_000),
        Finding(GROUP, "CPU of Python", everything.python_s / everything.report.rows * 1e6, "µs/row"),
        Finding(GROUP, "CPU of the server", everything.server_s / everything.report.rows * 1e6, "µs/row"),
        at_most(GROUP, f"memory, with {ROUNDS} times the rows", everything.rss_mib, "MiB", took[0].rss_mib * 1.1),
        at_most(GROUP, "longest snapshot", max(parts_s), "s", SNAPSHOT_S_MAX),
    ]


def _settle(lab: Lab, count: int) -> None:
    rules = Rules(WHEELS, tries_max=3)
    for _ in range(0, count, BATCH):
        tries.settle(lab.engine, make_draws(BATCH), rules)


def _audit(lab: Lab, scope: Scope) -> Took:
    began, python_s, server_s = time.monotonic(), time.process_time(), _server_s(lab)
    report = audit(lab.engine, WHEELS, scope)
    took = (time.monotonic() - began, time.process_time() - python_s, _server_s(lab) - server_s)
    if report.violations:
        raise BenchmarkFailed(f"the audit says: {'; '.join(map(str, report.violations[:3]))}")
    return Took(report, *took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _server_s(lab: Lab) -> float:
    """The CPU that the database server has used so far, in seconds."""
    fields = Path(f"/proc/{lab.mariadb.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
