"""Selecting dead letters: the same filters for all commands."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Final, TypeVar

import typer

from tombola.producers.domain.causes import OPEN_STATES, Cause, LetterState
from tombola.worker.cli.shared_options import options_as
from tombola.worker.dead_letters.letters import Selection

R = TypeVar("R")

_AGE: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")
_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}

FILTERS: Final[dict[str, Any]] = {
    "ids": Annotated[list[int] | None, typer.Argument(help="Ids of dead letters; default: all that pass the filters.")],
    "cause": Annotated[str | None, typer.Option(help=f"Only this cause: {', '.join(Cause)}.")],
    "group": Annotated[str | None, typer.Option(help="Only this group, as `groups` lists it.")],
    "account": Annotated[int | None, typer.Option(help="Only this account.", metavar="ID")],
    "key": Annotated[str | None, typer.Option(help="Only this request key.")],
    "older": Annotated[str | None, typer.Option(help="Only if parked longer ago than this: 90s, 15m, 2h, 3d.")],
    "newer": Annotated[str | None, typer.Option(help="Only if parked within the last: 90s, 15m, 2h, 3d.")],
    "state": Annotated[
        list[str] | None,
        typer.Option(
            help=f"Only this state: {', '.join(LetterState)}, or all. May be repeated. "
            f"Default: {' and '.join(OPEN_STATES)}."
        ),
    ],
}
LISTED: Final = ("cause", "group", "account", "key", "older", "newer", "state")
# Without `state`: replay, discard and restore each take the dead letters in the states that allow it.
CHOSEN: Final = ("ids", "cause", "group", "account", "key", "older", "newer")


def selecting(*filters: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a command these FILTERS as options; its argument `selection` is the Selection that they make."""
    return options_as("selection", {name: FILTERS[name] for name in filters}, selection_of)


def selection_of(given: dict[str, Any]) -> Selection:
    """The Selection of FILTERS' values, by their names; raises typer.BadParameter and InvalidRequest."""
    states = given.get("state")
    return Selection(
        ids=tuple(given.get("ids") or ()),
        states=OPEN_STATES if not states else tuple(LetterState) if "all" in states else tuple(states),
        cause=given.get("cause"),
        group_id=given.get("group"),
        account_id=given.get("account"),
        request_key=given.get("key"),
        older_than_s=_age_s(given.get("older")),
        newer_than_s=_age_s(given.get("newer")),
    )


def _age_s(text: str | None) -> float | None:
    if text is None:
        return None
    match = _AGE.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"an age is a number and s, m, h or d, such as 15m: {text}")
    return float(match[1]) * _UNITS[match[2]]
