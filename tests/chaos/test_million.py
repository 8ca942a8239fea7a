"""A million pulls, by the pure functions and through a worker: no promise is missed, frequencies fit the exact odds."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice

import pytest
from scipy.stats import chi2_contingency, chisquare
from sqlalchemy import select

from tests import processes
from tests.domain.test_drawing import NESTED
from tests.domain.test_manifest import WINTER
from tests.processes import House
from tombola.producers.client import DrawClient
from tombola.producers.domain.campaigns import figures, manifest
from tombola.producers.domain.campaigns.drawing import Drawing
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.campaigns.pulls import CONSUME
from tombola.producers.domain.campaigns.record import read_draw_notes
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.storage.campaigns import CampaignState
from tombola.producers.storage.schema import asset_transactions
from tombola.worker.campaigns import versions
from tombola.worker.campaigns.simulation import simulate

MILLION = 1_000_000
SEED = bytes(range(32))
SURE = 0.001  # a right drawing fails one test in a thousand, and these have fixed seeds
ACCOUNTS = 2_000
BY = {"operator": "ann", "reason": "a million"}

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3_600)]


def fits(observed: Counter[str], chances: dict[str, float]) -> float:
    """The p-value of these frequencies under these chances."""
    total = observed.total()
    codes = [code for code, chance in chances.items() if chance * total >= 5]
    rest = [observed[code] for code in codes], [chances[code] * total for code in codes]
    scale = sum(rest[0]) / sum(rest[1])
    return float(chisquare(rest[0], [it * scale for it in rest[1]]).pvalue)


@pytest.mark.parametrize("text", [WINTER.partition("[[guarantee]]")[0], WINTER, NESTED], ids=["none", "one", "nested"])
@pytest.mark.parametrize("tier", ["", "vip"])
def test_frequencies_fit_the_exact_effective_odds(text: str, tier: str) -> None:
    odds = manifest.parse(text)
    since_hit = tuple(0 for _ in odds.guarantees)
    observed: Counter[str] = Counter()
    for number in range(MILLION // 2):
        prize, _, since_hit = Drawing(SEED, odds, 6, f"key-{number}").pull(1, tier, since_hit)
        observed[prize.code] += 1
    assert fits(observed, figures.effective_chances(odds, tier)) > SURE


def test_hard_at_ninety_is_never_missed_across_a_new_version() -> None:
    """Prizes of the guarantee are so rare here that most hits are the promised ones."""
    rare = WINTER.replace("weight = 2000", "weight = 10").replace("soft_from = 75\nsoft_step = 300", "")
    before = manifest.parse(rare)
    after = manifest.parse(rare.replace("weight = 7000", "weight = 9000"))
    promised = before.guarantees[0].prizes
    for account in range(10):
        since_hit: tuple[int, ...] = (0,)
        missed = hits = 0
        for number in range(MILLION // 10):
            odds: Odds = before if number < MILLION // 20 else after
            prize, _, since_hit = Drawing(SEED, odds, account + 1, f"key-{number}").pull(1, "", since_hit)
            missed = 0 if prize.code in promised else missed + 1
            assert missed < 90
            hits += missed == 0
        assert hits > MILLION // 10 // 90


THROUGH_A_WORKER = """
name = "million"
asset = "POINT"
cost = { 1 = "1.00", 10 = "9.00" }

[[prize]]
code = "rare"
weight = 6
value = "50.00"
grants = [{ asset = "ITEM.RARE", amount = "1" }]

[[prize]]
code = "five"
weight = 100
grants = [{ asset = "POINT", amount = "5.00" }]

[[prize]]
code = "one"
weight = 894
stock = 900000
instead = "nothing"
grants = [{ asset = "POINT", amount = "1.00" }]

[[prize]]
code = "nothing"
weight = 1000

[[guarantee]]
name = "ssr"
prizes = ["rare"]
hard_at = 90
soft_from = 75
soft_step = 100
"""


def requests_of(accounts: list[int]) -> Iterator[DrawRequest]:
    """A million pulls, ten at a time, by the accounts in turn."""
    for number in range(MILLION // 10):
        yield DrawRequest(account_id=accounts[number % len(accounts)], campaign="million", pulls=10)


def first_pulls(odds: Odds, pulls: int) -> dict[str, float]:
    """The exact share of each prize in an account's first pulls: its counters begin at zero, short of the long run.

    Between two hits all accounts are alike, so the expected number of hits in n pulls obeys the renewal equation
    m(n) = sum over k of P(the next hit is at k) * (1 + m(n - k)). Without a hit the other prizes keep their weights.
    """
    until = figures.pulls_until_hit(odds)
    hits = [0.0]
    for count in range(1, pulls + 1):
        hits.append(sum(chance * (1 + hits[count - k]) for k, chance in enumerate(until[:count], 1)))
    rare = hits[pulls] / pulls
    base = figures.base_chances(odds)
    return {
        code: rare if code == "rare" else (1 - rare) * float(chance / (1 - base["rare"]))
        for code, chance in base.items()
    }


def test_a_million_real_pulls_agree_with_simulation_and_exact_figures(mariadb_url: str, redis_url: str) -> None:
    odds = manifest.parse(THROUGH_A_WORKER)
    codes = [prize.code for prize in odds.prizes]
    simulated = simulate(odds, draws=MILLION // 10, accounts=ACCOUNTS, pulls=10)
    with House(mariadb_url, redis_url, redis_url) as house:
        versions.publish(house.engine, odds, bounds=versions.Bounds(return_max=2.0), **BY)
        versions.move(house.engine, odds.name, CampaignState.OPEN, **BY)
        accounts = house.accounts(ACCOUNTS, balance=100_000)
        with processes.worker(house.env) as worker, DrawClient.from_settings(house.settings) as client:
            waiting = requests_of(accounts)
            while some := list(islice(waiting, 5_000)):
                client.enqueue_many(some)
            house.wait_settled(MILLION // 10, within_s=1_800, log=worker.log)
        observed: Counter[str] = Counter()
        since: dict[int, int] = defaultdict(int)
        longest = 0
        columns = asset_transactions.c
        with house.engine.connect().execution_options(read_only=True, yield_per=5_000) as connection:
            for account, notes in connection.execute(
                select(columns.account_id, columns.notes)
                .where(columns.business_type == CONSUME)
                .order_by(columns.transaction_id)
            ):
                for code in read_draw_notes(notes).prizes:
                    observed[code] += 1
                    since[account] = 0 if code == "rare" else since[account] + 1
                    longest = max(longest, since[account])
        assert observed.total() == MILLION
        assert longest < 90
        table = [[it[code] for code in codes if it[code]] for it in (observed, simulated.prizes)]
        assert chi2_contingency(table).pvalue > SURE
        expected = first_pulls(odds, MILLION // ACCOUNTS)
        hits = expected["rare"] * MILLION
        assert abs(observed["rare"] - hits) < 4 * math.sqrt(hits)
        others = Counter({code: count for code, count in observed.items() if code != "rare"})
        assert (
            fits(others, {code: chance / (1 - expected["rare"]) for code, chance in expected.items() if code != "rare"})
            > SURE
        )
        for asset in figures.assets(odds, expected):
            assert math.isclose(asset.expectation, simulated.expectation(asset.asset_code), rel_tol=0.05)
        assert house.violations() == []
