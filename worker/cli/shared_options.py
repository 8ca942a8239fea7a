"""Options that several commands share, or that belong together: a command gets one object made of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

R = TypeVar("R")
Command = Callable[..., R]


def options_as(
    argument: str, options: dict[str, Any], make: Callable[[dict[str, Any]], Any]
) -> Callable[[Command[R]], Command[R]]:
    """Give a command these options, as keyword arguments of typer, in place of its own `argument`.

    `options` are annotations by name; the options' defaults are False for flags and None for others. `make` gets their
    values by name and returns the argument.
    """

    def decorate(command: Command[R]) -> Command[R]:
        def run(**given: Any) -> R:
            made = make({name: given.pop(name) for name in options})
            return command(**{argument: made}, **given)

        hints = get_type_hints(command, include_extras=True)
        own = [
            it.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, it in inspect.signature(command).parameters.items()
            if name != argument
        ]
        shared = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if annotation.__origin__ is bool else None,
                annotation=annotation,
            )
            for name, annotation in options.items()
        ]
        needed = [it for it in own if it.default is it.empty]
        parameters = [*needed, *shared, *(it for it in own if it not in needed)]
        run.__doc__ = command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {it.name: it.annotation for it in parameters}
        return run

    return decorate
