"""What the README shows is what there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tombola.worker.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FOR_OPERATORS = (ROOT / "worker" / "README.md").read_text()


def commands() -> list[str]:
    """Every command of `tombola`, as it is typed."""
    return sorted(_commands(typer.main.get_command(app)))


def _commands(command: Any, typed: str = "") -> Iterator[str]:
    if not hasattr(command, "list_commands"):
        yield typed
        return
    for name in command.list_commands(None):
        yield from _commands(command.get_command(None, name), f"{typed} {name}".strip())


def test_there_are_commands_to_look_for() -> None:
    assert {"up", "gateway", "relay", "api-key add", "account show", "dead-letters replay"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_every_command_is_in_the_readme(command: str) -> None:
    assert f"tombola {command}" in README + FOR_OPERATORS


def test_the_snippet_is_the_pages_own_code() -> None:
    assert (ROOT / "producers" / "gateway" / "page" / "draw.js").read_text() in README


@pytest.mark.parametrize("path", ["producers/README.md", "producers/examples/README.md", "worker/README.md"])
def test_what_it_links_to_is_there(path: str) -> None:
    assert f"]({path.removesuffix('README.md')})" in README or f"]({path})" in README
    assert (ROOT / path).is_file()


def test_every_picture_is_there_and_shown() -> None:
    """The console's pages; TEST_CONSOLE_SHOTS makes new ones (tests/integration/test_console_browser.py)."""
    pictures = {path.name for path in (ROOT / "worker" / "screenshots").iterdir()}
    assert set(re.findall(r"screenshots/([\w-]+\.png)", FOR_OPERATORS)) == pictures
    assert set(re.findall(r"screenshots/([\w-]+\.png)", README)) <= pictures
