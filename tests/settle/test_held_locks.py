"""What another transaction holds, or a trigger refuses, costs the draws that need it and no others."""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, NullPool, create_engine, make_url, text

from tests import servers
from tests.books import assert_books
from tests.ledgers import migrated
from tests.processes import SEED, House, draws, wait_for
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.entry import Entry
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.requests import Submission
from tombola.worker.ledger.accounts import open_account
from tombola.worker.relay.relay import Relay
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Answer, Deferred, Refused, Settled
from tombola.worker.settle.consumer import Consumer
from tombola.worker.settle.rules import Rules

WHEELS = {"default": Wheel(DEFAULT_CAMPAIGN, bytes.fromhex(SEED))}
RULES = Rules(WHEELS)


@pytest.fixture
def engine(mariadb_url: str) -> Iterator[Engine]:
    migrated(mariadb_url)
    engine = open_engine(mariadb_url, lock_wait_s=1)
    yield engine
    assert_books(engine)
    engine.dispose()


def accounts(engine: Engine, count: int) -> list[int]:
    return [open_account(engine, user_id=number, balance=Decimal(100)) for number in range(1, count + 1)]


def draws_on(account_ids: Sequence[int]) -> list[DrawRequest]:
    return [DrawRequest(account_id=it, request_key=f"draw_{n:04d}") for n, it in enumerate(account_ids)]


def settle(engine: Engine, draws: Sequence[Request], *, has_patience: bool = True) -> list[Answer]:
    return tries.settle(engine, draws, RULES, has_patience=has_patience)


def deferred(answers: Sequence[Answer]) -> list[str]:
    assert not [answer for answer in answers if isinstance(answer, Refused)]
    return [answer.request.request_key for answer in answers if isinstance(answer, Deferred)]


@contextmanager
def held(engine: Engine, statement: str, **values: Any) -> Iterator[Connection]:
    """A stranger's transaction that has run `statement`, and stays open."""
    # Not by an engine of ours: with these, MariaDB ends a transaction that idles.
    with create_engine(engine.url, poolclass=NullPool).connect() as stranger:
        stranger.execute(text(statement), values)
        yield stranger
        stranger.rollback()


LOCK_ACCOUNT = "SELECT 1 FROM account_asset_balances WHERE id = :id FOR UPDATE"
HOLD_REQUEST = (
    "INSERT INTO api_idempotency_requests "
    "(request_key, lottery_session_id, account_id, campaign, fingerprint, status, created_at) "
    "VALUES (:key, :session, :account, 'default', 'f', 'accepted', UTC_TIMESTAMP(6))"
)
HOLD_ROW = (
    "INSERT INTO asset_transactions (account_id, business_id, lottery_session_id, idempotency_key, business_type, "
    "asset_code, delta_amount, balance_before, balance_after, created_at, updated_at) "
    "VALUES (:account, 's', 's', :key, 'lottery_consume', 'POINT', -1, 1, 0, UTC_TIMESTAMP(6), UTC_TIMESTAMP(6))"
)


def test_forty_of_eight_hundred_wait_and_the_others_settle_at_once(engine: Engine) -> None:
    ids = accounts(engine, 100)
    draws = draws_on([ids[number % 100] for number in range(800)])
    expected = [draw.request_key for draw in draws if draw.account_id in ids[10:15]]
    assert len(expected) == 40
    with ExitStack() as strangers:
        for account_id in ids[10:15]:
            strangers.enter_context(held(engine, LOCK_ACCOUNT, id=account_id))
        began = time.monotonic()
        answers = settle(engine, draws)
        took_s = time.monotonic() - began
        assert deferred(answers) == expected
        assert all(it.is_account_held for it in answers if isinstance(it, Deferred))
        # One wait, for the first of the five accounts: ten halvings of a second each took four times as long.
        assert took_s < 5
        again = settle(engine, [it.request for it in answers if isinstance(it, Deferred)], has_patience=False)
        assert deferred(again) == expected
    assert deferred(settle(engine, draws)) == []


def test_locks_that_come_free_one_after_the_other_do_not_add_up(engine: Engine) -> None:
    """Each is held for less than we wait for one lock: together they must not keep the batch for longer than that."""
    ids = accounts(engine, 8)
    with ExitStack() as strangers:
        held_by = [strangers.enter_context(held(engine, LOCK_ACCOUNT, id=account_id)) for account_id in ids[:6]]
        settling = strangers.enter_context(_in_thread(lambda: settle(engine, draws_on(ids))))
        for stranger in held_by:
            time.sleep(0.7)
            stranger.rollback()
        answers, took_s = settling()
    assert took_s < 3.5, "it waited for one after the other"
    assert {"draw_0006", "draw_0007"}.isdisjoint(deferred(answers))


@contextmanager
def _in_thread(work: Any) -> Iterator[Any]:
    from concurrent.futures import ThreadPoolExecutor

    def timed() -> tuple[Any, float]:
        began = time.monotonic()
        return work(), time.monotonic() - began

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(timed).result


@pytest.mark.parametrize("has_patience", [True, False], ids=["patient", "impatient"])
@pytest.mark.parametrize("what", ["its key", "its session", "its ledger row", "its row, accepted"])
def test_what_holds_one_request_defers_that_request_alone(engine: Engine, what: str, has_patience: bool) -> None:
    ids = accounts(engine, 5)
    draws = draws_on([ids[number % 4] for number in range(60)])
    draw = draws[33]
    if what == "its row, accepted":
        with engine.begin() as connection:
            connection.execute(
                text(HOLD_REQUEST.replace("'f'", ":fingerprint")),
                {
                    "key": draw.request_key, "session": draw.request_key, "account": draw.account_id,
                    "fingerprint": draw.fingerprint(),
                },
            )  # fmt: skip
    holders: dict[str, tuple[str, dict[str, Any]]] = {
        "its key": (HOLD_REQUEST, {"key": draw.request_key, "session": "other", "account": ids[4]}),
        "its session": (HOLD_REQUEST, {"key": "other", "session": draw.request_key, "account": ids[4]}),
        # Under the account's lock by all who keep the rules: this one does not.
        "its ledger row": (HOLD_ROW, {"key": f"{draw.request_key}:consume", "account": ids[4]}),
        "its row, accepted": (
            "SELECT 1 FROM api_idempotency_requests WHERE request_key = :key FOR UPDATE",
            {"key": draw.request_key},
        ),
    }
    statement, values = holders[what]
    with held(engine, statement, **values):
        began = time.monotonic()
        answers = settle(engine, draws, has_patience=has_patience)
        assert time.monotonic() - began < (5 if has_patience else 2)
        assert deferred(answers) == [draw.request_key]
        assert not any(it.is_account_held for it in answers if isinstance(it, Deferred))
    assert all(isinstance(answer, Settled) for answer in settle(engine, draws))


REFUSES = {
    "a trigger on the ledger": (
        "CREATE TRIGGER refuse BEFORE INSERT ON asset_transactions FOR EACH ROW IF NEW.account_id = {id} THEN "
        "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'this member is barred'; END IF",
        "DROP TRIGGER refuse",
    ),
    "a trigger on balances": (
        "CREATE TRIGGER refuse BEFORE UPDATE ON account_asset_balances FOR EACH ROW IF NEW.id = {id} THEN "
        "SIGNAL SQLSTATE '45001' SET MYSQL_ERRNO = 9999, MESSAGE_TEXT = 'no'; END IF",
        "DROP TRIGGER refuse",
    ),
    "a check": (
        "ALTER TABLE asset_transactions ADD CONSTRAINT refuse CHECK (account_id <> {id} OR business_type = 'recharge')",
        "ALTER TABLE asset_transactions DROP CONSTRAINT refuse",
    ),
    "a broken trigger": (
        "CREATE TRIGGER refuse BEFORE INSERT ON asset_transactions FOR EACH ROW IF NEW.account_id = {id} THEN "
        "SET NEW.delta_amount = 'no number'; END IF",
        "DROP TRIGGER refuse",
    ),
}


@pytest.mark.parametrize("refuses", REFUSES)
def test_what_refuses_one_account_refuses_its_draws_alone(engine: Engine, refuses: str) -> None:
    ids = accounts(engine, 5)
    draws = draws_on([ids[number % 5] for number in range(40)])
    create, drop = REFUSES[refuses]
    with engine.begin() as connection:
        connection.execute(text(create.format(id=ids[2])))
    answers = settle(engine, draws)
    assert {it.request.account_id for it in answers if isinstance(it, Refused)} == {ids[2]}
    assert {it.cause for it in answers if isinstance(it, Refused)} == {"failed alone"}
    assert {it.request.account_id for it in answers if isinstance(it, Settled)} == {*ids} - {ids[2]}
    with engine.begin() as connection:
        connection.execute(text(drop))
    assert all(isinstance(answer, Settled) for answer in settle(engine, draws))


# ---- the consumer ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["redis", "rabbitmq"])
def house(request: pytest.FixtureRequest, mariadb_url: str, redis_url: str) -> Iterator[House]:
    broker_url = redis_url if request.param == "redis" else request.getfixturevalue("rabbitmq_url")
    quick = {"TOMBOLA_BATCH_SIZE_MAX": "100", "TOMBOLA_CLAIM_AFTER_S": "7", "TOMBOLA_RELAY_AFTER_S": "3"}
    with House(mariadb_url, broker_url, redis_url, **quick) as house:
        yield house


@contextmanager
def consuming(house: House) -> Iterator[Consumer]:
    engine = open_engine(house.settings.need("database_url"), lock_wait_s=house.settings.lock_wait_s)
    consumer = Consumer.open(house.settings, engine, house.wheels)
    consumer.start()
    try:
        yield consumer
    finally:
        assert consumer.stop(timeout_s=30)
        engine.dispose()


def keys_of(draws: Sequence[DrawRequest]) -> set[str]:
    return {draw.request_key for draw in draws}


def test_draws_of_held_accounts_wait_apart_and_newcomers_go_first(house: House) -> None:
    """More of them than there is room for in hand: those go to the end of the queue, and none is lost or blamed."""
    ids = house.accounts(20)
    stuck = draws([*ids[:2]], 250, prefix="stuck")
    with held(house.engine, LOCK_ACCOUNT, id=ids[0]), held(house.engine, LOCK_ACCOUNT, id=ids[1]):
        house.enqueue(stuck)
        with consuming(house):
            for number in range(3):
                newcomers = draws(ids[2:], 40, prefix=f"new{number}")
                house.enqueue(newcomers)
                house.wait_settled(40 * (number + 1), within_s=10)
                assert keys_of(newcomers) <= house.results().keys()
            # Longer than a claim takes, and than a suspect is given.
            time.sleep(9)
            assert house.settled() == 120
        assert house.causes() == []
    with consuming(house):
        house.wait_settled(370, within_s=30)
    assert (house.causes(), house.violations()) == ([], [])


@pytest.mark.parametrize("house", ["redis"], indirect=True)
def test_an_accepted_draw_that_waits_apart_is_not_published_again(house: House) -> None:
    (account_id,) = house.accounts(1)
    (draw,) = draws([account_id], 1)
    entry = Entry(open_engine(house.settings.need("database_url")), relay_after_s=house.settings.relay_after_s)
    relay = Relay.from_settings(house.settings)
    with held(house.engine, LOCK_ACCOUNT, id=account_id), consuming(house) as consumer:
        entry.accept([Submission(draw)])
        house.enqueue([draw])
        wait_for(lambda: len(consumer._aside) == 1, within_s=10, what=lambda: "it is not set aside")
        time.sleep(1.5 * house.settings.relay_after_s)
        assert relay.run_once() == 0
    with consuming(house):
        house.wait_settled(1, within_s=20)
    relay.close()
    entry.close()


def test_a_worker_cut_off_from_its_database_gives_back_what_it_holds(house: House) -> None:
    """The one that is cut off fetches no more; the other one settles everything, and none is delivered too often."""
    queued = draws(house.accounts(5), 300)
    with socket.socket() as nobody:  # connects, and never answers
        nobody.bind((servers.HOST, 0))
        nobody.listen(100)
        port = nobody.getsockname()[1]
        url = make_url(house.settings.need("database_url")).set(port=port).render_as_string(hide_password=False)
        broken = Consumer.open(house.settings, open_engine(url, read_timeout_s=1), house.wheels)
        house.enqueue(queued)
        broken.start()
        try:
            wait_for(lambda: broken._outages_in_row > 0, within_s=30, what=lambda: "it still hopes")
            with consuming(house):
                house.wait_settled(300, within_s=10)
        finally:
            assert broken.stop(timeout_s=30)
    assert (house.causes(), house.violations()) == ([], [])
