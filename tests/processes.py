"""Worker processes for tests, with what they need: database, broker, settings.

with processes.worker(env) as worker:      # `celery -A tombola.worker worker`, consuming when this returns
    ...
    worker.stop()                          # SIGTERM; returns the exit status
print(worker.log())
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from sqlalchemy import Engine, func, select

from tests import forks
from tests.kept_results import results_of
from tests.ledgers import migrated
from tombola.producers.brokers.registry import open_broker
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel, Wheels
from tombola.producers.domain.seeds import draw_key, secret_of
from tombola.producers.settings import Settings
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import dead_letters
from tombola.worker.audit.audit import audit
from tombola.worker.ledger.accounts import open_account

PROJECT = Path(__file__).parents[1]
SEED = "5eed" * 16
READY = "consuming draws"
START_TIMEOUT_S = 40.0
STOP_TIMEOUT_S = 40.0
POLL_INTERVAL_S = 0.05

# A batch takes up to 4 s with these settings: a claim comes a second later.
QUICK_CLAIM = {
    "TOMBOLA_LOCK_WAIT_S": "1",
    "TOMBOLA_TRIES_MAX": "1",
    "TOMBOLA_BATCH_SIZE_MAX": "7",
    "TOMBOLA_CLAIM_AFTER_S": "5",
}
CELERY = [sys.executable, "-m", "celery", "-A", "tombola.worker", "worker", "--loglevel=INFO"]


class Timeout(AssertionError):
    """A condition did not become true in time; the message says what was found instead."""


@dataclass
class Worker:
    """One process and its output."""

    process: forks.Process
    output: Path

    def log(self) -> str:
        return self.output.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """Ask for a warm shutdown; return the exit status."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise Timeout(f"the process still runs after {timeout_s:g} s; its log:\n{self.log()}") from None

    def kill(self) -> None:
        """SIGKILL to the worker and its pool."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None


def environment(env: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TOMBOLA_")}
    return inherited | {"PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1"} | dict(env)


@contextmanager
def worker(env: Mapping[str, str], *, command: Sequence[str] = (), until: str = READY) -> Iterator[Worker]:
    """A worker whose only TOMBOLA_* variables are those in `env`; entered when its log contains `until`."""
    with tempfile.TemporaryDirectory(prefix="tombola-worker-") as folder:
        output = Path(folder) / "log"
        with output.open("wb") as log:
            process = forks.start(command or CELERY, env=environment(env), cwd=folder, log=log)
        started = Worker(process, output)
        try:
            wait_for(
                lambda: until in started.log() or not started.is_alive,
                within_s=START_TIMEOUT_S,
                what=lambda: f"no {until!r} in its log:\n{started.log()}",
            )
            if until not in started.log():
                raise Timeout(f"the worker ended with {process.returncode} before {until!r}:\n{started.log()}")
            yield started
        finally:
            started.kill()


def failed_start(env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a worker that is expected to end by itself; return its exit status and output."""
    with tempfile.TemporaryDirectory(prefix="tombola-worker-") as folder:
        # Celery writes six lines of warnings for root.
        quiet = environment(env) | {"PYTHONWARNINGS": "ignore"}
        return subprocess.run(CELERY, cwd=folder, env=quiet, capture_output=True, text=True, timeout=START_TIMEOUT_S)


def wait_for(condition: Callable[[], bool], *, within_s: float, what: Callable[[], str]) -> None:
    """Poll until `condition()` is true; raise Timeout with the text of `what()` if it is not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise Timeout(f"not within {within_s:g} s: {what()}")
        time.sleep(POLL_INTERVAL_S)


class House:
    """One deployment: a migrated database with accounts, a broker, a result store."""

    def __init__(self, database_url: str, broker_url: str, result_url: str, **more: str) -> None:
        self.env = {
            "TOMBOLA_DATABASE_URL": database_url,
            "TOMBOLA_BROKER_URL": broker_url,
            "TOMBOLA_RESULT_URL": result_url,
            "TOMBOLA_SEED": SEED,
            **more,
        }
        self.settings = Settings.from_env(self.env)
        # As worker.celery's wheels_of. Importing that module would read TOMBOLA_* of this process's environment.
        self.wheels: Wheels = {DEFAULT_CAMPAIGN.name: Wheel(DEFAULT_CAMPAIGN, self.settings.seed_bytes)}
        self.engine: Engine = open_engine(self.settings.need("database_url"))

    @property
    def first_wheel(self) -> Wheel:
        """The wheel of the first day's draws by real workers, which begin a chain of seed epochs at their start."""
        secret = secret_of(self.settings.seed_bytes, 1)
        return Wheel(DEFAULT_CAMPAIGN, draw_key(secret, DEFAULT_CAMPAIGN.name))

    def __enter__(self) -> "House":
        migrated(self.engine)
        return self

    def __exit__(self, *_error: object) -> None:
        self.engine.dispose()

    def accounts(self, count: int, *, balance: int = 1000) -> list[int]:
        return [open_account(self.engine, user_id=number, balance=Decimal(balance)) for number in range(1, count + 1)]

    def publish(self, *bodies: bytes) -> None:
        broker = open_broker(self.settings.need("broker_url"), publish_timeout_s=20)
        try:
            broker.publish(bodies)
        finally:
            broker.close()

    def enqueue(self, draws: Sequence[DrawRequest]) -> None:
        self.publish(*[draw.encode() for draw in draws])

    def results(self) -> dict[str, str]:
        """All results in the database, by request key; empty for requests that are not settled."""
        return {key: (body or b"").decode() for key, body in results_of(self.engine).items()}

    def settled(self) -> int:
        with self.engine.connect().execution_options(read_only=True) as connection:
            settled = select(func.count()).select_from(requests).where(requests.c.settled_at.is_not(None))
            return int(connection.execute(settled).scalar_one())

    def causes(self) -> list[str]:
        """The causes of all dead letters, sorted."""
        with self.engine.connect().execution_options(read_only=True) as connection:
            return sorted(connection.execute(select(dead_letters.c.cause)).scalars().all())

    def dead(self) -> int:
        return len(self.causes())

    def wait_settled(self, count: int, *, within_s: float, log: Callable[[], str] = str) -> None:
        wait_for(
            lambda: self.settled() >= count,
            within_s=within_s,
            what=lambda: f"{self.settled()} of {count} settled, dead: {self.causes()}\n{log()[-4000:]}",
        )

    def violations(self) -> list[str]:
        return [str(violation) for violation in audit(self.engine, self.wheels).violations]


def draws(accounts: Sequence[int], count: int, *, prefix: str = "draw") -> list[DrawRequest]:
    """`count` draw requests, spread over `accounts`."""
    return [
        DrawRequest(account_id=accounts[number % len(accounts)], request_key=f"{prefix}_{number:05d}")
        for number in range(count)
    ]
