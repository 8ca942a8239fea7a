"""The gateway against the same framework's empty endpoint, on the same server, under the same load."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Final, NamedTuple

import uvicorn
from litestar import Litestar, post
from sqlalchemy import text

from tests import servers
from tests.benchmarks.lab import ROOT, BenchmarkFailed, Lab, Say, Sizes
from tests.benchmarks.report import Finding, at_least, at_most
from tombola.producers.domain.receipt_keys import SigningKey
from tombola.producers.storage import api_keys

CONNECTIONS: Final = 64
START_S_MAX: Final = 30.0
P99_MS_MAX: Final = 50.0
NO_MORE: Final[Mapping[str, str]] = MappingProxyType({})


class Contestant(NamedTuple):
    """What is asked: a server's command, the path of a POST, and settings of its own."""

    name: str
    command: list[str]
    path: str
    env: Mapping[str, str] = NO_MORE


@post("/empty", status_code=202)
async def empty() -> None:
    """Nothing, but with everything that the framework does around it."""


def empty_app() -> Litestar:
    return Litestar([empty], openapi_config=None)


def gateway(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """POST /v1/draws with durable commits, beside an endpoint that does nothing, and with a signed receipt each.

    Then its latency at half its load.
    """
    lab.clear()
    api_key = api_keys.add(lab.engine, "bench")
    own = [sys.executable, "-m", "tombola.worker", "gateway", "--port"]
    nothing = [sys.executable, "-m", "tests.benchmarks.gateway"]
    signing = {"TOMBOLA_RECEIPT_KEY": SigningKey.make().text}
    contestants = (
        Contestant("empty", nothing, "/empty"),
        Contestant("draws", own, "/v1/draws"),
        Contestant("receipts", own, "/v1/draws", signing),
    )
    rates: dict[str, list[float]] = {it.name: [] for it in contestants}
    for number in range(1, sizes.rounds + 1):
        for it in contestants:
            with _served(lab, it.command, it.env) as url:
                _load(url + it.path, api_key, seconds=1.0)
                rates[it.name].append(_load(url + it.path, api_key, seconds=sizes.load_s)["rate"])
            say(f"round {number}: {it.name} {rates[it.name][-1]:,.0f}/s")
            lab.clear()
    draws = statistics.median(rates["draws"])
    latencies = []
    for _ in range(sizes.rounds):
        with _served(lab, own) as url:
            _load(url + "/v1/draws", api_key, seconds=1.0)
            latencies.append(_load(url + "/v1/draws", api_key, seconds=sizes.load_s, rate=draws / 2))
        lab.clear()
        say(f"at half load: p50 {latencies[-1]['p50_ms']:.1f} ms, p99 {latencies[-1]['p99_ms']:.1f} ms")
    with lab.engine.begin() as connection:
        connection.execute(text("DELETE FROM api_keys"))
    group = "gateway"
    return [
        Finding(group, "an empty endpoint, one process", statistics.median(rates["empty"]), "requests/s"),
        Finding(group, "POST /v1/draws, one process, durable", draws, "requests/s"),
        at_least(group, "POST /v1/draws : empty endpoint", _ratio(rates, "draws", "empty"), "×", 0.5),
        at_least(group, "with a receipt each : without", _ratio(rates, "receipts", "draws"), "×", 0.9),
        Finding(group, "at half load, p50", statistics.median(it["p50_ms"] for it in latencies), "ms"),
        at_most(group, "at half load, p99", statistics.median(it["p99_ms"] for it in latencies), "ms", P99_MS_MAX),
    ]


def _ratio(rates: dict[str, list[float]], one: str, other: str) -> float:
    """The median of the ratios round by round: what else this machine did then hit both."""
    return statistics.median(mine / theirs for mine, theirs in zip(rates[one], rates[other], strict=True))


def _load(url: str, api_key: str, *, seconds: float, rate: float = 0.0) -> dict[str, float]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.benchmarks.load", url, "--api-key", api_key),
            *("--connections", str(CONNECTIONS), "--seconds", str(seconds), "--rate", str(rate)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds + 60,
    )
    if done.returncode:
        raise BenchmarkFailed(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout)
    if found["wrong"]:
        raise BenchmarkFailed(f"{found['wrong']:,} answers of {url} were errors")
    return found


@contextmanager
def _served(lab: Lab, command: list[str], more: Mapping[str, str] = NO_MORE) -> Iterator[str]:
    """A server process on a free port, from when it answers."""
    port = servers._free_port()
    unlimited = {"TOMBOLA_GATEWAY_RATE_MAX": "1000000", "TOMBOLA_BACKLOG_MAX": "100000000"}
    log = lab.folder / "gateway.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(port)],
            cwd=ROOT,
            env=os.environ | lab.environment(lab.redis.url) | unlimited | dict(more),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + START_S_MAX
        while True:
            try:
                socket.create_connection((servers.HOST, port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BenchmarkFailed(log.read_text(errors="replace")[-2000:]) from None
                time.sleep(0.05)
        yield f"http://{servers.HOST}:{port}"
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    # With the settings of `tombola gateway`, so that nothing but the endpoint differs.
    uvicorn.run(
        empty_app(),
        host=servers.HOST,
        port=int(sys.argv[1]),
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
    )
