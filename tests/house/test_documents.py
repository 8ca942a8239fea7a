"""What the documents show is what there is: links, commands and their options, settings, errors, code, pictures."""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import typer

from tombola.producers.gateway.problems import KINDS
from tombola.producers.settings import HOME_VARIABLE, PREFIX, Settings
from tombola.worker.cli import app

ROOT = Path(__file__).parents[2]
FOREIGN: Final = {".venv", "node_modules", "vendor", "build", ".pytest_cache", ".git"}
DOCUMENTS: Final = sorted(
    path.relative_to(ROOT) for path in ROOT.rglob("*.md") if not FOREIGN & set(path.relative_to(ROOT).parts)
)
SETTINGS: Final = Path("worker/docs/settings.md")
LOCATIONS = pytest.mark.parametrize("document", DOCUMENTS, ids=str)
# Variables of this prefix that are no settings, with what sets them.
OTHER_VARIABLES: Final = {HOME_VARIABLE, "TOMBOLA_SERVICE_HOST", "TOMBOLA_PORT"}


@cache
def text(document: Path) -> str:
    return (ROOT / document).read_text()


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """Every fenced block: its language and its content."""
    yield from re.findall(r"^ *```([\w-]*)\n(.*?)^ *```$", text(document), re.MULTILINE | re.DOTALL)


def prose(document: Path) -> str:
    """All that is no fenced block."""
    return re.sub(r"^ *```[\w-]*\n.*?^ *```$", "", text(document), flags=re.MULTILINE | re.DOTALL)


def test_there_are_documents_to_look_at() -> None:
    names = {str(document) for document in DOCUMENTS}
    assert {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"} <= names
    assert {"producers/docs/http-api.md", str(SETTINGS), "migrations/README.md"} <= names


# ---- links and pictures ----------------------------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """Those of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


def links(document: Path) -> list[str]:
    shown = re.sub(r"`[^`\n]*`(?!\])", "", prose(document))
    return re.findall(r"\]\(([^)\s]+)\)", shown) + re.findall(r'(?:src|href)="([^"]+)"', shown)


@LOCATIONS
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in links(document):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT)), link


@LOCATIONS
def test_every_file_named_exists(document: Path) -> None:
    """By its path from the top, in code within a line."""
    for name in re.findall(r"`((?:producers|worker|migrations|tests)/[\w./-]+)`", prose(document)):
        assert (ROOT / name).exists(), name


def test_every_document_is_linked_to() -> None:
    """From the README or from what it links to."""
    found, waiting = set(), [Path("README.md")]
    while waiting:
        document = waiting.pop()
        if document in found or document not in DOCUMENTS:
            continue
        found.add(document)
        for link in links(document):
            target = (ROOT / document).parent / link.partition("#")[0]
            if target.is_file():
                waiting.append(target.resolve().relative_to(ROOT))
    assert set(DOCUMENTS) - found == {Path("tests/domain/golden/README.md")}


def test_every_picture_is_shown() -> None:
    """The console's pages; TEST_CONSOLE_SHOTS makes new ones (tests/console/test_browser.py)."""
    shown = {Path(link).name for document in DOCUMENTS for link in links(document) if link.endswith(".png")}
    assert shown == {path.name for path in (ROOT / "worker" / "screenshots").iterdir()}


def test_the_readme_fits_on_two_screens() -> None:
    assert len([line for line in text(Path("README.md")).splitlines() if not line.startswith("![")]) <= 130


# ---- commands --------------------------------------------------------------------------------------------------------


def commands(command: Any = None, typed: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command and group of `tombola`, by the words that are typed."""
    command = command or typer.main.get_command(app)
    found = {typed: command}
    if is_group(command):
        for name in command.list_commands(None):
            found |= commands(command.get_command(None, name), (*typed, name))
    return found


def is_group(command: Any) -> bool:
    return hasattr(command, "list_commands")


COMMANDS: Final = commands()
LEAVES: Final = [" ".join(words) for words, command in COMMANDS.items() if not is_group(command)]


def typed_in(document: Path) -> Iterator[list[str]]:
    """The words after `tombola` wherever a document shows a command: in a console block, or in code within a line."""
    shown = [
        line
        for language, block in blocks(document)
        if language == "console"
        for line in block.replace("\\\n", "").splitlines()
    ]
    shown = [line.lstrip()[2:] for line in shown if line.lstrip().startswith("$ ")]
    shown += [it for it in re.findall(r"`([^`\n]+)`", prose(document)) if it.startswith(("tombola ", ".venv/bin/tom"))]
    for line in shown:
        for part in re.split(r"&&|\||;", line.partition("  #")[0].partition(" # ")[0]):
            words = shlex.split(part)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words and words[0].rpartition("/")[2] == "tombola":
                yield words[1:]


@LOCATIONS
def test_every_command_shown_exists(document: Path) -> None:
    for words in typed_in(document):
        known: tuple[str, ...] = ()
        while len(known) < len(words) and (*known, words[len(known)]) in COMMANDS:
            known = (*known, words[len(known)])
        command, rest = COMMANDS[known], words[len(known) :]
        if is_group(command):
            assert not rest or rest[0].startswith("-"), f"no such command: {words}"
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        options |= {"-h", "--help"}
        for word in rest:
            if word.startswith("--") or (word.startswith("-") and len(word) == 2):
                assert word.partition("=")[0] in options, f"no such option: {words}"
        arguments = [it for it in command.params if it.param_type_name == "argument"]
        assert arguments or not rest or rest[0].startswith("-"), f"takes no arguments: {words}"


@pytest.mark.parametrize("command", LEAVES)
def test_every_command_is_documented(command: str) -> None:
    assert any(f"tombola {command}" in text(document) for document in DOCUMENTS)


def test_every_target_of_make_shown_exists() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", text(Path("Makefile")), re.MULTILINE))
    shown = {
        name for document in DOCUMENTS for name in re.findall(r"(?:`|^\$ )make ([a-z][\w-]*)", text(document), re.M)
    }
    assert {"run", "test", "check", "help"} <= shown <= targets


# ---- settings --------------------------------------------------------------------------------------------------------


def settings_table() -> dict[str, str]:
    """Default by name."""
    rows = re.findall(r"^\| `TOMBOLA_(\w+)` \| .+ \|([^|]*)\|$", text(SETTINGS), re.MULTILINE)
    return {name.lower(): default.strip() for name, default in rows}


def test_each_setting_is_in_the_table() -> None:
    assert list(settings_table()) == list(dict.fromkeys(settings_table()))
    assert set(settings_table()) == set(Settings.model_fields)
    assert HOME_VARIABLE in text(SETTINGS)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_table_has_the_default(name: str) -> None:
    default = Settings.model_fields[name].default
    if isinstance(default, bool | int | float) or (isinstance(default, str) and default):
        shown = str(default).lower() if isinstance(default, bool) else f"{default:g}" if default == 0 else str(default)
        assert settings_table()[name] in (shown, shown.removesuffix(".0"))


@LOCATIONS
def test_every_variable_named_is_a_setting(document: Path) -> None:
    named = set(re.findall(rf"{PREFIX}[A-Z][A-Z_]*[A-Z]", text(document)))
    assert named <= {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES


# ---- code and errors -------------------------------------------------------------------------------------------------


@LOCATIONS
def test_python_compiles(document: Path) -> None:
    for language, block in blocks(document):
        if language == "python":
            ast.parse(textwrap.dedent(block), str(document))


def test_what_python_imports_of_ours_is_there() -> None:
    for document in DOCUMENTS:
        for language, block in blocks(document):
            if language != "python":
                continue
            for node in ast.walk(ast.parse(textwrap.dedent(block))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tombola"):
                    module = __import__(node.module or "", fromlist=[it.name for it in node.names])
                    assert all(hasattr(module, it.name) for it in node.names), (document, node.module)


def test_the_table_of_errors_is_the_codes() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (\d{3}) \| (.+) \| (.+) \|$", text(Path("producers/docs/http-api.md")), re.M)
    assert rows == [(kind.code, str(kind.status), kind.means, kind.remedy) for kind in KINDS]


# ---- what code refers to ---------------------------------------------------------------------------------------------

SOURCES: Final = [path for it in ("producers", "worker", "migrations", "tests") for path in (ROOT / it).rglob("*.py")]


def test_code_refers_to_documents_that_are_here() -> None:
    elsewhere = re.compile(r"\b(SPEC|DESIGN|FAULTS|BOOKS|VERIFIABLE)\b(\.md|,| \()|\bCAMPAIGNS\.md")
    for path in SOURCES:
        if path != Path(__file__):
            assert not elsewhere.search(path.read_text()), path


def test_what_code_calls_by_its_heading_is_a_heading() -> None:
    headings = set(re.findall(r"^#+ (.+)$", text(Path("ARCHITECTURE.md")), re.MULTILINE))
    named = {
        name
        for path in SOURCES
        for name in re.findall(r"ARCHITECTURE(?:\.md)?, ([A-Z][\w ]+?)[).:]", path.read_text())
        if path != Path(__file__)
    }
    assert named
    assert named <= headings


def test_every_invariant_that_is_audited_is_described() -> None:
    audited = set(re.findall(r'"(I\d+)":', (ROOT / "worker" / "audit" / "report.py").read_text()))
    assert len(audited) >= 8
    assert audited <= set(re.findall(r"^\| (I\d+) \|", text(Path("ARCHITECTURE.md")), re.MULTILINE))


def test_every_room_is_in_the_plan() -> None:
    plan = text(Path("ARCHITECTURE.md"))
    for house in ("producers", "worker"):
        for path in sorted((ROOT / house).iterdir()):
            if (path / "__init__.py").is_file():
                assert re.search(rf"^  {path.name}/ ", plan, re.MULTILINE), path.name
