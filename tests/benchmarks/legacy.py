"""The legacy table's migration: what writers wait meanwhile, and how fast the backfill is beside one UPDATE.

Old code is four threads that charge and reward (tests/legacy.py); every step is a process of its own, killed at random
and run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url

from tests import legacy as old_code
from tests.benchmarks.lab import BenchmarkFailed, Lab, Say, Sizes
from tests.benchmarks.report import Finding, at_least, at_most
from tombola.migrations.legacy import backfill, contract, expand, tables, verify
from tombola.migrations.legacy.session import each_by_itself, open_session
from tombola.producers.domain.errors import ConfigurationError

GROUP: Final = "legacy"
ROWS: Final = 5_000_000
ROWS_QUICK: Final = 300_000
WRITERS: Final = 4
WRITER_RATE: Final = 50.0  # draws a second, each
ALONE_S: Final = 30.0
KILLS: Final = 2
GUIDE: Final = (
    "UPDATE asset_transactions SET idempotency_key = CONCAT('tx_', transaction_id), lottery_session_id = business_id "
    "WHERE idempotency_key IS NULL"
)


def legacy(lab: Lab, sizes: Sizes, say: Say) -> list[Finding]:
    """Five million rows: rates on an idle server first, then the whole way and back while old code writes."""
    rows = ROWS if sizes.rounds > 1 else ROWS_QUICK
    guide = _guide(lab, rows, say)
    with _old_table(lab, rows, say) as (url, engine):
        ours, whole = _backfill_alone(engine, rows, say)
        old_code.run_step(engine, "rollback")
        _quietly(engine, "ALTER TABLE asset_transactions FORCE")  # as it was on disk, too
        alone = _alone(url, say)
        meanwhile = _migrate(url, engine, rows, say)
    return [
        Finding(GROUP, f"the guide's one UPDATE, {rows / 1e6:g} million rows, idle", guide, "rows/s"),
        at_least(GROUP, "backfill's sweep : the guide's UPDATE", ours / guide, "×", 0.5),
        Finding(GROUP, "backfill with both indexes, idle", whole, "rows/s"),
        *_waits("without migration", alone),
        *_waits("during expand, backfill, verify", meanwhile),
        at_most(GROUP, "a writer's draw during the migration, max", max(meanwhile) * 1000, "ms", 1000),
    ]


@contextmanager
def _old_table(lab: Lab, rows: int, say: Say) -> Iterator[tuple[str, Engine]]:
    name = "legacy"
    server = create_engine(lab.mariadb.url, isolation_level="AUTOCOMMIT")
    _quietly(server, f"DROP DATABASE IF EXISTS {name}", f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
    url = make_url(lab.mariadb.url).set(database=name).render_as_string(hide_password=False)
    engine = open_session(url)
    try:
        begin = time.monotonic()
        old_code.create(engine)
        old_code.fill(engine, rows)
        say(f"{rows:,} old rows in {time.monotonic() - begin:.0f} s")
        yield url, engine
    finally:
        engine.dispose()
        _quietly(server, f"DROP DATABASE {name}")
        server.dispose()


def _guide(lab: Lab, rows: int, say: Say) -> float:
    with _old_table(lab, rows, say) as (_url, engine), each_by_itself(engine) as connection:
        connection.execute(
            text(expand.add_columns("asset_transactions", expand.missing_in_ledger(tables.ledger(connection)))[0])
        )
        begin = time.monotonic()
        connection.execute(text(GUIDE))
        took_s = time.monotonic() - begin
    say(f"the guide's UPDATE: {rows / took_s:,.0f} rows/s in one transaction of {took_s:.0f} s")
    return rows / took_s


def _backfill_alone(engine: Engine, rows: int, say: Say) -> tuple[float, float]:
    """Rows a second: of the sweep, and of all that the step does."""
    old_code.run_step(engine, "expand")
    swept_at = 0.0

    def on_progress(what: str, _done: int, _total: int) -> None:
        nonlocal swept_at
        if what == "rows":
            swept_at = time.monotonic()

    begin = time.monotonic()
    backfill.backfill(engine, own_session=False, follow=False, say=say, on_progress=on_progress)
    end = time.monotonic()
    say(f"the sweep: {rows / (swept_at - begin):,.0f} rows/s; with the indexes: {rows / (end - begin):,.0f} rows/s")
    return rows / (swept_at - begin), rows / (end - begin)


def _alone(url: str, say: Say) -> list[float]:
    with old_code.writers(url, WRITERS, rate=WRITER_RATE) as old:
        time.sleep(ALONE_S)
    _check(old, say, "alone")
    return old.waits_s


def _migrate(url: str, engine: Engine, rows: int, say: Say) -> list[float]:
    """Every step killed and resumed while old code writes; it stops for the contract's end only, as it must."""
    with each_by_itself(engine) as connection:
        before = tables.ledger(connection).plain_sql
    within_s = rows / 200_000
    with old_code.writers(url, WRITERS, rate=WRITER_RATE) as old:
        for step in ("expand", "backfill", "verify"):
            _timed(step, say, lambda step=step: _killed(url, step, within_s))  # type: ignore[misc]
        try:
            contract.contract(engine, drop_business_unique=True, quiet_s=1, say=say, on_progress=_untold)
        except ConfigurationError as refused:
            say(f"contract refuses: {refused}")
        else:
            raise BenchmarkFailed("contract began although old code was writing")
    _check(old, say, "meanwhile")
    _timed("contract", say, lambda: _killed(url, "contract", within_s))
    found = verify.verify(engine, on_progress=_untold)
    if not found.is_clean or found.duplicates or found.rows_without_key:
        raise BenchmarkFailed(f"verify: {found}")
    _timed("rollback", say, lambda: _killed(url, "rollback", within_s))
    found = verify.verify(engine, on_progress=_untold)
    with each_by_itself(engine) as connection:
        is_as_before = tables.ledger(connection).plain_sql == before
    if not found.is_clean or not is_as_before:
        raise BenchmarkFailed(f"after the rollback: {found}")
    say(f"{found.rows:,} rows: checksums equal, duplicates 0, rolled back, checksums equal again")
    return old.waits_s


def _killed(url: str, step: str, within_s: float) -> None:
    old_code.kill_and_resume(url, f"{step}*{KILLS}@{within_s}", timeout_s=1800)


def _timed(what: str, say: Say, run: Callable[[], None]) -> None:
    begin = time.monotonic()
    run()
    say(f"{what}: {time.monotonic() - begin:.1f} s, with {KILLS} kills where it is killed")


def _check(old: old_code.Writers, say: Say, when: str) -> None:
    if old.failures:
        raise BenchmarkFailed(f"old code failed {len(old.failures)} times {when}, such as: {old.failures[0]}")
    say(f"old code {when}: {old.draws:,} draws, the slowest {max(old.waits_s) * 1000:.0f} ms")


def _waits(when: str, waits_s: list[float]) -> list[Finding]:
    ordered = sorted(waits_s)
    return [
        Finding(
            GROUP,
            f"a writer's draw {when}, {name}",
            ordered[min(len(ordered) - 1, int(len(ordered) * at))] * 1000,
            "ms",
        )
        for name, at in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0))
    ]


def _quietly(engine: Engine, *statements: str) -> None:
    with each_by_itself(engine) as connection:
        for statement in statements:
            connection.execute(text(statement))


def _untold(*_progress: object) -> None:
    pass
