"""Watching a deployment: the operators' console, and the doctor."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from worker import doctor as doctors
from worker.cli.base import JsonOption, out, print_json, settings_with
from worker.embedded import CONSOLE_PORT

app = typer.Typer()


@app.command()
def console(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.", min=0, max=65535)] = CONSOLE_PORT,
) -> None:
    """Serve the operators' pages: what died, what a replay would do, the story of a draw. `tombola user add` first."""
    from worker.console.serve import serve  # the pages' libraries take a moment to import

    serve(settings_with("database_url", "broker_url", "result_url"), host=host, port=port)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check this deployment and say what to do. Changes nothing; exit code 1 if something must be done."""
    checks = doctors.examine(settings_with("database_url"))
    if as_json:
        found = list(checks)
        print_json(msgspec.json.encode(found))
        is_well = all(check.status != "fail" for check in found)
    else:
        is_well = doctors.show(checks, out)
    raise typer.Exit(0 if is_well else 1)
