"""What the commands print, on any terminal: one in ASCII or latin-1, one of 80 columns, and none at all.

Characters that the terminal cannot show are written in others (see `plain_streams`), so that no command ends in the
middle of what it has to say because somebody put an emoji into a message.
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

# Where nobody looks, a table is as wide as it likes: scripts cut it by lines.
WIDTH_OF_NONE: Final = 200
_IS_LOOKED_AT = sys.stdout.isatty() or "COLUMNS" in os.environ
out = Console(highlight=False, soft_wrap=True, width=None if _IS_LOOKED_AT else WIDTH_OF_NONE)

PROSE_WIDTH_MIN: Final = 24
INDENT: Final = "    "

# Our own signs, where a terminal has them not. Of one width, but for the last: tables stay in line.
_PLAIN: Final = str.maketrans({
    "✓": "+", "✗": "x", "×": "x", "–": "-", "·": "-", "→": ">", "━": "-", "’": "'", "“": '"', "”": '"', "…": "...",
})  # fmt: skip


def plain_streams() -> None:
    """From here on standard output and error take any text: what their encoding lacks is written as an escape."""
    codecs.register_error("tombola.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tombola.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


def print_json(json: bytes | str) -> None:
    """Print JSON. Where the terminal lacks a character, JSON has an escape of its own for it: the value is the same."""
    text = json.decode() if isinstance(json, bytes) else json
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    codecs.register_error("tombola.json", _escaped)
    typer.echo(text.encode(encoding, "tombola.json").decode(encoding))


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2)), error.end


def shown(value: object) -> Text:
    """What a stranger may have written, for a terminal: no markup, and nothing that it would obey."""
    text = "" if value is None else str(value)
    return Text("".join(it if it.isprintable() or it in "\n\t" else ascii(it)[1:-1] for it in text))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, is_prose: bool = False) -> None:
    """A line for each row. If the last column `is_prose` it gives way; all others are whole, for they are copied.

    On a terminal that is too narrow for that, each row is a few lines of its own, with the columns' names in them.
    """
    cells = [[shown(value) for value in row] for row in rows]
    widths = [
        max([cell_len(column), *(row[number].cell_len for row in cells)]) for number, column in enumerate(columns)
    ]
    room = out.width - sum(width + 2 for width in widths[:-1]) - 2
    if is_prose:
        widths[-1] = min(widths[-1], max(room, PROSE_WIDTH_MIN))
    if widths[-1] > room and out.width != WIDTH_OF_NONE:
        _print_blocks(columns, cells, is_prose=is_prose)
        return
    table = Table(box=None)
    for column, width in zip(columns, widths, strict=True):
        table.add_column(column, no_wrap=True, overflow="ellipsis", width=width)
    for row in cells:
        table.add_row(*row)
    Console(highlight=False, width=max(out.width, sum(width + 2 for width in widths))).print(table)


def _print_blocks(columns: Sequence[str], rows: Sequence[Sequence[Text]], *, is_prose: bool) -> None:
    """Each row: its first column, then the others by name, as many in a line as go in; prose alone, on one line."""
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
