"""Draws by operators' campaigns, from the door to the audit, on both databases."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pymysql
import pytest
from sqlalchemy import func, select, update

from tests.campaigns.shops import BY, LOCK_WAIT_S, WHEELS, Shop, open_shop
from tests.kept_results import keep_results
from tombola.producers.domain.causes import Cause, Status
from tombola.producers.domain.contract import DrawRequest, DrawResult, PullsResult
from tombola.producers.domain.errors import (
    CampaignClosed,
    CampaignNotOpen,
    CampaignPaused,
    DrawError,
    PullsNotSold,
    UnknownCampaign,
)
from tombola.producers.storage import requests
from tombola.producers.storage.campaigns import CampaignState
from tombola.producers.storage.chunks import IN_LIST_MAX
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.schema import (
    account_asset_balances,
    api_idempotency_requests,
    asset_transactions,
    campaign_codes,
    campaign_stock,
)
from tombola.producers.storage.transactions import transaction
from tombola.worker.campaigns import codes as pools
from tombola.worker.campaigns import lists, stock, versions
from tombola.worker.fulfilments.subscriptions import Subscriptions
from tombola.worker.settle import repeats, tries
from tombola.worker.settle.answers import Refused, Settled
from tombola.worker.settle.rehearsal import Rehearsal
from tombola.worker.settle.rules import Rules

pytestmark = pytest.mark.slow

WINTER = """
name = "winter"
asset = "POINT"
cost = { 1 = "10.00", 10 = "90.00" }

[[prize]]
code = "phone"
weight = 1
stock = 3
value = "100.00"
instead = "five"
grants = [{ asset = "ITEM.PHONE", amount = "1" }, { notify = "phone-won" }]

[[prize]]
code = "five"
weight = 2
grants = [{ asset = "POINT", amount = "5.00" }, { asset = "COIN", amount = "2.50" }]

[[prize]]
code = "nothing"
weight = 3
"""
ONE = """
name = "one"
asset = "POINT"
cost = { 1 = "1.00", 5 = "5.00" }

[[prize]]
code = "last"
weight = 1
stock = %d
instead = "nothing"
grants = [{ asset = "ITEM.LAST", amount = "1" }]

[[prize]]
code = "nothing"
weight = 1
"""


@pytest.fixture
def shop(database_url: str) -> Iterator[Shop]:
    with open_shop(database_url) as made:
        yield made


@pytest.fixture
def server(mariadb_url: str) -> Iterator[Shop]:
    """For what only a server with row locks can do."""
    with open_shop(mariadb_url) as made:
        yield made


def prizes(results: Sequence[DrawResult]) -> list[str]:
    return [it.code for result in results if isinstance(result, PullsResult) for it in result.prizes]


def left(shop: Shop, name: str) -> dict[str, int]:
    with shop.engine.connect().execution_options(read_only=True) as connection:
        return dict(stock.left(connection, name))


def rows_of(shop: Shop, key: str) -> list[tuple[str, str, str]]:
    with shop.engine.connect().execution_options(read_only=True) as connection:
        table = asset_transactions.c
        found = connection.execute(
            select(table.idempotency_key, table.asset_code, table.business_type)
            .where(table.lottery_session_id == key)
            .order_by(table.transaction_id)
        )
        return [tuple(row) for row in found]


def balances_of(shop: Shop, user: int) -> dict[str, str]:
    table = account_asset_balances.c
    with shop.engine.connect().execution_options(read_only=True) as connection:
        return {
            row.asset_code: f"{row.balance:.2f}"
            for row in connection.execute(select(table.asset_code, table.balance).where(table.user_id == user))
        }


def count_requests(shop: Shop) -> int:
    with shop.engine.connect().execution_options(read_only=True) as connection:
        return connection.execute(select(func.count()).select_from(api_idempotency_requests)).scalar_one()


# ---- rows and results ------------------------------------------------------------------------------------------------


def test_every_grant_is_a_row_with_a_key_of_its_own_on_the_accounts_of_the_user(shop: Shop) -> None:
    shop.publish(WINTER)
    payer = shop.account(user=7)
    results = shop.draw(*(DrawRequest(account_id=payer, campaign="winter", pulls=10) for _ in range(10)))

    won = Counter(prizes(results))
    assert won["phone"] == 3  # of one hundred pulls, a sixth wanted it
    assert left(shop, "winter") == {"phone": 0}
    assert balances_of(shop, 7) == {
        "POINT": f"{1000 - 10 * 90 + 5 * won['five']:.2f}",
        "ITEM.PHONE": "3.00",
        "COIN": f"{2.5 * won['five']:.2f}",
    }
    key, pull = next(
        (it.request_key, prize.pull)
        for it in results
        if isinstance(it, PullsResult)
        for prize in it.prizes
        if prize.code == "phone"
    )
    rows = rows_of(shop, key)
    assert rows[0] == (f"{key}:consume", "POINT", "lottery_consume")
    assert (f"{key}:item_{pull}", "ITEM.PHONE", "lottery_item") in rows
    assert (f"{key}:notice_{pull}", "POINT", "lottery_notice") in rows


def test_a_single_draw_of_contract_v1_gets_a_result_of_v1(shop: Shop) -> None:
    shop.publish(WINTER)
    payer = shop.account(user=7)
    draws = [DrawRequest(account_id=payer, campaign="winter") for _ in range(30)]
    results = shop.draw(*draws)

    assert {type(it) for it in results} == {DrawResult}
    paid = [it for it in results if it.prize_amount == "5.00"]
    assert paid
    key = paid[0].request_key
    assert [it.idempotency_key.removeprefix(key) for it in paid[0].transactions] == [
        ":consume",
        ":reward",
        ":reward_1_2",
    ]
    assert shop.violations() == []


def test_a_repeat_gets_the_first_bytes_also_from_the_ledger_alone(shop: Shop) -> None:
    shop.publish(WINTER)
    payer = shop.account(user=7)
    draws = [DrawRequest(account_id=payer, campaign="winter", pulls=pulls) for pulls in (10, 1, None, 10)]
    poor = DrawRequest(account_id=shop.account("1.00", user=8), campaign="winter", pulls=10)
    first = {it.request_key: it.encode() for it in shop.draw(*draws, poor)}

    again = [it for it in shop.settle(*draws, poor) if isinstance(it, Settled)]
    assert {it.request.request_key: it.result for it in again} == first
    assert all(it.is_repeat for it in again)
    keep_results(shop.engine)
    with shop.engine.begin() as connection:
        assert requests.archive(connection, datetime.now(UTC) + timedelta(days=1), rows_max=100) == 5
    archived = [it for it in shop.settle(*draws, poor) if isinstance(it, Settled)]
    assert {it.request.request_key: it.result for it in archived} == first
    for draw in (*draws, poor):
        state = shop.entry.state_of(draw.lottery_session_id)
        assert state is not None
        assert state.result == first[draw.request_key]
    # The request's row may be gone altogether: the ledger's keys never expire.
    with shop.engine.begin() as connection:
        connection.execute(api_idempotency_requests.delete())
    anew = [it for it in shop.settle(*draws) if isinstance(it, Settled)]
    assert {it.request.request_key: it.result for it in anew} == {it.request_key: first[it.request_key] for it in draws}
    with shop.engine.begin() as connection:  # for the audit at the end: the rejected request's row came back as none
        assert connection.execute(select(func.count()).select_from(api_idempotency_requests)).scalar_one() == 4


# ---- versions --------------------------------------------------------------------------------------------------------


def test_a_request_is_drawn_by_the_odds_that_it_was_accepted_under(shop: Shop) -> None:
    before = shop.publish(WINTER)
    payer = shop.account("99999.00", user=7)
    accepted = [DrawRequest(account_id=payer, campaign="winter", pulls=1) for _ in range(1000)]
    for start in range(0, len(accepted), 500):
        shop.accept(*accepted[start : start + 500])
    after = shop.publish(WINTER.replace("weight = 3\n", "weight = 300\n"), is_open=False)
    published = [DrawRequest(account_id=payer, campaign="winter", pulls=1) for _ in range(100)]  # past the door

    mixed = [it for pair in itertools.zip_longest(accepted, published) for it in pair if it is not None]
    batches = [mixed[start : start + 300] for start in range(0, len(mixed), 300)]
    results = {it.request_key: it for batch in batches for it in shop.results(shop.settle(*batch))}
    assert {results[it.request_key].odds_hash for it in accepted} == {before.odds_hash}  # type: ignore[attr-defined]
    assert {results[it.request_key].odds_hash for it in published} == {after.odds_hash}  # type: ignore[attr-defined]
    assert shop.violations() == []


def test_a_promise_holds_when_the_campaign_is_closed_before_it_settles(shop: Shop) -> None:
    shop.publish(WINTER)
    payer = shop.account(user=7)
    promised, late = (DrawRequest(account_id=payer, campaign="winter") for _ in range(2))
    shop.accept(promised)
    shop.move("winter", CampaignState.CLOSED)

    told = shop.results(shop.settle(promised, late))
    assert [it.status for it in told] == ["completed", "rejected"]
    assert told[1].reason == "CAMPAIGN_CLOSED"
    assert shop.results(shop.settle(late))[0] == told[1]  # a remembered outcome


def test_a_draw_of_a_campaign_that_is_not_published_is_parked_and_settles_later(shop: Shop) -> None:
    draw = DrawRequest(account_id=shop.account(user=7), campaign="winter", pulls=10)
    (refused,) = shop.settle(draw)
    assert isinstance(refused, Refused)
    assert refused.cause == Cause.UNKNOWN_CAMPAIGN
    shop.publish(WINTER)
    (result,) = shop.results(shop.settle(draw))
    assert result.status == "completed"


def test_pulls_that_are_not_sold_are_parked_where_no_door_has_refused_them(shop: Shop) -> None:
    shop.publish(WINTER)
    payer = shop.account(user=7)
    answers = shop.settle(
        DrawRequest(account_id=payer, campaign="winter", pulls=3), DrawRequest(account_id=payer, pulls=1)
    )
    assert [it.cause for it in answers if isinstance(it, Refused)] == [Cause.INVALID, Cause.INVALID]


# ---- the door --------------------------------------------------------------------------------------------------------


def refusal(shop: Shop, draw: DrawRequest) -> DrawError:
    (answer,) = shop.entry.accept_each([Submission(draw)])
    assert isinstance(answer, DrawError)
    return answer


def test_the_door_refuses_before_anything_is_written(shop: Shop) -> None:
    payer = shop.account(user=7)
    shop.publish(WINTER, is_open=False)
    for name, window in (("soon", "opens = 2099-01-01T00:00:00Z"), ("over", "closes = 2001-01-01T00:00:00Z")):
        shop.publish(WINTER.replace('"winter"', f'"{name}"').replace("[[prize]]", f"{window}\n[[prize]]", 1))
    shop.publish(WINTER.replace('"winter"', '"closed"'))
    shop.move("closed", CampaignState.CLOSED)

    def asked(campaign: str, pulls: int | None = None) -> DrawError:
        return refusal(shop, DrawRequest(account_id=payer, campaign=campaign, pulls=pulls))

    unknown = asked("spring")
    assert isinstance(unknown, UnknownCampaign)
    assert str(unknown).endswith("There are: default, over, soon")  # neither the draft nor what is closed
    assert isinstance(asked("winter"), CampaignNotOpen)  # a draft
    assert isinstance(asked("soon"), CampaignNotOpen)
    assert "2099-01-01T00:00:00+00:00" in str(asked("soon"))
    assert isinstance(asked("over"), CampaignClosed)
    assert isinstance(asked("closed"), CampaignClosed)
    shop.move("winter", CampaignState.OPEN)
    assert isinstance(asked("winter", 3), PullsNotSold)
    assert "1, 10 pulls" in str(asked("winter", 3))
    assert isinstance(asked("default", 1), PullsNotSold)
    assert count_requests(shop) == 0


def test_a_repeat_is_answered_whatever_has_become_of_its_campaign(shop: Shop) -> None:
    shop.publish(WINTER)
    draw, other = (DrawRequest(account_id=shop.account(user=user), campaign="winter", pulls=10) for user in (7, 8))
    shop.accept(draw)
    shop.move("winter", CampaignState.PAUSED)

    assert isinstance(refusal(shop, other), CampaignPaused)
    (answer,) = shop.entry.accept_each([Submission(draw)])
    assert not isinstance(answer, DrawError)
    assert (answer.is_new, answer.record and answer.record.status) == (False, Status.ACCEPTED)
    shop.move("winter", CampaignState.OPEN)
    assert shop.accept(other)[0].is_new


# ---- limits and lists ------------------------------------------------------------------------------------------------

LIMITED = WINTER.replace("[[prize]]", "[limits]\nper_day = 12\nper_account = 25\n[[prize]]", 1)


def test_limits_count_pulls_of_the_day_and_of_all_time(shop: Shop) -> None:
    shop.publish(LIMITED)
    payer = shop.account(user=7)

    def drawn(pulls: int, day: int) -> str | None:
        draw = DrawRequest(account_id=payer, campaign="winter", pulls=pulls)
        shop.accept(draw)
        with shop.engine.begin() as connection:
            connection.execute(
                update(api_idempotency_requests)
                .where(api_idempotency_requests.c.request_key == draw.request_key)
                .values(created_at=datetime(2026, 12, day, 12, tzinfo=UTC))
            )
        return shop.results(shop.settle(draw))[0].reason

    assert [drawn(10, 1), drawn(1, 1), drawn(10, 1), drawn(1, 1), drawn(1, 1)] == [
        None,
        None,
        "LIMIT_REACHED",
        None,
        "LIMIT_REACHED",
    ]
    assert [drawn(10, 2), drawn(1, 2), drawn(1, 3), drawn(10, 3), drawn(1, 3), drawn(1, 3)] == [
        None,
        None,
        None,
        "LIMIT_REACHED",
        None,
        "LIMIT_REACHED",
    ]


def test_limits_hold_in_one_batch_and_over_versions(shop: Shop) -> None:
    shop.publish(LIMITED)
    payer = shop.account(user=7)
    one_batch = shop.draw(*(DrawRequest(account_id=payer, campaign="winter") for _ in range(20)))
    assert Counter(it.reason for it in one_batch) == {None: 12, "LIMIT_REACHED": 8}
    shop.publish(LIMITED.replace("weight = 3\n", "weight = 30\n"), is_open=False)
    assert shop.draw(DrawRequest(account_id=payer, campaign="winter"))[0].reason == "LIMIT_REACHED"


def test_lists_say_who_may_not_and_who_alone_may(shop: Shop) -> None:
    shop.publish(WINTER.replace("[[prize]]", '[eligibility]\ndeny = "bad"\nallow = "good"\n[[prize]]', 1))
    good, bad, both, neither = (shop.account(user=user) for user in range(1, 5))
    lists.put_on(shop.engine, "good", [good, both], **BY)
    lists.put_on(shop.engine, "bad", [bad, both], **BY)

    told = shop.draw(*(DrawRequest(account_id=it, campaign="winter") for it in (good, bad, both, neither)))
    assert [it.reason for it in told] == [None, "NOT_ELIGIBLE", "NOT_ELIGIBLE", "NOT_ELIGIBLE"]


def test_a_prize_with_a_limit_per_account_is_won_so_often_and_no_more(shop: Shop) -> None:
    shop.publish(WINTER.replace("stock = 3\n", "per_account = 2\n"))
    first, second = shop.account(user=1), shop.account(user=2)
    results = shop.draw(
        *(
            # With keys that are chosen: by those that are made anew, one of thirty runs wins less.
            DrawRequest(account_id=it, campaign="winter", pulls=10, request_key=f"k{number}_{it}")
            for number in range(5)
            for it in (first, second)
        )
    )
    for account in (first, second):
        assert Counter(prizes([it for it in results if it.account_id == account]))["phone"] == 2


def test_fifty_parallel_requests_of_one_account_never_exceed_a_limit(server: Shop) -> None:
    server.publish(LIMITED)
    payer = server.account("9999.00", user=7)
    draws = [DrawRequest(account_id=payer, campaign="winter") for _ in range(50)]
    server.accept(*draws)
    with ThreadPoolExecutor(10) as pool:
        answers = [it for some in pool.map(server.settle, draws) for it in some]
    assert Counter(it.reason for it in server.results(answers)) == {None: 12, "LIMIT_REACHED": 38}


# ---- guarantees ------------------------------------------------------------------------------------------------------

PITY = """
name = "pity"
asset = "POINT"
cost = { 1 = "1.00", 10 = "10.00" }

[[prize]]
code = "rare"
weight = 1
grants = [{ asset = "POINT", amount = "2.00" }]

[[prize]]
code = "nothing"
weight = %d

[[guarantee]]
name = "ssr"
prizes = ["rare"]
hard_at = 7
"""


def test_a_guarantee_is_kept_across_batches_and_a_new_version(shop: Shop) -> None:
    shop.publish(PITY % 1000)
    payer = shop.account(user=7)
    found: list[str] = []
    for number in range(12):
        if number == 6:
            shop.publish(PITY % 2000, is_open=False)
        found += prizes(shop.draw(*(DrawRequest(account_id=payer, campaign="pity", pulls=it) for it in (1, 10, 1))))
    gaps = [len(list(group)) for code, group in itertools.groupby(found) if code == "nothing"]
    assert max(gaps) == 6  # the seventh is the promised one, also where the version changed
    assert len(found) == 144


# ---- stock -----------------------------------------------------------------------------------------------------------


def test_the_last_units_go_to_the_first_requests_and_the_others_get_what_is_instead(shop: Shop) -> None:
    shop.publish(ONE % 4)
    draws = [DrawRequest(account_id=shop.account(user=user), campaign="one", pulls=5) for user in range(1, 9)]
    results = shop.draw(*draws)
    assert Counter(prizes(results))["last"] == 4
    assert left(shop, "one") == {"last": 0}
    versions.restock(shop.engine, "one", "last", 3, **BY)
    again = shop.draw(*(DrawRequest(account_id=it.account_id, campaign="one", pulls=5) for it in draws))
    assert Counter(prizes(again))["last"] == 3


def test_a_request_that_is_rejected_takes_no_unit(shop: Shop) -> None:
    shop.publish(ONE % 1000)
    poor = shop.account("3.00", user=1)
    results = shop.draw(*(DrawRequest(account_id=poor, campaign="one") for _ in range(50)))
    drawn = [it for it in results if it.status == "completed"]
    assert len(drawn) == 3
    assert left(shop, "one")["last"] == 1000 - sum(len(it.transactions) == 2 for it in drawn)


@pytest.mark.parametrize("units", [40, 1200])
def test_lanes_side_by_side_issue_no_unit_twice(server: Shop, units: int) -> None:
    """One row of stock, and eight of them."""
    server.publish(ONE % units)
    accounts = [server.account(user=user) for user in range(1, 61)]
    batches = [
        [DrawRequest(account_id=it, campaign="one", pulls=5) for it in accounts[number::20] for _ in range(16)]
        for number in range(20)
    ]
    for batch in batches:
        server.accept(*batch)
    with ThreadPoolExecutor(10) as pool:
        answers = [it for some in pool.map(lambda batch: server.settle(*batch), batches) for it in some]
    results = server.results(answers)
    wanted = 20 * 48 * 5
    assert len(prizes(results)) == wanted
    assert Counter(prizes(results))["last"] == units
    assert left(server, "one") == {"last": 0}


def test_a_ten_pull_sent_fifty_times_at_once_is_charged_once(server: Shop) -> None:
    server.publish(WINTER)
    draw = DrawRequest(account_id=server.account(user=7), campaign="winter", pulls=10)
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda _: server.accept(draw), range(50)))
        answers = [it for some in pool.map(lambda _: server.settle(draw), range(50)) for it in some]
    assert len({it.result for it in answers if isinstance(it, Settled)}) == 1
    assert len(server.results(answers)) == 50
    assert sum(key.endswith(":consume") for key, _, _ in rows_of(server, draw.request_key)) == 1


# ---- codes -----------------------------------------------------------------------------------------------------------

COUPONS = ONE.replace('asset = "ITEM.LAST", amount = "1"', 'asset = "COUPON.X", amount = "1", codes = true')


def load_codes(shop: Shop, name: str, codes: Sequence[str]) -> None:
    """As `tombola campaign codes load` does."""
    pools.load(shop.engine, name, "last", {it: line for line, it in enumerate(codes, 1)}, **BY)


def test_each_code_of_a_pool_is_handed_out_once(server: Shop) -> None:
    server.publish((COUPONS % 0).replace("stock = 0\n", ""))
    codes = [f"X-{number:04}" for number in range(70)]
    load_codes(server, "one", codes)
    accounts = [server.account(user=user) for user in range(1, 21)]
    draws = [DrawRequest(account_id=it, campaign="one", pulls=5) for it in accounts for _ in range(4)]
    server.accept(*draws)
    with ThreadPoolExecutor(8) as pool:
        answers = [it for some in pool.map(lambda n: server.settle(*draws[n::16]), range(16)) for it in some]
    won = [
        grant.code
        for result in server.results(answers)
        if isinstance(result, PullsResult)
        for prize in result.prizes
        for grant in prize.grants
    ]
    assert sorted(won) == codes
    with server.engine.begin() as connection:
        taken = connection.execute(select(func.count(campaign_codes.c.taken_by))).scalar_one()
    assert taken == 70


# ---- forecast and audit ----------------------------------------------------------------------------------------------


def test_the_forecast_says_what_settling_does(shop: Shop) -> None:
    shop.publish(LIMITED)
    shop.publish(ONE % 5)
    accounts = [shop.account("100.00", user=user) for user in range(1, 5)]
    draws = [
        DrawRequest(account_id=it, campaign=campaign, pulls=pulls)
        for it in accounts
        for campaign, pulls in (("winter", 10), ("one", 5), ("one", 1), ("winter", 1))
    ]
    shop.accept(*draws)
    rehearsal = Rehearsal(shop.rules)
    told = []
    for some in (draws[:7], draws[7:]):
        with transaction(shop.engine, read_only=True) as reading:
            told += rehearsal.answers(reading, some)
    done = shop.settle(*draws)
    foretold = repeats.tell(shop.engine, told, shop.rules)
    assert [it.encode() for it in shop.results(foretold)] == [it.encode() for it in shop.results(done)]


@pytest.mark.parametrize(
    ("broken", "invariant"),
    [
        ("UPDATE campaign_stock SET units = units + 1", "I7"),
        ("UPDATE asset_transactions SET notes = REPLACE(notes, 'prize=five', 'prize=phone')", "I2"),
        ("UPDATE asset_transactions SET notes = REPLACE(notes, 'nothing', 'five')", "I2"),
        ("UPDATE account_asset_balances SET user_id = 99 WHERE asset_code = 'COIN'", "I11"),
        ("DELETE FROM campaign_versions", "I2"),
    ],
)
def test_the_audit_finds_what_was_changed_behind_its_back(database_url: str, broken: str, invariant: str) -> None:
    with open_shop(database_url, balances=False) as shop:
        shop.publish(WINTER)
        payer = shop.account(user=7)
        shop.draw(*(DrawRequest(account_id=payer, campaign="winter", pulls=10) for _ in range(5)))
        assert shop.violations() == []
        with shop.engine.begin() as connection:
            connection.exec_driver_sql(broken)
        assert invariant in {it.split()[0] for it in shop.violations()}


def test_a_large_batch_stays_within_the_limits_of_statements(shop: Shop) -> None:
    shop.publish(WINTER.replace("stock = 3", "stock = 30000"))
    payers = [shop.account(user=user) for user in range(1, 4)]
    draws = [DrawRequest(account_id=payers[number % 3], campaign="winter") for number in range(IN_LIST_MAX // 3)]
    assert len(shop.draw(*draws)) == len(draws)


def test_a_held_prize_account_defers_its_draws_alone(server: Shop, mariadb_url: str) -> None:
    server.publish(WINTER)
    first, second = (server.account(user=user) for user in (1, 2))
    server.draw(*(DrawRequest(account_id=it, campaign="winter", pulls=10) for it in (first, second)))
    other = open_engine(mariadb_url, lock_wait_s=LOCK_WAIT_S)
    rules = server.rules._replace(lock_wait_s=0.3, tries_max=2)
    held, free = (DrawRequest(account_id=it, campaign="winter") for it in (first, second))
    with other.begin() as connection:
        connection.exec_driver_sql(
            "SELECT id FROM account_asset_balances WHERE user_id = 1 AND asset_code = 'COIN' FOR UPDATE"
        )
        answers = tries.settle(server.engine, [held, free], rules, sleep=lambda _: None)
        assert [type(it).__name__ for it in answers] == ["Deferred", "Settled"]
    other.dispose()
    assert len(server.results(server.settle(held))) == 1


def test_stock_rows_have_no_unit_below_zero(shop: Shop) -> None:
    shop.publish(ONE % 1)
    with pytest.raises(Exception, match=r"(?i)constraint|check"), shop.engine.begin() as connection:
        connection.execute(update(campaign_stock).values(units=-1))


# ---- what the built-in campaign pays for all this --------------------------------------------------------------------


def test_draws_of_the_built_in_campaign_send_not_a_byte_more(server: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    server.publish(WINTER)
    monkeypatch.setattr("tombola.worker.fulfilments.subscriptions.REFRESH_S", 3600.0)
    accounts = [server.account(user=user) for user in range(1, 6)]
    sent: list[int] = []
    execute = pymysql.cursors.Cursor.execute

    def listening(cursor: pymysql.cursors.Cursor, query: str, args: object = None) -> int:
        sent.append(len(query))
        return execute(cursor, query, args)

    def bytes_of(rules: Rules, prefix: str) -> list[int]:
        draws = [DrawRequest(account_id=it, request_key=f"{prefix}-{it}-k{n}") for it in accounts for n in range(9)]
        lost = [it for it in draws if not WHEELS["default"].draw(it.account_id, it.request_key).amount][:20]
        server.accept(*lost[:10])
        sent.clear()
        with monkeypatch.context() as patched:
            patched.setattr(pymysql.cursors.Cursor, "execute", listening)
            tries.settle(server.engine, lost, rules)
        return list(sent)

    with_all = server.rules._replace(subscriptions=Subscriptions(server.engine))
    bytes_of(with_all, "first")  # reads the webhooks, and the database's clock
    alone = bytes_of(Rules(WHEELS, 5, lock_wait_s=LOCK_WAIT_S), "alone")
    beside = bytes_of(with_all, "besid")
    assert len(beside) == len(alone)
    # Balances have as many digits as they have; all else is as long.
    assert all(abs(one - other) <= 40 for one, other in zip(alone, beside, strict=True)), (alone, beside)
