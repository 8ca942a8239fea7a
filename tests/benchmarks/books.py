"""Sealing: ledger rows sealed and verified a second, draws counted, and the draws' rate with sealing and without."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

from sqlalchemy import func, select

from tests.benchmarks.lab import BenchmarkFailed, Lab, Say, Sizes, make_draws
from tests.benchmarks.report import Finding, at_least, at_most
from tombola.producers.domain.operations.recharge import RECHARGE
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.ledger_leaves import ROWS_MAX
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.books import head as heads
from tombola.worker.books.sealer import EVERY_S
from tombola.worker.books.sealing import seal, seal_once
from tombola.worker.books.verification import check_blocks
from tombola.worker.conformity import counting

GROUP: Final = "books"


def books(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """In turn, a Stream and one worker; then everything that is left is sealed, and verified."""
    seen: dict[str, list[float]] = {"alone": [], "beside sealing": []}
    sealed, verified, shares, counted, count_shares = [], [], [], [], []
    for number in range(1, sizes.rounds + 1):
        # The order changes from round to round: the second contestant meets another machine than the first.
        for name in (("alone", "beside sealing"), ("beside sealing", "alone"))[number % 2]:
            rate, beside_rows, draw_cpu_s = _rate(lab, sizes.draws, seals=name == "beside sealing")
            seen[name].append(rate)
            say(f"round {number}: draws {name} {rate:,.0f}/s, {beside_rows:,} rows sealed meanwhile")
            if name == "alone":
                alone_cpu_s = draw_cpu_s
        rate, row_cpu_s = _seal_rate(lab)
        sealed.append(rate)
        shares.append(row_cpu_s * _rows_per_draw(lab, sizes.draws) / alone_cpu_s)
        say(f"round {number}: {alone_cpu_s * 1e6:.0f} µs of CPU a draw, {row_cpu_s * 1e6:.1f} µs to seal a row")
        rate, count_cpu_s = _count_rate(lab)
        counted.append(rate)
        count_shares.append(count_cpu_s / alone_cpu_s)
        say(f"round {number}: {rate:,.0f} draws/s counted, {count_cpu_s * 1e6:.1f} µs each")
        verified.append(_verify_rate(lab))
        say(f"round {number}: {sealed[-1]:,.0f} rows/s sealed, {verified[-1]:,.0f} rows/s verified")
    beside = statistics.median(one / two for one, two in zip(seen["beside sealing"], seen["alone"], strict=True))
    return [
        Finding(GROUP, "draws alone", statistics.median(seen["alone"]), "draws/s"),
        Finding(GROUP, "draws beside sealing", statistics.median(seen["beside sealing"]), "draws/s"),
        at_least(GROUP, "draws beside sealing : alone", beside, "×", 0.97),
        # This one says most where other programs use the machine as well.
        at_most(GROUP, "CPU of sealing a draw's rows : of the draw", statistics.median(shares), "×", 0.03),
        Finding(GROUP, "sealing, nothing else running", statistics.median(sealed), "rows/s"),
        Finding(GROUP, "counting for conformity, nothing else running", statistics.median(counted), "draws/s"),
        Finding(GROUP, "CPU of counting a draw : of the draw", statistics.median(count_shares), "×"),
        Finding(GROUP, "verifying, nothing else running", statistics.median(verified), "rows/s"),
    ]


def _rate(lab: Lab, count: int, *, seals: bool) -> tuple[float, int, float]:
    """The rate of `count` draws from a full queue, how many rows were sealed meanwhile, and the CPU time of a draw.

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
    marks: list[tuple[int, float]] = []
    with lab.worker(contestant) as worker, _sealing(lab, sealed) if seals else nullcontext():
        pids = (lab.mariadb.pid, lab.redis.pid, worker.process.pid)

        def watch(done: int) -> None:
            if done:  # the worker has started
                marks.append((done, _cpu_s(*pids)))

        lab.drain(contestant, worker, len(draws), is_done=lambda: lab.settled(draws) == len(draws), watch=watch)
    lab.check_books(2 * count)
    (first, before), (last, after) = marks[0], marks[-1]
    return lab.settle_rate(draws), sum(sealed), (after - before) / max(1, last - first)


def _cpu_s(*pids: int | None) -> float:
    """The CPU time that these processes have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime, fields 14 and 15 of proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")


def _rows_per_draw(lab: Lab, draws: int) -> float:
    with lab.engine.connect() as connection:
        rows = connection.execute(
            select(func.count()).select_from(transactions).where(transactions.c.business_type != RECHARGE)
        ).scalar_one()
    return rows / (2 * draws)


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


def _seal_rate(lab: Lab) -> tuple[float, float]:
    """Rows sealed a second, and the CPU time of a row: the server's and this process's."""
    time.sleep(2 * heads.SEEN_EVERY.total_seconds())  # until the newest rows have a watermark
    seal_once(lab.engine, after_s=0, rows_max=1)
    began, before = time.monotonic(), _cpu_s(lab.mariadb.pid, os.getpid())
    rows = seal(lab.engine, after_s=0)
    elapsed_s, cpu_s = time.monotonic() - began, _cpu_s(lab.mariadb.pid, os.getpid()) - before
    if not rows:
        raise BenchmarkFailed("nothing was left to seal")
    return rows / elapsed_s, cpu_s / rows


def _count_rate(lab: Lab) -> tuple[float, float]:
    """Draws counted a second, and the CPU time of a draw: the server's and this process's."""
    began, before = time.monotonic(), _cpu_s(lab.mariadb.pid, os.getpid())
    draws = counting.count(lab.engine)
    elapsed_s, cpu_s = time.monotonic() - began, _cpu_s(lab.mariadb.pid, os.getpid()) - before
    if not draws:
        raise BenchmarkFailed("nothing was left to count")
    return draws / elapsed_s, cpu_s / draws


def _verify_rate(lab: Lab) -> float:
    rows: list[int] = []
    began = time.monotonic()
    found = list(check_blocks(lab.engine, on_block=lambda block: rows.append(block.row_count)))
    if found:
        raise BenchmarkFailed(f"sealed rows do not verify: {found[0]}")
    return sum(rows) / (time.monotonic() - began)
