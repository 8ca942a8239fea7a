"""Lanes: answers in order, no account in two of them at once, and none that fails takes another one along."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import Engine

from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.domain.operations.transfer import TransferRequest
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Answer, Deferred, Refused
from tombola.worker.settle.batch import Handling
from tombola.worker.settle.lanes import SPLIT_SIZE_MIN, Lanes
from tombola.worker.settle.rules import Rules

COUNT = 4
WITHIN_S = 20.0


class Transactions:
    """In place of tries.settle_unread: which draws it was given together, and what was going on at the same time."""

    def __init__(self) -> None:
        self.given: list[list[str]] = []
        self.has_patience: list[bool] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.lasts_s = 0.0
        self.fails_for: frozenset[int] = frozenset()
        self.are_held: frozenset[int] = frozenset()
        self.shared: set[int] = set()
        self.most_at_once = 0
        self.ended = 0
        self._accounts: list[set[int]] = []
        self._lock = threading.Lock()

    def settle(self, _engine: Any, draws: Sequence[Request], *_rules: Any, has_patience: bool) -> list[Answer]:
        mine = {draw.account_id for draw in draws}
        with self._lock:
            self.given.append([draw.request_key for draw in draws])
            self.has_patience.append(has_patience)
            self.shared |= mine & set().union(*self._accounts)
            self._accounts.append(mine)
            self.most_at_once = max(self.most_at_once, len(self._accounts))
        assert self.goes_on.wait(WITHIN_S)
        time.sleep(self.lasts_s)
        with self._lock:
            self._accounts.remove(mine)
            self.ended += 1
        if mine & self.fails_for:
            raise ServiceUnavailable("away")
        if mine & self.are_held:
            return [Deferred(draw, draw.request_key) for draw in draws]
        return [Refused(draw, Cause.INVALID, draw.request_key) for draw in draws]


@pytest.fixture
def transactions(monkeypatch: pytest.MonkeyPatch) -> Transactions:
    made = Transactions()
    monkeypatch.setattr(tries, "settle_unread", made.settle)
    return made


def lanes_on(dialect: str = "mysql") -> Lanes:
    return Lanes(cast(Engine, SimpleNamespace(dialect=SimpleNamespace(name=dialect))), Rules({}), COUNT)


def draws_of(count: int, accounts: int) -> list[Request]:
    return [DrawRequest(account_id=1 + number % accounts, request_key=f"k{number}") for number in range(count)]


def settle(by: Lanes, draws: Sequence[Request]) -> list[str]:
    answers = by.begin(draws, Handling()).answers()
    return [answer.error for answer in answers if isinstance(answer, Deferred | Refused)]


def test_the_answers_are_in_the_order_of_the_draws(transactions: Transactions) -> None:
    draws = draws_of(500, 37)
    assert settle(lanes_on(), draws) == [draw.request_key for draw in draws]
    assert len(transactions.given) > 1, "it was one lane: nothing was tested"


def test_no_account_is_in_two_lanes_and_its_draws_keep_their_order(transactions: Transactions) -> None:
    transactions.lasts_s = 0.05
    draws = draws_of(500, 37)
    settle(lanes_on(), draws)
    assert transactions.most_at_once > 1, "nothing went on side by side"
    assert transactions.shared == set()
    accounts = {draw.request_key: draw.account_id for draw in draws}
    for given in transactions.given:
        for account in {accounts[key] for key in given}:
            mine = [key for key in given if accounts[key] == account]
            assert mine == [draw.request_key for draw in draws if draw.account_id == account]


def test_accounts_of_a_transfer_share_a_lane_and_all_keep_their_order(transactions: Transactions) -> None:
    transactions.lasts_s = 0.05
    pairs = [(1, 2), (2, 3), (20, 9), (9, 30), (31, 33), (33, 31)]  # 1, 2, 3 are partners, and so are 9, 20, 30
    mixed = draws_of(500, 37)
    for number, (payer, receiver) in enumerate(pairs):
        transfer = TransferRequest(account_id=payer, to=receiver, amount="1", request_key=f"t{number}")
        mixed.insert(70 * (number + 1), transfer)
    touched = {it.request_key: accounts_of(it) for it in mixed}
    assert settle(lanes_on(), mixed) == [it.request_key for it in mixed]
    assert transactions.most_at_once > 1, "nothing went on side by side"
    lanes = [set[int]().union(*(touched[key] for key in given)) for given in transactions.given]
    assert sum(map(len, lanes)) == len(set[int]().union(*lanes)), "lanes share an account"
    for given in transactions.given:
        assert given == [it.request_key for it in mixed if it.request_key in set(given)]


def accounts_of(request: Request) -> set[int]:
    return {request.account_id} | ({request.to} if isinstance(request, TransferRequest) else set())


def test_accounts_in_steps_are_spread_over_all_lanes(transactions: Transactions) -> None:
    """Galera's nodes hand ids out in steps of their number."""
    draws: list[Request] = [DrawRequest(account_id=3 * number, request_key=f"k{number}") for number in range(1, 401)]
    settle(lanes_on(), draws)
    assert len(transactions.given) == COUNT
    assert min(map(len, transactions.given)) > 400 / COUNT / 2


def test_a_lane_that_fails_is_told_when_the_others_are_done(transactions: Transactions) -> None:
    transactions.lasts_s = 0.05
    transactions.fails_for = frozenset({1})
    with pytest.raises(ServiceUnavailable):
        settle(lanes_on(), draws_of(400, 40))
    assert transactions.ended == len(transactions.given) == COUNT


@pytest.mark.parametrize(
    ("dialect", "count"), [("mysql", SPLIT_SIZE_MIN - 1), ("sqlite", 500)], ids=["few draws", "SQLite has one writer"]
)
def test_what_is_not_worth_a_split_is_one_transaction(transactions: Transactions, dialect: str, count: int) -> None:
    draws = draws_of(count, 37)
    assert settle(lanes_on(dialect), draws) == [draw.request_key for draw in draws]
    assert len(transactions.given) == 1


def test_a_batch_begins_while_another_one_is_under_way(transactions: Transactions) -> None:
    lanes = lanes_on()
    transactions.lasts_s = 0.02
    batches = [draws_of(500, 37) for _ in range(3)]
    transactions.goes_on.clear()
    begun = [lanes.begin(it, Handling()) for it in batches]
    transactions.goes_on.set()
    for under_way, draws in zip(begun, batches, strict=True):
        answers = under_way.answers()
        assert [it.request.request_key for it in answers] == [it.request_key for it in draws]
    assert transactions.shared == set(), "an account was in two transactions at once"
    assert transactions.most_at_once == COUNT
    assert transactions.ended == 3 * COUNT


def test_one_batch_that_fails_fails_no_other(transactions: Transactions) -> None:
    lanes = lanes_on()
    transactions.fails_for = frozenset({99})
    transactions.goes_on.clear()
    first, second = (lanes.begin(draws_of(200, accounts), Handling()) for accounts in (120, 40))
    transactions.goes_on.set()
    second.wait()
    with pytest.raises(ServiceUnavailable):
        first.answers()
    assert len(second.answers()) == 200


def test_who_waits_behind_a_lock_does_not_wait_for_it_again(transactions: Transactions) -> None:
    """The part that met the lock has waited for it in full; the parts behind it in the lane take what is free."""
    lanes = lanes_on()
    transactions.are_held = frozenset({1})
    begun = [lanes.begin(draws_of(400, 40), Handling()) for _ in range(2)]
    for it in begun:
        it.wait()
    assert sorted(transactions.has_patience) == [False] + [True] * (2 * COUNT - 1)
    transactions.are_held = frozenset()
    for _ in range(2):
        lanes.begin(draws_of(400, 40), Handling()).wait()
    assert sorted(transactions.has_patience) == [False] * 2 + [True] * (4 * COUNT - 2)


def test_nothing_is_nothing(transactions: Transactions) -> None:
    assert settle(lanes_on(), []) == []
