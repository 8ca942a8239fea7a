"""Chains: the first one is begun once, by whichever worker is first; later ones by operators, with a new seed each."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import Engine

from tests.ledgers import migrated
from tests.seeds.shops import LENGTH, SEED, WHEELS, SeededShop, open_seeded_shop
from tombola import migrations
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import seed_id_of
from tombola.producers.domain.errors import ConfigurationError, InvalidRequest
from tombola.producers.domain.seeds import anchor_of, commitment_of, secret_of
from tombola.producers.storage import clock
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.seeds import BEFORE_EPOCHS_ID, all_chains, all_epochs, by_id
from tombola.worker.ledger.accounts import open_account
from tombola.worker.seeds import chains
from tombola.worker.seeds.chains import begin_first, check_seeds, rotate
from tombola.worker.seeds.masters import Masters
from tombola.worker.settle import tries
from tombola.worker.settle.rules import Rules

pytestmark = pytest.mark.slow

OTHER, THIRD = b"other" * 8, b"third" * 8


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = open_engine(database_url, lock_wait_s=10)
    migrated(made)
    yield made
    made.dispose()


@pytest.fixture
def shop(database_url: str) -> Iterator[SeededShop]:
    with open_seeded_shop(database_url) as opened:
        yield opened


def test_the_first_chain_is_of_days_of_utc(engine: Engine) -> None:
    assert begin_first(engine, Masters([SEED]))
    assert not begin_first(engine, Masters([OTHER]))
    with engine.connect() as connection:
        before, first = all_chains(connection)
        epochs = all_epochs(connection)
        now = clock.now(connection)
    assert (before.anchor.hex(), before.seed_id) == (hashlib.sha256(SEED).hexdigest(), seed_id_of(SEED))
    assert (first.chain, first.anchor, first.epochs) == (1, anchor_of(SEED), 3650)
    assert epochs[0].id == BEFORE_EPOCHS_ID
    assert epochs[0].closes_at == first.begun_at == epochs[1].opens_at < now
    for epoch, following in itertools.pairwise(epochs[1:]):
        assert epoch.closes_at == following.opens_at
        assert (following.opens_at.hour, following.opens_at.minute, following.opens_at.microsecond) == (0, 0, 0)
        assert following.name == (1, epoch.name.epoch + 1)
    assert epochs[2].closes_at - epochs[2].opens_at == timedelta(days=1)  # type: ignore[operator]
    for number in (1, 17, 3650):
        assert epochs[number].commitment == commitment_of(secret_of(SEED, number))
    assert all(it.revealed is None for it in epochs)


def test_many_workers_that_start_at_once_begin_one_chain(database_url: str) -> None:
    migrated(database_url)
    engines = [open_engine(database_url, lock_wait_s=10) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        begun = list(pool.map(lambda engine: begin_first(engine, Masters([SEED])), engines))
    assert sorted(begun) == [False, False, False, True]
    for engine in engines:
        check_seeds(engine, Masters([SEED]))
        engine.dispose()
    with open_engine(database_url).connect() as connection:
        assert [it.chain for it in all_chains(connection)] == [0, 1]
        assert len(all_epochs(connection)) == 3651


def test_chain_0_has_the_seed_that_the_last_draw_names(engine: Engine) -> None:
    account = open_account(engine, user_id=1, balance=Decimal(10))
    tries.settle(engine, [DrawRequest(account_id=account)], Rules(WHEELS))
    assert begin_first(engine, Masters([OTHER, SEED, THIRD]))
    with engine.connect() as connection:
        before, first = all_chains(connection)
        row = by_id(connection, BEFORE_EPOCHS_ID)
    assert (before.seed_id, first.seed_id) == (seed_id_of(SEED), seed_id_of(OTHER))
    assert row is not None
    assert row.commitment == hashlib.sha256(SEED).hexdigest()


def test_a_worker_with_another_seed_does_not_start(engine: Engine) -> None:
    begin_first(engine, Masters([SEED]))
    check_seeds(engine, Masters([OTHER, SEED]))
    with pytest.raises(ConfigurationError, match="TOMBOLA_SEED lacks the seed of chain 1"):
        check_seeds(engine, Masters([OTHER]))


def test_a_rotation_ends_the_last_chain_where_the_next_one_begins(shop: SeededShop) -> None:
    begun = shop.rotate(OTHER, SEED)
    assert (begun.chain, begun.anchor) == (2, anchor_of(OTHER))
    with shop.engine.connect() as connection:
        epochs = {str(it.name): it for it in all_epochs(connection)}
        now = clock.now(connection)
    assert now < begun.begun_at < now + chains.ANNOUNCED
    assert epochs["1.1"].closes_at == begun.begun_at == epochs["2.1"].opens_at
    assert all(epochs[f"1.{it}"].closes_at == epochs[f"1.{it}"].opens_at for it in range(2, 3651))
    with pytest.raises(InvalidRequest, match="chain 2 opens at"):
        shop.rotate(THIRD, OTHER)
    shop.pass_time(LENGTH)
    shop.rotate(THIRD, OTHER)


def test_what_a_rotation_needs(shop: SeededShop, database_url: str) -> None:
    for seeds, error, why in (
        ((SEED,), InvalidRequest, "was used for chain 0"),
        ((OTHER,), ConfigurationError, "lacks the seed of chain 1"),
        ((), ConfigurationError, "not set"),
    ):
        with pytest.raises(error, match=why), shop.engine.begin() as connection:
            rotate(connection, Masters(seeds), by="ann", reason="a leak")
    shop.rotate(OTHER, SEED)
    shop.pass_time(LENGTH)
    with pytest.raises(InvalidRequest, match="was used for chain 0"):
        shop.rotate(SEED, OTHER)
    with pytest.raises(InvalidRequest, match="was used for chain 2"):
        shop.rotate(OTHER, SEED)
    shop.masters = Masters([OTHER, SEED])


def test_nothing_to_rotate(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="no chain has begun"), engine.begin() as connection:
        rotate(connection, Masters([SEED]), by="ann", reason="a leak")


def test_epochs_are_not_forgotten_by_going_back(engine: Engine) -> None:
    begin_first(engine, Masters([SEED]))
    with pytest.raises(ConfigurationError, match="bound to seed epochs"):
        migrations.downgrade(engine, "0006")
    with engine.begin() as connection:
        assert [it.chain for it in all_chains(connection)] == [0, 1]
        for table in ("seed_epochs", "seed_chains"):
            connection.exec_driver_sql(f"DELETE FROM {table}")
    migrations.downgrade(engine, "0006")
    migrations.upgrade(engine)
