"""THE transaction on both databases: one charge for each request, however often, in whatever company it is delivered.

After every test the books are looked up in plain SQL (tests.books).
"""

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

import pymysql
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, insert, select, text

from tests.books import Row, assert_books, table
from tests.kept_results import keep_results, results_of
from tests.ledgers import migrated, recharge
from tombola.producers.domain.causes import DeadReason
from tombola.producers.domain.contract import DUPLICATE_REQUEST_IDEMPOTENT, DrawRequest, parse_result
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Campaign, Prize, Wheel
from tombola.producers.domain.errors import ConfigurationError, ServiceUnavailable
from tombola.producers.domain.money import AMOUNT_MAX
from tombola.producers.storage import requests
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.faults import fault_of
from tombola.producers.storage.ledger import get_lottery_session_transactions
from tombola.producers.storage.schema import account_asset_balances, api_idempotency_requests, asset_transactions
from tombola.producers.storage.transactions import transaction
from tombola.worker.ledger import post as ledger
from tombola.worker.ledger.accounts import open_account
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Answer, Deferred, Refused, Settled
from tombola.worker.settle.rules import Rules

SEED = bytes(range(32))
SPRING = Campaign(
    name="spring",
    asset_code="POINT",
    cost=Decimal("2.50"),
    prizes=(Prize(1, Decimal("100.00")), Prize(2, Decimal("0.25")), Prize(3, Decimal("0.00"))),
)
COINS = Campaign(name="coins", asset_code="COIN", cost=Decimal("1.00"), prizes=(Prize(1, Decimal("1.00")),))
WHEELS = {campaign.name: Wheel(campaign, SEED) for campaign in (DEFAULT_CAMPAIGN, SPRING, COINS)}
NO_ACCOUNT = 2**62
# So long that nobody gives up on a slow machine; tests that want a lock wait to end say so.
LOCK_WAIT_S = 10
TABLES = ("account_asset_balances", "asset_transactions", "api_idempotency_requests")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    yield from _engine(database_url)


@pytest.fixture
def mariadb(mariadb_url: str) -> Iterator[Engine]:
    """For what only a server with row locks can do."""
    yield from _engine(mariadb_url)


def _engine(url: str) -> Iterator[Engine]:
    migrated(url)
    engine = open_engine(url, lock_wait_s=LOCK_WAIT_S)
    yield engine
    assert_books(engine)
    engine.dispose()


def settle(engine: Engine, *draws: DrawRequest, tries_max: int = 2) -> list[Answer]:
    return tries.settle(engine, draws, Rules(WHEELS, tries_max, lock_wait_s=LOCK_WAIT_S), sleep=lambda _: None)


def settled(engine: Engine, *draws: DrawRequest) -> list[Settled]:
    answers = settle(engine, *draws)
    assert all(isinstance(answer, Settled) for answer in answers), answers
    return [answer for answer in answers if isinstance(answer, Settled)]


def snapshot(engine: Engine) -> list[list[Row]]:
    return [table(engine, name) for name in TABLES]


def key_that(account_id: int, *, wins: bool, campaign: str = "default", prefix: str = "k") -> str:
    """The first key that draws a prize on this account, or none."""
    keys = (f"{prefix}{number}" for number in itertools.count())
    return next(key for key in keys if (WHEELS[campaign].draw(account_id, key).amount > 0) is wins)


def session_of(engine: Engine, session_id: str) -> list[dict[str, Any]]:
    return get_lottery_session_transactions(session_id, engine=engine)


def balance_of(engine: Engine, account_id: int) -> Decimal:
    with engine.connect() as connection:
        found = connection.execute(
            select(account_asset_balances.c.balance).where(account_asset_balances.c.id == account_id)
        )
        balance: Decimal = found.scalar_one()
    return balance


def accept(engine: Engine, draw: DrawRequest, *, fingerprint: str = "") -> None:
    """What the gateway has done before it publishes."""
    with engine.begin() as connection:
        connection.execute(
            insert(api_idempotency_requests).values(
                request_key=draw.request_key,
                lottery_session_id=draw.lottery_session_id,
                account_id=draw.account_id,
                campaign=draw.campaign,
                fingerprint=fingerprint or draw.fingerprint(),
                status="accepted",
                created_at=utc_now(),
                publish_at=utc_now(),
            )
        )


def archive(engine: Engine) -> None:
    """What retention does with old requests; the ledger is never touched."""
    with engine.begin() as connection:
        connection.execute(delete(api_idempotency_requests))


# ---- the owner's list -----------------------------------------------------------------


@pytest.mark.parametrize("wins", [True, False])
def test_a_repeated_request_is_not_charged_again(engine: Engine, wins: bool) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    draw = DrawRequest(account_id=account_id, request_key=key_that(account_id, wins=wins))
    (first,) = settled(engine, draw)
    after_first = snapshot(engine)
    assert (first.is_repeat, first.reason) == (False, None)
    for _ in range(3):
        (again,) = settled(engine, draw)
        assert again.result == first.result
        assert (again.is_repeat, again.reason) == (True, DUPLICATE_REQUEST_IDEMPOTENT)
        assert abs(again.settled_at - first.settled_at).total_seconds() < 0.001
    assert snapshot(engine) == after_first
    assert balance_of(engine, account_id) == (14 if wins else 9)


def test_a_win_writes_two_rows_that_its_session_ties_together(engine: Engine) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    key = key_that(account_id, wins=True)
    (answer,) = settled(engine, DrawRequest(account_id=account_id, request_key=key, lottery_session_id="lottery_tx_1"))
    consume, reward = session_of(engine, "lottery_tx_1")
    assert consume["transaction_id"] < reward["transaction_id"]
    assert (consume["idempotency_key"], reward["idempotency_key"]) == (f"{key}:consume", f"{key}:reward")
    assert (consume["business_type"], reward["business_type"]) == ("lottery_consume", "lottery_reward")
    assert (consume["delta_amount"], reward["delta_amount"]) == (-1, 5)
    chain = [consume["balance_before"], consume["balance_after"], reward["balance_before"], reward["balance_after"]]
    assert chain == [10, 9, 9, 14]
    for row in (consume, reward):
        assert (row["account_id"], row["asset_code"]) == (account_id, "POINT")
        assert row["business_id"] == row["lottery_session_id"] == "lottery_tx_1"
        assert DEFAULT_CAMPAIGN.odds_hash in row["notes"]
        assert row["created_at"] == row["updated_at"] == answer.settled_at
    result = json.loads(answer.result)
    assert (result["status"], result["reason"], result["prize_amount"]) == ("completed", None, "5.00")
    assert (result["balance_after"], result["lottery_session_id"], result["request_key"]) == (
        "14.00",
        "lottery_tx_1",
        key,
    )


def test_a_loss_writes_the_charge_alone(engine: Engine) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(1))
    key = key_that(account_id, wins=False)
    (answer,) = settled(engine, DrawRequest(account_id=account_id, request_key=key))
    assert [row["idempotency_key"] for row in session_of(engine, key)] == [f"{key}:consume"]
    result = parse_result(answer.result)
    assert (result.status, result.prize_amount, result.balance_after, result.won) == (
        "completed",
        "0.00",
        "0.00",
        False,
    )


def test_after_many_draws_every_key_is_there_once_and_every_session_whole(engine: Engine) -> None:
    accounts = [open_account(engine, user_id=number, balance=Decimal(200)) for number in range(1, 6)]
    draws = [
        DrawRequest(
            account_id=accounts[number % 5], request_key=f"r{number}", campaign=("default", "spring")[number % 2]
        )
        for number in range(150)
    ]
    deliveries = [*draws, *random.Random(1).sample(draws, 60)]
    answers = [
        answer for start in range(0, len(deliveries), 40) for answer in settled(engine, *deliveries[start:][:40])
    ]
    assert sum(answer.is_repeat for answer in answers) == 60
    with engine.connect() as connection:
        total, distinct = connection.execute(
            text("SELECT COUNT(*), COUNT(DISTINCT idempotency_key) FROM asset_transactions")
        ).one()
    assert total == distinct
    expected = {
        draw.request_key: WHEELS[draw.campaign].draw(draw.account_id, draw.request_key).amount for draw in draws
    }
    assert 0 < sum(amount > 0 for amount in expected.values()) < len(draws)
    for key, amount in expected.items():
        types = [row["business_type"] for row in session_of(engine, key)]
        assert types == (["lottery_consume", "lottery_reward"] if amount else ["lottery_consume"])
    assert total == len(accounts) + len(draws) + sum(amount > 0 for amount in expected.values())


# ---- rejections are outcomes -----------------------------------------------------------------------------------------


def test_who_was_told_no_is_told_no_again_even_after_a_recharge(engine: Engine) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal("0.99"))
    draw = DrawRequest(account_id=account_id, request_key="k")
    (first,) = settled(engine, draw)
    result = parse_result(first.result)
    assert (result.status, result.reason, result.balance_after) == ("rejected", "INSUFFICIENT_BALANCE", "0.99")
    assert session_of(engine, "k") == []
    recharge(engine, account_id, Decimal(10))
    (again,) = settled(engine, draw)
    assert (again.result, again.is_repeat) == (first.result, True)
    assert balance_of(engine, account_id) == Decimal("10.99")
    (other,) = settled(engine, DrawRequest(account_id=account_id, request_key="a-new-try"))
    assert parse_result(other.result).status == "completed"


@pytest.mark.parametrize(("balance", "status"), [("1.00", "completed"), ("0.99", "rejected"), ("0", "rejected")])
def test_the_cost_is_what_a_draw_needs(engine: Engine, balance: str, status: str) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(balance))
    (answer,) = settled(engine, DrawRequest(account_id=account_id, request_key="k"))
    assert parse_result(answer.result).status == status


def test_a_batch_cannot_spend_what_an_account_has_not(engine: Engine) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal("3.50"))
    losing = [key for key in map("k{}".format, range(40)) if not WHEELS["default"].draw(account_id, key).amount][:6]
    answers = settled(engine, *(DrawRequest(account_id=account_id, request_key=key) for key in losing))
    assert [parse_result(answer.result).status for answer in answers] == ["completed"] * 3 + ["rejected"] * 3
    assert balance_of(engine, account_id) == Decimal("0.50")


def test_an_account_that_is_not_there_or_of_another_asset_is_rejected_and_recorded(engine: Engine) -> None:
    points = open_account(engine, user_id=1, balance=Decimal(10))
    coins = open_account(engine, user_id=1, asset_code="COIN", balance=Decimal(10))
    draws = [
        DrawRequest(account_id=NO_ACCOUNT, request_key="nobody"),
        DrawRequest(account_id=coins, request_key="coins-for-points"),
        DrawRequest(account_id=points, request_key="points-for-coins", campaign="coins"),
    ]
    answers = settled(engine, *draws)
    for answer in answers:
        result = parse_result(answer.result)
        assert (result.status, result.reason, result.balance_after) == ("rejected", "ACCOUNT_NOT_FOUND", None)
    assert [answer.result for answer in settled(engine, *draws)] == [answer.result for answer in answers]
    (coin_draw,) = settled(engine, DrawRequest(account_id=coins, request_key="coins", campaign="coins"))
    assert parse_result(coin_draw.result).status == "completed"


# ---- conflicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["settled", "rejected", "accepted", "in the same batch"])
@pytest.mark.parametrize("change", ["account_id", "campaign", "lottery_session_id"])
def test_a_key_with_another_request_behind_it_is_refused_and_learns_nothing(
    engine: Engine, state: str, change: str
) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(0 if state == "rejected" else 10))
    other_id = open_account(engine, user_id=2, balance=Decimal(10))
    first = DrawRequest(account_id=account_id, request_key="k", lottery_session_id="s")
    changes: dict[str, Any] = {"account_id": other_id, "campaign": "spring", "lottery_session_id": "s2"}
    fields: dict[str, Any] = {"account_id": account_id, "request_key": "k", "lottery_session_id": "s"}
    other = DrawRequest(**fields | {change: changes[change]})
    if state == "in the same batch":
        answer, refused = settle(engine, first, other)
        assert isinstance(answer, Settled)
    else:
        if state == "accepted":
            accept(engine, first)
        else:
            settled(engine, first)
        before = snapshot(engine)
        (refused,) = settle(engine, other)
        assert snapshot(engine) == before
    assert isinstance(refused, Refused)
    assert refused.cause == "fingerprint mismatch"
    assert "10" not in refused.error
    assert balance_of(engine, other_id) == 10
    # the first one is none the worse for it
    assert parse_result(settled(engine, first)[0].result).account_id == account_id


def test_a_session_belongs_to_one_draw(engine: Engine) -> None:
    """Or its result would change when the second one settles. The others of the batch are not held up."""
    account_id = open_account(engine, user_id=1, balance=Decimal(50))
    draws = [
        DrawRequest(account_id=account_id, request_key=f"k{number}", lottery_session_id=session_id)
        for number, session_id in enumerate(["a", "s", "b", "s", "c", "d", "s", "e"])
    ]
    answers = settle(engine, *draws)
    assert [type(answer) for answer in answers] == [
        *(Settled, Settled, Settled, Refused, Settled, Settled, Refused, Settled)
    ]
    assert {answer.cause for answer in answers if isinstance(answer, Refused)} == {"fingerprint mismatch"}
    assert {row["idempotency_key"].partition(":")[0] for row in session_of(engine, "s")} == {"k1"}


def test_an_unknown_campaign_is_refused_alone_and_left_unrecorded(engine: Engine) -> None:
    """A worker that is not configured yet must not decide for ever."""
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    early = DrawRequest(account_id=account_id, request_key="early", campaign="summer")
    other = DrawRequest(account_id=account_id, request_key="other")
    refused, answer = settle(engine, early, other)
    assert isinstance(refused, Refused)
    assert refused.cause == "unknown campaign"
    assert isinstance(answer, Settled)
    summer = Campaign("summer", "POINT", Decimal(1), (Prize(1, Decimal(0)),))
    (later,) = tries.settle(engine, [early], Rules({"summer": Wheel(summer, SEED)}, tries_max=1))
    assert isinstance(later, Settled)
    assert not later.is_repeat


def test_a_key_twice_in_one_batch_is_a_redelivery(engine: Engine) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    draw = DrawRequest(account_id=account_id, request_key="k")
    answers = settled(engine, draw, DrawRequest(account_id=account_id, request_key="other"), draw, draw)
    assert [answer.is_repeat for answer in answers] == [False, False, True, True]
    assert answers[0].result == answers[2].result == answers[3].result


def test_keys_that_differ_in_case_are_two_requests(engine: Engine) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    answers = settled(engine, *(DrawRequest(account_id=account_id, request_key=key) for key in ("Abc", "abc", "ABC")))
    assert [answer.is_repeat for answer in answers] == [False] * 3
    assert len({row["idempotency_key"] for row in table(engine, "asset_transactions")} - {None}) >= 4


# ---- requests accepted before ----------------------------------------------------------------------------------------


def test_accepted_requests_are_finished_in_their_own_rows(engine: Engine) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(2))
    keys = ["accepted-1", "new-1", "accepted-2", "new-2", "accepted-3"]
    draws = [DrawRequest(account_id=account_id, request_key=key, campaign="spring") for key in keys]
    for draw in draws[::2]:
        accept(engine, draw)
    accepted_at = {row["request_key"]: row["created_at"] for row in table(engine, "api_idempotency_requests")}
    answers = settled(engine, *draws)
    assert [answer.is_repeat for answer in answers] == [False] * 5
    results = results_of(engine)
    rows = {row["request_key"]: row for row in table(engine, "api_idempotency_requests")}
    for answer in answers:
        row = rows[answer.request.request_key]
        assert row["status"] == parse_result(answer.result).status == "rejected"
        assert row["reason"] == "INSUFFICIENT_BALANCE"
        assert (row["result"], results[answer.request.request_key]) == (None, answer.result)
    assert {key: rows[key]["created_at"] for key in accepted_at} == accepted_at
    assert [answer.result for answer in settled(engine, *draws)] == [answer.result for answer in answers]


def test_accepted_requests_with_different_outcomes_are_not_mixed_up(engine: Engine) -> None:
    """One statement finishes them all."""
    rich = open_account(engine, user_id=1, balance=Decimal(100))
    poor = open_account(engine, user_id=2)
    draws = [
        DrawRequest(account_id=(rich, poor, NO_ACCOUNT)[number % 3], request_key=f"k{number}") for number in range(30)
    ]
    for draw in draws:
        accept(engine, draw)
    answers = settled(engine, *draws)
    statuses = [parse_result(answer.result).status for answer in answers]
    assert statuses == ["completed", "rejected", "rejected"] * 10
    results = results_of(engine)
    rows = {row["request_key"]: row for row in table(engine, "api_idempotency_requests")}
    for draw, answer in zip(draws, answers, strict=True):
        result = parse_result(answer.result)
        assert (result.request_key, result.account_id) == (draw.request_key, draw.account_id)
        row = rows[draw.request_key]
        assert (row["status"], row["reason"]) == (result.status, result.reason)
        assert (row["result"], results[draw.request_key]) == (None, answer.result)


# ---- requests archived since -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("campaign", ["default", "spring"])
@pytest.mark.parametrize("wins", [True, False])
def test_an_archived_request_is_rebuilt_from_the_ledger_to_the_same_bytes(
    engine: Engine, wins: bool, campaign: str
) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(50))
    key = key_that(account_id, wins=wins, campaign=campaign)
    draw = DrawRequest(account_id=account_id, request_key=key, campaign=campaign, lottery_session_id="s")
    (first,) = settled(engine, draw)
    settled(engine, DrawRequest(account_id=account_id, request_key="later"))
    archive(engine)
    books = table(engine, "asset_transactions")
    (again,) = settled(engine, draw)
    assert (again.result, again.is_repeat) == (first.result, True)
    assert table(engine, "asset_transactions") == books
    # it is on record again
    assert results_of(engine) == {key: first.result}


def test_an_archived_request_on_another_account_is_refused(engine: Engine) -> None:
    payer = open_account(engine, user_id=1, balance=Decimal(10))
    other = open_account(engine, user_id=2, balance=Decimal(10))
    settled(engine, DrawRequest(account_id=payer, request_key="k"))
    archive(engine)
    (refused,) = settle(engine, DrawRequest(account_id=other, request_key="k"))
    assert isinstance(refused, Refused)
    assert refused.cause == "fingerprint mismatch"
    assert table(engine, "api_idempotency_requests") == []


def test_an_archived_request_that_is_accepted_anew_gets_its_first_result(engine: Engine) -> None:
    """A client's late retry: the gateway has forgotten the key and accepts it; the ledger has not."""
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    draw = DrawRequest(account_id=account_id, request_key="k")
    (first,) = settled(engine, draw)
    archive(engine)
    accept(engine, draw)
    try:
        (again,) = settle(engine, draw)
    finally:
        archive(engine)  # the books do not know a request that is accepted and charged
    assert isinstance(again, Settled)
    assert (again.result, again.is_repeat) == (first.result, True)


def test_an_archived_request_under_another_session_is_refused(engine: Engine) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    settled(engine, DrawRequest(account_id=account_id, request_key="k", lottery_session_id="s1"))
    archive(engine)
    try:
        (refused,) = settle(engine, DrawRequest(account_id=account_id, request_key="k", lottery_session_id="s2"))
    finally:
        archive(engine)  # the books do not know a request whose session is not its rows'
    assert isinstance(refused, Refused)


def test_an_archived_request_needs_no_campaign_any_more(engine: Engine) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    draw = DrawRequest(account_id=account_id, request_key="k")
    (first,) = settled(engine, draw)
    archive(engine)
    (again,) = tries.settle(engine, [draw], Rules({}, tries_max=1))
    assert isinstance(again, Settled)
    assert again.result == first.result


def retire(engine: Engine) -> None:
    """What retention does to rows of older releases: the results' text goes, the rest of the rows stays."""
    keep_results(engine)
    with engine.begin() as connection:
        assert requests.archive(connection, utc_now(), rows_max=800) > 0


def test_an_archived_requests_session_is_not_given_to_another(engine: Engine) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    first = DrawRequest(account_id=account_id, request_key="k1", lottery_session_id="s")
    (answer,) = settled(engine, first)
    retire(engine)
    (other,) = settle(engine, DrawRequest(account_id=account_id, request_key="k2", lottery_session_id="s"))
    assert isinstance(other, Refused)
    (again,) = settled(engine, first)
    assert (again.result, again.settled_at, again.is_repeat) == (answer.result, answer.settled_at, True)


@pytest.mark.parametrize("balance", [0, 1])
def test_who_was_told_no_is_told_no_again_in_the_same_bytes_after_archiving(engine: Engine, balance: int) -> None:
    """Also after a recharge, and whether the account had anything or did not exist at all."""
    account_id = open_account(engine, user_id=1) if balance else 4711
    draw = DrawRequest(account_id=account_id, request_key="k")
    (no,) = settled(engine, draw)
    retire(engine)
    if balance:
        recharge(engine, account_id, Decimal(100))
    (again,) = settled(engine, draw)
    assert (again.result, again.settled_at, again.is_repeat) == (no.result, no.settled_at, True)
    (row,) = table(engine, "api_idempotency_requests")
    assert row["result"] is None


def test_a_dead_request_is_not_settled_by_a_late_message(engine: Engine) -> None:
    """It was told that nothing was charged; only an operator's replay opens it again."""
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    draw = DrawRequest(account_id=account_id, request_key="k")
    accept(engine, draw)
    with engine.begin() as connection:
        assert requests.give_up(connection, "k", draw.fingerprint(), DeadReason.NEVER_SETTLED)
    (late,) = settle(engine, draw)
    assert isinstance(late, Refused)
    assert late.cause == "never settled"
    assert balance_of(engine, account_id) == 10
    with engine.begin() as connection:
        assert requests.revive(connection, ["k"], utc_now()) == 1
    (now,) = settled(engine, draw)
    assert not now.is_repeat


# ---- one bad draw in a good batch ------------------------------------------------------------------------------------


def test_a_balance_out_of_range_costs_that_draw_alone(engine: Engine) -> None:
    full = open_account(engine, user_id=1, balance=AMOUNT_MAX)
    other = open_account(engine, user_id=2, balance=Decimal(10))
    draws = [DrawRequest(account_id=other, request_key=f"good-{number}") for number in range(7)]
    draws.insert(3, DrawRequest(account_id=full, request_key=key_that(full, wins=True)))
    answers = settle(engine, *draws)
    assert [type(answer) for answer in answers] == [Settled] * 3 + [Refused] + [Settled] * 4
    refused = answers[3]
    assert isinstance(refused, Refused)
    assert refused.cause == "failed alone"
    assert balance_of(engine, full) == AMOUNT_MAX
    assert session_of(engine, draws[3].request_key) == []
    # a loss fits, so the account is not barred
    settled(engine, DrawRequest(account_id=full, request_key=key_that(full, wins=False)))


@pytest.mark.parametrize("poisoned", [0, 5, 11, 12])
def test_a_draw_that_makes_our_own_code_fail_is_found(
    engine: Engine, poisoned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(50))
    draws = [DrawRequest(account_id=account_id, request_key=f"k{number}") for number in range(13)]
    finish = requests.finish

    def fail_on_one(open_transaction: Any, finished: Sequence[Any], now: Any, **options: Any) -> None:
        finish(open_transaction, finished, now, **options)
        if any(it.request.request_key == f"k{poisoned}" for it in finished):
            raise ArithmeticError("a bug of ours")

    monkeypatch.setattr(requests, "finish", fail_on_one)
    answers = settle(engine, *draws)
    assert [number for number, answer in enumerate(answers) if not isinstance(answer, Settled)] == [poisoned]
    refused = answers[poisoned]
    assert isinstance(refused, Refused)
    assert (refused.cause, refused.error) == ("failed alone", "ArithmeticError: a bug of ours")
    assert session_of(engine, f"k{poisoned}") == []
    monkeypatch.undo()
    # fixed and replayed
    assert not settled(engine, draws[poisoned])[0].is_repeat


def test_answers_come_in_the_order_of_the_draws(engine: Engine) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(50))
    draws = [
        DrawRequest(account_id=account_id, request_key=f"k{number}", lottery_session_id=f"s{number % 9}")
        for number in random.Random(2).sample(range(20), 20)
    ]
    answers = settle(engine, *draws)
    assert [answer.request for answer in answers] == draws
    assert sum(isinstance(answer, Settled) for answer in answers) == 9


def test_a_full_batch_settles_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """900 draws, half of them accepted before: within what the databases take in one statement."""
    accounts = [open_account(engine, user_id=number, balance=Decimal(99)) for number in range(1, 31)]
    draws = [DrawRequest(account_id=accounts[number % 30], request_key=f"k{number:04}") for number in range(900)]
    with engine.begin() as connection:
        connection.execute(
            insert(api_idempotency_requests),
            [
                {
                    "request_key": draw.request_key,
                    "lottery_session_id": draw.lottery_session_id,
                    "account_id": draw.account_id,
                    "campaign": draw.campaign,
                    "fingerprint": draw.fingerprint(),
                    "status": "accepted",
                    "created_at": utc_now(),
                }
                for draw in draws[::2]
            ],
        )
    tries = record_errors(monkeypatch)
    assert not any(answer.is_repeat for answer in settled(engine, *draws))
    assert all(answer.is_repeat for answer in settled(engine, *draws))
    assert tries == []


# ---- all or nothing --------------------------------------------------------------------------------------------------


class Died(BaseException):
    """A SIGKILL, as far as code between two statements can be killed."""


STEPS: list[tuple[Any, str]] = [
    (ledger, "lock_accounts"),
    (requests, "look_up"),
    (ledger, "charged"),
    (ledger, "post"),
    (ledger, "move"),
    (requests, "finish"),
]


@pytest.mark.parametrize(("module", "name"), STEPS, ids=[name for _, name in STEPS])
@pytest.mark.parametrize("error", [Died(), OSError("the network is gone"), pymysql.OperationalError(2013, "gone")])
def test_what_ends_after_a_statement_leaves_nothing(
    engine: Engine, module: Any, name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    draws = [DrawRequest(account_id=account_id, request_key=f"k{number}") for number in range(4)]
    accept(engine, draws[0])
    before = snapshot(engine)
    step = getattr(module, name)

    def die(*arguments: Any, **options: Any) -> None:
        step(*arguments, **options)
        raise error

    monkeypatch.setattr(module, name, die)
    with pytest.raises(Died if isinstance(error, Died) else ServiceUnavailable):
        settle(engine, *draws)
    monkeypatch.undo()
    assert snapshot(engine) == before
    assert [answer.is_repeat for answer in settled(engine, *draws)] == [False] * 4


def test_a_database_without_tables_says_what_to_do(database_url: str) -> None:
    engine = open_engine(database_url)
    with pytest.raises(ConfigurationError, match="tombola migrate"):
        settle(engine, DrawRequest(account_id=1, request_key="k"))
    engine.dispose()


def test_a_database_that_is_down_is_an_outage() -> None:
    engine = open_engine("mysql+pymysql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(ServiceUnavailable, match="the database does not answer"):
        settle(engine, DrawRequest(account_id=1, request_key="k"))


def test_no_draws_need_no_transaction(mariadb: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = itertools.count(1)

    def count(engine: Engine) -> Any:
        if next(opened) > 3:
            pytest.fail("it goes on and on")
        return transaction(engine)

    monkeypatch.setattr(tries, "transaction", count)
    assert settle(mariadb) == []


# ---- others at the same time -----------------------------------------------------------------------------------------


def test_workers_that_are_handed_the_same_draws_charge_them_once(engine: Engine) -> None:
    """Redelivered, shuffled and cut differently for each: every key has one result, whoever answers."""
    accounts = [open_account(engine, user_id=number, balance=Decimal(12)) for number in range(1, 5)]
    draws = [DrawRequest(account_id=accounts[number % 4], request_key=f"k{number}") for number in range(60)]

    def work(number: int) -> list[Settled]:
        shuffled = random.Random(number).sample(draws, len(draws))
        size = 7 + number * 5
        cut = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
        return [answer for lot in cut for answer in settled(engine, *lot)]

    with ThreadPoolExecutor(4) as pool:
        everything = [answer for answers in pool.map(work, range(4)) for answer in answers]
    results: dict[str, set[bytes]] = {}
    for answer in everything:
        results.setdefault(answer.request.request_key, set()).add(answer.result)
    assert len(results) == 60
    assert all(len(bodies) == 1 for bodies in results.values())
    assert sum(not answer.is_repeat for answer in everything) == 60


def test_workers_with_different_draws_on_the_same_accounts_lose_no_charge(engine: Engine) -> None:
    """Where each worker wrote back the balance that it read before the others had written theirs."""
    accounts = [open_account(engine, user_id=number, balance=Decimal(1000)) for number in (1, 2)]
    draws = [DrawRequest(account_id=accounts[number % 2], request_key=f"k{number}") for number in range(120)]

    def work(number: int) -> None:
        mine = draws[number::4]
        for start in range(0, len(mine), 3):
            settled(engine, *mine[start : start + 3])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    for account_id in accounts:
        won = sum(
            WHEELS["default"].draw(account_id, draw.request_key).amount
            for draw in draws
            if draw.account_id == account_id
        )
        assert balance_of(engine, account_id) == 1000 - 60 + won


def test_a_balance_is_read_under_its_lock(mariadb: Engine) -> None:
    """A recharge is under way: the draw waits for it, and then has its points."""
    account_id = open_account(mariadb, user_id=1)
    draw = DrawRequest(account_id=account_id, request_key=key_that(account_id, wins=False))
    with mariadb.connect() as recharging, ThreadPoolExecutor(1) as pool:
        now = utc_now()
        recharging.execute(account_asset_balances.update().values(balance=Decimal(1)))
        recharging.execute(
            insert(asset_transactions).values(
                account_id=account_id,
                business_id="recharge",
                lottery_session_id="recharge",
                idempotency_key="recharge",
                business_type="recharge",
                asset_code="POINT",
                delta_amount=Decimal(1),
                balance_before=Decimal(0),
                balance_after=Decimal(1),
                created_at=now,
                updated_at=now,
            )
        )
        settling = pool.submit(settle, mariadb, draw)
        await_lock_wait(mariadb)
        recharging.commit()
        (answer,) = settling.result(timeout=30)
    assert isinstance(answer, Settled)
    assert parse_result(answer.result).status == "completed"


def test_one_key_many_times_in_parallel_is_charged_once(engine: Engine) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    draw = DrawRequest(account_id=account_id, request_key="k")
    barrier = threading.Barrier(5, timeout=60)

    def click(_: int) -> Settled:
        barrier.wait()
        return settled(engine, draw)[0]

    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(click, range(5)))
    assert len({answer.result for answer in answers}) == 1
    assert sum(not answer.is_repeat for answer in answers) == 1


def test_one_key_for_two_accounts_in_parallel_is_charged_to_one(mariadb: Engine) -> None:
    """They share no account's lock: here the unique constraint itself decides."""
    accounts = [open_account(mariadb, user_id=number, balance=Decimal(100)) for number in range(1, 5)]
    barrier = threading.Barrier(4, timeout=60)

    def click(account_id: int) -> list[Answer]:
        answers = []
        for number in range(15):
            barrier.wait()
            answers += settle(mariadb, DrawRequest(account_id=account_id, request_key=f"k{number}"), tries_max=5)
        return answers

    with ThreadPoolExecutor(4) as pool:
        everything = [answer for answers in pool.map(click, accounts) for answer in answers]
    assert sum(isinstance(answer, Settled) for answer in everything) == 15
    refused = [answer for answer in everything if isinstance(answer, Refused)]
    assert len(refused) == 45
    assert {answer.cause for answer in refused} == {"fingerprint mismatch"}


def test_sqlite_waits_its_turn_and_says_so_when_it_does_not_come(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    migrated(url)
    engine, other = open_engine(url, lock_wait_s=0), open_engine(url)
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    draw = DrawRequest(account_id=account_id, request_key="k")
    with other.begin(), pytest.raises(ServiceUnavailable, match="locked"):
        settle(engine, draw)
    assert not settled(engine, draw)[0].is_repeat
    assert_books(engine)


# ---- MariaDB's own ways to fail --------------------------------------------------------------------------------------


def record_errors(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The codes of the errors that `settle` meets, as they come."""
    codes: list[int | None] = []

    def remember(error: BaseException) -> Any:
        codes.append(error.args[0] if isinstance(error, pymysql.MySQLError) else None)
        return fault_of(error)

    monkeypatch.setattr(tries, "fault_of", remember)
    return codes


def await_lock_wait(engine: Engine) -> None:
    """Until somebody waits for a row lock."""
    deadline_s = time.monotonic() + 5
    with engine.connect() as connection:
        while not connection.execute(
            text("SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'")
        ).first():
            assert time.monotonic() < deadline_s, "nobody came to wait"
            # InnoDB renews this table at most every 0.1 s, and only after a pause in reading it
            time.sleep(0.12)


def test_a_deadlock_runs_the_whole_transaction_again(mariadb: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first_id, second_id = (open_account(mariadb, user_id=number, balance=Decimal(10)) for number in (1, 2))
    draws = [DrawRequest(account_id=account_id, request_key=f"k{account_id}") for account_id in (first_id, second_id)]
    codes = record_errors(monkeypatch)
    with mariadb.connect() as other, ThreadPoolExecutor(1) as pool:
        lock = text("SELECT balance FROM account_asset_balances WHERE id = :id FOR UPDATE")
        # Work that makes the other transaction the heavier one, so that ours is chosen as the victim.
        other.execute(text("CREATE TEMPORARY TABLE heavy (id INT) ENGINE=InnoDB"))
        other.execute(text(f"INSERT INTO heavy VALUES {','.join(['(1)'] * 500)}"))
        other.execute(lock, {"id": second_id})
        settling = pool.submit(settle, mariadb, *draws)
        await_lock_wait(mariadb)
        other.execute(lock, {"id": first_id})
        other.commit()
        answers = settling.result(timeout=30)
    assert 1213 in codes
    assert [isinstance(answer, Settled) and not answer.is_repeat for answer in answers] == [True, True]


def test_a_draw_whose_account_stays_locked_is_deferred_and_the_others_settle(
    mariadb: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts = [open_account(mariadb, user_id=number, balance=Decimal(10)) for number in range(1, 5)]
    draws = [DrawRequest(account_id=account_id, request_key=f"k{account_id}") for account_id in accounts]
    held = accounts[2]
    impatient = open_engine(mariadb.url.render_as_string(hide_password=False), lock_wait_s=1)
    codes = record_errors(monkeypatch)
    with mariadb.connect() as other:
        other.execute(text("SELECT 1 FROM account_asset_balances WHERE id = :id FOR UPDATE"), {"id": held})
        answers = settle(impatient, *draws, tries_max=1)
        other.rollback()
    impatient.dispose()
    assert [type(answer) for answer in answers] == [Settled, Settled, Deferred, Settled]
    assert set(codes) == {1205}
    assert session_of(mariadb, f"k{held}") == []
    again = settled(mariadb, *draws)
    assert [answer.is_repeat for answer in again] == [True, True, False, True]
    for before, after in zip(answers, again, strict=True):
        if isinstance(before, Settled):
            assert before.result == after.result


Commit = Callable[[], None]
Fault = Callable[["pymysql.connections.Connection[Any]", Commit], None]


@contextmanager
def at_commit(*faults: Fault) -> Iterator[list[Fault]]:
    """The first commits of any PyMySQL connection meet these faults in turn; yields those still to come."""
    left = list(faults)
    commit = pymysql.connections.Connection.commit

    def meet(connection: "pymysql.connections.Connection[Any]") -> None:
        if left:
            left.pop(0)(connection, lambda: commit(connection))
        else:
            commit(connection)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pymysql.connections.Connection, "commit", meet)
        yield left


def lost_after(_: Any, commit: Commit) -> None:
    """The server commits, and its answer does not arrive."""
    commit()
    raise pymysql.OperationalError(2013, "Lost connection to MySQL server during query")


def galera_conflict(connection: Any, _: Commit) -> None:
    """A lost race against another node shows here; the node has rolled back."""
    connection.rollback()
    raise pymysql.OperationalError(1213, "Deadlock found when trying to get lock; try restarting transaction")


def error_during_commit(connection: Any, _: Commit) -> None:
    connection.rollback()
    raise pymysql.OperationalError(1180, 'Got error 149 "Lock deadlock" during COMMIT')


@pytest.fixture
def four_draws(mariadb: Engine) -> list[DrawRequest]:
    rich = open_account(mariadb, user_id=1, balance=Decimal(10))
    poor = open_account(mariadb, user_id=2)
    draws = [
        DrawRequest(account_id=rich, request_key=key_that(rich, wins=True)),
        DrawRequest(account_id=rich, request_key=key_that(rich, wins=False), campaign="default"),
        DrawRequest(account_id=poor, request_key="too-poor"),
        DrawRequest(account_id=NO_ACCOUNT, request_key="nobody"),
    ]
    accept(mariadb, draws[1])
    return draws


def test_a_commit_whose_answer_is_lost_is_found_out_by_the_keys(mariadb: Engine, four_draws: list[DrawRequest]) -> None:
    with at_commit(lost_after) as left, pytest.raises(ServiceUnavailable, match="Lost connection"):
        settle(mariadb, *four_draws)
    assert left == []
    after = snapshot(mariadb)
    assert {row["status"] for row in after[2]} == {"completed", "rejected"}
    again = settled(mariadb, *four_draws)
    assert [answer.is_repeat for answer in again] == [True] * 4
    assert {answer.request.request_key: answer.result for answer in again} == results_of(mariadb)
    assert snapshot(mariadb) == after


def test_a_connection_killed_before_its_commit_has_done_nothing(mariadb: Engine, four_draws: list[DrawRequest]) -> None:
    def kill(connection: Any, commit: Commit) -> None:
        with mariadb.connect().execution_options(isolation_level="AUTOCOMMIT") as operator:
            operator.execute(text(f"KILL {connection.thread_id()}"))
        commit()

    before = snapshot(mariadb)
    # twice: the operator's own connection commits nothing
    with at_commit(kill) as left, pytest.raises(ServiceUnavailable, match="the database does not answer"):
        settle(mariadb, *four_draws)
    assert left == []
    assert snapshot(mariadb) == before
    assert [answer.is_repeat for answer in settled(mariadb, *four_draws)] == [False] * 4


@pytest.mark.parametrize("conflict", [galera_conflict, error_during_commit])
def test_a_conflict_at_commit_runs_the_whole_transaction_again(
    mariadb: Engine, four_draws: list[DrawRequest], conflict: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = record_errors(monkeypatch)
    with at_commit(conflict) as left:
        answers = settled(mariadb, *four_draws)
    assert (left, len(codes)) == ([], 1)
    assert [answer.is_repeat for answer in answers] == [False] * 4


def test_conflicts_at_every_commit_defer_the_draws_and_blame_none(
    mariadb: Engine, four_draws: list[DrawRequest]
) -> None:
    before = snapshot(mariadb)
    with at_commit(*[galera_conflict] * 100) as left:
        answers = settle(mariadb, *four_draws, tries_max=3)
    assert [type(answer) for answer in answers] == [Deferred] * 4
    assert len(left) == 100 - 3 * (1 + 2 + 4)  # the batch, its halves, the draws alone: each three times
    assert snapshot(mariadb) == before
    assert [answer.is_repeat for answer in settled(mariadb, *four_draws)] == [False] * 4


def test_crashes_do_not_roll_the_dice_again(mariadb: Engine) -> None:
    """What was drawn before the crash is drawn after it: nobody can wait for a better prize."""
    account_id = open_account(mariadb, user_id=1, balance=Decimal(100))
    draws = [DrawRequest(account_id=account_id, request_key=f"k{number}") for number in range(30)]
    attempts: list[list[str]] = []
    post = ledger.post

    def remember(open_transaction: Any, entries: Sequence[Any], now: Any) -> None:
        attempts.append([f"{entry.idempotency_key} {entry.delta}" for entry in entries])
        post(open_transaction, entries, now)

    with pytest.MonkeyPatch.context() as patch, at_commit(galera_conflict, galera_conflict):
        patch.setattr(ledger, "post", remember)
        tries.settle(mariadb, draws, Rules(WHEELS, tries_max=3), sleep=lambda _: None)
    assert len(attempts) == 3
    assert attempts[0] == attempts[1] == attempts[2]
    assert any(entry.endswith("reward 5.00") for entry in attempts[0])


def test_a_session_does_not_trust_the_servers_defaults(mariadb: Engine) -> None:
    with mariadb.connect() as connection:
        settings = {str(name): value for name, value in connection.execute(text("SHOW SESSION VARIABLES"))}
    isolation = settings.get("transaction_isolation", settings.get("tx_isolation"))  # older MariaDB
    mode, zone, charset = (settings[it] for it in ("sql_mode", "time_zone", "character_set_connection"))
    assert isolation == "READ-COMMITTED"
    assert "STRICT_TRANS_TABLES" in mode
    assert "NO_BACKSLASH_ESCAPES" not in mode
    assert (zone, charset) == ("+00:00", "utf8mb4")
    assert settings["innodb_lock_wait_timeout"] == str(LOCK_WAIT_S)


# ---- any mix, in any batching, equals one draw at a time -------------------------------------------------------------


class Spec(NamedTuple):
    """A draw by names, so that examples are readable: `account` and `session` mean something only in an example."""

    key: str
    account: str
    campaign: str
    session: str  # empty: the key


class Step(NamedTuple):
    accepted: list[Spec]
    recharged: str
    delivered: list[Spec]


# In this order their ids are 1, 2, …: the same in every example, as outcomes depend on them.
BALANCES = {"rich": "60.00", "middling": "3.50", "poor": "1.00", "coins": "9.00"}
RECHARGE = Decimal("1.25")


@dataclass
class Model:
    """The guarantee, one draw at a time, in dicts."""

    accounts: dict[str, int]
    balances: dict[int, Decimal] = field(default_factory=dict)
    asked: dict[str, DrawRequest] = field(default_factory=dict)
    answered: dict[str, bytes] = field(default_factory=dict)
    sessions: dict[str, str] = field(default_factory=dict)
    rows: list[tuple[int, str, str, str]] = field(default_factory=list)

    def accept(self, draw: DrawRequest) -> bool:
        if draw.request_key in self.asked or draw.lottery_session_id in self.sessions:
            return False
        self._record(draw)
        return True

    def settle(self, draw: DrawRequest) -> tuple[str, bytes | None, bool]:
        key = draw.request_key
        if self.asked.get(key, draw) != draw:
            return "fingerprint mismatch", None, False
        if key in self.answered:
            return "settled", self.answered[key], True
        wheel = WHEELS.get(draw.campaign)
        if wheel is None:
            return "unknown campaign", None, False
        if self.sessions.get(draw.lottery_session_id, key) != key:
            return "fingerprint mismatch", None, False
        self._record(draw)
        self.answered[key] = self._outcome(draw, wheel)
        return "settled", self.answered[key], False

    def _record(self, draw: DrawRequest) -> None:
        self.asked[draw.request_key] = draw
        self.sessions[draw.lottery_session_id] = draw.request_key

    def _outcome(self, draw: DrawRequest, wheel: Wheel) -> bytes:
        asset = "COIN" if draw.account_id == self.accounts["coins"] else "POINT"
        balance = self.balances.get(draw.account_id)
        if balance is None or asset != wheel.campaign.asset_code:
            return self._result(draw, "rejected", "ACCOUNT_NOT_FOUND", "0.00", None, [])
        if balance < wheel.campaign.cost:
            return self._result(draw, "rejected", "INSUFFICIENT_BALANCE", "0.00", balance, [])
        prize = wheel.draw(draw.account_id, draw.request_key).amount
        rows = []
        for type_, delta in (("consume", -wheel.campaign.cost), ("reward", prize)):
            if delta:
                key = f"{draw.request_key}:{type_}"
                rows.append(
                    {
                        "idempotency_key": key,
                        "business_type": f"lottery_{type_}",
                        "asset_code": asset,
                        "delta_amount": f"{delta:.2f}",
                        "balance_before": f"{balance:.2f}",
                        "balance_after": f"{balance + delta:.2f}",
                    }
                )
                balance += delta
                self.rows.append((draw.account_id, draw.lottery_session_id, key, f"{balance:.2f}"))
        self.balances[draw.account_id] = balance
        return self._result(draw, "completed", None, f"{prize:.2f}", balance, rows)

    def _result(
        self,
        draw: DrawRequest,
        status: str,
        reason: str | None,
        prize: str,
        balance: Decimal | None,
        rows: list[dict[str, str]],
    ) -> bytes:
        shown = {
            "v": 1,
            "request_key": draw.request_key,
            "lottery_session_id": draw.lottery_session_id,
            "account_id": draw.account_id,
            "campaign": draw.campaign,
            "status": status,
            "reason": reason,
            "prize_amount": prize,
            "balance_after": None if balance is None else f"{balance:.2f}",
            "transactions": rows,
        }
        return json.dumps(shown, separators=(",", ":")).encode()


specs = st.builds(
    Spec,
    key=st.sampled_from([f"k{number}" for number in range(7)]),
    account=st.sampled_from(["rich", "rich", "rich", "middling", "middling", "poor", "coins", "nobody"]),
    campaign=st.sampled_from(["default", "default", "default", "spring", "coins", "nowhere"]),
    session=st.sampled_from(["", "", "", "", "", "s1", "k1", "k2"]),
)
# Mostly redeliveries of a few draws; now and then the same key with something else behind it.
deliveries = st.lists(specs, min_size=1, max_size=5, unique_by=lambda spec: spec.key).flatmap(
    lambda few: st.lists(st.one_of(st.sampled_from(few), st.sampled_from(few), specs), min_size=1, max_size=12)
)
steps = st.lists(
    st.builds(
        Step,
        accepted=st.one_of(st.just([]), st.lists(specs, max_size=3)),
        recharged=st.sampled_from(["", "", "poor", "middling"]),
        delivered=deliveries,
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.slow
@hypothesis_settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(steps, st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_any_mix_in_any_batching_equals_one_draw_at_a_time(
    engine: Engine, steps: list[Step], batch_sizes: list[int]
) -> None:
    accounts = fresh_accounts(engine)
    model = Model(accounts | {"nobody": NO_ACCOUNT})
    model.balances = {accounts[name]: Decimal(balance) for name, balance in BALANCES.items()}
    sizes = itertools.cycle(batch_sizes)

    def draw_of(spec: Spec) -> DrawRequest:
        return DrawRequest(
            account_id=model.accounts[spec.account],
            request_key=spec.key,
            campaign=spec.campaign,
            lottery_session_id=spec.session,
        )

    for step in steps:
        for draw in map(draw_of, step.accepted):
            if model.accept(draw):
                accept(engine, draw)
        if step.recharged:
            account_id = accounts[step.recharged]
            model.balances[account_id] = recharge(engine, account_id, RECHARGE)
        draws = list(map(draw_of, step.delivered))
        while draws:
            size = next(sizes)
            lot, draws = draws[:size], draws[size:]
            expected = [model.settle(draw) for draw in lot]
            assert [told(answer) for answer in settle(engine, *lot)] == expected

    ledger_rows = sorted(table(engine, "asset_transactions"), key=lambda row: row["transaction_id"])
    assert [
        (
            row["account_id"],
            row["lottery_session_id"],
            row["idempotency_key"],
            f"{Decimal(row['balance_after']) / 100:.2f}",
        )
        for row in ledger_rows
        if row["business_type"] != "recharge"
    ] == model.rows
    balances = {row["id"]: Decimal(row["balance"]) / 100 for row in table(engine, "account_asset_balances")}
    assert balances == model.balances
    recorded = {row["request_key"]: row for row in table(engine, "api_idempotency_requests")}
    assert recorded.keys() == model.asked.keys()
    assert results_of(engine) == dict.fromkeys(recorded) | model.answered
    for key, row in recorded.items():
        assert row["lottery_session_id"] == model.asked[key].lottery_session_id
    assert_books(engine)


def told(answer: Answer) -> tuple[str, bytes | None, bool]:
    match answer:
        case Settled():
            return "settled", answer.result, answer.is_repeat
        case Refused():
            return answer.cause, None, False
        case Deferred():
            return "deferred", None, False


def fresh_accounts(engine: Engine) -> dict[str, int]:
    """Empty tables and the accounts of BALANCES, each with the recharge that its balance comes from."""
    now = utc_now()
    with engine.begin() as connection:
        for emptied in (api_idempotency_requests, asset_transactions, account_asset_balances):
            connection.execute(delete(emptied))
        made = {name: number for number, name in enumerate(BALANCES, start=1)}
        times = {"created_at": now, "updated_at": now}
        for name, account_id in made.items():
            asset, balance = "COIN" if name == "coins" else "POINT", Decimal(BALANCES[name])
            account = {"id": account_id, "user_id": account_id, "asset_code": asset, "balance": balance}
            connection.execute(insert(account_asset_balances).values(**account, **times))
            connection.execute(
                insert(asset_transactions).values(
                    account_id=account_id,
                    business_id=f"initial_{name}",
                    lottery_session_id=f"initial_{name}",
                    idempotency_key=f"initial_{name}",
                    business_type="recharge",
                    asset_code=asset,
                    delta_amount=balance,
                    balance_before=Decimal(0),
                    balance_after=balance,
                    **times,
                )
            )
    return made
