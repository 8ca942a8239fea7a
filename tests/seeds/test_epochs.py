"""Draws and their epochs: bound at the door or when they settle, bound anew, drawn under the secret of their epoch."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import update

from tests.campaigns.shops import LOCK_WAIT_S, Shop
from tests.ledgers import migrated
from tests.seeds.shops import EPOCHS_ALONE, LENGTH, PRIZES, SEED, SeededShop, open_seeded_shop
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.seeds import draw_key, secret_of
from tombola.producers.entry import Entry
from tombola.producers.storage import clock, requests
from tombola.producers.storage import seeds as storage
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.schema import api_idempotency_requests
from tombola.producers.storage.seeds import Epochs, all_epochs, by_id, open_at
from tombola.worker.seeds.binding import EpochSeeds
from tombola.worker.seeds.masters import Masters
from tombola.worker.settle.answers import Deferred, Settled

pytestmark = pytest.mark.slow

OTHER = b"other" * 8


@pytest.fixture
def shop(database_url: str) -> Iterator[SeededShop]:
    with open_seeded_shop(database_url) as opened:
        yield opened


def draws(account_id: int, *keys: str, campaign: str = "default") -> list[DrawRequest]:
    return [DrawRequest(account_id=account_id, request_key=key, campaign=campaign) for key in keys]


def bind(shop: SeededShop, epoch: int | None) -> None:
    with shop.engine.begin() as connection:
        connection.execute(update(api_idempotency_requests).values(seed_epoch=epoch))


def prize_of(draw: DrawRequest, epoch: int, master: bytes = SEED) -> str:
    """The prize that anybody computes who has the secret of that epoch."""
    key = draw_key(secret_of(master, epoch), draw.campaign)
    return f"{Wheel(DEFAULT_CAMPAIGN, key).draw(draw.account_id, draw.request_key).amount}"


def test_a_draw_is_drawn_in_the_epoch_of_its_acceptance(shop: SeededShop) -> None:
    asked = draws(shop.account(user=1), *(f"k{number:02}" for number in range(20)))
    (acceptance, *_) = shop.accept(*asked)
    assert acceptance.record is not None
    assert acceptance.record.seed_epoch == 10_001
    shop.pass_time(LENGTH)
    found = shop.results(shop.settle(*asked))
    assert shop.bound() == {it.request_key: 10_001 for it in asked}
    assert shop.noted() == {it.request_key: "1.1" for it in asked}
    assert [it.prize_amount for it in found] == [prize_of(it, 1) for it in asked]
    assert [prize_of(it, 1) for it in asked] != [prize_of(it, 2) for it in asked]
    later = draws(asked[0].account_id, "later")
    shop.draw(*later)
    assert (shop.bound()["later"], shop.noted()["later"]) == (10_002, "1.2")


def test_draws_by_campaigns_have_keys_of_their_own(shop: SeededShop) -> None:
    shop.publish(PRIZES)
    asked = draws(shop.account(user=1), *(f"k{number:02}" for number in range(30)), campaign="autumn")
    some = [DrawRequest(account_id=asked[0].account_id, request_key="three", campaign="autumn", pulls=3)]
    shop.accept(*asked[:10], *some)
    shop.pass_time(LENGTH)
    shop.settle(*asked[:10], *some, *asked[10:])  # two epochs in one batch
    assert set(shop.noted().values()) == {"1.1", "1.2"}
    assert {shop.bound()[it.request_key] for it in asked[10:]} == {10_002}


def test_a_message_that_no_door_has_accepted_binds_when_it_settles(shop: SeededShop) -> None:
    account = shop.account(user=1)
    first, second = draws(account, "first", "second")
    shop.settle(first, RechargeRequest(account_id=account, request_key="paid", amount="5.00", channel="shop"))
    shop.pass_time(LENGTH)
    shop.settle(first, second)
    assert shop.bound() == {"first": 10_001, "paid": None, "second": 10_002}


def test_a_door_before_the_first_chain_leaves_it_to_the_worker(database_url: str) -> None:
    migrated(database_url)
    before = Shop(open_engine(database_url, lock_wait_s=LOCK_WAIT_S))
    (draw,) = draws(before.account(user=1), "k")
    before.accept(draw)
    shop = SeededShop(before.engine)
    assert shop.bound() == {"k": None}
    shop.settle(draw)
    assert (shop.bound(), shop.noted(), shop.violations()) == ({"k": 10_001}, {"k": "1.1"}, [])
    for it in (before, shop):
        it.entry.close()


def test_a_dead_request_that_is_revived_binds_anew(shop: SeededShop) -> None:
    account = shop.account(user=1)
    (draw,) = draws(account, "k")
    paid = RechargeRequest(account_id=account, request_key="paid", amount="5.00", channel="shop")
    shop.accept(draw)
    shop.entry.accept([Submission(paid)])
    with shop.engine.begin() as connection:
        assert requests.give_up(connection, "k", draw.fingerprint(), "NEVER_SETTLED")
        assert requests.give_up(connection, "paid", paid.fingerprint(), "NEVER_SETTLED")
    shop.pass_time(LENGTH)
    assert shop.reveal() == ["1.1"]
    with shop.engine.begin() as connection:
        assert requests.revive(connection, ["k", "paid"], clock.now(connection)) == 2
    assert shop.bound() == {"k": 10_002, "paid": None}
    shop.settle(draw, paid)
    assert shop.noted() == {"k": "1.2"}


def test_a_draw_of_an_epoch_that_is_public_by_now_binds_anew(shop: SeededShop) -> None:
    """Its row was committed after the secret was revealed: a frontend might have waited for the secret."""
    (draw,) = draws(shop.account(user=1), "k")
    shop.accept(draw)
    shop.pass_time(LENGTH, *EPOCHS_ALONE)
    bind(shop, None)
    assert shop.reveal() == ["1.1"]
    bind(shop, 10_001)
    shop.settle(draw)
    assert (shop.bound(), shop.noted()) == ({"k": 10_002}, {"k": "1.2"})


def test_a_frontends_transaction_that_outlives_the_revelation(mariadb_url: str) -> None:
    with open_seeded_shop(mariadb_url) as shop:
        account = shop.account(user=1)
        (draw,) = draws(account, "k")
        slow = open_engine(mariadb_url)
        with slow.connect() as connection:
            shop.entry.accept_with(connection, Submission(draw))
            shop.pass_time(LENGTH, *EPOCHS_ALONE)
            assert shop.reveal() == ["1.1"], "its row cannot be seen"
            connection.commit()
        assert shop.bound() == {"k": 10_001}
        shop.settle(draw)
        assert (shop.bound(), shop.noted()) == ({"k": 10_002}, {"k": "1.2"})
        slow.dispose()


def test_a_worker_without_the_seed_leaves_its_draws_to_others(shop: SeededShop) -> None:
    account = shop.account(user=1)
    old, new = draws(account, "old", "new")
    shop.publish(PRIZES)
    (limited,) = draws(account, "limited", campaign="autumn")
    shop.accept(old, limited)
    rules = shop.rules
    shop.rules = rules._replace(seeds=EpochSeeds(shop.engine, Masters([OTHER])))
    paid = RechargeRequest(account_id=account, request_key="paid", amount="5.00", channel="shop")
    answers = shop.settle(old, new, limited, paid)
    assert [type(it) for it in answers] == [Deferred, Deferred, Deferred, Settled]
    shop.rules = rules
    assert all(isinstance(it, Settled) for it in shop.settle(old, new, limited, paid))


def test_what_a_worker_lacks_of_an_older_chain_keeps_no_other_draw(
    shop: SeededShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tombola.worker.seeds.chains.ANNOUNCED", timedelta(0))
    old, new = draws(shop.account(user=1), "old", "new")
    shop.accept(old)
    shop.rotate(OTHER, SEED)
    shop.accept(new)
    rules = shop.rules
    shop.rules = rules._replace(seeds=EpochSeeds(shop.engine, Masters([OTHER])))
    assert [type(it) for it in shop.settle(old, new)] == [Deferred, Settled]
    shop.rules = rules
    shop.settle(old)
    assert shop.noted() == {"old": "1.1", "new": "2.1"}


def test_a_row_that_is_gone_comes_back_with_the_epoch_of_its_draw(shop: SeededShop) -> None:
    (draw,) = draws(shop.account(user=1), "k")
    shop.draw(draw)
    shop.pass_time(LENGTH)
    with shop.engine.begin() as connection:
        connection.execute(api_idempotency_requests.delete())
    shop.settle(draw)
    assert (shop.bound(), shop.noted()) == ({"k": 10_001}, {"k": "1.1"})


# ---- what processes know of the epochs -------------------------------------------------------------------------------


def test_epochs_are_read_once_in_a_while(shop: SeededShop, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = Epochs(shop.engine)
    now = clock.now(shop.engine)
    looks = 0
    look = epochs._look

    def counted() -> storage._Known:
        nonlocal looks
        looks += 1
        return look()

    monkeypatch.setattr(epochs, "_look", counted)
    for _ in range(5):
        found = epochs.at(now)
        assert found is not None
        assert (found.id, str(found.name)) == (10_001, "1.1")
        assert epochs.by_id(10_001) == found
        assert epochs.has_begun
    assert looks == 1
    monkeypatch.setattr(storage, "REFRESH_S", 0)
    epochs.at(now)
    assert looks == 2
    assert epochs.at(now - timedelta(days=1)) is None
    assert epochs.by_id(4711) is None


def test_an_epoch_is_open_from_its_first_moment_to_before_its_last(shop: SeededShop) -> None:
    with shop.engine.connect() as connection:
        epochs = all_epochs(connection)
        second = epochs[2]
        assert second.closes_at is not None
        moment = timedelta(microseconds=1)
        for at, number in ((second.opens_at - moment, 10_001), (second.opens_at, 10_002),
                           (second.closes_at - moment, 10_002), (second.closes_at, 10_003)):  # fmt: skip
            found = open_at(connection, at)
            assert found is not None
            assert found.id == number
            assert [it.id for it in epochs if it.name.chain and it.is_open_at(at)] == [number]
        assert by_id(connection, 10_002) == second
        assert len(epochs) == 1 + 3650


def test_another_process_learns_of_a_rotation_before_the_chain_opens(
    shop: SeededShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Entry(
        open_engine(shop.engine.url.render_as_string(hide_password=False), lock_wait_s=LOCK_WAIT_S), relay_after_s=60
    )
    account = shop.account(user=1)
    other.accept([Submission(it) for it in draws(account, "before")])
    begun = shop.rotate(OTHER, SEED)
    assert storage.STALE_S < (begun.begun_at - clock.now(shop.engine)).total_seconds() < 2 * storage.STALE_S
    shop.accept(*draws(account, "announced"))
    assert shop.bound() == {"before": 10_001, "announced": 10_001}
    shop.pass_time(begun.begun_at - clock.now(shop.engine) + timedelta(seconds=1), *EPOCHS_ALONE)
    monkeypatch.setattr(storage, "REFRESH_S", 0)
    other.accept([Submission(it) for it in draws(account, "after")])
    assert shop.bound()["after"] == 20_001
    shop.settle(*draws(account, "before", "announced", "after"))
    assert shop.noted() == {"before": "1.1", "announced": "1.1", "after": "2.1"}
    other.close()
