"""`tombola campaign codes`: the pools of codes that prizes hand out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from tombola.producers.domain.errors import CampaignNotFound, InvalidRequest
from tombola.producers.storage.campaigns import Campaigns
from tombola.worker.campaigns import codes, stock
from tombola.worker.cli.base import JsonOption, ReasonOption, engine_of, out, print_json, print_table
from tombola.worker.operators.actions import shell_operator

codes_app = typer.Typer(help="Load the codes that prizes hand out.", no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(help="The campaign's name.", metavar="NAME", show_default=False)]


@codes_app.command("load")
def load(
    name: NameArgument,
    prize: Annotated[str, typer.Argument(help="The prize's code.", show_default=False)],
    file: Annotated[Path, typer.Argument(help="Codes, one a line.", metavar="FILE", show_default=False)],
    reason: ReasonOption,
) -> None:
    """Add the codes in a file to a prize's pool: all of them or none. Each is a unit of its stock."""
    try:
        lines = codes.read(file.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from None
    left = codes.load(engine_of(), name, prize, lines, operator=shell_operator(), reason=reason)
    out.print(f"{len(lines):,} codes loaded; {prize} of {name}: {left:,} units left")


@codes_app.command("show")
def show(name: NameArgument, as_json: JsonOption = False) -> None:
    """Show how many codes of each prize are loaded, handed out and free. The codes themselves are not shown."""
    engine = engine_of()
    if (campaign := Campaigns(engine).find(name)) is None:
        raise CampaignNotFound(f"there is no campaign {name!r}")
    with engine.connect().execution_options(read_only=True) as connection:
        pools = {pool.prize: pool for pool in stock.pools(connection, name)}
    # A prize that waits for its first codes is shown, too.
    for prize in () if campaign.odds is None else campaign.odds.prizes:
        if prize.has_codes:
            pools.setdefault(prize.code, stock.Pool(prize.code, 0, 0))
    if as_json:
        print_json(msgspec.json.encode([{**it._asdict(), "free": it.free} for it in pools.values()]))
        return
    rows = [(it.prize, f"{it.loaded:,}", f"{it.handed_out:,}", f"{it.free:,}") for it in pools.values()]
    print_table(["prize", "loaded", "handed out", "free"], rows)
