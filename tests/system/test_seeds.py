"""Seeds and real processes: workers begin the chain, the worker's task reveals, beat runs without the seed."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, update

from tests import processes
from tests.processes import SEED, House, draws, wait_for
from tombola.producers.settings import Settings
from tombola.producers.storage import clock
from tombola.producers.storage.schema import api_idempotency_requests, seed_epochs
from tombola.producers.storage.seeds import all_chains, by_id
from tombola.worker.audit.audit import audit_by

OTHER = "07e2" * 16

pytestmark = pytest.mark.process


def chains(house: House) -> list[int]:
    with house.engine.connect() as connection:
        return [it.chain for it in all_chains(connection)]


def test_a_worker_begins_the_chain_and_another_seed_is_refused(mariadb_url: str, redis_url: str) -> None:
    with House(mariadb_url, redis_url, redis_url) as house:
        asked = draws(house.accounts(3), 30)
        with processes.worker(house.env) as worker:
            assert chains(house) == [0, 1]
            house.enqueue(asked)
            house.wait_settled(30, within_s=60, log=worker.log)
            assert worker.stop() == 0
        with house.engine.connect() as connection:
            bound = connection.execute(select(api_idempotency_requests.c.seed_epoch)).scalars().all()
        assert bound == [10_001] * 30
        assert house.violations() == []
        without = Settings.from_env(house.env | {"TOMBOLA_SEED": ""})
        report = audit_by(without, house.engine, everything=True)
        assert (report.violations, report.unproven) == ([], 30)
        ended = processes.failed_start(house.env | {"TOMBOLA_SEED": OTHER})
        assert ended.returncode == 1
        assert "TOMBOLA_SEED lacks the seed of chain 1" in ended.stdout + ended.stderr
        with processes.worker(house.env | {"TOMBOLA_SEED": f"{OTHER},{SEED}"}):
            assert chains(house) == [0, 1], "only an operator begins a further chain"


def test_beat_without_the_seed_asks_a_worker_that_has_it_to_reveal(
    mariadb_url: str, redis_url: str, tmp_path: Path
) -> None:
    with House(mariadb_url, redis_url, redis_url, TOMBOLA_SEED_REVEAL_AFTER_S="60") as house:
        with processes.worker(house.env) as worker:
            past = clock.now(house.engine) - timedelta(minutes=5)
            with house.engine.begin() as connection:
                connection.execute(
                    update(seed_epochs).where(seed_epochs.c.id == 10_001).values(
                        opens_at=past - timedelta(minutes=5), closes_at=past
                    )
                )  # fmt: skip
            command = [*processes.CELERY[:-2], "call", "tombola.reveal_seeds"]
            with processes.worker(house.env | {"TOMBOLA_SEED": ""}, command=command, until="-"):
                pass

            def is_revealed() -> bool:
                with house.engine.connect() as connection:
                    epoch = by_id(connection, 10_001)
                return epoch is not None and epoch.revealed is not None

            wait_for(is_revealed, within_s=30, what=worker.log)
            assert "the secret of epoch 1.1 is public" in worker.log()
        beat = [*processes.CELERY[:-2], "beat", "--loglevel=INFO", f"--schedule={tmp_path}/beat"]
        with processes.worker(house.env | {"TOMBOLA_SEED": ""}, command=beat, until="beat: Starting") as started:
            assert started.is_alive
