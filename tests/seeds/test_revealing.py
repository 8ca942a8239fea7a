"""Secrets become public when their epochs are over and no draw is bound to them, in the order of the epochs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import update

from tests.seeds.shops import LENGTH, SEED, SeededShop, open_seeded_shop
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import seed_id_of
from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.domain.seeds import anchor_of, commitment_of, hashed_down
from tombola.producers.storage import clock, requests
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.schema import seed_epochs
from tombola.producers.storage.seeds import BEFORE_EPOCHS_ID, by_id
from tombola.producers.storage.transactions import transaction
from tombola.worker.seeds.binding import LONG_OVER, _revealed
from tombola.worker.seeds.masters import Masters

pytestmark = pytest.mark.slow

OTHER = b"other" * 8


@pytest.fixture
def shop(database_url: str) -> Iterator[SeededShop]:
    with open_seeded_shop(database_url) as opened:
        yield opened


def revealed(shop: SeededShop, id: int) -> bytes | None:
    with shop.engine.connect() as connection:
        epoch = by_id(connection, id)
    assert epoch is not None
    return epoch.revealed


def test_a_secret_hashes_down_to_the_anchor(shop: SeededShop) -> None:
    assert shop.reveal(after_s=0) == [], "the first epoch is open"
    shop.pass_time(3 * LENGTH)
    assert shop.reveal() == ["1.1", "1.2", "1.3"]
    third = revealed(shop, 10_003)
    assert third is not None
    assert hashed_down(third, 3) == anchor_of(SEED)
    assert hashed_down(third, 1) == revealed(shop, 10_002)
    with shop.engine.connect() as connection:
        epoch = by_id(connection, 10_003)
    assert epoch is not None
    assert epoch.revealed_at is not None
    assert commitment_of(third) == epoch.commitment
    assert shop.reveal() == []


def test_it_takes_its_time(shop: SeededShop) -> None:
    with shop.engine.connect() as connection:
        first = by_id(connection, 10_001)
        assert first is not None
        assert first.closes_at is not None
        left = first.closes_at - clock.now(connection)
    shop.pass_time(left + timedelta(minutes=50))
    assert shop.reveal(after_s=3600) == []
    shop.pass_time(timedelta(minutes=11))
    assert shop.reveal(after_s=3600) == ["1.1"]


def test_a_request_that_waits_keeps_its_epoch_and_all_later_ones_secret(shop: SeededShop) -> None:
    account = shop.account(user=1)
    waiting, dead, settled = (DrawRequest(account_id=account, request_key=it) for it in ("waiting", "dead", "settled"))
    shop.pass_time(LENGTH)
    shop.accept(waiting, dead, settled)
    shop.settle(settled)
    with shop.engine.begin() as connection:
        requests.give_up(connection, "dead", dead.fingerprint(), "NEVER_SETTLED")
    shop.pass_time(3 * LENGTH)
    assert shop.reveal() == ["1.1"]
    assert revealed(shop, 10_003) is None
    shop.settle(waiting)
    assert shop.reveal() == ["1.2", "1.3", "1.4"]


def test_without_the_seed_nothing_is_revealed(shop: SeededShop) -> None:
    shop.pass_time(LENGTH)
    mine, shop.masters = shop.masters, Masters([OTHER])
    assert shop.reveal() == []
    shop.masters = mine


def test_a_commitment_that_was_changed_is_no_reason_to_reveal(shop: SeededShop) -> None:
    shop.pass_time(2 * LENGTH)
    is_second = seed_epochs.c.id == 10_002
    with shop.engine.begin() as connection:
        second = by_id(connection, 10_002)
        connection.execute(update(seed_epochs).where(is_second).values(commitment="0" * 64))
    with pytest.raises(ConfigurationError, match=r"epoch 1\.2 has another commitment"):
        shop.reveal()
    assert (revealed(shop, 10_001) is not None, revealed(shop, 10_002)) == (True, None)
    assert second is not None
    with shop.engine.begin() as connection:
        connection.execute(update(seed_epochs).where(is_second).values(commitment=second.commitment))
    assert shop.reveal() == ["1.2"]


def test_the_seed_of_before_becomes_public_with_the_last_secret_of_its_chain(shop: SeededShop) -> None:
    shop.pass_time(LENGTH)
    assert shop.reveal() == ["1.1"]
    shop.rotate(OTHER, SEED)
    assert revealed(shop, BEFORE_EPOCHS_ID) is None
    shop.pass_time(LENGTH)
    # Chain 1 ended in its second epoch: the others never open, and need not be revealed.
    assert shop.reveal() == ["2.1", "1.2", "0.0"]
    seed = revealed(shop, BEFORE_EPOCHS_ID)
    assert seed is not None
    assert seed_id_of(seed) == seed_id_of(SEED)
    assert revealed(shop, 10_003) is None


def test_a_batch_that_draws_in_an_epoch_is_waited_for(mariadb_url: str) -> None:
    with open_seeded_shop(mariadb_url) as shop:
        shop.pass_time(LENGTH)
        with ThreadPoolExecutor(1) as pool:
            with transaction(shop.engine) as batch:
                assert _revealed(batch, {10_001}) == set()
                revealing = pool.submit(shop.reveal)
                with pytest.raises(TimeoutError):
                    revealing.result(0.5)
            assert revealing.result(10) == ["1.1"]
        with transaction(shop.engine) as batch:
            assert _revealed(batch, {10_001, 10_002}) == {10_001}


def test_a_draw_that_settles_late_is_drawn_in_its_epoch_while_that_is_secret(shop: SeededShop) -> None:
    draw = DrawRequest(account_id=shop.account(user=1), request_key="k")
    shop.accept(draw)
    shop.pass_time(LENGTH + 2 * LONG_OVER)
    shop.settle(draw)
    assert shop.noted() == {"k": "1.1"}
    assert shop.reveal() == ["1.1"]


def test_who_settles_and_who_reveals_agree(mariadb_url: str) -> None:
    """Many times, side by side: no draw is drawn in an epoch whose secret is public."""
    with open_seeded_shop(mariadb_url) as shop, ThreadPoolExecutor(2) as pool:
        account = shop.account(user=1)
        for turn in range(8):
            draw = DrawRequest(account_id=account, request_key=f"k{turn}")
            shop.entry.accept([Submission(draw)])
            shop.pass_time(LENGTH)
            settling, revealing = pool.submit(shop.settle, draw), pool.submit(shop.reveal)
            settling.result(20)
            revealing.result(20)
            shop.look()
        shop.reveal()
        assert len(set(shop.noted().values())) == 8
