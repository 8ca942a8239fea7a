"""The base on the oldest versions that pyproject.toml allows, in an environment of its own with nothing else in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests import servers
from tests.processes import House
from tombola.producers.domain.contract import parse_request
from tombola.producers.results import ResultStore, StoredResult
from tombola.worker.deliveries import open_deliveries
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Settled
from tombola.worker.settle.rules import Rules

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements-oldest.lock"
# What pip says where it can ask no index, or one that has no files for this Python.
NO_INDEX = re.compile(r"No matching distribution|Connection|Temporary failure|timed out", re.IGNORECASE)
ENQUEUE = """
import sys
from tombola.producers import DrawClient, DrawRequest
with DrawClient.from_env() as client:
    ticket = client.enqueue(DrawRequest(account_id=int(sys.argv[1]), request_key="k-1"))
print(ticket.lottery_session_id, ticket.reason)
"""
READ = """
from tombola.producers import DrawClient, Settings
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.ledger import get_lottery_session_transactions
with DrawClient.from_env() as client:
    print(client.wait("k-1", timeout_s=10).status)
engine = open_engine(Settings.from_env().need("database_url"))
print(*[row["idempotency_key"] for row in get_lottery_session_transactions("k-1", engine=engine)])
"""

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 13), reason="the oldest msgspec has no wheel for this Python")


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the oldest versions, which finds the project's folders but none of its dependencies."""
    home = tmp_path_factory.mktemp("oldest")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--disable-pip-version-check")
    done = subprocess.run(
        [*pip, "--no-deps", "--no-compile", "--only-binary=:all:", "--require-hashes", "-r", str(LOCK)],
        capture_output=True,
        text=True,
        timeout=150,
    )
    if done.returncode and NO_INDEX.search(done.stderr) and "DO NOT MATCH" not in done.stderr:
        raise servers.Unavailable(f"the package index does not give the oldest versions: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    packages = next((home / "lib").glob("python*/site-packages"))
    (packages / "tombola").mkdir()
    for folder in ("producers", "worker", "migrations"):
        (packages / "tombola" / folder).symlink_to(ROOT / folder)
    return python


def run(python: Path, house: House, script: str, *arguments: str) -> list[str]:
    settings = {
        f"TOMBOLA_{name.upper()}": house.settings.need(name) for name in ("database_url", "broker_url", "result_url")
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), "-c", script, *arguments],
        env=environment | settings,
        cwd=python.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_a_shop_draws_with_the_oldest_versions(
    oldest: Path, broker: str, redis_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    broker_url: str = request.getfixturevalue(f"{broker}_url")
    with House(f"sqlite:///{tmp_path}/ledger.db", broker_url, redis_url) as house:
        (account,) = house.accounts(1)
        assert run(oldest, house, ENQUEUE, str(account)) == ["k-1", "None"]
        source = open_deliveries(broker_url, claim_after_s=3600, prefetch=10)
        try:
            (delivery,) = source.fetch(10, wait_s=10)
        finally:
            source.close()
        draw = parse_request(delivery.body)
        (answer,) = tries.settle(house.engine, [draw], Rules(house.wheels, tries_max=1))
        assert isinstance(answer, Settled)
        store = ResultStore.from_settings(house.settings)
        store.put([StoredResult("k-1", answer.result, answer.settled_at)])
        store.close()
        status, *keys = run(oldest, house, READ)
        assert status == "completed"
        assert "k-1:consume" in keys
        assert run(oldest, house, ENQUEUE, str(account)) == ["k-1", "DUPLICATE_REQUEST_IDEMPOTENT"]
