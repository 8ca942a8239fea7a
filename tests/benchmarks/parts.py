"""Where a draw's microseconds go: the CPU time of each process, within our worker of each part, and what is idle."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import redis
from sqlalchemy import text

from tests.benchmarks import watched
from tests.benchmarks.lab import LEAD_IN, LEAD_OUT, Contestant, Lab, Say, Sizes, make_draws
from tests.benchmarks.report import Finding

TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
OURS: Final = (watched.BROKER, watched.PARSING, watched.SETTLING, watched.DRIVER, watched.RESULTS)


@dataclass(frozen=True, slots=True)
class Counted:
    """What all have used and asked for at one moment."""

    at: float
    done: int
    cpu_s: dict[str, float]
    asked: dict[str, int]


def parts(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """Microseconds of CPU for each draw, by part, of the baseline and of ours; and what a draw asks of the servers."""
    pool = ("--concurrency=8", "--prefetch-multiplier=4")
    theirs = [lab.celery_redis(*pool), lab.celery_rabbitmq(*pool)]
    ours = [lab.stream(), lab.accepted(), lab.queue()]
    findings = [_of(lab, it, sizes.baseline_draws) for it in theirs]
    findings += [_of(lab, replace(it, runner=watched.__name__), sizes.draws) for it in ours]
    return [finding for some in findings for finding in some]


def _of(lab: Lab, contestant: Contestant, count: int) -> list[Finding]:
    lab.clear()
    draws = make_draws(count)
    contestant.fill(draws)
    seen: list[Counted] = []
    report = lab.folder / "parts.json"
    os.environ[watched.FILE] = str(report)
    with lab.worker(contestant) as worker:
        pids = {"worker": worker.process.pid, "MariaDB": lab.mariadb.pid, "Redis": lab.redis.pid}
        pids["RabbitMQ"] = lab.rabbitmq.pid

        def watch(done: int) -> None:
            if (not seen and done >= LEAD_IN * count) or (len(seen) == 1 and done >= LEAD_OUT * count):
                seen.append(_counted(lab, done, pids))

        lab.drain(contestant, worker, count, is_done=lambda: lab.settled(draws) == count, watch=watch)
    first, last = seen
    draws_seen = last.done - first.done
    cpu = {name: (last.cpu_s[name] - first.cpu_s[name]) * 1e6 / draws_seen for name in first.cpu_s}
    wall = (last.at - first.at) * 1e6 / draws_seen
    if contestant.runner == watched.__name__:
        cpu = _split(cpu, json.loads(report.read_text()), count)
    idle = (os.cpu_count() or 1) * wall - sum(cpu.values())
    told = {**{name: used for name, used in cpu.items() if used >= 0.05}, "in all": sum(cpu.values()), "idle": idle}
    group = f"parts of {contestant.name}"
    asked = {name: (last.asked[name] - first.asked[name]) / draws_seen for name in first.asked}
    return [
        *(Finding(group, f"{contestant.title}: {name}", used, "µs") for name, used in told.items()),
        *(Finding(group, f"{contestant.title}: {name}", number, "") for name, number in asked.items()),
    ]


def _split(cpu: dict[str, float], parts_s: dict[str, float], count: int) -> dict[str, float]:
    """The worker's CPU by part; what is in none of them is the worker's other work."""
    parts_us = {name: parts_s.get(name, 0.0) * 1e6 / count for name in OURS}
    parts_us[watched.SETTLING] -= parts_us[watched.DRIVER]
    split = {f"worker, {name}": used for name, used in parts_us.items()}
    split["worker, other"] = cpu["worker"] - sum(parts_us.values())
    return split | {name: used for name, used in cpu.items() if name != "worker"}


def _counted(lab: Lab, done: int, pids: dict[str, int | None]) -> Counted:
    with lab.engine.connect() as connection:
        query = text("SHOW GLOBAL STATUS WHERE variable_name IN ('Questions', 'Bytes_received', 'Bytes_sent')")
        status: dict[str, Any] = {str(name): value for name, value in connection.execute(query)}
    with redis.Redis.from_url(lab.redis.url) as client:
        info: Any = client.info()
    asked = {
        "statements of MariaDB": int(status["Questions"]),
        "bytes to MariaDB": int(status["Bytes_received"]),
        "bytes from MariaDB": int(status["Bytes_sent"]),
        "commands of Redis": int(info["total_commands_processed"]),
        "bytes to Redis": int(info["total_net_input_bytes"]),
        "bytes from Redis": int(info["total_net_output_bytes"]),
    }
    return Counted(time.monotonic(), done, {name: _cpu_s(pid) for name, pid in pids.items() if pid}, asked)


def _cpu_s(pid: int) -> float:
    """The CPU seconds of a process and its descendants so far."""
    children: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(folder.name))
        used[int(folder.name)] = sum(map(int, fields[11:15])) / TICKS_PER_S  # of its ended children as well
    wanted, total = [pid], 0.0
    while wanted:
        it = wanted.pop()
        total += used.get(it, 0.0)
        wanted += children.get(it, [])
    return total
