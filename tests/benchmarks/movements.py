"""Draws with transfers and refunds among them, beside the same draws alone: their rate, and the server's deadlocks."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Final

from sqlalchemy import text

from tests.benchmarks.lab import ACCOUNTS, POLL_S, PUBLISH_SIZE, Lab, Say, Sizes, make_draws
from tests.benchmarks.report import Finding, at_least, at_most
from tombola.producers import DrawRequest
from tombola.producers.brokers.registry import open_broker
from tombola.producers.domain.contract import Request
from tombola.producers.domain.operations.refund import RefundRequest
from tombola.producers.domain.operations.transfer import TransferRequest

TRANSFERS, REFUNDS = 0.02, 0.01  # of the draws: 200 and 100 a second beside 10,000 draws a second
GROUP: Final = "movements"


def movements(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """In turn, a Stream and one worker; every round ends with the audit."""
    seen: dict[str, list[float]] = {"alone": [], "among": []}
    deadlocks = 0
    for number in range(1, sizes.rounds + 1):
        # The order changes from round to round: the second contestant meets another machine than the first.
        for name in (("alone", "among"), ("among", "alone"))[number % 2]:
            rate, met = _rate(lab, sizes.draws, has_movements=name == "among")
            seen[name].append(rate)
            deadlocks += met
            say(f"round {number}: draws {name} {rate:,.0f}/s, {met} deadlocks")
    beside = statistics.median(one / two for one, two in zip(seen["among"], seen["alone"], strict=True))
    return [
        Finding(GROUP, "draws alone", statistics.median(seen["alone"]), "draws/s"),
        Finding(GROUP, "draws among 2 % transfers and 1 % refunds", statistics.median(seen["among"]), "draws/s"),
        at_least(GROUP, "draws among movements : alone", beside, "×", 0.95),
        at_most(GROUP, "deadlocks", deadlocks, "", 0),
    ]


def _rate(lab: Lab, count: int, *, has_movements: bool) -> tuple[float, int]:
    """The rate of `count` draws from a full queue, and the deadlocks that the server met."""
    lab.clear()
    contestant = lab.stream()
    earlier = make_draws(int(count * REFUNDS))
    contestant.fill(earlier)
    with lab.worker(contestant) as worker:
        while lab.settled(earlier) < len(earlier):
            worker.check()
            time.sleep(POLL_S)
    draws = make_draws(count)
    others = [*_refunds(earlier), *_transfers(int(count * TRANSFERS))] if has_movements else []
    mixed: list[Request] = [*draws, *others]
    random.shuffle(mixed)
    with closing(open_broker(contestant.broker_url, publish_timeout_s=30)) as broker:
        for start in range(0, len(mixed), PUBLISH_SIZE):
            broker.publish([it.encode() for it in mixed[start : start + PUBLISH_SIZE]])
    before, done = _deadlocks(lab), len(earlier) + len(mixed)
    with lab.worker(contestant) as worker:
        lab.drain(contestant, worker, len(mixed), is_done=lambda: lab.settled(draws) == len(draws))
    lab.check_books(done)
    return lab.settle_rate(draws), _deadlocks(lab) - before


def _refunds(draws: Sequence[DrawRequest]) -> list[RefundRequest]:
    return [
        RefundRequest(account_id=it.account_id, draw=it.request_key, policy="write_off", reason="benchmark")
        for it in draws
    ]


def _transfers(count: int) -> list[TransferRequest]:
    pairs = [random.sample(range(1, ACCOUNTS + 1), 2) for _ in range(count)]
    return [TransferRequest(account_id=payer, to=receiver, amount="1.00") for payer, receiver in pairs]


def _deadlocks(lab: Lab) -> int:
    with lab.engine.connect() as connection:
        return int(connection.execute(text("SHOW GLOBAL STATUS LIKE 'Innodb_deadlocks'")).one()[1])
