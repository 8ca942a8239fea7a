"""Hashes of passwords as users get them: slow on purpose, so few tests make one."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from argon2 import PasswordHasher
from sqlalchemy import Engine, select, update

from tests.ledgers import migrated
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import operators as table
from tombola.worker.operators import users as operators

PASSWORD = "correct horse battery"
OTHER = "another twelve or more"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = open_engine(f"sqlite:///{tmp_path}/ledger.db")
    migrated(made)
    yield made
    made.dispose()


def test_an_old_hash_is_made_anew(engine: Engine) -> None:
    operators.add(engine, "ann", "operator", PASSWORD)
    weak = PasswordHasher(time_cost=1, memory_cost=1024, parallelism=1).hash(PASSWORD)
    with engine.begin() as connection:
        connection.execute(update(table).values(password_hash=weak))
    assert operators.verify(engine, "ann", OTHER) is None
    assert operators.verify(engine, "ann", PASSWORD) is not None
    with engine.connect().execution_options(read_only=True) as connection:
        assert connection.execute(select(table.c.password_hash)).scalar_one() != weak
    assert operators.verify(engine, "ann", PASSWORD) is not None


@pytest.mark.slow
def test_a_name_that_is_nobodys_takes_as_long(engine: Engine) -> None:
    operators.add(engine, "ann", "operator", PASSWORD)

    def seconds(name: str) -> float:
        best = 60.0
        for _ in range(3):
            started = time.perf_counter()
            assert operators.verify(engine, name, OTHER) is None
            best = min(best, time.perf_counter() - started)
        return best

    seconds("eve")  # makes the hash to compare with
    known, unknown = seconds("ann"), seconds("eve")
    assert 0.5 < known / unknown < 2
