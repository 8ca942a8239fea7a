"""`tombola dead-letters`: list, show, forecast, replay, edit, discard and restore dead letters."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import click
import msgspec
import typer
from rich.text import Text
from sqlalchemy import Connection

from tombola.producers.domain.causes import LetterState
from tombola.producers.domain.errors import InvalidRequest
from tombola.worker.cli import replaying
from tombola.worker.cli.base import (
    JsonOption,
    ReasonOption,
    YesOption,
    confirm,
    engine_of,
    out,
    print_json,
    print_table,
    shown,
    when,
)
from tombola.worker.cli.selecting import CHOSEN, LISTED, selecting
from tombola.worker.dead_letters import letters
from tombola.worker.dead_letters.letters import DeadLetter, Selection
from tombola.worker.operators.actions import shell_operator

app = typer.Typer()
group = typer.Typer(
    help="Look at dead letters; forecast, replay, edit, discard and restore them.",
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


def _read(read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with engine_of().connect().execution_options(read_only=True) as connection:
        return read(connection, *arguments, **options)


# ---- look ------------------------------------------------------------------------------------------------------------


@group.command("list")
@selecting(*LISTED)
def list_letters(
    selection: Selection,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many to list.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, the latest first."""

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
            when(it.last_parked_at),
            it.times_parked,
            it.error,
        )
        for it in found
    ]
    print_table(["id", "state", "cause", "account", "request key", "parked", "times", "error"], rows, is_prose=True)
    out.print(f"{len(found):,} of {number:,}")


@group.command("groups")
@selecting("cause", "account", "older", "newer", "state")
def list_groups(
    selection: Selection,
    as_json: JsonOption = False,
) -> None:
    """Count dead letters by group: the same cause and exception, raised at the same place."""
    found: list[letters.Group] = _read(letters.groups, selection)
    if as_json:
        print_json(msgspec.json.encode(found))
        return
    rows = [
        (
            it.group_id,
            f"{it.count:,}",
            it.cause,
            when(it.first_parked_at),
            when(it.last_parked_at),
            it.sample_id,
            it.title,
        )
        for it in found
    ]
    print_table(["group", "count", "cause", "first", "last", "such as", "error"], rows, is_prose=True)
    out.print(f"{sum(it.count for it in found):,} in {len(found):,} groups")


@group.command("show")
def show(
    dead_letter: Annotated[int, typer.Argument(help="The dead letter's id.", metavar="ID")],
    as_json: JsonOption = False,
) -> None:
    """Show one dead letter: its body, its cause, the worker that parked it."""

    def read(connection: Connection) -> tuple[DeadLetter, list[int]]:
        return letters.get(connection, dead_letter), letters.copies(connection, dead_letter)

    it, copies = _read(read)
    if as_json:
        print_json(_json(it))
        return
    rows: list[tuple[str, Any]] = [
        ("state", f"{it.state}" + (f" since {when(it.state_at)}" if it.state_at else "")),
        ("cause", it.cause),
        ("error", it.error),
        ("group", it.group_id),
        ("request key", it.request_key),
        ("session", it.lottery_session_id),
        ("account", it.account_id),
        ("queue", it.queue),
        ("deliveries", it.deliveries),
        ("parked", f"{it.times_parked} times, {when(it.first_parked_at)} to {when(it.last_parked_at)}"),
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
@selecting(*LISTED)
def export(
    selection: Selection,
    to: Annotated[Path | None, typer.Option("--to", help="A new file; default: the standard output.")] = None,
) -> None:
    """Write dead letters as JSON, one per line, the latest first; bodies as text and in base64."""
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


# ---- replay ----------------------------------------------------------------------------------------------------------

group.command("forecast")(replaying.show_forecast)
group.command("replay", epilog=replaying.EXAMPLES)(replaying.replay)


# ---- edit, discard, restore ------------------------------------------------------------------------------------------


@group.command("edit")
def edit(
    dead_letter: Annotated[int, typer.Argument(help="The dead letter's id.", metavar="ID")],
    reason: ReasonOption,
    body: Annotated[
        str | None, typer.Option(help="The new body, a draw request in JSON; default: opens your editor.")
    ] = None,
) -> None:
    """Park an edited copy of a dead letter, to replay in its place. Request key and account cannot be edited."""
    engine = engine_of()
    with engine.connect().execution_options(read_only=True) as connection:
        original = letters.get(connection, dead_letter)
    if body is None:
        body = click.edit(_readable(original.body), extension=".json")
        if body is None:
            raise InvalidRequest("the editor saved nothing: no copy was made")
    copy = letters.edit(engine, dead_letter, body.strip().encode(), operator=shell_operator(), reason=reason)
    out.print(f"dead letter {copy} is the edited copy of {dead_letter}")
    out.print(f"next: tombola dead-letters replay {copy} --reason …")


@group.command("discard")
@selecting(*CHOSEN)
def discard(
    selection: Selection,
    reason: ReasonOption,
    yes: YesOption = False,
) -> None:
    """Discard dead letters: they are not replayed any more. Nothing is deleted; `restore` undoes it."""
    _act(letters.discard, "discarded", selection, reason, yes)


@group.command("restore")
@selecting(*CHOSEN)
def restore(
    selection: Selection,
    reason: ReasonOption,
    yes: YesOption = False,
) -> None:
    """Restore discarded dead letters: they are parked again."""
    selection = msgspec.structs.replace(selection, states=(LetterState.DISCARDED,))
    _act(letters.restore, "restored", selection, reason, yes)


def _act(act: Callable[..., int], done: str, selection: Selection, reason: str, yes: bool) -> None:
    engine = engine_of()
    with engine.connect().execution_options(read_only=True) as connection:
        number = letters.count(connection, selection)
    if number and not yes:
        confirm(f"{number:,} dead letters will be {done}. Go on?")
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
