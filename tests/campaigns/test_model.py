"""Any mix of draws, ten-pulls, repeats, stock, limits and versions in any batching equals a plain model.

The model settles one request at a time, one pull at a time, and keeps its books in dicts. It shares with the product
only the tickets (Drawing.pull with counters and what is unavailable), which tests/domain/test_drawing.py checks.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine, select

from tests.campaigns.shops import LOCK_WAIT_S, SEED, Shop, open_shop
from tombola.producers.domain.campaigns.drawing import Drawing
from tombola.producers.domain.campaigns.odds import Odds, Prize
from tombola.producers.domain.contract import DrawRequest, DrawResult, PullsResult
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import account_asset_balances

pytestmark = pytest.mark.slow

VERSION = """
name = "mix"
asset = "POINT"
cost = {{ 1 = "2.00", 3 = "5.00", 10 = "15.00" }}

[limits]
per_account = {per_account}

[[prize]]
code = "gold"
weight = {gold}
stock = {stock}
per_account = 2
instead = "silver"
grants = [{{ asset = "ITEM.GOLD", amount = "1" }}, {{ asset = "POINT", amount = "3.00" }}]

[[prize]]
code = "silver"
weight = 20
stock = {silver}
instead = "nothing"
grants = [{{ asset = "POINT", amount = "4.00" }}]

[[prize]]
code = "bronze"
weight = 10
grants = [{{ asset = "POINT", amount = "1.00" }}, {{ notify = "bronze-won" }}]

[[prize]]
code = "nothing"
weight = 70

[[tier]]
name = "vip"
spent_from = "12.00"
weights = {{ gold = 60, nothing = 10 }}

[[guarantee]]
name = "pity"
prizes = ["bronze"]
hard_at = {hard_at}
"""


@dataclass
class Account:
    """What the model knows of one account."""

    balance: Decimal
    pulls: int = 0
    spent: Decimal = Decimal(0)
    since_hit: int = 0
    won: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    gold: int = 0


@dataclass
class Model:
    """One request at a time."""

    accounts: dict[int, Account]
    stock: dict[str, int]
    answers: dict[str, tuple[str | None, list[str]]] = field(default_factory=dict)

    def settle(self, draw: DrawRequest, odds: Odds) -> tuple[str | None, list[str]]:
        """Why the request is rejected, or what it wins."""
        if draw.request_key not in self.answers:
            self.answers[draw.request_key] = self._settle(draw, odds)
        return self.answers[draw.request_key]

    def _settle(self, draw: DrawRequest, odds: Odds) -> tuple[str | None, list[str]]:
        account, pulls = self.accounts[draw.account_id], draw.pulls or 1
        if odds.per_account is not None and account.pulls + pulls > odds.per_account:
            return "LIMIT_REACHED", []
        if account.balance < odds.cost[pulls]:
            return "INSUFFICIENT_BALANCE", []
        tier = "vip" if account.spent >= 12 else ""
        account.balance -= odds.cost[pulls]
        account.spent += odds.cost[pulls]
        account.pulls += pulls
        drawing = Drawing(SEED, odds, draw.account_id, draw.request_key)
        codes = []
        for pull in range(1, pulls + 1):

            def is_there(prize: Prize) -> bool:
                if prize.code == "gold" and account.won["gold"] >= 2:
                    return False
                return self.stock[prize.code] > 0

            prize = drawing.pull(pull, tier, (account.since_hit,), is_there).prize
            account.since_hit = 0 if prize.code == "bronze" else account.since_hit + 1
            account.won[prize.code] += 1
            if prize.code in self.stock:
                self.stock[prize.code] -= 1
            account.gold += prize.code == "gold"
            account.balance += {"gold": 3, "silver": 4, "bronze": 1, "nothing": 0}[prize.code]
            codes.append(prize.code)
        return None, codes


numbers = st.integers(0, 10**6)
VERSIONS = st.fixed_dictionaries(
    {
        "per_account": st.integers(5, 40),
        "gold": st.integers(1, 60),
        "stock": st.integers(0, 6),
        "silver": st.integers(0, 12),
        "hard_at": st.integers(2, 9),
    }
)
REQUEST = st.tuples(st.integers(0, 2), st.sampled_from([None, 1, 3, 10]))
STEP = st.one_of(
    st.tuples(st.just("draw"), st.lists(REQUEST, min_size=1, max_size=8), st.integers(0, 8)),
    st.tuples(st.just("publish"), VERSIONS, st.just(0)),
)


def outcome(result: DrawResult) -> tuple[str | None, list[str] | None]:
    """A result as the model says it; a result of v1 does not name its prizes."""
    return result.reason, [it.code for it in result.prizes] if isinstance(result, PullsResult) else None


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """One for all examples, each with a new file: what it has compiled stays."""
    return open_engine(f"sqlite:///{tmp_path_factory.mktemp('model')}/ledger.db", lock_wait_s=LOCK_WAIT_S)


@given(first=VERSIONS, steps=st.lists(STEP, min_size=1, max_size=8))
@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mix_in_any_batching_equals_one_at_a_time(engine: Engine, first: dict[str, int], steps: list[Any]) -> None:
    engine.dispose()
    for it in Path(engine.url.database or "").parent.glob("ledger.db*"):
        it.unlink()
    with open_shop(engine) as shop:
        run(shop, first, steps)


def run(shop: Shop, first: dict[str, int], steps: list[Any]) -> None:
    """Take the steps in the shop and in the model, and compare."""
    odds = shop.publish(VERSION.format(**first))
    published = dict(first)
    accounts = [shop.account("40.00", user=user) for user in range(1, 4)]
    model = Model(
        {it: Account(Decimal("40.00")) for it in accounts}, {"gold": first["stock"], "silver": first["silver"]}
    )
    model.stock |= {"bronze": 1 << 60, "nothing": 1 << 60}
    sent: list[tuple[DrawRequest, Odds]] = []
    for kind, given_, repeats in steps:
        if kind == "publish":
            # What is left cannot be taken away twice: the stock of a new version never sinks.
            new = given_ | {it: max(given_[it], published[it]) for it in ("stock", "silver")}
            odds = shop.publish(VERSION.format(**new), is_open=False)
            model.stock["gold"] += new["stock"] - published["stock"]
            model.stock["silver"] += new["silver"] - published["silver"]
            published = new
            continue
        fresh = [(DrawRequest(account_id=accounts[who], campaign="mix", pulls=pulls), odds) for who, pulls in given_]
        shop.accept(*(draw for draw, _ in fresh))
        sent += fresh
        batch = [*sent[-len(fresh) - repeats : -len(fresh)], *fresh, *fresh[: repeats // 2]]
        results = shop.results(shop.settle(*(draw for draw, _ in batch)))
        for (draw, bound), result in zip(batch, results, strict=True):
            reason, codes = model.settle(draw, bound)
            told = outcome(result)
            assert told == (reason, codes if draw.pulls is not None else None)
    with shop.engine.connect().execution_options(read_only=True) as connection:
        table = account_asset_balances.c
        found = {
            (row.user_id, row.asset_code): row.balance
            for row in connection.execute(select(table.user_id, table.asset_code, table.balance))
        }
    for user, account_id in enumerate(accounts, 1):
        assert found[user, "POINT"] == model.accounts[account_id].balance
        assert found.get((user, "ITEM.GOLD"), 0) == model.accounts[account_id].gold


@given(first=VERSIONS, steps=st.lists(STEP, min_size=4, max_size=8))
@hypothesis_settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_same_on_a_server(mariadb_url: str, first: dict[str, int], steps: list[Any]) -> None:
    with open_shop(mariadb_url) as shop:
        with shop.engine.begin() as connection:
            for table in ("campaigns", "campaign_versions", "campaign_stock", "campaign_stock_changes"):
                connection.exec_driver_sql(f"DELETE FROM {table}")
            for table in ("campaign_accounts", "api_idempotency_requests", "asset_transactions"):
                connection.exec_driver_sql(f"DELETE FROM {table}")
            connection.exec_driver_sql("DELETE FROM operator_actions")
            connection.exec_driver_sql("DELETE FROM account_asset_balances")
        run(shop, first, steps)
