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

from tests import servers
from tests.chaos.stranger import KINDS
from tests.gateways import Gateway, gateway
from tests.processes import PROJECT, House
from tombola.producers.storage import api_keys

SECONDS = 4.0
ROUNDS_MAX = 4
RATE = 60
CONNECTIONS = 8
SLOWER_MAX = 4.0
QUIET_P99_MS_MIN = 8.0  # below, four times as much is what another process on this machine does
MEMORY_KB_MAX = 150 * 1024

pytestmark = [pytest.mark.chaos, pytest.mark.process, pytest.mark.timeout(600)]


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
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, str]]:
    """A gateway on durable commits, and an API key for it."""
    with (
        servers.mariadb(private=True) as database,
        servers.redis(private=True) as redis,
        House(f"{database.url}mysql", redis.url, redis.url) as house,
        gateway(house, TOMBOLA_BACKLOG_MAX="100000000") as started,
    ):
        api_key = api_keys.add(house.engine, "honest")
        honest_p99_ms(started.url, api_key)
        yield started, api_key


@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_post_stays_quick(door: tuple[Gateway, str], kind: str) -> None:
    """In turns without and with the stranger: the machine has others to serve as well, and the best of each counts."""
    started, api_key = door
    before, quiet, beside = memory_kb(started), QUIET_P99_MS_MIN, float("inf")
    alone: list[float] = []
    for _ in range(ROUNDS_MAX):
        alone.append(honest_p99_ms(started.url, api_key))
        quiet = max(QUIET_P99_MS_MIN, min(alone))
        with stranger(started.url, kind):
            beside = min(beside, honest_p99_ms(started.url, api_key))
        print(f"{kind}: p99 {beside:.1f} ms, quiet {quiet:.1f} ms, memory +{memory_kb(started) - before} kB")
        if beside < SLOWER_MAX * quiet:
            break
    assert beside < SLOWER_MAX * quiet
    assert memory_kb(started) - before < MEMORY_KB_MAX
