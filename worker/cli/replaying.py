"""Replaying dead letters from a shell: the forecast, the replay, its progress, and Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import Engine

from tombola.producers.brokers.registry import broker_of
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
from tombola.worker.cli.shared_options import options_as
from tombola.worker.dead_letters import letters
from tombola.worker.dead_letters.letters import Selection
from tombola.worker.operators.actions import shell_operator
from tombola.worker.replays import forecast as forecasts
from tombola.worker.replays import replay as replays
from tombola.worker.replays.forecast import OUTCOMES, REFUSALS, WOULD_CHARGE, Forecast
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
# The fields of a replay's Options.
OPTIONS: Final[dict[str, Any]] = {
    "rate": Annotated[float | None, typer.Option(min=0.001, help="At most this many a second.")],
    "limit": LimitOption,
    "canary": Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Send this many first and wait for their outcomes, then twice as many, and so on; stop when one is "
            "parked again for the same cause.",
        ),
    ],
    "vouch": Annotated[
        bool,
        typer.Option("--vouch", help="Also send messages that are neither signed nor on record: you know the sender."),
    ],
}


@selecting(*CHOSEN)
def show_forecast(
    selection: Selection,
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forecast what a replay would do, message by message and in sum. Writes nothing."""
    settings = settings_with("database_url")
    forecast = _forecast(settings, engine_of(settings), selection, Options(limit=limit), quiet=as_json)
    if as_json:
        sums = {
            "counts": forecast.counts,
            "reasons": forecast.reasons,
            "charged": forecast.charged,
        }
        print_json(msgspec.json.encode({**sums, "lines": [it._asdict() for it in forecast.lines]}))
        return
    lines = [(it.id, it.account_id, it.request_key, it.outcome, it.why) for it in forecast.lines[:LINES_SHOWN_MAX]]
    print_table(["id", "account", "request key", "outcome", "why"], lines, is_prose=True)
    if forecast.total > LINES_SHOWN_MAX:
        out.print(f"… and {forecast.total - LINES_SHOWN_MAX:,} more: --json lists them all")
    _show_sums(forecast)


@selecting(*CHOSEN)
@options_as("options", OPTIONS, lambda given: Options(**given))
def replay(
    selection: Selection,
    options: Options,
    reason: ReasonOption,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send dead letters again, each under its own request key: draws that have settled are not charged again.

    Prints the forecast and asks for confirmation. Ctrl-C stops the replay: messages that were sent settle, the others
    stay parked. Exit code 1 unless all selected messages have settled.
    """
    settings = settings_with("database_url", "broker_url")
    engine = engine_of(settings)
    if as_json and not yes:
        raise InvalidRequest("--json asks for no confirmation: add --yes")
    if not yes or not as_json:
        forecast = _forecast(settings, engine, selection, options, quiet=as_json)
        _show_sums(forecast)
        if not yes:
            options = _confirmed(options, forecast)
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


def _confirmed(options: Options, forecast: Forecast) -> Options:
    """The options after a yes; with a canary if most messages would be parked again. Raises what `confirm` raises."""
    if forecast.is_hopeless and options.canary is None:
        options = msgspec.structs.replace(options, canary=replays.CANARY)
        out.print(f"The first {options.canary} are sent before the others; --canary changes that number.")
    confirm("Replay them?")
    if forecast.is_hopeless:
        confirm(f"{forecast.hopeless:,} of {forecast.total:,} would stay parked, or be parked again. Replay anyway?")
    return options


def _run(replayer: Replayer, engine: Engine, replay_id: int, *, quiet: bool) -> Replay:
    """Run the replay with a progress bar, unless `quiet`; return its row at the end."""
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

        def on_progress(it: Replay) -> None:
            seconds = max(0.001, (it.seen_at - it.started_at).total_seconds())
            outcomes = f"{it.settled:,} settled, {it.parked_again:,} parked again"
            progress.update(bar, completed=it.sent + it.refused, speed=f"{it.sent / seconds:,.0f}/s", outcomes=outcomes)

        return replayer.run(replay_id, on_progress)


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


def _forecast(settings: Settings, engine: Engine, selection: Selection, options: Options, *, quiet: bool) -> Forecast:
    """The forecast for a replay with these options; shows a progress bar unless `quiet`."""
    limit = options.limit
    with engine.connect().execution_options(read_only=True) as connection:
        total = letters.count(connection, selection)
    with Progress(console=out, transient=True, disable=quiet or total < 2000) as progress:
        bar = progress.add_task("forecast", total=min(total, limit or total))
        vouching = Vouching.of(settings, by_operator=options.vouch)

        def on_progress(done: int) -> None:
            progress.update(bar, completed=done)

        return forecasts.forecast(engine, selection, limit=limit, vouching=vouching, on_progress=on_progress)


def _show_sums(forecast: Forecast) -> None:
    out.print(f"Of {forecast.total:,} selected dead letters, a replay now:")
    charged = ", ".join(f"{sum_:,} {code}" for code, sum_ in forecast.charged.items())
    meanings = {
        "already settled": "have settled already: nothing happens",
        "would charge": f"would be charged: {charged}",
        "would be rejected": "would be rejected",
        "conflict": "conflict with the request accepted under the same key: left parked",
        "cannot be parsed": "still cannot be parsed: left parked",
        "not vouched for": "are neither signed nor on record as accepted: left parked, without --vouch",
        "unknown campaign": "name a campaign that this release does not know: parked again",
    }
    for outcome in OUTCOMES:
        if forecast.counts[outcome]:
            out.print(f"{forecast.counts[outcome]:>9,}  {meanings[outcome]}")
            for why, number in forecast.reasons.most_common():
                if why.startswith((f"{outcome}: ", f"{outcome}, such as: ")):
                    reason = why.removeprefix(outcome).lstrip(":, ")
                    line = shown(f"{'':>9}    {number:,} × {reason}")
                    line.truncate(min(out.width, REASON_WIDTH_MAX), overflow="ellipsis")
                    out.print(line)
    if forecast.counts[WOULD_CHARGE]:
        out.print("Prizes are not known before a draw settles: a charge that one would pay for is shown as rejected.")
    if forecast.total and all(outcome in REFUSALS for outcome in forecast.counts):
        out.print("None of the selected dead letters can be replayed as it is.")


def _show_end(done: Replay) -> None:
    out.print(
        f"replay {done.id} {done.status}: {done.sent:,} sent, {done.settled:,} settled, "
        f"{done.parked_again:,} parked again, {done.refused:,} left parked"
        + (f", {done.under_way:,} under way" if done.under_way else "")
    )
    if done.stopped_because:
        out.print(shown(done.stopped_because))
