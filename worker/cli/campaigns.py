"""`tombola campaign`: define campaigns, see what they would come to, publish them, run them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import Engine

from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.errors import CampaignNotFound, InvalidRequest
from tombola.producers.storage.campaigns import Campaign, Campaigns, CampaignState
from tombola.worker.campaigns import chart, lists, live, stock, versions
from tombola.worker.campaigns.differences import differences
from tombola.worker.campaigns.outlook import Outlook
from tombola.worker.campaigns.simulation import Simulation, simulate
from tombola.worker.cli.base import (
    JsonOption,
    ReasonOption,
    YesOption,
    amount_of,
    confirm,
    engine_of,
    out,
    print_json,
    print_table,
    settings_with,
    when,
)
from tombola.worker.cli.campaign_codes import codes_app
from tombola.worker.cli.campaign_conformity import SinceOption, UntilOption, period_of, show_conformity
from tombola.worker.cli.campaign_fit import is_manifest, show_fit
from tombola.worker.cli.odds_shown import show_figures, show_live, show_prizes, show_returns, simulated
from tombola.worker.cli.shared_options import options_as
from tombola.worker.operators.actions import shell_operator

app = typer.Typer()
campaign_app = typer.Typer(help="Define campaigns: odds, prizes, stock, limits.", no_args_is_help=True)
app.add_typer(campaign_app, name="campaign")
campaign_app.add_typer(codes_app, name="codes")


NameArgument = Annotated[str, typer.Argument(help="The campaign's name.", metavar="NAME", show_default=False)]
FileArgument = Annotated[Path, typer.Argument(help="A manifest in TOML.", metavar="FILE", show_default=False)]


def odds_of(file: Path) -> Odds:
    """The odds that a file says; raises InvalidManifest, or InvalidRequest for a file that cannot be read."""
    try:
        return manifest.parse(file.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}") from None


@campaign_app.command()
def check(file: FileArgument, as_json: JsonOption = False) -> None:
    """Check a manifest, and say what it means. Exit code 1 with the line of the first mistake."""
    odds = odds_of(file)
    outlook = Outlook.of(odds)
    if as_json:
        print_json(msgspec.json.encode({"odds_hash": odds.odds_hash, **outlook.told()}))
        return
    out.print(f"{odds.name}: a manifest without mistakes. Its odds hash is {odds.odds_hash}.")
    show_prizes(outlook)
    show_figures(outlook)


class Shown(NamedTuple):
    """How a simulation is shown: days at `per_day` pulls a day, and a chart in a file."""

    per_day: int | None
    chart: Path | None
    as_json: bool


SHOWN: Final[dict[str, Any]] = {
    "per_day": Annotated[int | None, typer.Option(help="Pulls a day: says on which day a stock runs out.", min=1)],
    "chart": Annotated[
        Path | None, typer.Option(help="Draw what came back to accounts, as SVG, into this file.", metavar="FILE")
    ],
    "as_json": JsonOption,
}


@campaign_app.command("simulate")
@options_as("shown", SHOWN, lambda given: Shown(**given))
def simulate_command(
    file: FileArgument,
    shown: Shown,
    draws: Annotated[int, typer.Option(help="Requests to draw.", min=1)] = 1_000_000,
    accounts: Annotated[int, typer.Option(help="Accounts that draw, in turn.", min=1)] = 10_000,
    pulls: Annotated[int, typer.Option(help="Pulls in each request.", min=1)] = 1,
    seed: Annotated[str, typer.Option(help="Any text: the same text, the same draws.")] = "simulation",
) -> None:
    """Say exactly what a campaign comes to, then draw it a million times and compare."""
    odds = odds_of(file)
    outlook = Outlook.of(odds)
    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True, disable=shown.as_json or not out.is_terminal) as progress:
        task = progress.add_task("", total=draws)
        found = simulate(
            odds,
            draws=draws,
            accounts=accounts,
            pulls=pulls,
            seed=seed,
            on_progress=lambda more: progress.advance(task, more),
        )
    if shown.chart is not None:
        _write_chart(shown.chart, found)
    if shown.as_json:
        told = {"odds_hash": odds.odds_hash, **outlook.told(), "simulated": simulated(found)}
        print_json(msgspec.json.encode(told))
        return
    show_prizes(outlook, found)
    show_figures(outlook, found, shown.per_day)
    show_returns(found)


def _write_chart(file: Path, found: Simulation) -> None:
    try:
        file.write_text(chart.of_returns(found.by_return()), encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be written: {error.strerror}") from None


@campaign_app.command("fit")
def fit_command(
    what: Annotated[
        str, typer.Argument(help="A manifest in TOML, or a campaign's name.", metavar="FILE|NAME", show_default=False)
    ],
    draws: Annotated[int, typer.Option(help="Pulls to draw.", min=1)] = 1_000_000,
    as_json: JsonOption = False,
) -> None:
    """Draw by fresh seeds, and test whether the frequencies fit the exact chances. Exit code 1 if they do not."""
    odds = odds_of(Path(what)) if is_manifest(what) else _live(engine_of(), what)[1]
    raise typer.Exit(0 if show_fit(odds, draws, as_json=as_json) else 1)


# ---- publish and run -------------------------------------------------------------------------------------------------


@campaign_app.command()
def publish(
    file: FileArgument,
    reason: ReasonOption,
    rtp_max: Annotated[
        float, typer.Option("--rtp-max", help="Refuse odds that give back more than this share of the price.", min=0)
    ] = versions.RETURN_MAX,
    prize_value_max: Annotated[str, typer.Option(help="Refuse a prize that is worth more.", show_default=False)] = "",
    is_sure: YesOption = False,
) -> None:
    """Make a manifest the live version of its campaign. Shows what changes, and asks."""
    odds = odds_of(file)
    bounds = versions.Bounds(rtp_max, amount_of(prize_value_max) if prize_value_max else None)
    if (refusal := versions.why_not(odds, bounds)) is not None:
        raise InvalidRequest(refusal)
    engine = engine_of()
    campaign = Campaigns(engine).find(odds.name)
    for line in differences(campaign.odds if campaign else None, odds):
        out.print(line)
    if not is_sure:
        confirm(f"Publish this version of {odds.name}?")
    done = versions.publish(engine, odds, bounds=bounds, operator=shell_operator(), reason=reason)
    out.print(
        f"{odds.name} version {done.version}, odds hash {odds.odds_hash}"
        + (": live already, nothing was done" if done.is_repeat else ": live")
    )
    if campaign is None:
        out.print(f"It is a draft. To let players draw: tombola campaign open {odds.name} --reason …")


@campaign_app.command("diff")
def diff(file: FileArgument) -> None:
    """Show what a manifest would change. Exit code 1 if it changes something."""
    odds = odds_of(file)
    campaign = Campaigns(engine_of()).find(odds.name)
    lines = list(differences(campaign.odds if campaign else None, odds))
    for line in lines:
        out.print(line)
    if not lines:
        out.print(f"{odds.name}: the live version says the same")
    raise typer.Exit(1 if lines else 0)


@campaign_app.command("open")
def open_campaign(name: NameArgument, reason: ReasonOption) -> None:
    """Let players draw."""
    _move(name, CampaignState.OPEN, reason)


@campaign_app.command()
def pause(name: NameArgument, reason: ReasonOption) -> None:
    """Accept no new requests, until the campaign is opened again. Accepted requests are still drawn."""
    _move(name, CampaignState.PAUSED, reason)


@campaign_app.command()
def close(name: NameArgument, reason: ReasonOption, is_sure: YesOption = False) -> None:
    """Accept no new requests, for good. Accepted requests are still drawn."""
    if not is_sure:
        confirm(f"Close {name} for good?")
    _move(name, CampaignState.CLOSED, reason)


def _move(name: str, state: CampaignState, reason: str) -> None:
    versions.move(engine_of(), name, state, operator=shell_operator(), reason=reason)
    out.print(f"{name} is {state}")


@campaign_app.command(context_settings={"ignore_unknown_options": True})  # for -5
def restock(
    name: NameArgument,
    prize: Annotated[str, typer.Argument(help="The prize's code.", show_default=False)],
    units: Annotated[int, typer.Argument(help="How many to add; negative: to take away.", show_default=False)],
    reason: ReasonOption,
) -> None:
    """Change what is left of a prize."""
    left = versions.restock(engine_of(), name, prize, units, operator=shell_operator(), reason=reason)
    out.print(f"{prize} of {name}: {left:,} units left")


# ---- look ------------------------------------------------------------------------------------------------------------


@campaign_app.command("list")
def list_campaigns(as_json: JsonOption = False) -> None:
    """List the campaigns."""
    found = Campaigns(engine_of()).all()
    if as_json:
        told = [
            {"name": it.name, "state": it.state, "odds_hash": None if it.odds is None else it.odds.odds_hash}
            for it in found
        ]
        print_json(msgspec.json.encode(told))
        return
    rows = [
        (it.name, it.state, *(("", "") if it.odds is None else (it.odds.odds_hash[:16], _window(it.odds))))
        for it in found
    ]
    print_table(["campaign", "state", "odds hash", "open"], rows)


@campaign_app.command()
def show(name: NameArgument, as_json: JsonOption = False) -> None:
    """Show a campaign: its live version, its chances, what is left of its stock, what the latest pulls came to."""
    engine = engine_of()
    campaign, odds = _live(engine, name)
    with engine.connect().execution_options(read_only=True) as connection:
        left = stock.left(connection, name)
        now = live.look(connection, odds)
    outlook = Outlook.of(odds)
    if as_json:
        told = {"state": campaign.state, "odds_hash": odds.odds_hash, **outlook.told(), "left": left}
        print_json(msgspec.json.encode({**told, "live": now.told()}))
        return
    out.print(f"{name} is {campaign.state}, {_window(odds)}. Odds hash {odds.odds_hash}.")
    show_prizes(outlook)
    show_figures(outlook)
    for code, units in left.items():
        out.print(f"{code}: {units:,} units left")
    show_live(outlook, now)


@campaign_app.command("conformity")
def conformity_command(
    name: NameArgument, since: SinceOption = None, until: UntilOption = None, as_json: JsonOption = False
) -> None:
    """Test whether players' draws came as often as the odds say. Exit code 1 if they did not."""
    settings = settings_with("database_url")
    period = period_of(since, until)
    conforms = show_conformity(engine_of(settings), settings, name, period, as_json=as_json)
    raise typer.Exit(0 if conforms else 1)


def _live(engine: Engine, name: str) -> tuple[Campaign, Odds]:
    """A campaign and its live version. Raises CampaignNotFound."""
    campaign = Campaigns(engine).find(name)
    if campaign is None or campaign.odds is None:
        raise CampaignNotFound(f"there is no published campaign {name!r}")
    return campaign, campaign.odds


def _window(odds: Odds) -> str:
    begin = "open" if odds.opens is None else f"from {when(odds.opens)} UTC"
    return begin if odds.closes is None else f"{begin} until {when(odds.closes)} UTC"


# ---- lists of accounts -----------------------------------------------------------------------------------------------

list_app = typer.Typer(help="Keep lists of accounts, for campaigns' eligibility.", no_args_is_help=True)
campaign_app.add_typer(list_app, name="accounts")
ListArgument = Annotated[str, typer.Argument(help="The list's name.", show_default=False)]
AccountsArgument = Annotated[list[int], typer.Argument(help="Account ids.", show_default=False)]


@list_app.command("add")
def list_add(name: ListArgument, accounts: AccountsArgument, reason: ReasonOption) -> None:
    """Put accounts on a list."""
    new = lists.put_on(engine_of(), name, accounts, operator=shell_operator(), reason=reason)
    out.print(f"{new} new on {name}")


@list_app.command("remove")
def list_remove(name: ListArgument, accounts: AccountsArgument, reason: ReasonOption) -> None:
    """Take accounts off a list."""
    gone = lists.take_off(engine_of(), name, accounts, operator=shell_operator(), reason=reason)
    out.print(f"{gone} gone from {name}")


@list_app.command("show")
def list_show(name: ListArgument) -> None:
    """Print the accounts on a list, one per line."""
    with engine_of().connect().execution_options(read_only=True) as connection:
        for account_id in sorted(lists.accounts_on(connection, name)):
            typer.echo(account_id)
