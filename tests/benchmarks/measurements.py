"""The measurements: a function per figure, each takes the lab and the sizes and returns findings."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, text

from tests.benchmarks import baseline
from tests.benchmarks.audits import audits_of_draws
from tests.benchmarks.books import books
from tests.benchmarks.campaigns import campaigns
from tests.benchmarks.dead_letters import full_replay, poison
from tests.benchmarks.gateway import gateway
from tests.benchmarks.lab import (
    ACCOUNTS,
    DATABASE,
    PUBLISH_SIZE,
    WHEELS,
    Contestant,
    Lab,
    Say,
    Sizes,
    make_draws,
    send,
)
from tests.benchmarks.legacy import legacy
from tests.benchmarks.movements import movements
from tests.benchmarks.parts import parts
from tests.benchmarks.report import Finding, at_least, at_most, beside
from tests.benchmarks.rounds import Rounds, interleaved
from tests.benchmarks.webhooks import webhooks
from tombola.producers import DrawClient, DrawRequest
from tombola.producers.brokers.registry import open_broker
from tombola.worker.settle import tries
from tombola.worker.settle.rules import Rules

BATCH: Final = 500
LATENCY_RATE: Final = 20.0  # draws a second
CONCURRENCIES, PREFETCHES = (2, 4, 8), (1, 4, 32)
OLD_DATABASE: Final = "tombola_old"
FILL_ROWS: Final = 250_000


FULL: Final = Sizes(3, 40_000, 7, 20_000, 1_000, 600, 15, 200_000, 5_000_000, 300_000, 10)
QUICK: Final = Sizes(1, 15_000, 1, 15_000, 800, 300, 4, 50_000, 0, 60_000, 4)


# ---- throughput ------------------------------------------------------------------------------------------------------


def throughput(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """Baseline, bare loops and ours in turn, so that whatever else this machine does hits all of them."""
    contenders: dict[str, Callable[[], float]] = {}
    titles = {
        "ceiling": f"no queue, no results: worker.settle.batch in a loop of {BATCH}",
        "plain": f"plain minimal SQL in a loop of {BATCH}: ledger rows and balances, nothing else",
        "two workers": "tombola, Redis Stream, two workers",
    }
    for make in (lab.celery_redis, lab.celery_rabbitmq):
        contestant = make(*best_options(lab, make, sizes, say))
        contenders[contestant.name] = partial(settle_all, lab, contestant, sizes.baseline_draws)
        titles[contestant.name] = f"{contestant.title} ({' '.join(contestant.options)})"
    contenders["ceiling"] = partial(ceiling, lab, sizes.slice_draws)
    contenders["plain"] = partial(plain, lab, sizes.slice_draws)
    for contestant in (lab.stream(), lab.accepted(), lab.queue()):
        contenders[contestant.name] = partial(settle_all, lab, contestant, sizes.slice_draws)
        titles[contestant.name] = f"{contestant.title}, one worker"
    contenders["two workers"] = partial(settle_all, lab, lab.stream(), sizes.slice_draws, workers=2)
    rounds = interleaved(contenders, sizes.slices, say)
    shown = {"celery-redis": "Celery task per draw, Redis", "celery-rabbitmq": "Celery task per draw, RabbitMQ"}
    shown |= {"ceiling": "bare SQL loop, no queue", "stream": "tombola, Redis Stream", "queue": "tombola, RabbitMQ"}
    shown["accepted"] = "tombola, Stream, accepted first"
    group, baselines = "throughput", ("celery-redis", "celery-rabbitmq")
    return [
        *(Finding(group, titles[it], rounds.median(it), "draws/s", bar=shown.get(it, "")) for it in contenders),
        beside(group, "Redis Stream : best baseline", rounds.beside("stream", *baselines), 50),
        beside(group, "Redis Stream, two workers : best baseline", rounds.beside("two workers", *baselines), 55),
        beside(group, "RabbitMQ : best baseline", rounds.beside("queue", *baselines), 30),
        beside(group, "Redis Stream : plain minimal SQL", rounds.beside("stream", "plain"), 0.75),
        beside(group, "Redis Stream : bare loop", rounds.beside("stream", "ceiling"), 0.6),
        beside(group, "accepted first : published alone", rounds.beside("accepted", "stream"), 0.9),
    ]


def best_options(lab: Lab, make: Callable[..., Contestant], sizes: Sizes, say: Say) -> tuple[str, ...]:
    """The baseline's best settings here: the best pool size first, then the best prefetch for it."""

    def measure(options: tuple[str, ...]) -> float:
        value = settle_all(lab, make(*options), sizes.calibration_draws)
        say(f"calibrating {make().name} {' '.join(options)}: {value:,.0f}/s")
        return value

    pools = [(f"--concurrency={size}", "--prefetch-multiplier=4") for size in CONCURRENCIES]
    pool = max(pools, key=measure)[0]
    return max([(pool, f"--prefetch-multiplier={size}") for size in PREFETCHES], key=measure)


def settle_all(lab: Lab, contestant: Contestant, count: int, *, workers: int = 1) -> float:
    """Fill an empty queue, let the workers drain it; the rate at which they settled. The books must be right."""
    lab.clear()
    draws = make_draws(count)
    contestant.fill(draws)
    with ExitStack() as stack:
        for number in range(workers):
            worker = stack.enter_context(lab.worker(replace(contestant, name=f"{contestant.name}-{number}")))
        lab.drain(contestant, worker, count, is_done=lambda: lab.settled(draws) == count)
    lab.check_books(count)
    return lab.settle_rate(draws)


def ceiling(lab: Lab, count: int) -> float:
    """worker.settle.tries.settle in a bare loop: what the database and our SQL would do with no queue around them."""
    lab.clear()
    draws = make_draws(count)

    for start in range(0, count, BATCH):
        tries.settle(lab.engine, draws[start : start + BATCH], Rules(WHEELS, tries_max=3))
    lab.check_books(count)
    return lab.settle_rate(draws)


def plain(lab: Lab, count: int) -> float:
    """The least that a draw needs, as one would write it first: its ledger rows, and its account's balance."""
    lab.clear()
    batches = [make_draws(BATCH) for _ in range(0, count, BATCH)]
    with closing(lab.engine.raw_connection()) as proxy:
        connection: Any = proxy.driver_connection
        began = time.perf_counter()
        for draws in batches:
            _settle_plainly(connection, draws)
        return count / (time.perf_counter() - began)


def _settle_plainly(connection: Any, draws: Sequence[DrawRequest]) -> None:
    rows: list[str] = []
    ids = ",".join(map(str, sorted({draw.account_id for draw in draws})))
    with connection.cursor() as cursor:
        connection.begin()
        cursor.execute(f"SELECT id, balance FROM account_asset_balances WHERE id IN ({ids}) FOR UPDATE")
        balances: dict[int, Any] = dict(cursor.fetchall())
        for number, draw in enumerate(draws):
            won = 5 if number % 10 < 3 else 0  # 1.3 rows a draw, as the built-in campaign has
            for name, delta in (("consume", -1), ("reward", won)):
                if not delta:
                    continue
                before = balances[draw.account_id]
                after = balances[draw.account_id] = before + delta
                key = draw.request_key
                rows.append(
                    f"({draw.account_id},'{key}','{key}','{key}:{name}','lottery_{name}','POINT',"
                    f"{delta},{before},{after},NOW(6),NOW(6))"
                )
        cursor.execute(
            "INSERT INTO asset_transactions (account_id, business_id, lottery_session_id, idempotency_key, "
            "business_type, asset_code, delta_amount, balance_before, balance_after, created_at, updated_at) "
            f"VALUES {','.join(rows)}"
        )
        cases = " ".join(f"WHEN {account_id} THEN {balance}" for account_id, balance in balances.items())
        cursor.execute(f"UPDATE account_asset_balances SET balance = CASE id {cases} END WHERE id IN ({ids})")
        connection.commit()


# ---- redeliveries ----------------------------------------------------------------------------------------------------


def redeliveries(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """The same draws published a second time, all of them settled: read from the queue, as no rows come of it."""
    draws: list[DrawRequest] = []

    def drained() -> float:
        contestant = lab.stream()
        contestant.fill(draws)
        with lab.worker(contestant) as worker:
            return lab.drain(contestant, worker, len(draws), is_done=lambda: True)

    seen: dict[str, list[float]] = {"first": [], "again": []}
    for _ in range(sizes.rounds):
        lab.clear()
        draws[:] = make_draws(sizes.draws)
        for name in seen:
            seen[name].append(drained())
        lab.check_books(len(draws))
        say(f"first {seen['first'][-1]:,.0f}/s, again {seen['again'][-1]:,.0f}/s")
    rounds, group = Rounds(seen), "redeliveries"
    return [
        Finding(group, "a queue of nothing but redeliveries", rounds.median("again"), "draws/s"),
        beside(group, "redeliveries : first draws", rounds.beside("again", "first"), 1.5),
    ]


# ---- latency ---------------------------------------------------------------------------------------------------------


def latency(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """From publish to readable result while draws come one by one, 20 a second."""
    p50: dict[str, float] = {}
    p99: dict[str, float] = {}
    pool = ("--concurrency=2",)
    for contestant in (lab.celery_redis(*pool), lab.stream(), lab.celery_rabbitmq(*pool), lab.queue()):
        lab.clear()
        with lab.worker(contestant):
            took_ms = sorted(_latencies_ms(lab, contestant, sizes.latency_s))
        p50[contestant.name], p99[contestant.name] = statistics.median(took_ms), took_ms[int(len(took_ms) * 0.99)]
        say(f"{contestant.name}: p50 {p50[contestant.name]:.1f} ms, p99 {p99[contestant.name]:.1f} ms")
    group = "latency"
    return [
        Finding(group, "Celery on Redis, p50", p50["celery-redis"], "ms"),
        Finding(group, "Celery on Redis, p99", p99["celery-redis"], "ms"),
        Finding(group, "tombola on a Stream, p50", p50["stream"], "ms"),
        at_most(group, "tombola on a Stream, p99 (the baseline's)", p99["stream"], "ms", p99["celery-redis"]),
        at_most(group, "tombola on a Stream, p99 (our aim)", p99["stream"], "ms", 10),
        Finding(group, "Celery on RabbitMQ, p50", p50["celery-rabbitmq"], "ms"),
        Finding(group, "Celery on RabbitMQ, p99", p99["celery-rabbitmq"], "ms"),
        Finding(group, "tombola on RabbitMQ, p50", p50["queue"], "ms"),
        at_most(group, "tombola on RabbitMQ, p99 (the baseline's)", p99["queue"], "ms", p99["celery-rabbitmq"]),
    ]


def _latencies_ms(lab: Lab, contestant: Contestant, duration_s: float) -> list[float]:
    """Milliseconds of each draw; the first twenty warm the worker up and are not counted."""
    warm_up = 20
    took_ms: list[float] = []
    with _asker(lab, contestant) as ask:
        ask(make_draws(1)[0], 30.0)  # the worker is up
        start = time.perf_counter()
        for number in range(warm_up + int(duration_s * LATENCY_RATE)):
            time.sleep(max(0.0, start + number / LATENCY_RATE - time.perf_counter()))
            (draw,) = make_draws(1)
            begin = time.perf_counter()
            ask(draw, 10.0)
            took_ms.append((time.perf_counter() - begin) * 1000)
    return took_ms[warm_up:]


class _asker:
    """Publishes a draw and waits for its result, as each contestant's users do."""

    def __init__(self, lab: Lab, contestant: Contestant) -> None:
        self._celery: Any = None
        self._client: DrawClient | None = None
        if contestant.module == "worker":
            self._client = DrawClient.from_settings(lab.settings(contestant.broker_url))
        else:
            self._celery = baseline.make_app(contestant.broker_url, lab.redis.url)

    def __enter__(self) -> Callable[[DrawRequest, float], None]:
        return self._ask

    def __exit__(self, *_error: object) -> None:
        (self._client or self._celery).close()

    def _ask(self, draw: DrawRequest, timeout_s: float) -> None:
        if self._client is None:
            send(self._celery, draw).get(timeout=timeout_s)
        else:
            ticket = self._client.enqueue(draw)
            self._client.wait(ticket.lottery_session_id, timeout_s=timeout_s)


# ---- publishing ------------------------------------------------------------------------------------------------------


def publish(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """From one process, the making of requests and keys included: with the accept, and straight to the broker."""

    def publish_alone(broker_url: str, count: int) -> float:
        lab.clear_queues()
        with closing(open_broker(broker_url, publish_timeout_s=30)) as broker:
            broker.publish([make_draws(1)[0].encode()])  # connects and declares
            begin = time.perf_counter()
            for _ in range(0, count, PUBLISH_SIZE):
                broker.publish([draw.encode() for draw in make_draws(PUBLISH_SIZE)])
            return count / (time.perf_counter() - begin)

    def measure(broker_url: str, count: int) -> float:
        lab.clear_queues()
        with DrawClient.from_settings(lab.settings(broker_url)) as client:
            client.enqueue_many(make_draws(1))  # connects and declares
            begin = time.perf_counter()
            client.enqueue_many(DrawRequest(account_id=random.randint(1, ACCOUNTS)) for _ in range(count))
            return count / (time.perf_counter() - begin)

    rounds = interleaved(
        {
            "enqueue_many, Redis": partial(measure, lab.redis.url, sizes.published),
            "enqueue_many, RabbitMQ": partial(measure, lab.rabbitmq.url, sizes.published // 5),
            "publish, Redis": partial(publish_alone, lab.redis.url, sizes.published),
            "publish, RabbitMQ": partial(publish_alone, lab.rabbitmq.url, sizes.published // 5),
        },
        sizes.rounds,
        say,
    )
    lab.clear()
    return [
        Finding("publishing", "accept and publish, Redis", rounds.median("enqueue_many, Redis"), "draws/s"),
        Finding("publishing", "accept and publish, RabbitMQ", rounds.median("enqueue_many, RabbitMQ"), "draws/s"),
        at_least("publishing", "publish alone, Redis", rounds.median("publish, Redis"), "draws/s", 30_000),
        Finding("publishing", "publish alone, RabbitMQ", rounds.median("publish, RabbitMQ"), "draws/s"),
    ]


# ---- a large ledger --------------------------------------------------------------------------------------------------


def ledger(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """A ledger of millions of rows, older and in time order, against an empty one on the same server."""
    if not sizes.ledger_rows:
        return []
    try:
        begin = time.monotonic()
        lab.create_database(OLD_DATABASE)
        _fill_ledger(lab, sizes.ledger_rows)
        say(f"{sizes.ledger_rows:,} ledger rows in {time.monotonic() - begin:.0f} s")

        def measure(database: str) -> float:
            lab.database = database
            lab.clear_queues()
            contestant, draws = lab.stream(), make_draws(sizes.draws)
            contestant.fill(draws)
            with lab.worker(contestant) as worker:
                lab.drain(contestant, worker, len(draws), is_done=lambda: lab.settled(draws) == len(draws))
            return lab.settle_rate(draws)

        lab.database = DATABASE
        lab.clear()
        rounds = interleaved({name: partial(measure, name) for name in (DATABASE, OLD_DATABASE)}, sizes.rounds, say)
    finally:
        lab.database = DATABASE
        with lab.engine.begin() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {OLD_DATABASE}"))
    rows = f"{sizes.ledger_rows / 1e6:g} million rows"
    return [
        Finding("large ledger", f"Redis Stream, {rows}", rounds.median(OLD_DATABASE), "draws/s"),
        beside("large ledger", f"{rows} : empty", rounds.beside(OLD_DATABASE, DATABASE), 0.95),
    ]


_OLD_KEY: Final = "CONCAT('lottery_req_', 1700000000000 + seq, '_', LPAD(LOWER(HEX(seq * 7919)), 8, '0'), '_001')"
_OLD_ACCOUNT: Final = f"1 + (seq * 7919) % {ACCOUNTS}"
_OLD_TIME: Final = "'2023-11-14' + INTERVAL seq SECOND"


def _fill_ledger(lab: Lab, rows: int) -> None:
    """Old rows as the worker writes them: 10 requests have 13 ledger rows."""
    tries.settle(lab.engine, make_draws(1), Rules(WHEELS, tries_max=3))  # whose notes all rows get
    with lab.engine.connect() as connection:
        notes = connection.execute(text("SELECT notes FROM asset_transactions LIMIT 1")).scalar_one()
        connection.execute(text("SET unique_checks=0, foreign_key_checks=0, check_constraint_checks=0"))
        # Each chunk holds 13 rows for every 10 requests: a charge each, and a reward for three of ten.
        requests_total = rows * 10 // 13
        for start in range(1, requests_total + 1, FILL_ROWS):
            end = min(start + FILL_ROWS - 1, requests_total)
            for statement in (_FILL_CHARGES, _FILL_REQUESTS):
                bound = {"notes": notes} if ":notes" in statement else {}
                connection.execute(text(statement.replace("SEQUENCE", f"seq_{start}_to_{end}")), bound)
            connection.commit()
        _write_back(connection)
        connection.invalidate()  # its session checks nothing


def _write_back(connection: Connection, *, timeout_s: float = 90.0) -> None:
    """Let the server write its dirty pages now: otherwise it would during the measurement, in both databases' time."""
    connection.execute(text("SET GLOBAL innodb_io_capacity_max=40000, innodb_io_capacity=20000"))
    connection.execute(text("SET GLOBAL innodb_max_dirty_pages_pct=0"))
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        dirty = connection.execute(text("SHOW GLOBAL STATUS LIKE 'Innodb_buffer_pool_pages_dirty'")).one()[1]
        if int(dirty) < 100:
            break
        time.sleep(0.5)
    for name in ("max_dirty_pages_pct", "io_capacity", "io_capacity_max"):
        connection.execute(text(f"SET GLOBAL innodb_{name}=DEFAULT"))


_FILL_CHARGES: Final = (
    "INSERT INTO asset_transactions (account_id, business_id, lottery_session_id, idempotency_key, business_type, "
    "asset_code, delta_amount, balance_before, balance_after, notes, created_at, updated_at) "
    f"SELECT {_OLD_ACCOUNT}, {_OLD_KEY}, {_OLD_KEY}, CONCAT({_OLD_KEY}, IF(part, '\\:reward', '\\:consume')), "
    "IF(part, 'lottery_reward', 'lottery_consume'), 'POINT', IF(part, 5, -1), 1000000, IF(part, 1000005, 999999), "
    f":notes, {_OLD_TIME}, {_OLD_TIME} FROM SEQUENCE JOIN (SELECT 0 AS part UNION ALL SELECT 1) AS parts "
    "WHERE part = 0 OR seq % 10 < 3 ORDER BY seq, part"
)
_FILL_REQUESTS: Final = (
    "INSERT INTO api_idempotency_requests (request_key, lottery_session_id, account_id, campaign, fingerprint, status, "
    f"created_at, settled_at, publish_at) SELECT {_OLD_KEY}, {_OLD_KEY}, {_OLD_ACCOUNT}, 'default', "
    f"SHA2({_OLD_KEY}, 256), 'completed', {_OLD_TIME}, {_OLD_TIME}, {_OLD_TIME} FROM SEQUENCE"
)


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """Resident memory of one worker's main process, where the lanes are, from warm to the end."""
    lab.clear()
    contestant, count = lab.stream(), sizes.memory_draws
    for _ in range(0, count, 20_000):
        contestant.fill(make_draws(20_000))
    samples: list[tuple[int, float]] = []
    with lab.worker(contestant) as worker:

        def watch(done: int) -> None:
            if done >= 20_000 * (len(samples) + 1):
                samples.append((done, worker.rss_mib()))
                say(f"{done:,} draws: {samples[-1][1]:.1f} MiB")

        lab.drain(contestant, worker, count, is_done=lambda: True, watch=watch)
        samples.append((count, worker.rss_mib()))
    warm, last = samples[1][1], samples[-1][1]
    return [
        Finding("memory", "a worker, warm after 40,000 draws", warm, "MiB"),
        at_most("memory", f"a worker after {count:,} draws", last, "MiB", warm * 1.05),
    ]


# ---- tuning: only by name --------------------------------------------------------------------------------------------


def tune(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """Lanes and batch sizes against each other, for the defaults in producers.settings."""
    contenders: dict[str, Callable[[], float]] = {}

    def measure(contestant: Contestant, lanes: int, batch_size_max: int) -> float:
        lab.lanes, lab.batch_size_max = lanes, batch_size_max
        try:
            return settle_all(lab, contestant, sizes.draws)
        finally:
            lab.lanes = lab.batch_size_max = None

    for contestant in (lab.stream(), lab.queue()):
        for lanes in (1, 2, 3):
            for size in (200, 500, 900):
                name = f"{contestant.name}, {lanes} lanes, batches of {size}"
                contenders[name] = partial(measure, contestant, lanes, size)
    rounds = interleaved(contenders, sizes.rounds, say)
    return [Finding("tuning", name, rounds.median(name), "draws/s") for name in contenders]


Measurement = Callable[[Lab, Sizes, Say], Sequence[Finding]]
MEASUREMENTS: Final[dict[str, Measurement]] = {
    "throughput": throughput,
    "parts": parts,
    "redeliveries": redeliveries,
    "latency": latency,
    "publish": publish,
    "gateway": gateway,
    "ledger": ledger,
    "memory": memory,
    "poison": poison,
    "replay": full_replay,
    "campaigns": campaigns,
    "movements": movements,
    "audit": audits_of_draws,
    "books": books,
    "webhooks": webhooks,
}
BY_NAME_ONLY: Final[dict[str, Measurement]] = {"tune": tune, "legacy": legacy}
