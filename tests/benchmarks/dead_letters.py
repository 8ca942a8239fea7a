"""What dead letters cost: good draws among poison, lists of 100,000, and a replay of all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Final

from tests import poison as corpus
from tests.benchmarks.lab import ACCOUNTS, BenchmarkFailed, Contestant, Lab, Say, Sizes, make_draws
from tests.benchmarks.report import Finding, at_least, at_most
from tombola.producers import DrawRequest
from tombola.producers.brokers.registry import open_broker
from tombola.producers.domain.causes import Cause, LetterState
from tombola.worker.dead_letters import letters as dead_letters
from tombola.worker.dead_letters import parking
from tombola.worker.dead_letters.letters import Selection
from tombola.worker.dead_letters.message import Parking
from tombola.worker.deliveries import Delivery
from tombola.worker.replays import replay
from tombola.worker.replays.forecast import forecast
from tombola.worker.replays.replayer import Replayer

OTHER_ACCOUNT: Final = ACCOUNTS + 1
PARKED_AT_ONCE: Final = 500
LOOKS: Final = 5
REPLAYS_WAIT_S: Final = 5.0


# ---- poison ----------------------------------------------------------------------------------------------------------


def poison(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """20,000 good draws with and without the corpus among them, in turn; the rate of the good ones."""
    count = max(20_000, sizes.draws // 2)
    rates: dict[str, list[float]] = {}
    for number in range(1, max(3, sizes.rounds) + 1):
        for contestant in (lab.stream(), lab.queue()):
            for kind in ("alone", "among poison"):
                name = f"{contestant.name} {kind}"
                value = _good_rate(lab, contestant, count, with_poison=kind == "among poison")
                rates.setdefault(name, []).append(value)
                say(f"round {number}: {name} {value:,.0f}/s")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    findings = []
    for name, title in (("stream", "Redis Stream"), ("queue", "RabbitMQ")):
        alone, among = medians[f"{name} alone"], medians[f"{name} among poison"]
        findings += [
            Finding("poison", f"{title}, good draws among poison", among, "draws/s"),
            at_least("poison", f"{title}, among poison : alone", among / alone, "×", 0.8),
        ]
    return findings


def _good_rate(lab: Lab, contestant: Contestant, count: int, *, with_poison: bool) -> float:
    lab.clear()
    good = make_draws(count)
    taken = good[: corpus.TAKEN_MIN]
    corpus.accept(lab.engine, taken)
    bad = corpus.corpus(taken, other_account=OTHER_ACCOUNT) if with_poison else []
    corpus.publish(contestant.broker_url, corpus.mixed(good, bad, seed=count))
    with lab.worker(contestant) as worker:
        lab.drain(contestant, worker, count, is_done=lambda: lab.settled(good) == count and _parked(lab) >= len(bad))
    lab.check_books(count)
    if with_poison:
        corpus.assert_parked_once(lab.engine, bad)
    return lab.settle_rate(good)


def _parked(lab: Lab) -> int:
    with lab.engine.connect() as connection:
        return dead_letters.count(connection, Selection(states=tuple(LetterState)))


# ---- a table full of them --------------------------------------------------------------------------------------------


def fill(lab: Lab, count: int) -> list[DrawRequest]:
    """Park `count` draws as a bad night leaves them, half of them accepted before; return them."""
    draws = make_draws(count)
    for start in range(0, count, 2 * PARKED_AT_ONCE):
        corpus.accept(lab.engine, draws[start : start + PARKED_AT_ONCE])
    for start in range(0, count, PARKED_AT_ONCE):
        parking.park(lab.engine, list(causes(draws[start : start + PARKED_AT_ONCE])), worker="bench:1")
    return draws


def causes(draws: Sequence[DrawRequest]) -> Iterator[Parking]:
    """Six of ten name an unknown campaign, three failed at one of three places, one was delivered too often."""
    for number, draw in enumerate(draws):
        delivery = Delivery(draw.encode(), number, 1)
        match number % 10:
            case 0 | 1 | 2 as place:
                error = _raised(place, draw.request_key)
                yield Parking(delivery, Cause.FAILED_ALONE, f"{type(error).__name__}: {error}", draw, error)
            case 3:
                why = "delivered 6 times and never settled"
                yield Parking(delivery, Cause.TOO_MANY_DELIVERIES, why, draw)
            case _:
                yield Parking(delivery, Cause.UNKNOWN_CAMPAIGN, "there is no campaign 'default' here", draw)


GROUPS: Final = 5


def _raised(place: int, key: str) -> Exception:
    def first() -> None:
        raise KeyError(key)

    def second() -> None:
        raise ValueError(f"no odds for {key}")

    def third() -> None:
        first()

    try:
        (first, second, third)[place]()
    except (KeyError, ValueError) as error:
        return error
    raise AssertionError


def full_replay(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """100,000 parked draws: how long lists take, what is foretold, and how fast all of them are replayed."""
    count = 100_000 if sizes.rounds > 1 else 30_000
    rates: list[float] = []
    findings: list[Finding] = []
    for number in range(1, sizes.rounds + 1):
        lab.clear()
        begin = time.perf_counter()
        draws = fill(lab, count)
        say(f"round {number}: {count:,} parked in {time.perf_counter() - begin:.0f} s")
        if not findings:
            findings = _looks(lab, say)
            begin = time.perf_counter()
            said = forecast(lab.engine, Selection())
            findings.append(Finding("replay", "forecast", count / (time.perf_counter() - begin), "draws/s"))
            if said.counts["would charge"] != count:
                raise BenchmarkFailed(f"the forecast says {said.counts}")
        contestant = lab.stream()
        with lab.worker(contestant) as worker:
            time.sleep(REPLAYS_WAIT_S)  # it is up
            worker.check()
            rates.append(_replay_all(lab, contestant, count))
        lab.check_books(count)
        say(f"round {number}: replayed at {rates[-1]:,.0f}/s")
        if lab.settled(draws) != count:
            raise BenchmarkFailed("not all draws are settled")
    value = statistics.median(rates)
    return [*findings, at_least("replay", f"{count:,} replayed and settled, Redis", value, "draws/s", 3000)]


def _replay_all(lab: Lab, contestant: Contestant, count: int) -> float:
    """From the first one sent to the last one known to be settled."""
    with closing(open_broker(contestant.broker_url, publish_timeout_s=30)) as broker:
        runner = Replayer(lab.engine, broker, lab.settings(contestant.broker_url))
        begin = time.perf_counter()
        replay_id = replay.begin(lab.engine, Selection(), replay.Options(), operator="bench", reason="to see how fast")
        done = runner.run(replay_id)
        took_s = time.perf_counter() - begin
    if (done.status, done.settled) != (replay.DONE, count):
        raise BenchmarkFailed(f"the replay ended so: {done}")
    return count / took_s


def _looks(lab: Lab, say: Say) -> list[Finding]:
    """What the lists of the command line and the console ask the database for."""
    everything = Selection(states=tuple(LetterState))
    with lab.engine.connect().execution_options(read_only=True) as connection:
        found = dead_letters.groups(connection, Selection())
        if len(found) != GROUPS:
            raise BenchmarkFailed(f"{len(found)} groups")
        looks: dict[str, Callable[[], Any]] = {
            "list": partial(dead_letters.some, connection, Selection(), rows_max=50),
            "list, all states": partial(dead_letters.some, connection, everything, rows_max=50),
            "list of a cause": partial(
                dead_letters.some, connection, Selection(cause=Cause.TOO_MANY_DELIVERIES), rows_max=50
            ),
            "list of a group": partial(
                dead_letters.some, connection, Selection(group_id=found[-1].group_id), rows_max=50
            ),
            "list of an account": partial(dead_letters.some, connection, Selection(account_id=6), rows_max=50),
            "list of the last hour": partial(dead_letters.some, connection, Selection(newer_than_s=3600), rows_max=50),
            "list of those older": partial(dead_letters.some, connection, Selection(older_than_s=3600), rows_max=50),
            "count": partial(dead_letters.count, connection, Selection()),
            "count of the last hour": partial(dead_letters.count, connection, Selection(newer_than_s=3600)),
            "counts": partial(dead_letters.counts, connection),
            "groups": partial(dead_letters.groups, connection, Selection()),
            "groups of all states": partial(dead_letters.groups, connection, everything),
            "groups of the last hour": partial(dead_letters.groups, connection, Selection(newer_than_s=3600)),
        }
        findings = []
        for name, look in looks.items():
            took_ms = []
            for _ in range(LOOKS):
                begin = time.perf_counter()
                look()
                took_ms.append((time.perf_counter() - begin) * 1000)
            say(f"{name}: {statistics.median(took_ms):.0f} ms, the slowest {max(took_ms):.0f} ms")
            findings.append(at_most("replay", name, statistics.median(took_ms), "ms", 300))
    return findings
