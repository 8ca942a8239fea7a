"""Replaying dead letters from a shell: what it would do, doing it, watching it, stopping it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Final

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import Engine

from tombola.producers.brokers.registry import broker_of
from tombola.producers.domain.draw import wheels
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.settings import Settings
from tombola.worker.cli.base import (
    JsonOption,
    LimitOption,
    ReasonOption,
    YesOption,
    confirm,
    engine_of,
    out,
    print_json,
    print_table,
    settings_with,
    shown,
)
from tombola.worker.cli.selecting import CHOSEN, selecting
from tombola.worker.dead_letters import letters
from tombola.worker.dead_letters.letters import Selection
from tombola.worker.operators.actions import shell_operator
from tombola.worker.replays import replay as replays
from tombola.worker.replays.forecast import OUTCOMES, REFUSALS, Forecast, forecast
from tombola.worker.replays.replay import Options, Replay
from tombola.worker.replays.replayer import Replayer
from tombola.worker.replays.vouching import Vouching

LINES_SHOWN_MAX: Final = 20
REASON_WIDTH_MAX: Final = 140
EXAMPLES: Final = (
    "\b\nExamples:\n"
    "  tombola dead-letters replay 17 18 --reason 'account 6 was locked'\n"
    "  tombola dead-letters replay --cause 'unknown campaign' --canary 10 --reason 'rolled back'\n"
    "  tombola dead-letters replay --newer 2h --rate 500 --yes --json --reason 'after the outage'\n"
)


@selecting(*CHOSEN)
def foretell(
    selection: Selection,
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a replay would do, message by message and in sum. Writes nothing."""
    settings = settings_with("database_url")
    said = _foretell(settings, engine_of(settings), selection, limit, quiet=as_json)
    if as_json:
        sums = {"counts": said.counts, "reasons": said.reasons, "charged": said.charged, "is_exact": said.is_exact}
        print_json(msgspec.json.encode({**sums, "lines": [it._asdict() for it in said.lines]}))
        return
    lines = [(it.id, it.account_id, it.request_key, it.outcome, it.why) for it in said.lines[:LINES_SHOWN_MAX]]
    print_table(["id", "account", "request key", "outcome", "why"], lines, is_prose=True)
    if said.total > LINES_SHOWN_MAX:
        out.print(f"… and {said.total - LINES_SHOWN_MAX:,} more: --json lists them all")
    _show_sums(said)


@selecting(*CHOSEN)
def replay(
    selection: Selection,
    reason: ReasonOption,
    rate: Annotated[float | None, typer.Option(min=0.001, help="At most so many a second.")] = None,
    limit: LimitOption = None,
    canary: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Send so many first and wait for their outcome, then twice as many, …; stop if the cause is back.",
        ),
    ] = None,
    vouch: Annotated[
        bool,
        typer.Option(
            "--vouch", help="Send as well what is not signed, or nobody is on record for: you know what asked for it."
        ),
    ] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send dead letters again, each under its own request key: what had happened after all is not charged again.

    Prints the forecast and asks. Ctrl-C stops: what is sent is sent, the rest stays parked. Exit code 1 unless all that
    was selected has settled.
    """
    settings = settings_with("database_url", "broker_url")
    engine = engine_of(settings)
    if as_json and not yes:
        raise InvalidRequest("--json asks nothing: add --yes")
    if not yes or not as_json:
        said = _foretell(settings, engine, selection, limit, vouch=vouch, quiet=as_json)
        _show_sums(said)
        if not yes:
            if said.is_hopeless and canary is None:
                canary = replays.CANARY
                out.print(f"The first {canary} are tried before the others: --canary says another number.")
            confirm("Replay them?")
            if said.is_hopeless:
                confirm(f"{said.hopeless:,} of {said.total:,} would be parked still, or again. Replay all the same?")
    options = Options(rate=rate, limit=limit, canary=canary, vouch=vouch)
    replay_id = replays.begin(engine, selection, options, operator=shell_operator(), reason=reason)
    broker = broker_of(settings)
    try:
        done = _run(Replayer(engine, broker, settings), engine, replay_id, quiet=as_json)
    finally:
        broker.close()
    if as_json:
        print_json(msgspec.json.encode(done._asdict()))
    else:
        _show_end(done)
    raise typer.Exit(0 if done.status == replays.DONE and done.settled == done.selected else 1)


def _run(replayer: Replayer, engine: Engine, replay_id: int, *, quiet: bool) -> Replay:
    with engine.connect().execution_options(read_only=True) as connection:
        total = replays.find(connection, replay_id).selected
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[outcomes]}"),
        TimeElapsedColumn(),
        console=out,
        disable=quiet,
    )
    with progress, _stopped_by_ctrl_c(replayer):
        bar = progress.add_task(f"replay {replay_id}", total=total, speed="", outcomes="")

        def tell(it: Replay) -> None:
            seconds = max(0.001, (it.seen_at - it.started_at).total_seconds())
            outcomes = f"{it.settled:,} settled, {it.parked_again:,} parked again"
            progress.update(bar, completed=it.sent + it.refused, speed=f"{it.sent / seconds:,.0f}/s", outcomes=outcomes)

        return replayer.run(replay_id, tell)


@contextmanager
def _stopped_by_ctrl_c(replayer: Replayer) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the replay between two steps."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        replayer.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _foretell(
    settings: Settings, engine: Engine, selection: Selection, limit: int | None, *, vouch: bool = False, quiet: bool
) -> Forecast:
    known = wheels(settings.seed_bytes) if settings.has("seed") else None
    with engine.connect().execution_options(read_only=True) as connection:
        total = letters.count(connection, selection)
    with Progress(console=out, transient=True, disable=quiet or total < 2000) as progress:
        bar = progress.add_task("forecast", total=min(total, limit or total))
        vouching = Vouching.of(settings, by_operator=vouch)

        def tell(done: int) -> None:
            progress.update(bar, completed=done)

        return forecast(engine, selection, known, limit=limit, vouching=vouching, tell=tell)


def _show_sums(said: Forecast) -> None:
    out.print(f"Of {said.total:,} selected dead letters a replay now")
    words = {
        "already settled": "have settled already: nothing happens",
        "would charge": "would be charged: " + (", ".join(f"{sum_:,} {code}" for code, sum_ in said.charged.items())),
        "would be rejected": "would be rejected",
        "conflict": "conflict with what was accepted under their key: left parked",
        "cannot be parsed": "still cannot be parsed: left parked",
        "not vouched for": "are not signed, or nobody is on record for them: left parked, without --vouch",
        "unknown campaign": "name a campaign that is not known here: parked again",
    }
    for outcome in OUTCOMES:
        if said.counts[outcome]:
            out.print(f"{said.counts[outcome]:>9,}  {words[outcome]}")
            for why, number in said.reasons.most_common():
                if why.startswith((f"{outcome}: ", f"{outcome}, such as: ")):
                    said_why = why.removeprefix(outcome).lstrip(":, ")
                    line = shown(f"{'':>9}    {number:,} × {said_why}")
                    line.truncate(min(out.width, REASON_WIDTH_MAX), overflow="ellipsis")
                    out.print(line)
    if not said.is_exact:
        out.print("TOMBOLA_SEED is not set here: what would be won is left out of the balances.")
    if said.total and all(outcome in REFUSALS for outcome in said.counts):
        out.print("None of them can be replayed as it is.")


def _show_end(done: Replay) -> None:
    out.print(
        f"replay {done.id} {done.status}: {done.sent:,} sent, {done.settled:,} settled, "
        f"{done.parked_again:,} parked again, {done.refused:,} left parked"
        + (f", {done.under_way:,} under way" if done.under_way else "")
    )
    if done.stopped_because:
        out.print(shown(done.stopped_because))
