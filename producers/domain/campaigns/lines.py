"""Where a mistake stands in a TOML text: the standard parser tells positions only of what is not TOML."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from tombola.producers.domain.campaigns.form import Path


def syntax_error(error: tomllib.TOMLDecodeError, text: str) -> str:
    """What is wrong with what is no TOML, and where."""
    what, _, where = str(error).rpartition(" (at ")
    line = re.match(r"line (\d+)", where)
    number = int(line[1]) if line else text.count("\n") + 1
    return f"line {number}: this is not TOML: {what:.200}"


def line_of(text: str, path: Path) -> int:
    """The line that `path` stands in, or else what `path` is a part of; the first line for the manifest itself."""
    best, best_length = 1, 0
    for number, found in _statements(text):
        common = min(len(found), len(path))
        if common > best_length and path[:common] == found[:common]:
            best, best_length = number, common
    return best


def _statements(text: str) -> Iterator[tuple[int, Path]]:
    """Each header and each key of a TOML document: its line, from one, and its path.

    The document is known to be right: so a statement ends where what was gathered of it is TOML by itself.
    """
    table: Path = ()
    counts: dict[Path, int] = {}
    begin, gathered = 1, ""
    for number, line in enumerate(text.split("\n"), 1):
        if not gathered:
            begin = number
        gathered += line + "\n"
        try:
            said = tomllib.loads(gathered)
        except (tomllib.TOMLDecodeError, ValueError, RecursionError):
            continue
        is_header, gathered = gathered.lstrip().startswith("["), ""
        if is_header:
            table = _counted(said, counts)
            yield begin, table
        else:
            yield from ((begin, table + path) for path in _paths(said))


def _counted(said: Any, counts: dict[Path, int]) -> Path:
    """The path of a header; elements of a list of tables are counted."""
    counted: Path = ()
    while said:
        ((key, said),) = said.items()
        counted = (*counted, key)
        if isinstance(said, list):  # [[this]]: a new element begins
            counts[counted] = counts.get(counted, -1) + 1
            said = {}
        if counted in counts:
            counted = (*counted, counts[counted])
    return counted


def _paths(said: Mapping[str, Any]) -> Iterator[Path]:
    """The paths that a statement writes, those inside an inline table or a list of them included."""
    for key, value in said.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in _paths(value))
        elif isinstance(value, list):
            for number, it in enumerate(value):
                yield (key, number)
                if isinstance(it, dict):
                    yield from ((key, number, *rest) for rest in _paths(it))
