"""`make matrix`: see tests/matrix. `python -m tests.matrix --help` says what it takes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from tests.matrix.fetching import NotToBeHad, fetch, version_of
from tests.matrix.releases import RELEASES, Release

FOLDER: Final = Path("build/matrix")
EPILOG: Final = """\
examples:
  python -m tests.matrix                                  every release, every test that uses its server
  python -m tests.matrix "MySQL 9.7" --tests tests/settle
  python -m tests.matrix --fetch-only                     fetch and say what was fetched

The output of each run is in build/matrix. What cannot be fetched is told with the reason.
"""


@dataclass
class Outcome:
    """What a release came to: its version, or why it could not be had; and its tests."""

    release: Release
    version: str = ""
    reason: str = ""
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: int = 0
    minutes: float = 0.0

    @property
    def fails(self) -> bool:
        """Whether this release fails the whole: not where its suite moves."""
        return not self.release.moves and bool(self.failed)


def main() -> int:
    arguments = _parser().parse_args()
    console = Console()
    wanted = [it for it in RELEASES if not arguments.releases or it.name in arguments.releases]
    outcomes = [_outcome(it, arguments.tests, arguments.processes, arguments.fetch_only, console) for it in wanted]
    table = Table(title="tombola, on the servers of other releases")
    for name in ("server", "version", "passed", "failed", "skipped", "minutes"):
        table.add_column(name)
    for it in outcomes:
        counts = (str(it.passed), str(len(it.failed)), str(it.skipped), f"{it.minutes:.1f}")
        table.add_row(it.release.name, it.version or it.reason, *(counts if it.version else ()))
    console.print(table)
    for it in outcomes:
        for name in it.failed:
            console.print(f"{it.release.name}: {name}", highlight=False, markup=False, soft_wrap=True)
    return 1 if any(it.fails for it in outcomes) else 0


def _outcome(release: Release, tests: Sequence[str], processes: int, fetch_only: bool, console: Console) -> Outcome:
    outcome = Outcome(release)
    folder = FOLDER / f"{release.suite}-{release.packages[0]}"
    console.print(f"[bold]{release.name}[/], from {release.suite}")
    try:
        release.write_programs(fetch(release.suite, release.packages, folder), (folder / "programs").resolve())
    except NotToBeHad as error:
        outcome.reason = f"not to be had: {error}"
        return outcome
    outcome.version = version_of(folder, release.packages[0])
    if not fetch_only:
        _run_tests(outcome, folder, tests, processes)
    return outcome


def _run_tests(outcome: Outcome, folder: Path, tests: Sequence[str], processes: int) -> None:
    report = folder.resolve() / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", f"{outcome.release.mark} and not chaos", "-q"]
    command += ["-n", str(processes), "--dist", "loadfile", f"--junitxml={report}", *tests]
    environment = os.environ | {"TEST_SERVER_PATH": str((folder / "programs").resolve())}
    began = time.monotonic()
    with (folder / "output.txt").open("w") as output:
        status = subprocess.run(command, env=environment, stdout=output, stderr=output).returncode
    outcome.minutes = (time.monotonic() - began) / 60
    if not report.exists():
        outcome.failed.append(f"pytest ended with status {status}: see {folder}/output.txt")
        return
    for case in xml.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            outcome.skipped += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            outcome.failed.append(f"{case.get('classname')}.{case.get('name')}")
        else:
            outcome.passed += 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix",
        description="Run the tests that use a server against the servers of other Debian releases.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [it.name for it in RELEASES]
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=f"some of: {', '.join(names)}")
    parser.add_argument("--tests", nargs="+", default=[], metavar="PATH", help="tests to choose from; default: all")
    parser.add_argument("--processes", type=int, default=3, help="test processes; default: %(default)s")
    parser.add_argument("--fetch-only", action="store_true", help="run no tests")
    return parser


if __name__ == "__main__":
    sys.exit(main())
