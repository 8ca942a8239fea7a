"""A stranger with 50 connections and any request they like: an honest POST stays quick, and memory bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from producers import api_keys
from tests import servers
from tests.chaos.stranger import KINDS
from tests.gateways import Gateway, gateway
from tests.processes import PROJECT, House

SECONDS = 5.0
RATE = 60
CONNECTIONS = 8
SLOWER_MAX = 4.0
QUIET_P99_MS_MIN = 8.0  # below, four times as much is what another process on this machine does
MEMORY_KB_MAX = 150 * 1024

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


def honest_p99_ms(url: str, api_key: str) -> float:
    """Of POST /v1/draws, RATE a second; none of them may fail."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.benchmarks.load", url + "/v1/draws", "--api-key", api_key),
            *("--connections", str(CONNECTIONS), "--seconds", str(SECONDS), "--rate", str(RATE)),
        ],
        cwd=PROJECT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    assert found["wrong"] == 0
    assert found["rate"] > 0.8 * RATE
    return found["p99_ms"]


@contextmanager
def stranger(url: str, kind: str) -> Iterator[None]:
    """One at work, from another machine, as it were: it takes no time from the gateway."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.stranger", url, kind, str(SECONDS + 4)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.nice(19),
    )
    try:
        yield
    finally:
        told, _ = process.communicate(timeout=60)
    print(f"{kind}: asked {told.strip()} times")


def memory_kb(started: Gateway) -> int:
    status = Path(f"/proc/{started.process.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, str, float]]:
    """A gateway on durable commits, an API key, and the p99 that it has by itself."""
    with (
        servers.mariadb(private=True) as database,
        servers.redis(private=True) as redis,
        House(f"{database.url}mysql", redis.url, redis.url) as house,
        gateway(house, TOMBOLA_BACKLOG_MAX="100000000") as started,
    ):
        api_key = api_keys.add(house.engine, "honest")
        honest_p99_ms(started.url, api_key)
        p99_ms = sorted(honest_p99_ms(started.url, api_key) for _ in range(3))[1]
        yield started, api_key, max(p99_ms, QUIET_P99_MS_MIN)


@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_post_stays_quick(quiet: tuple[Gateway, str, float], kind: str) -> None:
    started, api_key, quiet_p99_ms = quiet
    before = memory_kb(started)
    told = []
    for _ in range(3):  # the machine has others to serve: the best of three
        with stranger(started.url, kind):
            told.append(honest_p99_ms(started.url, api_key))
        print(f"{kind}: p99 {told[-1]:.1f} ms, quiet {quiet_p99_ms:.1f} ms, memory +{memory_kb(started) - before} kB")
        if told[-1] < SLOWER_MAX * quiet_p99_ms:
            break
    assert min(told) < SLOWER_MAX * quiet_p99_ms
    assert memory_kb(started) - before < MEMORY_KB_MAX
