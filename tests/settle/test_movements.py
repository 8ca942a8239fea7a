"""Draws, ten-pulls, recharges, transfers, refunds, holds and expiry in any order and batching equal a plain model.

The model settles one request at a time and keeps its books in dicts. What a draw wins is taken from its result:
tests/campaigns/test_model.py and tests/settle/test_batch.py check draws.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine, select

from tests.campaigns.shops import LOCK_WAIT_S, Shop, open_shop
from tests.kept_results import keep_results, results_of
from tombola.producers.domain import operations
from tombola.producers.domain.contract import (
    DrawRequest,
    DrawResult,
    MovementResult,
    Request,
    parse_movement_result,
    parse_result,
)
from tombola.producers.domain.money import AMOUNT_MAX
from tombola.producers.domain.operations.adjust import AdjustRequest
from tombola.producers.domain.operations.expire import ExpireRequest
from tombola.producers.domain.operations.hold import HoldRequest
from tombola.producers.domain.operations.post import PostRequest
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.operations.refund import RefundRequest
from tombola.producers.domain.operations.transfer import TransferRequest
from tombola.producers.domain.operations.void import VoidRequest
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.schema import (
    account_asset_balances,
    account_holds,
    api_idempotency_requests,
    asset_transactions,
    campaign_stock,
)
from tombola.worker.relay.retention import archive_once
from tombola.worker.settle.answers import Settled

CAMPAIGN = """
name = "mix"
asset = "POINT"
cost = { 1 = "2.00", 10 = "15.00" }

[[prize]]
code = "gold"
weight = 30
stock = 200
instead = "nothing"
grants = [{ asset = "ITEM.GOLD", amount = "1" }, { asset = "POINT", amount = "3.00" }]

[[prize]]
code = "coupon"
weight = 10
grants = [{ asset = "COUPON.TEN", amount = "1" }, { notify = "coupon-won" }]

[[prize]]
code = "nothing"
weight = 60
"""
STOCK = 200
ALWAYS, NEVER = "2100-01-01T00:00:00+00:00", "2000-01-01T00:00:00+00:00"

Owner = tuple[int, str]  # the account of the request, and the asset of what is meant


@dataclass
class Hold:
    account: int
    amount: Decimal
    is_open: bool = True


@dataclass
class Model:
    """One request at a time. Prizes in other assets are counted by the account that paid, and their asset."""

    assets: dict[int, str]
    balances: dict[Owner, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    earned: dict[int, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    taken: dict[int, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    draws: dict[str, tuple[int, str, Decimal, list[tuple[str, Decimal]]]] = field(default_factory=dict)
    golds: dict[str, int] = field(default_factory=dict)
    refunded: set[str] = field(default_factory=set)
    holds: dict[str, Hold] = field(default_factory=dict)
    stock: int = STOCK
    answers: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)

    def settle(self, request: Request, result: DrawResult | MovementResult) -> tuple[str | None, str | None]:
        """Why the request is rejected, and the balance of its account afterwards."""
        if request.request_key not in self.answers:
            reason = getattr(self, f"_{request.kind}")(request, result)
            owner = (request.account_id, self.assets.get(request.account_id, ""))
            told = str(self.balances[owner]) if request.account_id in self.assets else None
            self.answers[request.request_key] = reason, told
        return self.answers[request.request_key]

    def _add(self, account: int, amount: Decimal, *, is_return: bool = False) -> None:
        self.balances[account, self.assets[account]] += amount
        if amount < 0 or is_return:
            self.taken[account] -= amount
        else:
            self.earned[account] += amount

    def _balance(self, account: int) -> Decimal:
        return self.balances[account, self.assets[account]]

    def _draw(self, draw: DrawRequest, result: DrawResult) -> str | None:
        pulls = draw.pulls or 1
        cost = Decimal(1) if draw.campaign == "default" else {1: Decimal(2), 10: Decimal(15)}[pulls]
        if self.assets.get(draw.account_id) != "POINT":
            return "ACCOUNT_NOT_FOUND"
        if self._balance(draw.account_id) < cost:
            return "INSUFFICIENT_BALANCE"
        self._add(draw.account_id, -cost)
        won = [(row.asset_code, Decimal(row.delta_amount)) for row in result.transactions[1:]]
        for asset_code, amount in won:
            if asset_code == "POINT":
                self._add(draw.account_id, amount)
            else:
                self.balances[draw.account_id, asset_code] += amount
        golds = sum(asset_code == "ITEM.GOLD" for asset_code, _ in won)
        self.stock -= golds
        self.golds[draw.request_key] = golds
        self.draws[draw.request_key] = draw.account_id, draw.campaign, cost, [it for it in won if it[1]]
        return None

    def _recharge(self, it: RechargeRequest, _: object) -> str | None:
        if it.account_id not in self.assets:
            return "ACCOUNT_NOT_FOUND"
        if self._balance(it.account_id) + it.moved > AMOUNT_MAX:
            return "BALANCE_LIMIT"
        self._add(it.account_id, it.moved)
        return None

    def _transfer(self, it: TransferRequest, _: object) -> str | None:
        return self._moved(it.account_id, it.to, it.moved)

    def _moved(self, payer: int, receiver: int, amount: Decimal) -> str | None:
        if payer not in self.assets:
            return "ACCOUNT_NOT_FOUND"
        if self._balance(payer) < amount:
            return "INSUFFICIENT_BALANCE"
        if receiver not in self.assets:
            return "ACCOUNT_NOT_FOUND"
        if self.assets[receiver] != self.assets[payer]:
            return "OTHER_ASSET"
        if self._balance(receiver) + amount > AMOUNT_MAX:
            return "BALANCE_LIMIT"
        self._add(payer, -amount)
        self._add(receiver, amount)
        return None

    def _adjust(self, it: AdjustRequest, _: object) -> str | None:
        if it.account_id not in self.assets:
            return "ACCOUNT_NOT_FOUND"
        if self._balance(it.account_id) + it.moved < 0:
            return "INSUFFICIENT_BALANCE"
        if self._balance(it.account_id) + it.moved > AMOUNT_MAX:
            return "BALANCE_LIMIT"
        self._add(it.account_id, it.moved)
        return None

    def _refund(self, it: RefundRequest, _: object) -> str | None:
        if it.account_id not in self.assets:
            return "ACCOUNT_NOT_FOUND"
        account, campaign, cost, won = self.draws.get(it.draw, (0, "", Decimal(0), []))
        if account != it.account_id or campaign != it.campaign:
            return "DRAW_NOT_FOUND"
        if it.draw in self.refunded:
            return "ALREADY_REFUNDED"
        if self._balance(account) + cost > AMOUNT_MAX:
            return "BALANCE_LIMIT"
        after = dict(self.balances)
        after[account, "POINT"] += cost
        collected = []
        for asset_code, amount in won if it.policy != "charge_only" else []:
            some = min(amount, after[account, asset_code])
            if some < amount and it.policy == "refuse":
                return "PRIZE_SPENT"
            after[account, asset_code] -= some
            collected.append((asset_code, some, some == amount))
        self._add(account, cost, is_return=True)
        for asset_code, some, _ in collected:
            if asset_code == "POINT":
                self._add(account, -some)
            else:
                self.balances[account, asset_code] -= some
        # A gold is an item and 3 points, in this order: both are collected, or the unit does not go back.
        is_whole = iter(collected)
        for asset_code, _, is_full in is_whole:
            if asset_code == "ITEM.GOLD":
                self.stock += is_full and next(is_whole)[2]
        self.refunded.add(it.draw)
        return None

    def _hold(self, it: HoldRequest, _: object) -> str | None:
        if it.account_id not in self.assets:
            return "ACCOUNT_NOT_FOUND"
        if self._balance(it.account_id) < it.moved:
            return "INSUFFICIENT_BALANCE"
        self._add(it.account_id, -it.moved)
        self.holds[it.request_key] = Hold(it.account_id, it.moved)
        return None

    def _why_no_hold(self, account: int, key: str) -> str | None:
        if account not in self.assets:
            return "ACCOUNT_NOT_FOUND"
        hold = self.holds.get(key)
        if hold is None or hold.account != account:
            return "HOLD_NOT_FOUND"
        return None if hold.is_open else "HOLD_ENDED"

    def _post(self, it: PostRequest, _: object) -> str | None:
        if reason := self._why_no_hold(it.account_id, it.hold):
            return reason
        hold = self.holds[it.hold]
        paid = Decimal(it.amount) if it.amount else hold.amount
        if paid > hold.amount:
            return "AMOUNT_ABOVE_HOLD"
        if it.to is not None and it.to not in self.assets:
            return "ACCOUNT_NOT_FOUND"
        if it.to is not None and self.assets[it.to] != self.assets[it.account_id]:
            return "OTHER_ASSET"
        self._add(it.account_id, hold.amount, is_return=True)
        if it.to is None:
            self._add(it.account_id, -paid)
        else:
            assert self._moved(it.account_id, it.to, paid) is None
        hold.is_open = False
        return None

    def _void(self, it: VoidRequest, _: object) -> str | None:
        if reason := self._why_no_hold(it.account_id, it.hold):
            return reason
        self._add(it.account_id, self.holds[it.hold].amount, is_return=True)
        self.holds[it.hold].is_open = False
        return None

    def _expire(self, it: ExpireRequest, _: object) -> str | None:
        if it.account_id not in self.assets:
            return "ACCOUNT_NOT_FOUND"
        earned = self.earned[it.account_id] if it.until == ALWAYS else Decimal(0)
        due = min(self._balance(it.account_id), max(Decimal(0), earned - self.taken[it.account_id]))
        if not due:
            return "NOTHING_DUE"
        self._add(it.account_id, -due)
        return None


# ---- what is asked for -----------------------------------------------------------------------------------------------

who = st.integers(0, 4)  # three accounts of points, one of coins, and one that does not exist
amounts = st.decimals("0.01", "30", places=2).map(str)
some = st.integers(0, 10**6)  # one of the earlier draws or holds
ACTION = st.one_of(
    st.tuples(st.just("draw"), who, st.sampled_from(["default", "mix", "mix"]), st.sampled_from([None, None, 10])),
    st.tuples(st.just("draw"), who, st.sampled_from(["default", "mix", "mix"]), st.sampled_from([None, None, 10])),
    st.tuples(st.just("recharge"), who, amounts),
    st.tuples(st.just("transfer"), who, who, amounts),
    st.tuples(st.just("adjust"), who, amounts, st.booleans()),
    st.tuples(st.just("refund"), some, st.sampled_from(["refuse", "charge_only", "write_off"]), who, st.booleans()),
    st.tuples(st.just("refund"), some, st.sampled_from(["refuse", "charge_only", "write_off"]), who, st.booleans()),
    st.tuples(st.just("hold"), who, amounts),
    st.tuples(st.just("post"), some, st.one_of(st.just(""), amounts), st.one_of(st.none(), who)),
    st.tuples(st.just("void"), some),
    st.tuples(st.just("expire"), who, st.sampled_from([ALWAYS, ALWAYS, NEVER])),
)
STEP = st.tuples(st.lists(ACTION, min_size=1, max_size=12), st.lists(some, max_size=4))
NO_ACCOUNT = 10**12


class Sender:
    """Makes requests of what hypothesis chose."""

    def __init__(self, accounts: Sequence[int]) -> None:
        self.accounts = [*accounts, NO_ACCOUNT]
        self.sent: list[Request] = []
        self.draws: list[DrawRequest] = []
        self.holds: list[HoldRequest] = []

    def requests(self, actions: Iterable[Any]) -> list[Request]:
        """The requests of these actions; an action that means nothing yet is left out."""
        made = []
        for kind, *chosen in actions:
            request = getattr(self, f"_{kind}")(*chosen)
            if request is not None:
                made.append(request)
                self.sent.append(request)
        return made

    def _draw(self, account: int, campaign: str, pulls: int | None) -> DrawRequest:
        is_default = campaign == "default"
        # Here every request settles. A draw that wins more than an account may have is parked, and the third account
        # has nearly all of it.
        account = 0 if account == 2 else account
        draw = DrawRequest(account_id=self.accounts[account], campaign=campaign, pulls=None if is_default else pulls)
        self.draws.append(draw)
        return draw

    def _recharge(self, account: int, amount: str) -> RechargeRequest:
        return RechargeRequest(account_id=self.accounts[account], amount=amount, channel="bank", reference="r-1")

    def _transfer(self, account: int, to: int, amount: str) -> TransferRequest | None:
        if to == account:
            return None
        return TransferRequest(account_id=self.accounts[account], to=self.accounts[to], amount=amount)

    def _adjust(self, account: int, amount: str, is_down: bool) -> AdjustRequest:
        signed = f"-{amount}" if is_down else amount
        return AdjustRequest(account_id=self.accounts[account], amount=signed, reason="to try it")

    def _refund(self, number: int, policy: str, other: int, is_anothers: bool) -> RefundRequest | None:
        if not self.draws:
            return None
        draw = self.draws[number % len(self.draws)]
        account = self.accounts[other] if is_anothers and other % 2 else draw.account_id
        return RefundRequest(account_id=account, draw=draw.request_key, campaign=draw.campaign, policy=policy)

    def _hold(self, account: int, amount: str) -> HoldRequest:
        hold = HoldRequest(account_id=self.accounts[account], amount=amount)
        self.holds.append(hold)
        return hold

    def _post(self, number: int, amount: str, to: int | None) -> PostRequest | None:
        if not self.holds:
            return None
        hold = self.holds[number % len(self.holds)]
        receiver = None if to is None else self.accounts[to]
        if receiver == hold.account_id:
            receiver = None
        return PostRequest(account_id=hold.account_id, hold=hold.request_key, amount=amount, to=receiver)

    def _void(self, number: int) -> VoidRequest | None:
        if not self.holds:
            return None
        hold = self.holds[number % len(self.holds)]
        return VoidRequest(account_id=hold.account_id, hold=hold.request_key)

    def _expire(self, account: int, until: str) -> ExpireRequest:
        return ExpireRequest(account_id=self.accounts[account], until=until)


def parsed(request: Request, body: bytes) -> DrawResult | MovementResult:
    return parse_result(body) if isinstance(request, DrawRequest) else parse_movement_result(body)


def run(shop: Shop, steps: list[Any]) -> None:
    """Take the steps in the shop and in the model, and compare."""
    shop.publish(CAMPAIGN)
    assets = ["POINT", "POINT", "POINT", "COIN"]
    balances = ["40.00", "5.00", str(AMOUNT_MAX - 20), "9.00"]
    accounts = [
        shop.account(balance, user=user, asset=asset)
        for user, (balance, asset) in enumerate(zip(balances, assets, strict=True), 1)
    ]
    model = Model(dict(zip(accounts, assets, strict=True)))
    for account, balance in zip(accounts, balances, strict=True):
        model._add(account, Decimal(balance))
    sender = Sender(accounts)
    first: dict[str, bytes] = {}
    for actions, repeats in steps:
        fresh = sender.requests(actions)
        shop.entry.accept([Submission(it) for it in fresh])
        again = [sender.sent[it % len(sender.sent)] for it in repeats] if sender.sent else []
        batch = [*again, *fresh, *fresh[:2]]
        for request, answer in zip(batch, shop.settle(*batch), strict=True):
            assert isinstance(answer, Settled), answer
            assert first.setdefault(request.request_key, answer.result) == answer.result
            result = parsed(request, answer.result)
            reason, left = model.settle(request, result)
            assert (result.reason, result.status) == (reason, "rejected" if reason else "completed"), request
            # A draw of an account of another asset is told no balance.
            told = None if reason == "ACCOUNT_NOT_FOUND" and isinstance(request, DrawRequest) else left
            assert result.balance_after == told, request
        _books_balance(shop)
    _is_as_the_model_says(shop, model)
    _results_are_derived(shop, sender.sent, first)


def _results_are_derived(shop: Shop, sent: Sequence[Request], first: dict[str, bytes]) -> None:
    """What is rebuilt from the rows equals the first answers to the byte, as do the texts of older releases."""
    for is_kept in (False, True, False):
        with shop.engine.connect().execution_options(read_only=True) as connection:
            texts = connection.execute(select(api_idempotency_requests.c.result)).scalars().all()
        assert [it is not None for it in texts] == [is_kept] * len(first)
        assert results_of(shop.engine) == first
        for answer in shop.settle(*sent):
            assert isinstance(answer, Settled), answer
            assert (answer.result, answer.is_repeat) == (first[answer.request.request_key], True)
            state = shop.entry.state_of(answer.request.lottery_session_id)
            assert state is not None
            assert (state.request, state.result, state.settled_at) == (answer.request, answer.result, answer.settled_at)
        assert shop.violations() == []
        if is_kept:
            assert archive_once(shop.engine, older_than_s=-3600, rows_max=len(first)) == len(first)
        else:
            keep_results(shop.engine)


def _books_balance(shop: Shop) -> None:
    """Users + house = 0 in each asset, and what has no house side moved between users only."""
    house = operations.house_accounts()
    total: dict[str, Decimal] = defaultdict(Decimal)
    between: dict[str, Decimal] = defaultdict(Decimal)
    with shop.engine.connect().execution_options(read_only=True) as connection:
        rows = asset_transactions.c
        for business_type, asset_code, delta in connection.execute(
            select(rows.business_type, rows.asset_code, rows.delta_amount)
        ):
            (total if house[business_type] else between)[asset_code] -= delta
        held = connection.execute(select(account_asset_balances.c.asset_code, account_asset_balances.c.balance))
        for asset_code, balance in held:
            total[asset_code] += balance
    assert not any(total.values()), total
    assert not any(between.values()), between


def _is_as_the_model_says(shop: Shop, model: Model) -> None:
    with shop.engine.connect().execution_options(read_only=True) as connection:
        accounts = account_asset_balances.c
        found = {
            (row.user_id, row.asset_code): row
            for row in connection.execute(select(accounts.id, accounts.user_id, accounts.asset_code, accounts.balance))
        }
        users = {row.id: row.user_id for row in found.values()}
        for (account, asset_code), balance in model.balances.items():
            row = found.get((users[account], asset_code))
            assert (row.balance if row is not None else Decimal(0)) == balance
        left = sum(connection.execute(select(campaign_stock.c.units)).scalars())
        assert left == model.stock
        holds = account_holds.c
        states = {row.hold_key: row.state for row in connection.execute(select(holds.hold_key, holds.state))}
        assert {key: state == "open" for key, state in states.items()} == {
            key: it.is_open for key, it in model.holds.items()
        }


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """One for all examples, each with a new file: what it has compiled stays."""
    return open_engine(f"sqlite:///{tmp_path_factory.mktemp('movements')}/ledger.db", lock_wait_s=LOCK_WAIT_S)


@pytest.mark.slow
@given(steps=st.lists(STEP, min_size=1, max_size=8))
@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_mix_in_any_batching_equals_one_at_a_time(engine: Engine, steps: list[Any]) -> None:
    engine.dispose()
    for it in Path(engine.url.database or "").parent.glob("ledger.db*"):
        it.unlink()
    with open_shop(engine, balances=False) as shop:  # run() has looked
        run(shop, steps)


@given(steps=st.lists(STEP, min_size=3, max_size=8))
@hypothesis_settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_same_on_a_server(mariadb_url: str, steps: list[Any]) -> None:
    with open_shop(mariadb_url) as shop:
        with shop.engine.begin() as connection:
            for table in (
                *("campaigns", "campaign_versions", "campaign_stock", "campaign_stock_changes", "campaign_accounts"),
                *("api_idempotency_requests", "asset_transactions", "account_holds", "operator_actions"),
                "account_asset_balances",
            ):
                connection.exec_driver_sql(f"DELETE FROM {table}")
        run(shop, steps)
