"""Printing on any terminal: in ASCII or latin-1, 80 columns wide, or to a pipe.

Characters that the terminal's encoding lacks are replaced (see `plain_streams`): an emoji in a message must not end a
command in the middle of its output.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Sequence
from typing import Final

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

# The width without a terminal. Tables may be wider: scripts split the output by lines.
PIPE_WIDTH: Final = 200
_IS_TERMINAL = sys.stdout.isatty() or "COLUMNS" in os.environ
out = Console(highlight=False, soft_wrap=True, width=None if _IS_TERMINAL else PIPE_WIDTH)

PROSE_WIDTH_MIN: Final = 24
INDENT: Final = "    "

# ASCII for our own signs, where an encoding lacks them. One cell each, except the last: columns stay aligned.
_PLAIN: Final = str.maketrans({
    "✓": "+", "✗": "x", "×": "x", "–": "-", "·": "-", "→": ">", "━": "-", "’": "'", "“": '"', "”": '"', "…": "...",
})  # fmt: skip


def plain_streams() -> None:
    """Make stdout and stderr accept any text: characters that their encoding lacks are written as escapes."""
    codecs.register_error("tombola.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tombola.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


def print_json(json: bytes | str) -> None:
    """Print JSON; characters that the terminal's encoding lacks become JSON escapes, so the value stays the same."""
    text = json.decode() if isinstance(json, bytes) else json
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    codecs.register_error("tombola.json", _escaped)
    typer.echo(text.encode(encoding, "tombola.json").decode(encoding))


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2)), error.end


def shown(value: object) -> Text:
    """Untrusted text for a terminal: without markup, and with control characters escaped."""
    text = "" if value is None else str(value)
    return Text("".join(it if it.isprintable() or it in "\n\t" else ascii(it)[1:-1] for it in text))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, is_prose: bool = False) -> None:
    """Print a line per row. The last column is cut to fit if it `is_prose`; other columns never are: users copy them.

    On a terminal that is too narrow for a row, the row becomes several lines, with the columns' names in them.
    """
    cells = [[shown(value) for value in row] for row in rows]
    widths = [
        max([cell_len(column), *(row[number].cell_len for row in cells)]) for number, column in enumerate(columns)
    ]
    room = out.width - sum(width + 2 for width in widths[:-1]) - 2
    if is_prose:
        widths[-1] = min(widths[-1], max(room, PROSE_WIDTH_MIN))
    if widths[-1] > room and out.width != PIPE_WIDTH:
        _print_blocks(columns, cells, is_prose=is_prose)
        return
    table = Table(box=None)
    for column, width in zip(columns, widths, strict=True):
        table.add_column(column, no_wrap=True, overflow="ellipsis", width=width)
    for row in cells:
        table.add_row(*row)
    Console(highlight=False, width=max(out.width, sum(width + 2 for width in widths))).print(table)


def _print_blocks(columns: Sequence[str], rows: Sequence[Sequence[Text]], *, is_prose: bool) -> None:
    """Print per row: the first column, then the others by name, as many per line as fit; prose on a line of its own."""
    for row in rows:
        line = row[0].plain
        named = slice(1, -1 if is_prose else None)
        for column, cell in zip(columns[named], row[named], strict=True):
            if not cell:
                continue
            word = f"{column} {cell.plain}"
            if cell_len(line) + 2 + cell_len(word) > out.width:
                out.print(Text(line))
                line = f"{INDENT}{word}"
            else:
                line = f"{line}  {word}"
        out.print(Text(line))
        if is_prose and row[-1]:
            prose = Text(f"{INDENT}{row[-1].plain}".replace("\n", " "))
            prose.truncate(max(out.width, PROSE_WIDTH_MIN), overflow="ellipsis")
            out.print(prose)
