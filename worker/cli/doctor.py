"""`tombola doctor`: checks of a deployment, each with what to do."""

from __future__ import annotations

import msgspec
import typer

from tombola.worker import doctor as doctors
from tombola.worker.cli.base import JsonOption, out, print_json, settings_with

app = typer.Typer()


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check this deployment, and print what to do. Changes nothing; exit code 1 if a check fails."""
    checks = doctors.examine(settings_with("database_url"))
    if as_json:
        found = list(checks)
        print_json(msgspec.json.encode(found))
        is_well = all(check.status != "fail" for check in found)
    else:
        is_well = doctors.show(checks, out)
    raise typer.Exit(0 if is_well else 1)
