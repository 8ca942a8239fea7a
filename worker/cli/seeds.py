"""`tombola seed`: chains of seed epochs, their anchors, revealing and rotating."""

from __future__ import annotations

import msgspec
import typer
from sqlalchemy import Connection

from tombola.producers.domain.errors import DrawError
from tombola.producers.storage import clock
from tombola.producers.storage.seeds import Chain, Epoch, all_chains
from tombola.worker.cli.base import (
    JsonOption,
    ReasonOption,
    YesOption,
    confirm,
    engine_of,
    out,
    print_json,
    print_table,
    settings_with,
    when,
)
from tombola.worker.operators.actions import checked_reason, shell_operator
from tombola.worker.operators.once import once
from tombola.worker.seeds import chains
from tombola.worker.seeds.masters import Masters
from tombola.worker.seeds.revealing import reveal_due
from tombola.worker.seeds.standing import ChainStanding, standings

app = typer.Typer()
group = typer.Typer(help="The seeds of draws: epochs, anchors, revealing, rotating.", no_args_is_help=True)
app.add_typer(group, name="seed")


@group.command()
def status(as_json: JsonOption = False) -> None:
    """Show the chains, the open epoch, and which epochs wait to be revealed."""
    settings = settings_with("database_url")
    masters = Masters(settings.seeds)
    with engine_of(settings).connect().execution_options(read_only=True) as connection:
        found = standings(connection, clock.now(connection))
    if as_json:
        print_json(msgspec.json.encode([_as_json(it, masters) for it in found]))
        return
    if not found:
        out.print("No chain has begun: the first worker begins it.")
        return
    print_table(
        ["chain", "anchor", "begun", "ends", "open", "revealed", "waiting", "seed here"],
        [
            (
                str(it.chain.chain),
                f"{it.chain.anchor.hex()[:16]}…",
                when(it.chain.begun_at),
                "" if it.ends_at is None else when(it.ends_at),
                "" if it.open is None else str(it.open.name),
                f"{it.revealed:,}",
                f"{it.secret:,}",
                "yes" if masters.of_chain(it.chain) else "no",
            )
            for it in found
        ],
    )
    for it in found:
        if it.open is not None:
            out.print(f"epoch {it.open.name} is open; its commitment is {it.open.commitment}")
        if it.oldest_secret is not None and it.oldest_secret.closes_at is not None:
            out.print(
                f"epoch {it.oldest_secret.name} was over at {when(it.oldest_secret.closes_at)}, and is secret still"
            )


@group.command()
def anchor(as_json: JsonOption = False) -> None:
    """Print the anchor of each chain: publish it where you cannot change it later."""
    with engine_of().connect().execution_options(read_only=True) as connection:
        found = [it for it in all_chains(connection) if it.chain]
    if as_json:
        print_json(msgspec.json.encode([_chain(it) for it in found]))
        return
    for it in found:
        typer.echo(f"{it.chain} {it.anchor.hex()}")


@group.command()
def reveal() -> None:
    """Reveal the secrets of all epochs that are over for long enough and have no draw under way, as workers do.

    Needs TOMBOLA_SEED. Exit code 1 if an epoch that is over stays secret.
    """
    settings = settings_with("database_url", "seed")
    engine = engine_of(settings)
    revealed = reveal_due(engine, Masters(settings.seeds), after_s=settings.seed_reveal_after_s)
    for name in revealed:
        out.print(f"epoch {name} is revealed")
    with engine.connect().execution_options(read_only=True) as connection:
        waiting = [it.oldest_secret for it in standings(connection, clock.now(connection)) if it.oldest_secret]
    for epoch in waiting:
        out.print(f"epoch {epoch.name} stays secret: {_why(epoch, settings.seed_reveal_after_s)}")
    if not revealed and not waiting:
        out.print("Every epoch that is over is revealed.")
    raise typer.Exit(1 if waiting else 0)


@group.command()
def rotate(reason: ReasonOption, yes: YesOption = False) -> None:
    """Begin a new chain with the first seed of TOMBOLA_SEED, a minute ahead; the last chain ends then.

    First set TOMBOLA_SEED=NEW,OLD for all workers, and restart them: a worker without the new seed cannot draw.
    """
    settings = settings_with("database_url", "seed")
    why, masters = checked_reason(reason), Masters(settings.seeds)
    if not yes:
        confirm("Do all workers have the new seed, in front of the old one?")

    def act(connection: Connection) -> Chain:
        return chains.rotate(connection, masters, by=shell_operator(), reason=why)

    begun = once(engine_of(settings), act)
    out.print(f"chain {begun.chain} opens at {when(begun.begun_at)} UTC; publish its anchor:")
    typer.echo(begun.anchor.hex())


def _why(epoch: Epoch, after_s: float) -> str:
    if epoch.closes_at is None:
        raise DrawError(f"epoch {epoch.name} has no end: run `tombola audit`")
    return (
        f"it was over at {when(epoch.closes_at)} UTC; it is revealed {after_s:,.0f} s after that, by a process with "
        "its seed, when no accepted request is bound to it"
    )


def _chain(it: Chain) -> dict[str, object]:
    return {"chain": it.chain, "anchor": it.anchor.hex(), "epochs": it.epochs, "begun_at": it.begun_at}


def _as_json(it: ChainStanding, masters: Masters) -> dict[str, object]:
    return _chain(it.chain) | {
        "ends_at": it.ends_at,
        "open": None if it.open is None else str(it.open.name),
        "commitment": None if it.open is None else it.open.commitment,
        "revealed": it.revealed,
        "waiting": it.secret,
        "has_seed": masters.of_chain(it.chain) is not None,
    }
