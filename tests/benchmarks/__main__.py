"""`make bench`: measure everything, print the table. See --help."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from tests.benchmarks import report
from tests.benchmarks.lab import BenchmarkFailed, busy_share, open_lab
from tests.benchmarks.measurements import BY_NAME_ONLY, FULL, MEASUREMENTS, QUICK
from tests.benchmarks.report import Finding

CHART = Path(__file__).with_name("chart.svg")
BUSY_MAX = 0.15  # above this somebody else is measured, too
EPILOG = """\
examples:
  python -m tests.benchmarks                                everything, about 25 minutes
  python -m tests.benchmarks --quick                        small sizes, to see whether it works
  python -m tests.benchmarks --only latency memory
  python -m tests.benchmarks --only tune --quick            lanes and batch sizes, for the defaults
  python -m tests.benchmarks --only legacy                  the legacy migration, 5 million rows; some 15 minutes

A missed target is a finding, not an error: the exit code is 0 unless something broke.
"""


def main() -> int:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    console, progress = Console(), Console(stderr=True, highlight=False)
    sizes = QUICK if arguments.quick else FULL
    findings: list[Finding] = []
    failed: list[str] = []
    begin = time.monotonic()
    with open_lab() as lab:
        for name in arguments.only or MEASUREMENTS:
            if (busy := busy_share()) > BUSY_MAX:
                findings.append(Finding(name, "[yellow]CPU in use by others at the start[/]", busy * 100, "%"))
            progress.print(f"[bold]{name}[/] ({time.monotonic() - begin:.0f} s)")
            try:
                findings += (MEASUREMENTS | BY_NAME_ONLY)[name](lab, sizes, progress.print)
            except BenchmarkFailed as error:  # half an hour of other figures must not be lost
                progress.print(f"[red]{name} failed[/]: {error}")
                failed.append(name)
    report.print_table(findings, console)
    if arguments.json:
        report.write_json(findings, arguments.json)
    chart = arguments.chart or (None if arguments.quick else CHART)
    if chart and report.write_chart(findings, chart):
        progress.print(f"chart: {chart}")
    progress.print(f"{time.monotonic() - begin:.0f} s")
    if failed:
        progress.print(f"[red]without figures: {', '.join(failed)}[/]")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Measure tombola against a Celery task per draw and against a bare loop, on servers of its own.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [*MEASUREMENTS, *BY_NAME_ONLY]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"some of: {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round, no large ledger, no chart")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    parser.add_argument("--chart", type=Path, metavar="FILE", help=f"write the chart there; default: {CHART.name}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
