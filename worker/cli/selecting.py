"""Which dead letters a command is about: the same filters for all of them, in one place."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, Final, TypeVar, get_type_hints

import typer

from tombola.producers.domain.causes import OPEN_STATES, Cause, LetterState
from tombola.worker.dead_letters.letters import Selection

R = TypeVar("R")

_AGE: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")
_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}

FILTERS: Final[dict[str, Any]] = {
    "ids": Annotated[list[int] | None, typer.Argument(help="Their ids; default: all that the filters leave.")],
    "cause": Annotated[str | None, typer.Option(help=f"Only this cause: {', '.join(Cause)}.")],
    "group": Annotated[str | None, typer.Option(help="Only this group, as `groups` lists it.")],
    "account": Annotated[int | None, typer.Option(help="Only this account's.", metavar="ID")],
    "key": Annotated[str | None, typer.Option(help="Only this request key.")],
    "older": Annotated[str | None, typer.Option(help="Parked longer ago than this: 90s, 15m, 2h, 3d.")],
    "newer": Annotated[str | None, typer.Option(help="Parked within the last: 90s, 15m, 2h, 3d.")],
    "state": Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(LetterState)}, or all; may be repeated. Default: {' and '.join(OPEN_STATES)}."),
    ],
}
LISTED: Final = ("cause", "group", "account", "key", "older", "newer", "state")
# What can be replayed, discarded or restored is in the states for that.
CHOSEN: Final = ("ids", "cause", "group", "account", "key", "older", "newer")


def selecting(*filters: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a command these FILTERS as its options, and the Selection that they leave as its argument `selection`."""

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        def run(**given: Any) -> R:
            selection = selection_of({name: given.pop(name) for name in filters})
            return command(selection=selection, **given)

        hints = get_type_hints(command, include_extras=True)
        own = [
            it.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, it in inspect.signature(command).parameters.items()
            if name != "selection"
        ]
        chosen = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=FILTERS[name])
            for name in filters
        ]
        needed = [it for it in own if it.default is it.empty]
        run.__doc__ = command.__doc__
        run.__signature__ = inspect.Signature([*needed, *chosen, *(it for it in own if it not in needed)])  # type: ignore[attr-defined]
        run.__annotations__ = {it.name: it.annotation for it in (*own, *chosen)}
        return run

    return decorate


def selection_of(given: dict[str, Any]) -> Selection:
    """The Selection that these FILTERS leave, by their names; raises typer.BadParameter and InvalidRequest."""
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
