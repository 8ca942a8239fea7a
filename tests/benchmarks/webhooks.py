"""Draws whose every result a webhook wants to hear, with a receiver that answers, is slow, or is down; and without."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from tests.benchmarks.lab import ROOT, STOP_S_MAX, Lab, Say, Sizes, make_draws
from tests.benchmarks.report import Finding, at_least
from tests.fulfilments.books import add_webhook
from tests.receivers import Answer, Receiver

GROUP: Final = "webhooks"
SLOW_S: Final = 5.0


def webhooks(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """In turn, a Stream, one worker and one relay; every round ends with the audit."""
    contenders: dict[str, Callable[[], float]] = {
        "none": lambda: _rate(lab, sizes.draws, ""),
        "answers": lambda: _answered(lab, sizes.draws, lambda _: 204),
        "slow": lambda: _answered(lab, sizes.draws, _slowly),
        "down": lambda: _rate(lab, sizes.draws, "http://127.0.0.1:9/hook"),  # nobody listens there
    }
    seen: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(1, sizes.rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seen[name].append(contenders[name]())
            say(f"round {number}: {name} {seen[name][-1]:,.0f}/s")

    def beside(name: str, other: str) -> float:
        return statistics.median(one / two for one, two in zip(seen[name], seen[other], strict=True))

    return [
        Finding(GROUP, "no webhook", statistics.median(seen["none"]), "draws/s"),
        Finding(GROUP, "a webhook hears of every draw : none", beside("answers", "none"), "×"),
        at_least(GROUP, "its receiver is slow : answers", beside("slow", "answers"), "×", 0.95),
        at_least(GROUP, "its receiver is down : answers", beside("down", "answers"), "×", 0.95),
    ]


def _slowly(_received: object) -> Answer:
    time.sleep(SLOW_S)
    return 204


def _answered(lab: Lab, count: int, answer: Callable[[object], Answer]) -> float:
    with Receiver(answer) as receiver:
        return _rate(lab, count, receiver.url)


def _rate(lab: Lab, count: int, url: str) -> float:
    """The rate of draws from a full queue while a relay delivers; with an empty `url` there is no webhook."""
    lab.clear()
    if url:
        add_webhook(lab.engine, "shop", url, "draw.settled")
    contestant, draws = lab.stream(), make_draws(count)
    contestant.fill(draws)
    with _relay(lab), lab.worker(contestant) as worker:
        lab.drain(contestant, worker, count, is_done=lambda: lab.settled(draws) == count)
    lab.check_books(count)
    return lab.settle_rate(draws)


@contextmanager
def _relay(lab: Lab) -> Iterator[None]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TOMBOLA_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tombola.worker", "relay"],
        cwd=ROOT,
        env=inherited | lab.environment(lab.redis.url) | {"TOMBOLA_WEBHOOK_PRIVATE": "true"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
