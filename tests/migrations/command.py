"""The command, in this process: starting one takes seconds."""

from __future__ import annotations

from typer.testing import CliRunner

from tombola.worker.cli import app


def tombola(*arguments: str, code: int = 0) -> str:
    """Run `tombola legacy …` in here; what it said, the words of its error included."""
    done = CliRunner().invoke(app, ["legacy", *arguments])
    assert (done.exit_code != 0) == bool(code), done.output
    return f"{done.output} {done.exception or ''}"
