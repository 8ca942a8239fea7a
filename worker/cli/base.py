"""Shared by the commands: settings, options, amounts, confirmation, and Ctrl-C."""

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

from tombola.producers.domain.errors import ConfigurationError, InvalidRequest, ServiceUnavailable
from tombola.producers.settings import Settings
from tombola.producers.storage.engines import open_engine
from tombola.worker.cli.terminal import out, print_json, print_table, shown
from tombola.worker.embedded.home import settings_from_anywhere

__all__ = ["out", "print_json", "print_table", "shown"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
AccountOption = Annotated[int, typer.Option("--account", help="The account that pays.", metavar="ID")]
ReasonOption = Annotated[str, typer.Option("--reason", help="The reason, for the record of operators' actions.")]
OptionalReasonOption = Annotated[
    str, typer.Option("--reason", help="The reason, for the record of operators' actions.", show_default=False)
]
OnceOption = Annotated[
    str, typer.Option("--key", help="The same command under the same key has one effect. Default: a new key.")
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation: for scripts.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="At most this many, the oldest first.")]


def settings_with(*needed: str) -> Settings:
    """The settings from TOMBOLA_*, else of embedded mode; raises ConfigurationError when one of `needed` is missing."""
    settings = settings_from_anywhere()
    if settings.need("database_url").startswith("sqlite") and not all(settings.has(name) for name in needed):
        raise ConfigurationError("tombola is not up: start it with `tombola up` in another terminal")
    for name in needed:
        settings.need(name)
    return settings


def engine_of(settings: Settings | None = None) -> Engine:
    """An engine for the database of `settings`, by default those of `settings_with`."""
    settings = settings or settings_with("database_url")
    return open_engine(settings.need("database_url"), lock_wait_s=settings.lock_wait_s)


@contextmanager
def under_key(key: str) -> Iterator[str]:
    """Around a change that has one effect per `key`: after an unknown outcome, the error says to run it again."""
    try:
        yield key
    except ServiceUnavailable as error:
        raise ServiceUnavailable(
            f"{error}. The outcome is unknown: run the same command with --key {key}; it has one effect"
        ) from error


def amount_of(text: str) -> Decimal:
    """The amount in an argument; raises typer.BadParameter unless it is a number of 0 or more."""
    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise typer.BadParameter(f"not an amount: {text}") from None
    if not amount.is_finite() or amount < 0:
        raise typer.BadParameter(f"an amount is 0 or more: {text}")
    return amount


@contextmanager
def until_interrupted() -> Iterator[threading.Event]:
    """End in order, with exit code 0, at Ctrl-C or SIGTERM. The event is set then."""
    interrupted = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        if interrupted.is_set():
            return  # ending already: the parts stop in their order
        interrupted.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    except KeyboardInterrupt:
        out.print("\nStopped. Settled draws are kept for the next start.")
        raise typer.Exit(0) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def confirm(question: str) -> None:
    """Return after a yes. Raises typer.Exit after a no, and InvalidRequest without a terminal to ask on."""
    if not sys.stdin.isatty():
        raise InvalidRequest("no terminal to ask for confirmation on: add --yes")
    if not typer.confirm(question):
        out.print("Nothing was done.")
        raise typer.Exit(1)


def when(moment: datetime) -> str:
    """A moment for tables, to the second; in UTC, as `moment` is."""
    return f"{moment:%Y-%m-%d %H:%M:%S}"
