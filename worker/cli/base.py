"""What the commands share: settings, the terminal, amounts, and how Ctrl-C ends them."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal, InvalidOperation
from types import FrameType
from typing import Annotated

import typer
from sqlalchemy import Engine

from tombola.producers.domain.errors import ConfigurationError, InvalidRequest
from tombola.producers.settings import Settings
from tombola.producers.storage.engines import open_engine
from tombola.worker.cli.terminal import out, print_json, print_table, shown
from tombola.worker.embedded.home import settings_from_anywhere

__all__ = ["out", "print_json", "print_table", "shown"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
AccountOption = Annotated[int, typer.Option("--account", help="The account that pays.", metavar="ID")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why: it is put on record.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask: for scripts.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="At most so many, the oldest first.")]
WhyOption = Annotated[str, typer.Option("--reason", help="Why, for the record of operators' actions.")]


def settings_with(*needed: str) -> Settings:
    """TOMBOLA_*, or what embedded mode left; raises ConfigurationError when one of `needed` is missing."""
    settings = settings_from_anywhere()
    if settings.need("database_url").startswith("sqlite") and not all(settings.has(name) for name in needed):
        raise ConfigurationError("tombola is not up: start it with `tombola up` in another terminal")
    for name in needed:
        settings.need(name)
    return settings


def engine_of(settings: Settings | None = None) -> Engine:
    """An engine for the settings' database."""
    settings = settings or settings_with("database_url")
    return open_engine(settings.need("database_url"), lock_wait_s=settings.lock_wait_s)


def amount_of(text: str) -> Decimal:
    """An amount that somebody typed."""
    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise typer.BadParameter(f"not an amount: {text}") from None
    if not amount.is_finite() or amount < 0:
        raise typer.BadParameter(f"an amount is 0 or more: {text}")
    return amount


@contextmanager
def until_interrupted() -> Iterator[threading.Event]:
    """Turn SIGTERM into what Ctrl-C does, and Ctrl-C into an orderly end with exit code 0."""
    interrupted = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        if interrupted.is_set():
            return  # already on the way out: the parts stop in their order
        interrupted.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    except KeyboardInterrupt:
        out.print("\nStopped. What was settled is kept for the next start.")
        raise typer.Exit(0) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def confirm(question: str) -> None:
    """Go on after a yes. Raises InvalidRequest where nobody can be asked, and typer.Exit after a no."""
    if not sys.stdin.isatty():
        raise InvalidRequest("nobody to ask here: add --yes")
    if not typer.confirm(question):
        out.print("Nothing was done.")
        raise typer.Exit(1)


def when(moment: datetime) -> str:
    """A moment in UTC, as tables show it."""
    return f"{moment:%Y-%m-%d %H:%M:%S}"
