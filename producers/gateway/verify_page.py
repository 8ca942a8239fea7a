"""The page /verify as one file: markup, style and both scripts, and a policy that lets it run nothing else.

The policy stands in the page itself, so that a saved copy has it: no script and no style but these, no network at all.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Final

VERIFIERS: Final = Path(__file__).parents[1] / "verifiers"
PROGRAMS: Final = {"verify.py": "text/x-python", "verify.js": "text/javascript"}


@cache
def page() -> bytes:
    """The page."""
    parts = {"style": _read("page.css"), "script": _script()}
    text = _read("page.html").replace("{{policy}}", policy())
    for name, content in parts.items():
        text = text.replace(f"{{{{{name}}}}}", content)
    return text.encode()


@cache
def policy() -> str:
    """The content security policy of the page, as the page itself has it."""
    style, script = _hash(_read("page.css")), _hash(_script())
    return f"default-src 'none'; style-src '{style}'; script-src '{script}'; base-uri 'none'; form-action 'none'"


@cache
def program(name: str) -> bytes:
    """One of PROGRAMS, as it lies in producers/verifiers."""
    return (VERIFIERS / name).read_bytes()


def _script() -> str:
    return f"{_read('verify.js')}\n{_read('page.js')}"


def _read(name: str) -> str:
    return (VERIFIERS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
