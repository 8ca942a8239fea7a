"""`tombola dead-letters`: see what died, be told what a replay would do, do it, watch it, stop it."""

from __future__ import annotations

import base64
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Final

import click
import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from sqlalchemy import Connection, Engine

from tombola.producers.brokers.streams import broker_of
from tombola.producers.domain.causes import OPEN_STATES, Cause, LetterState
from tombola.producers.domain.draw import wheels
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.settings import Settings
from tombola.worker.cli.base import JsonOption, engine_of, out, print_json, print_table, settings_with, shown
from tombola.worker.dead_letters import letters
from tombola.worker.dead_letters.letters import DeadLetter, Selection
from tombola.worker.operators.actions import shell_operator
from tombola.worker.replays import replay as replays
from tombola.worker.replays.forecast import OUTCOMES, REFUSALS, Forecast, forecast
from tombola.worker.replays.replay import Options, Replay, Replayer
from tombola.worker.replays.vouching import Vouching

app = typer.Typer()
group = typer.Typer(
    help="Messages that were set aside: look, forecast, replay, edit, discard.",
    no_args_is_help=True,
    epilog=(
        "\b\nExamples:\n"
        "  tombola dead-letters groups\n"
        "  tombola dead-letters list --cause invalid --newer 2h\n"
        "  tombola dead-letters show 17\n"
        "  tombola dead-letters forecast --group 3f9c2a7be1d04c58\n"
        "  tombola dead-letters replay --group 3f9c2a7be1d04c58 --canary 10 --reason 'rolled back'\n"
        "  tombola dead-letters edit 17 --reason 'a typo'\n"
        "  tombola dead-letters discard --cause unparsable --older 30d --reason 'noise'\n"
    ),
)
app.add_typer(group, name="dead-letters")

LINES_SHOWN_MAX: Final = 20
REASON_WIDTH_MAX: Final = 140
_AGE: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")
_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}

IdsArgument = Annotated[list[int] | None, typer.Argument(help="Their ids; default: all that the filters leave.")]
CauseOption = Annotated[str | None, typer.Option(help=f"Only this cause: {', '.join(tuple(Cause))}.")]
GroupOption = Annotated[str | None, typer.Option("--group", help="Only this group, as `groups` lists it.")]
AccountOption = Annotated[int | None, typer.Option("--account", help="Only this account's.", metavar="ID")]
KeyOption = Annotated[str | None, typer.Option("--key", help="Only this request key.")]
OlderOption = Annotated[str | None, typer.Option("--older", help="Parked longer ago than this: 90s, 15m, 2h, 3d.")]
NewerOption = Annotated[str | None, typer.Option("--newer", help="Parked within the last: 90s, 15m, 2h, 3d.")]
StateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--state", help=f"{', '.join(LetterState)}, or all; may be repeated. Default: {' and '.join(OPEN_STATES)}."
    ),
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why: it is put on record.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask: for scripts.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="At most so many, the oldest first.")]


def _selection(
    ids: Sequence[int] | None,
    cause: str | None,
    group_id: str | None,
    account: int | None,
    key: str | None,
    older: str | None,
    newer: str | None,
    states: Sequence[str] | None = None,
) -> Selection:
    chosen = OPEN_STATES if not states else tuple(LetterState) if "all" in states else tuple(states)
    return Selection(
        ids=tuple(ids or ()),
        states=chosen,
        cause=cause,
        group_id=group_id,
        account_id=account,
        request_key=key,
        older_than_s=_age_s(older),
        newer_than_s=_age_s(newer),
    )


def _age_s(text: str | None) -> float | None:
    if text is None:
        return None
    match = _AGE.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"an age is a number and s, m, h or d, such as 15m: {text}")
    return float(match[1]) * _UNITS[match[2]]


def _read(read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with engine_of().connect().execution_options(read_only=True) as connection:
        return read(connection, *arguments, **options)


# ---- look ------------------------------------------------------------------------------------------------------------


@group.command("list")
def list_letters(
    cause: CauseOption = None,
    group_id: GroupOption = None,
    account: AccountOption = None,
    key: KeyOption = None,
    older: OlderOption = None,
    newer: NewerOption = None,
    state: StateOption = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many to list, the latest first.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, the latest first."""
    selection = _selection(None, cause, group_id, account, key, older, newer, state)

    def read(connection: Connection) -> tuple[list[DeadLetter], int]:
        return letters.some(connection, selection, rows_max=limit), letters.count(connection, selection)

    found, number = _read(read)
    if as_json:
        for letter in found:
            print_json(_json(letter))
        return
    rows = [
        (
            it.id,
            it.state,
            it.cause,
            it.account_id,
            it.request_key,
            _when(it.last_parked_at),
            it.times_parked,
            it.error,
        )
        for it in found
    ]
    print_table(["id", "state", "cause", "account", "request key", "parked", "times", "error"], rows, is_prose=True)
    out.print(f"{len(found):,} of {number:,}")


@group.command("groups")
def list_groups(
    cause: CauseOption = None,
    account: AccountOption = None,
    older: OlderOption = None,
    newer: NewerOption = None,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count dead letters by what they died of: like errors at the same place are one group."""
    found: list[letters.Group] = _read(
        letters.groups, _selection(None, cause, None, account, None, older, newer, state)
    )
    if as_json:
        print_json(msgspec.json.encode(found))
        return
    rows = [
        (
            it.group_id,
            f"{it.count:,}",
            it.cause,
            _when(it.first_parked_at),
            _when(it.last_parked_at),
            it.sample_id,
            it.title,
        )
        for it in found
    ]
    print_table(["group", "count", "cause", "first", "last", "such as", "error"], rows, is_prose=True)
    out.print(f"{sum(it.count for it in found):,} in {len(found):,} groups")


@group.command("show")
def show(
    dead_letter: Annotated[int, typer.Argument(help="Its id.", metavar="ID")], as_json: JsonOption = False
) -> None:
    """Show one dead letter: what it says, why it is here, who parked it."""

    def read(connection: Connection) -> tuple[DeadLetter, list[int]]:
        return letters.get(connection, dead_letter), letters.copies(connection, dead_letter)

    it, copies = _read(read)
    if as_json:
        print_json(_json(it))
        return
    rows: list[tuple[str, Any]] = [
        ("state", f"{it.state}" + (f" since {_when(it.state_at)}" if it.state_at else "")),
        ("cause", it.cause),
        ("error", it.error),
        ("group", it.group_id),
        ("request key", it.request_key),
        ("session", it.lottery_session_id),
        ("account", it.account_id),
        ("queue", it.queue),
        ("deliveries", it.deliveries),
        ("parked", f"{it.times_parked} times, {_when(it.first_parked_at)} to {_when(it.last_parked_at)}"),
        ("by", f"{it.worker or '?'}, release {it.version or '?'}"),
        ("headers", it.headers),
        ("replay", it.replay_id),
        ("edited from", it.edited_from),
        ("edited copies", ", ".join(map(str, copies)) or None),
    ]
    for name, value in rows:
        if value is not None:
            out.print(Text(f"{name:<13} ") + shown(value))
    out.print(f"\nbody, {it.body_bytes:,} bytes" + ("" if it.is_whole else f" (the first {len(it.body):,})") + ":")
    out.print(shown(_readable(it.body)))
    if it.traceback:
        out.print("\ntraceback:")
        out.print(shown(it.traceback.rstrip()))


@group.command("export")
def export(
    cause: CauseOption = None,
    group_id: GroupOption = None,
    account: AccountOption = None,
    key: KeyOption = None,
    older: OlderOption = None,
    newer: NewerOption = None,
    state: StateOption = None,
    to: Annotated[Path | None, typer.Option("--to", help="A file; default: the standard output.")] = None,
) -> None:
    """Write dead letters as JSON, one a line, the latest first; bodies in base64 as well as in text."""
    selection = _selection(None, cause, group_id, account, key, older, newer, state)
    engine = engine_of()

    def lines() -> Iterator[str]:
        before = None
        while True:
            with engine.connect().execution_options(read_only=True) as connection:
                found = letters.some(connection, selection, rows_max=1000, before_id=before)
            yield from map(_json, found)
            if len(found) < 1000:
                return
            before = found[-1].id

    if to is None:
        for line in lines():
            print_json(line)
        return
    number = 0
    try:
        with to.open("x", encoding="utf-8") as file:
            for line in lines():
                file.write(line + "\n")
                number += 1
    except OSError as error:
        raise InvalidRequest(f"{to} cannot be written: {error.strerror or error}") from None
    out.print(f"{number:,} dead letters written to {to}")


# ---- foretell and replay ---------------------------------------------------------------------------------------------


@group.command("forecast")
def foretell(
    ids: IdsArgument = None,
    cause: CauseOption = None,
    group_id: GroupOption = None,
    account: AccountOption = None,
    key: KeyOption = None,
    older: OlderOption = None,
    newer: NewerOption = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a replay would do, message by message and in sum. Writes nothing."""
    settings = settings_with("database_url")
    selection = _selection(ids, cause, group_id, account, key, older, newer)
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


@group.command(
    "replay",
    epilog=(
        "\b\nExamples:\n"
        "  tombola dead-letters replay 17 18 --reason 'account 6 was locked'\n"
        "  tombola dead-letters replay --cause 'unknown campaign' --canary 10 --reason 'rolled back'\n"
        "  tombola dead-letters replay --newer 2h --rate 500 --yes --json --reason 'after the outage'\n"
    ),
)
def replay(
    reason: ReasonOption,
    ids: IdsArgument = None,
    cause: CauseOption = None,
    group_id: GroupOption = None,
    account: AccountOption = None,
    key: KeyOption = None,
    older: OlderOption = None,
    newer: NewerOption = None,
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
    selection = _selection(ids, cause, group_id, account, key, older, newer)
    if as_json and not yes:
        raise InvalidRequest("--json asks nothing: add --yes")
    if not yes or not as_json:
        said = _foretell(settings, engine, selection, limit, vouch=vouch, quiet=as_json)
        _show_sums(said)
        if not yes:
            if said.is_hopeless and canary is None:
                canary = replays.CANARY
                out.print(f"The first {canary} are tried before the others: --canary says another number.")
            _confirm("Replay them?")
            if said.is_hopeless:
                _confirm(f"{said.hopeless:,} of {said.total:,} would be parked still, or again. Replay all the same?")
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


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise InvalidRequest("nobody to ask here: add --yes")
    if not typer.confirm(question):
        out.print("Nothing was done.")
        raise typer.Exit(1)


# ---- edit, discard, restore ------------------------------------------------------------------------------------------


@group.command("edit")
def edit(
    dead_letter: Annotated[int, typer.Argument(help="Its id.", metavar="ID")],
    reason: ReasonOption,
    body: Annotated[
        str | None, typer.Option(help="The new body, a draw request in JSON; default: your editor opens.")
    ] = None,
) -> None:
    """Make an edited copy of a dead letter, to replay instead of it. Its request key and account stay as they are."""
    engine = engine_of()
    with engine.connect().execution_options(read_only=True) as connection:
        original = letters.get(connection, dead_letter)
    if body is None:
        body = click.edit(_readable(original.body), extension=".json")
        if body is None:
            raise InvalidRequest("nothing was saved: nothing is changed")
    copy = letters.edit(engine, dead_letter, body.strip().encode(), operator=shell_operator(), reason=reason)
    out.print(f"dead letter {copy} is the edited copy of {dead_letter}")
    out.print(f"next: tombola dead-letters replay {copy} --reason …")


@group.command("discard")
def discard(
    reason: ReasonOption,
    ids: IdsArgument = None,
    cause: CauseOption = None,
    group_id: GroupOption = None,
    account: AccountOption = None,
    key: KeyOption = None,
    older: OlderOption = None,
    newer: NewerOption = None,
    yes: YesOption = False,
) -> None:
    """Put dead letters away, to be replayed no more. Nothing is deleted: `restore` brings them back."""
    _act(letters.discard, "discarded", _selection(ids, cause, group_id, account, key, older, newer), reason, yes)


@group.command("restore")
def restore(
    reason: ReasonOption,
    ids: IdsArgument = None,
    cause: CauseOption = None,
    group_id: GroupOption = None,
    account: AccountOption = None,
    key: KeyOption = None,
    older: OlderOption = None,
    newer: NewerOption = None,
    yes: YesOption = False,
) -> None:
    """Bring back what was discarded."""
    selection = _selection(ids, cause, group_id, account, key, older, newer, ["discarded"])
    _act(letters.restore, "restored", selection, reason, yes)


def _act(act: Callable[..., int], done: str, selection: Selection, reason: str, yes: bool) -> None:
    engine = engine_of()
    with engine.connect().execution_options(read_only=True) as connection:
        number = letters.count(connection, selection)
    if number and not yes:
        _confirm(f"{number:,} dead letters will be {done}. Go on?")
    out.print(f"{act(engine, selection, operator=shell_operator(), reason=reason):,} dead letters {done}")


# ---- how things are shown --------------------------------------------------------------------------------------------


def _json(letter: DeadLetter) -> str:
    shown = letter._asdict()
    shown["headers"] = None if letter.headers is None else msgspec.json.decode(letter.headers)
    shown["body"] = _readable(letter.body)
    shown["body_base64"] = base64.b64encode(letter.body).decode()
    return msgspec.json.encode(shown).decode()


def _readable(body: bytes) -> str:
    return body.decode(errors="backslashreplace")


def _when(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}"
