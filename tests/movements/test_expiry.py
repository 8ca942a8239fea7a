"""Points that expire: what is due by the month, once, whatever the runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from sqlalchemy import Engine, text, update

from tests.books import table
from tests.ledgers import migrated
from tests.processes import House
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.operations.transfer import TransferRequest
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import asset_transactions
from tombola.worker.audit import audit
from tombola.worker.ledger.accounts import open_account
from tombola.worker.movements import expiry
from tombola.worker.movements.expiry import Expiry, Month
from tombola.worker.movements.settling import settle
from tombola.worker.operators import actions

WHEELS = {DEFAULT_CAMPAIGN.name: Wheel(DEFAULT_CAMPAIGN, b"seed" * 8)}
MONTH = Month(2026, 11)
DUE = Expiry("POINT", MONTH, 30)  # earned before the 2nd of October


@pytest.fixture
def engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(expiry, "ACCOUNTS_MAX", 3)
    monkeypatch.setattr(expiry, "BATCH_MAX", 2)
    made = open_engine(database_url)
    migrated(made)
    yield made
    assert audit.audit(made, WHEELS).violations == []
    made.dispose()


def account(engine: Engine, number: int, *, earned_on: str = "2026-09-01", asset: str = "POINT") -> int:
    """An account with 10.00, earned on that day."""
    made = open_account(engine, user_id=number, asset_code=asset, balance=Decimal(10))
    date_back(engine, made, earned_on)
    return made


def date_back(engine: Engine, account_id: int, to: str) -> None:
    day = datetime.fromisoformat(to).replace(tzinfo=UTC)
    with engine.begin() as connection:
        mine = asset_transactions.c.account_id == account_id
        connection.execute(update(asset_transactions).where(mine).values(created_at=day))


def balances(engine: Engine) -> dict[int, int]:
    return {row["id"]: row["balance"] for row in table(engine, "account_asset_balances")}


def pay(engine: Engine, payer: int, to: int, amount: str) -> None:
    settle(engine, TransferRequest(account_id=payer, amount=amount, to=to), operator="ann")


def test_the_moment_follows_from_month_and_validity() -> None:
    assert DUE.until == datetime(2026, 10, 2, tzinfo=UTC)
    asked = DUE.request(6)
    assert (asked.request_key, asked.until) == ("expiry-POINT-6-202611", "2026-10-02T00:00:00+00:00")
    long = Expiry("A" * 50, MONTH, 30).request(2**63 - 1)
    assert len(long.request_key) <= 64
    assert long.request_key != Expiry("A" * 49 + "B", MONTH, 30).request(2**63 - 1).request_key
    assert str(Month.of(datetime(2026, 1, 31, 23, tzinfo=UTC))) == "2026-01"
    assert Month.parse("2026-02").begins == datetime(2026, 2, 1, tzinfo=UTC)
    for wrong in ("2026-13", "2026-1", "11/2026", "", "0001-01", "２０２６-01"):
        with pytest.raises(InvalidRequest, match="a month is written as"):
            Month.parse(wrong)


def test_what_is_due_expires_once(engine: Engine) -> None:
    old = [account(engine, number) for number in range(1, 8)]
    young = account(engine, 20, earned_on="2026-10-02")
    coins = account(engine, 21, asset="COIN")
    spent = account(engine, 22)
    pay(engine, spent, young, "9.50")
    foretold = expiry.foretell(engine, DUE)
    assert (foretold.looked_at, foretold.due, foretold.amount) == (9, 8, Decimal("70.50"))
    done = expiry.expire(engine, DUE, by="ann", reason="november")
    assert (done.expired, done.amount, done.is_whole, done.refused) == (8, Decimal("70.50"), True, 0)
    after = balances(engine)
    assert {after[it] for it in (*old, spent)} == {0}
    assert (after[young], after[coins]) == (19_50, 10_00)
    again = expiry.expire(engine, DUE, by="ann")
    assert (again.due, again.expired, again.repeated, again.is_whole) == (0, 0, 0, True)
    assert balances(engine) == after
    with engine.connect().execution_options(read_only=True) as connection:
        last, first = actions.recent(connection, rows_max=2)
    assert (first.operator, first.action, first.reason, first.count) == ("ann", "account expire", "november", 8)
    about = {"asset": "POINT", "month": "2026-11", "valid_days": 30, "until": "2026-10-02T00:00:00+00:00"}
    assert first.details.items() >= (about | {"amount": "70.50", "looked_at": 9, "held": 0}).items()
    assert last.count == 0
    (row,) = (it for it in table(engine, "api_idempotency_requests") if it["request_key"] == "expiry-POINT-1-202611")
    assert (row["status"], row["settled_by"]) == ("completed", "ann")


def test_many_runs_at_once_take_it_once(engine: Engine) -> None:
    for number in range(1, 11):
        account(engine, number)
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda by: expiry.expire(engine, DUE, by=by), ("a", "b", "c")))
    while not (last := expiry.expire(engine, DUE, by="d")).is_whole:
        pass  # what another run had locked
    assert sum(it.expired for it in (*runs, last)) == 10
    assert set(balances(engine).values()) == {0}


def test_a_run_that_is_stopped_is_gone_on_with(engine: Engine) -> None:
    for number in range(1, 9):
        account(engine, number, earned_on="2020-01-01")
    valid_days = 400
    pages: list[int] = []
    month = Month.of(utc_now())
    done = expiry.expire(
        engine,
        Expiry("POINT", month, valid_days),
        by="tombola.expire",
        is_stopped=lambda: len(pages) >= 1,
        on_progress=lambda it: pages.append(it.looked_at),
    )
    assert (done.looked_at, done.expired, done.is_through, done.after_id) == (3, 3, False, 3)
    went_on = expiry.go_on(engine, "POINT", valid_days, by="tombola.expire", time_s_max=60)
    assert went_on is not None
    assert (went_on.looked_at, went_on.expired, went_on.is_whole) == (5, 5, True)
    assert expiry.go_on(engine, "POINT", valid_days, by="tombola.expire", time_s_max=60) is None
    # No run of this asset is on record: it begins with the first account.
    account(engine, 30, earned_on="2020-01-01", asset="COIN")
    coins = expiry.go_on(engine, "COIN", valid_days, by="tombola.expire", time_s_max=60)
    assert coins is not None
    assert coins.expired == 1


def test_a_month_that_has_not_begun_is_refused(engine: Engine) -> None:
    ahead = Month.of(utc_now() + timedelta(days=40))
    with pytest.raises(InvalidRequest, match="are not due before"):
        expiry.expire(engine, Expiry("POINT", ahead, 30), by="ann")
    with pytest.raises(InvalidRequest, match="are not due before"):
        expiry.foretell(engine, Expiry("POINT", ahead, 30))


def test_another_validity_takes_nothing_more_in_the_same_month(engine: Engine) -> None:
    first, second = account(engine, 1), account(engine, 2, earned_on="2026-10-20")
    assert expiry.expire(engine, DUE, by="ann").expired == 1
    settle(engine, RechargeRequest(account_id=first, amount="3"), operator="ann")
    date_back(engine, first, "2026-09-01")
    shorter = expiry.expire(engine, DUE._replace(valid_days=7), by="ann")
    assert (shorter.due, shorter.expired, shorter.refused) == (2, 1, 1)
    assert balances(engine) == {first: 3_00, second: 0}


def test_an_account_that_is_held_is_left_to_a_later_run(mariadb_url: str) -> None:
    engine = open_engine(mariadb_url)
    migrated(engine)
    held, free = account(engine, 1), account(engine, 2)
    with engine.begin() as connection:
        connection.execute(text(f"SELECT * FROM account_asset_balances WHERE id = {held} FOR UPDATE"))
        done = expiry.expire(engine, DUE, by="ann")
    assert (done.expired, done.held, done.is_through, done.is_whole) == (1, 1, True, False)
    assert balances(engine) == {held: 10_00, free: 0}
    assert expiry.expire(engine, DUE, by="ann").is_whole
    assert balances(engine) == {held: 0, free: 0}
    engine.dispose()


def test_an_account_that_the_database_refuses_is_named_and_the_others_expire(
    mariadb_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine(mariadb_url)
    migrated(engine)
    first, second, third = (account(engine, number) for number in (1, 2, 3))
    with engine.begin() as connection:
        connection.execute(
            text(f"ALTER TABLE asset_transactions ADD CONSTRAINT no CHECK (account_id <> {second} OR delta_amount > 0)")
        )
    done = expiry.expire(engine, DUE, by="ann")
    assert (done.expired, done.refused, done.is_whole) == (2, 1, True)
    assert balances(engine) == {first: 0, second: 10_00, third: 0}
    assert f"account {second}: the database refuses this" in caplog.text
    engine.dispose()


def test_the_task_goes_by_the_setting(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "redis://127.0.0.1:1"
    with House(database_url, nowhere, nowhere, TOMBOLA_POINTS_VALID_DAYS="POINT=400") as house:
        for name, value in house.env.items():
            monkeypatch.setenv(name, value)
        from tombola.worker.celery import make_app

        points = account(house.engine, 1, earned_on="2020-01-01")
        coins = account(house.engine, 2, earned_on="2020-01-01", asset="COIN")
        off = make_app(house.settings.model_copy(update={"points_valid_days": ()}))
        assert off.tasks["tombola.expire"].apply().get() == 0
        app = make_app(house.settings)
        assert app.conf.beat_schedule["expire"]["task"] == "tombola.expire"
        assert [app.tasks["tombola.expire"].apply().get() for _ in range(2)] == [1, 0]
        assert balances(house.engine) == {points: 0, coins: 10_00}
        with house.engine.connect().execution_options(read_only=True) as connection:
            (action,) = actions.recent(connection, rows_max=10)  # the second task had nothing to do
        assert (action.operator, action.count, action.details["is_through"]) == ("tombola.expire", 1, True)
        assert house.violations() == []
