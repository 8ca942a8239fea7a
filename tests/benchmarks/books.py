"""Sealing: ledger rows sealed and verified a second, and the draws' rate with and without sealing beside them."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Final

from tests.benchmarks.lab import BenchmarkFailed, Lab, Say, Sizes, make_draws
from tests.benchmarks.report import Finding, at_least
from tombola.producers.storage.engines import open_engine
from tombola.worker.books import head as heads
from tombola.worker.books.rows import ROWS_MAX
from tombola.worker.books.sealer import EVERY_S
from tombola.worker.books.sealing import seal, seal_once
from tombola.worker.books.verification import check_blocks

GROUP: Final = "books"


def books(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """In turn, a Stream and one worker; then everything that is left is sealed, and verified."""
    seen: dict[str, list[float]] = {"alone": [], "beside sealing": []}
    sealed, verified = [], []
    for number in range(1, sizes.rounds + 1):
        # The order changes from round to round: the second contestant meets another machine than the first.
        for name in (("alone", "beside sealing"), ("beside sealing", "alone"))[number % 2]:
            rate, beside_rows = _rate(lab, sizes.draws, seals=name == "beside sealing")
            seen[name].append(rate)
            say(f"round {number}: draws {name} {rate:,.0f}/s, {beside_rows:,} rows sealed meanwhile")
        sealed.append(_seal_rate(lab))
        verified.append(_verify_rate(lab))
        say(f"round {number}: {sealed[-1]:,.0f} rows/s sealed, {verified[-1]:,.0f} rows/s verified")
    beside = statistics.median(one / two for one, two in zip(seen["beside sealing"], seen["alone"], strict=True))
    return [
        Finding(GROUP, "draws alone", statistics.median(seen["alone"]), "draws/s"),
        Finding(GROUP, "draws beside sealing", statistics.median(seen["beside sealing"]), "draws/s"),
        at_least(GROUP, "draws beside sealing : alone", beside, "×", 0.97),
        Finding(GROUP, "sealing, nothing else running", statistics.median(sealed), "rows/s"),
        Finding(GROUP, "verifying, nothing else running", statistics.median(verified), "rows/s"),
    ]


def _rate(lab: Lab, count: int, *, seals: bool) -> tuple[float, int]:
    """The rate of `count` draws from a full queue, and how many rows were sealed meanwhile.

    As many draws before them leave rows to seal: in steady state, what was written a minute ago is sealed now.
    """
    lab.clear()
    contestant = lab.stream()
    earlier, draws = make_draws(count), make_draws(count)
    contestant.fill(earlier)
    with lab.worker(contestant) as worker:
        lab.drain(contestant, worker, len(earlier), is_done=lambda: lab.settled(earlier) == len(earlier))
    contestant.fill(draws)
    sealed: list[int] = []
    with lab.worker(contestant) as worker, _sealing(lab, sealed) if seals else nullcontext():
        lab.drain(contestant, worker, len(draws), is_done=lambda: lab.settled(draws) == len(draws))
    lab.check_books(2 * count)
    return lab.settle_rate(draws), sum(sealed)


@contextmanager
def _sealing(lab: Lab, sealed: list[int]) -> Iterator[None]:
    """Seal beside the draws, every second as many rows as were written in the last one."""
    engine, stopping = open_engine(lab.database_url), threading.Event()

    def highest() -> int:
        with engine.connect() as connection:
            return heads.highest_id(connection)

    def run() -> None:
        before = highest()
        while not stopping.wait(EVERY_S):
            now = highest()
            left, before = now - before, now
            while left > 0 and not stopping.is_set():
                step = seal_once(engine, after_s=0, rows_max=min(left, ROWS_MAX))
                if step.block is None:
                    break
                sealed.append(step.block.row_count)
                left -= step.block.row_count

    sealing = threading.Thread(target=run, name="sealer", daemon=True)
    sealing.start()
    try:
        yield
    finally:
        stopping.set()
        sealing.join(30)
        engine.dispose()


def _seal_rate(lab: Lab) -> float:
    time.sleep(2 * heads.SEEN_EVERY.total_seconds())  # until the newest rows have a watermark
    seal_once(lab.engine, after_s=0, rows_max=1)
    began = time.monotonic()
    rows = seal(lab.engine, after_s=0)
    elapsed_s = time.monotonic() - began
    if not rows:
        raise BenchmarkFailed("nothing was left to seal")
    return rows / elapsed_s


def _verify_rate(lab: Lab) -> float:
    rows: list[int] = []
    began = time.monotonic()
    found = list(check_blocks(lab.engine, on_block=lambda block: rows.append(block.row_count)))
    if found:
        raise BenchmarkFailed(f"sealed rows do not verify: {found[0]}")
    return sum(rows) / (time.monotonic() - began)
