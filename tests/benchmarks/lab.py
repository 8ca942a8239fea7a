"""The lab: private servers with durable commits, equal tables for everyone, workers as real processes, one clock.

How a rate is read: every contestant writes `settled_at` into `api_idempotency_requests` when a transaction begins. The
rate is what was settled between the first batch that begins after 5 % of the draws and the first after 95 %: start-up,
cold caches and the last, half-filled batches stay out of it, everything a draw needs (results and acks) stays in.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import kombu
import redis
from amqp.exceptions import NotFound
from sqlalchemy import ColumnElement, Engine, and_, create_engine, func, select, text
from sqlalchemy.engine import make_url

from tests import servers
from tests.benchmarks import baseline
from tombola import migrations
from tombola.producers import DrawClient, DrawRequest, Settings
from tombola.producers.brokers.registry import open_broker
from tombola.producers.brokers.streams import QUEUE
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.worker.audit import audit

ROOT: Final = Path(__file__).parents[2]
ACCOUNTS: Final = 10_000
LEDGER_TABLES: Final = (
    *("asset_transactions", "api_idempotency_requests", "dead_letters", "operator_actions", "fulfilments"),
    *("campaigns", "campaign_versions", "campaign_accounts", "campaign_stock", "campaign_stock_changes"),
    *("replays", "account_holds", "books_blocks", "books_head", "books_house", "books_snapshots"),
    *("audit_marks", "audited_accounts", "webhooks"),
    *("conformity_parts", "conformity_counts", "conformity_accounts"),
)
BALANCE: Final = 1_000_000
SEED: Final = "5eed" * 16
# As a server that is written to all day would have it: the default of 96 MiB flushes pages all the time.
REDO_LOG: Final = ("--innodb-log-file-size=1G",)
DATABASE: Final = "tombola"
WHEELS: Final = {DEFAULT_CAMPAIGN.name: Wheel(DEFAULT_CAMPAIGN, bytes.fromhex(SEED))}
LEAD_IN, LEAD_OUT = 0.05, 0.95
POLL_S: Final = 0.02
PUBLISH_SIZE: Final = 1000
STOP_S_MAX: Final = 30.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    rounds: int
    draws: int
    slices: int  # of throughput: many and small, so that all contestants meet the same machine
    slice_draws: int
    baseline_draws: int
    calibration_draws: int
    latency_s: float
    published: int
    ledger_rows: int
    memory_draws: int
    load_s: float


Say = Callable[[str], None]


class BenchmarkFailed(Exception):
    """A contestant did not do its work: no figure is better than a wrong one."""


@dataclass(frozen=True)
class Contestant:
    """A worker under test: how to start it, how to fill its queue and how to see what is left in it."""

    name: str
    title: str
    broker_url: str
    module: str
    fill: Callable[[Sequence[DrawRequest]], None]
    backlog: Callable[[], int]
    options: tuple[str, ...] = ()
    runner: str = "celery"  # a module that takes the options of `celery`


@dataclass
class Worker:
    """A running worker process."""

    process: subprocess.Popen[bytes]
    log: Path

    def rss_mib(self) -> float:
        """Resident memory of the main process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def check(self) -> None:
        """Raise BenchmarkFailed if it is gone."""
        if self.process.poll() is not None:
            tail = self.log.read_text(errors="replace")[-3000:]
            raise BenchmarkFailed(f"a worker ended with status {self.process.returncode}; its log ends:\n{tail}")


@dataclass
class Lab:
    """The servers and what is in them."""

    mariadb: servers.Server
    redis: servers.Server
    rabbitmq: servers.RabbitMQ
    folder: Path
    database: str = DATABASE
    lanes: int | None = None
    batch_size_max: int | None = None
    _engines: dict[str, Engine] = field(default_factory=dict)

    @property
    def database_url(self) -> str:
        url = make_url(self.mariadb.url).set(database=self.database)
        return url.render_as_string(hide_password=False)

    @property
    def engine(self) -> Engine:
        return self._engines.setdefault(self.database, open_engine(self.database_url))

    def settings(self, broker_url: str) -> Settings:
        return Settings.from_env(self.environment(broker_url))

    def environment(self, broker_url: str) -> dict[str, str]:
        chosen = {"LANES": self.lanes, "BATCH_SIZE_MAX": self.batch_size_max}
        return {
            "TOMBOLA_DATABASE_URL": self.database_url,
            "TOMBOLA_BROKER_URL": broker_url,
            "TOMBOLA_RESULT_URL": self.redis.url,
            "TOMBOLA_SEED": SEED,
            **{f"TOMBOLA_{name}": str(value) for name, value in chosen.items() if value is not None},
        }

    # ---- the database ------------------------------------------------------------------------------------------------

    def create_database(self, name: str) -> None:
        """Make and migrate a database with ACCOUNTS accounts that never run dry."""
        server = create_engine(self.mariadb.url, isolation_level="AUTOCOMMIT")
        with server.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name} CHARACTER SET utf8mb4"))
        server.dispose()
        self.database = name
        migrations.upgrade(self.database_url)
        with self.engine.begin() as connection:
            connection.execute(
                text(
                    "INSERT INTO account_asset_balances (user_id, asset_code, balance, created_at, updated_at) "
                    f"SELECT seq, 'POINT', 0, UTC_TIMESTAMP(6), UTC_TIMESTAMP(6) FROM seq_1_to_{ACCOUNTS}"
                )
            )
        self._recharge_all()

    def _recharge_all(self) -> None:
        """Give every account what it has from the beginning: the books begin at zero, and the audit says so."""
        with self.engine.begin() as connection:
            connection.execute(text(f"UPDATE account_asset_balances SET balance = {BALANCE}"))
            connection.execute(
                text(
                    "INSERT INTO asset_transactions (account_id, business_id, lottery_session_id, idempotency_key, "
                    "business_type, asset_code, delta_amount, balance_before, balance_after, created_at, updated_at) "
                    "SELECT id, CONCAT('opening_', id), CONCAT('opening_', id), CONCAT('opening_', id), 'recharge', "
                    f"asset_code, {BALANCE}, 0, {BALANCE}, created_at, created_at FROM account_asset_balances "
                    "ORDER BY id"
                )
            )

    def clear(self) -> None:
        """Empty ledger, queues and result store, so that all contestants begin alike."""
        with self.engine.begin() as connection:
            for table in LEDGER_TABLES:
                connection.execute(text(f"TRUNCATE {table}"))
        self._recharge_all()
        self.clear_queues()

    def clear_queues(self) -> None:
        """Empty the queues and the result store."""
        with redis.Redis.from_url(self.redis.url) as client:
            client.flushall()
        for queue in (QUEUE, "celery"):
            with suppress(NotFound), kombu.Connection(self.rabbitmq.url) as connection:
                connection.channel().queue_purge(queue)

    def settled(self, draws: Sequence[DrawRequest]) -> int:
        """How many of `draws` are settled."""
        with self.engine.connect() as connection:
            return connection.execute(
                select(func.count()).select_from(requests).where(_are_settled(draws))
            ).scalar_one()

    def settle_rate(self, draws: Sequence[DrawRequest]) -> float:
        """At how many a second `draws` were settled (see above)."""
        with self.engine.connect() as connection:
            batches = connection.execute(
                select(requests.c.settled_at, func.count())
                .where(_are_settled(draws))
                .group_by(requests.c.settled_at)
                .order_by(requests.c.settled_at)
            ).all()
        seen, done = [], 0
        for moment, count in batches:
            seen.append((moment.timestamp(), done))  # what was done when this batch began
            done += count
        return rate(seen, done)

    def check_books(self, draws: int) -> None:
        """Same work everywhere: every draw is settled, and the audit finds nothing. Raises BenchmarkFailed."""
        report = audit.audit(self.engine, WHEELS)
        if report.requests != draws or report.violations:
            violations = "; ".join(map(str, report.violations[:3]))
            raise BenchmarkFailed(
                f"{report.requests} of {draws} draws settled; the audit says: {violations or 'clean'}"
            )

    # ---- the contestants ---------------------------------------------------------------------------------------------

    def stream(self) -> Contestant:
        url = self.redis.url
        backlog = partial(_stream_backlog, redis.Redis.from_url(url))
        return Contestant("stream", "tombola, Redis Stream", url, "worker", partial(self._publish, url), backlog)

    def queue(self) -> Contestant:
        url = self.rabbitmq.url
        backlog = partial(_queue_backlog, kombu.Connection(url), QUEUE)
        return Contestant("queue", "tombola, RabbitMQ", url, "worker", partial(self._publish, url), backlog)

    def celery_redis(self, *options: str) -> Contestant:
        url = self.redis.url
        backlog = partial(_list_backlog, redis.Redis.from_url(url))
        return self._celery("celery-redis", "Celery task per draw, Redis", url, backlog, options)

    def celery_rabbitmq(self, *options: str) -> Contestant:
        url = self.rabbitmq.url
        backlog = partial(_queue_backlog, kombu.Connection(url), "celery")
        return self._celery("celery-rabbitmq", "Celery task per draw, RabbitMQ", url, backlog, options)

    def _celery(
        self, name: str, title: str, url: str, backlog: Callable[[], int], options: tuple[str, ...]
    ) -> Contestant:
        return Contestant(name, title, url, "tests.benchmarks.baseline", partial(self._send, url), backlog, options)

    def accepted(self) -> Contestant:
        """The Stream again, with every draw accepted in the database before it is published."""
        return replace(
            self.stream(),
            name="accepted",
            title="tombola, Redis Stream, accepted first",
            fill=partial(self._enqueue, self.redis.url),
        )

    def _publish(self, broker_url: str, draws: Sequence[DrawRequest]) -> None:
        """Straight to the broker, as from another language."""
        with closing(open_broker(broker_url, publish_timeout_s=30)) as broker:
            for start in range(0, len(draws), PUBLISH_SIZE):
                broker.publish([draw.encode() for draw in draws[start : start + PUBLISH_SIZE]])

    def _enqueue(self, broker_url: str, draws: Sequence[DrawRequest]) -> None:
        with DrawClient.from_settings(self.settings(broker_url)) as client:
            client.enqueue_many(draws)

    def _send(self, broker_url: str, draws: Sequence[DrawRequest]) -> None:
        with baseline.make_app(broker_url, self.redis.url) as app:
            for draw in draws:
                send(app, draw)

    @contextmanager
    def worker(self, contestant: Contestant) -> Iterator[Worker]:
        """`celery worker` in a process of its own, ended by a warm shutdown."""
        log = self.folder / f"{contestant.name}.log"
        argv = [sys.executable, "-m", contestant.runner, "-A", contestant.module, "worker", "--loglevel=WARNING"]
        argv += ["--without-gossip", "--without-mingle", *contestant.options]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("TOMBOLA_")}
        with log.open("wb") as output:
            process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=inherited | self.environment(contestant.broker_url),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            yield Worker(process, log)
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_S_MAX)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the group: a pool's children go along
            process.wait()

    def drain(
        self,
        contestant: Contestant,
        worker: Worker,
        draws: int,
        *,
        is_done: Callable[[], bool],
        watch: Callable[[int], None] | None = None,
    ) -> float:
        """Wait until the queue is empty and `is_done`; the rate at which it emptied, for work that leaves no rows."""
        deadline = time.monotonic() + 60 + draws / 100
        seen: list[tuple[float, int]] = []
        while True:
            left = contestant.backlog()
            seen.append((time.monotonic(), draws - left))
            if watch is not None:
                watch(draws - left)
            if left == 0 and is_done():
                return rate(seen, draws)
            worker.check()
            if time.monotonic() > deadline:
                tail = worker.log.read_text(errors="replace")[-2000:]
                raise BenchmarkFailed(f"{contestant.name} left {left} of {draws} draws in its queue:\n{tail}")
            time.sleep(POLL_S)


def send(app: Any, draw: DrawRequest) -> Any:
    """Send one draw to the baseline; the task id is the lottery session id, as tombola's results have it."""
    fields = {"account_id": draw.account_id, "request_key": draw.request_key}
    return app.send_task(baseline.TASK, kwargs=fields, task_id=draw.lottery_session_id)


def rate(seen: Sequence[tuple[float, int]], total: int) -> float:
    """Draws per second from (seconds, done so far), between LEAD_IN and LEAD_OUT of `total`."""
    first = next((seconds, done) for seconds, done in seen if done >= LEAD_IN * total)
    last = next(((seconds, done) for seconds, done in seen if done >= LEAD_OUT * total), seen[-1])
    if last[0] <= first[0]:
        raise BenchmarkFailed(f"{total} draws are too few to measure a rate")
    return (last[1] - first[1]) / (last[0] - first[0])


def busy_share(seconds: float = 1.0) -> float:
    """How much of this machine's CPU is in use, by whomever: while we idle, it is by others."""
    before = _cpu_ticks()
    time.sleep(seconds)
    (idle, total), (idle_before, total_before) = _cpu_ticks(), before
    return 1 - (idle - idle_before) / max(1, total - total_before)


def _cpu_ticks() -> tuple[int, int]:
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return ticks[3] + ticks[4], sum(ticks)  # idle, and idle because of I/O


def make_draws(count: int) -> list[DrawRequest]:
    """`count` new draws on uniformly random accounts, with time-ordered keys."""
    return [DrawRequest(account_id=random.randint(1, ACCOUNTS)) for _ in range(count)]


@contextmanager
def open_lab() -> Iterator[Lab]:
    """Start the servers, make the database; all is gone afterwards."""
    with ExitStack() as stack:
        lab = Lab(
            mariadb=stack.enter_context(servers.mariadb(private=True, buffer_pool_mib=1024, options=REDO_LOG)),
            redis=stack.enter_context(servers.redis(private=True)),
            rabbitmq=stack.enter_context(servers.rabbitmq(private=True)),
            folder=Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tombola-bench-"))),
        )
        lab.create_database(DATABASE)
        yield lab


def _are_settled(draws: Sequence[DrawRequest]) -> ColumnElement[bool]:
    # Keys of one process sort by the time they were made, so a range holds these and no others.
    mine = requests.c.request_key.between(draws[0].request_key, draws[-1].request_key)
    return and_(mine, requests.c.settled_at.is_not(None))


def _stream_backlog(client: redis.Redis) -> int:
    return int(client.xlen(QUEUE))


def _list_backlog(client: redis.Redis) -> int:
    return int(client.llen("celery")) + int(client.hlen("unacked"))


def _queue_backlog(connection: kombu.Connection, queue: str) -> int:
    """Messages ready; those that a consumer holds are not counted. One connection for all looks: opening costs CPU."""
    return int(connection.default_channel.queue_declare(queue, passive=True).message_count)
