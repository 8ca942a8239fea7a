"""The SQL in our code keeps to what every server knows that we name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("producers", "worker", "migrations") for path in (PROJECT / folder).rglob("*.py"))
# Built in no longer, or never, in MySQL 9: SHA2 and what is here besides are. (`SHA` is another name of SHA1.)
GONE = re.compile(
    r"\b(SHA1?|MD5|PASSWORD|OLD_PASSWORD|ENCODE|DECODE|ENCRYPT|DES_ENCRYPT|DES_DECRYPT)\s*\(", re.IGNORECASE
)


def texts(path: Path) -> list[str]:
    """Every string in a file but its docstrings, f-strings' parts joined as far as they are known."""
    found = []
    tree = ast.parse(path.read_text())
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in said:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(it.value) if isinstance(it, ast.Constant) else "?" for it in node.values))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_no_function_that_a_server_has_lost(path: Path) -> None:
    for it in texts(path):
        assert not GONE.search(it), it


def test_the_look_finds_what_it_is_for() -> None:
    assert GONE.search("SELECT GET_LOCK(CONCAT('tombola_', SHA1(DATABASE())), 0)")
    assert GONE.search("(SELECT md5 (CONCAT_WS(',', x)) AS h")
    assert not GONE.search("SHA2(DATABASE(), 224)")
