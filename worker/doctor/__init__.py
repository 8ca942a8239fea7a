"""The doctor: checks a deployment, and says what is wrong and what to do. It changes nothing on any server.

    for check in examine(settings):
        print(check.name, check.status, check.found, check.cure)

A server that is away is one failed check, and the checks that need it are skipped. A check that lacks a privilege is
skipped, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from rich.console import Console
from rich.markup import escape

from tombola.producers.brokers.registry import RABBITMQ, REDIS, kind_of
from tombola.producers.settings import Settings
from tombola.worker.doctor.checks import Check, Facts, skipped
from tombola.worker.doctor.configuration import examine_settings
from tombola.worker.doctor.database import examine_database, reading
from tombola.worker.doctor.draws import examine_draws, examine_workers
from tombola.worker.doctor.members import examine_members, examine_release
from tombola.worker.doctor.queues import examine_queues
from tombola.worker.doctor.streams import examine_consumers, examine_results, examine_stream

__all__ = ["Check", "examine", "show"]

MARKS: Final = {
    "ok": "[green]✓[/]",
    "warn": "[bold yellow]![/]",
    "fail": "[bold red]✗[/]",
    "skip": "[dim]–[/]",
}
NAME_WIDTH: Final = 26

BROKER_LOOKS: Final = {REDIS: examine_stream, RABBITMQ: examine_queues}


def examine(settings: Settings) -> Iterator[Check]:
    """Every check of the deployment behind `settings`, each as soon as it is done. Raises and writes nothing."""
    found = Facts()
    yield examine_release()
    yield from examine_settings(settings)
    yield from _examine_broker(settings, found)
    yield from _examine_results(settings, found)
    if settings.has("database_url"):
        with reading(settings.need("database_url")) as engine:
            yield from examine_database(engine, found)
            yield from examine_draws(engine, settings, found)
    else:
        yield _not_set("database", "TOMBOLA_DATABASE_URL")
    if settings.has("result_url"):
        has_beat = not settings.database_url.get_secret_value().startswith("sqlite")
        yield from examine_members(settings.need("result_url"), found, has_beat=has_beat)
    if is_stream := settings.broker_kind is REDIS:
        yield from examine_consumers(settings.need("broker_url"), found, claim_after_s=settings.claim_after_s)
    yield examine_workers(found, is_stream=is_stream)


def _examine_broker(settings: Settings, found: Facts) -> Iterator[Check]:
    if not settings.has("broker_url"):
        yield _not_set("broker", "TOMBOLA_BROKER_URL")
    else:
        url = settings.need("broker_url")
        yield from BROKER_LOOKS[kind_of(url)](url, found)


def _examine_results(settings: Settings, found: Facts) -> Iterator[Check]:
    if not settings.has("result_url"):
        yield _not_set("result store", "TOMBOLA_RESULT_URL")
    elif settings.need("result_url") == settings.broker_url.get_secret_value():
        yield from skipped(["result store"], "it is the broker")
    else:
        yield from examine_results(settings.need("result_url"), found)


def _not_set(name: str, variable: str) -> Check:
    return Check(
        name, "fail", f"{variable} is not set here", "set it, or run `tombola up` for everything on this machine"
    )


def show(checks: Iterable[Check], console: Console) -> bool:
    """Print each check as it comes, with its cure below it; return whether no check failed."""
    counted: Counter[str] = Counter()
    for check in checks:
        counted[check.status] += 1
        style = "dim" if check.status == "skip" else "default"
        name = f"{check.name:<{NAME_WIDTH}}"
        console.print(f"{MARKS[check.status]} {name} [{style}]{escape(check.found)}[/]", highlight=False)
        if check.cure:
            console.print(f"  {'':<{NAME_WIDTH}} [bold]→[/] {escape(check.cure)}", highlight=False)
    words = {"ok": "in order", "warn": "to look at", "fail": "wrong", "skip": "skipped"}
    summary = ", ".join(f"{counted[status]} {word}" for status, word in words.items() if counted[status])
    console.print(f"\n{summary}", highlight=False)
    return not counted["fail"]
