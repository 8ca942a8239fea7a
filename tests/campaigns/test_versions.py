"""What operators do to campaigns: versions, states, stock and lists, whole and on record."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import Engine, select
from typer.testing import CliRunner

from tests.domain.test_manifest import WINTER
from tests.ledgers import migrated
from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.errors import CampaignNotFound, InvalidRequest, ServiceUnavailable
from tombola.producers.storage.campaigns import Campaigns, CampaignState
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import campaign_stock, campaign_versions
from tombola.worker.campaigns import lists, stock, versions
from tombola.worker.campaigns.differences import differences
from tombola.worker.cli import app
from tombola.worker.operators import actions

ODDS = manifest.parse(WINTER)
RICHER = manifest.parse(WINTER.replace("weight = 7000", "weight = 6000").replace("stock = 3", "stock = 5"))
BY = {"operator": "ann", "reason": "for Monday"}
BOUNDS = versions.Bounds()


@pytest.fixture
def engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    made = open_engine(database_url)
    migrated(made)
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", database_url)
    yield made
    made.dispose()


def publish(engine: Engine, odds: Odds = ODDS) -> versions.Published:
    return versions.publish(engine, odds, bounds=BOUNDS, **BY)


def left(engine: Engine) -> dict[str, int]:
    with engine.connect().execution_options(read_only=True) as connection:
        return dict(stock.left(connection, ODDS.name))


def recorded(engine: Engine) -> list[str]:
    with engine.connect().execution_options(read_only=True) as connection:
        return [it.action for it in reversed(actions.recent(connection, rows_max=100))]


def test_a_version_is_kept_to_the_byte_and_named_by_its_hash(engine: Engine) -> None:
    assert (publish(engine).version, publish(engine, RICHER).version) == (1, 2)

    with engine.connect().execution_options(read_only=True) as connection:
        rows = connection.execute(select(campaign_versions.c.odds_hash, campaign_versions.c.manifest))
        kept = {row.odds_hash: row.manifest for row in rows}
    assert kept == {it.odds_hash: it.canonical.decode() for it in (ODDS, RICHER)}
    campaigns = Campaigns(engine)
    found = campaigns.find(ODDS.name)
    assert found is not None
    assert (found.state, found.odds) == (CampaignState.DRAFT, RICHER)
    assert campaigns.version(ODDS.odds_hash) == ODDS  # no longer live, and never forgotten
    assert campaigns.version("0" * 64) is None
    assert campaigns.find("other") is None


def test_a_version_published_again_changes_nothing(engine: Engine) -> None:
    publish(engine)
    assert publish(engine) == versions.Published(ODDS, 1, is_repeat=True)
    assert recorded(engine) == ["campaign publish"]
    assert left(engine) == {"phone": 3}


def test_an_earlier_version_is_live_again_under_its_own_number(engine: Engine) -> None:
    publish(engine)
    publish(engine, RICHER)
    assert publish(engine) == versions.Published(ODDS, 1)
    assert left(engine) == {"phone": 3}


def test_other_processes_see_a_change_within_a_second(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    campaigns = Campaigns(engine)
    assert campaigns.all() == []
    publish(engine)
    assert campaigns.all() == []  # asked less than a second ago
    monkeypatch.setattr("tombola.producers.storage.campaigns.REFRESH_S", 0.0)
    assert [it.name for it in campaigns.all()] == [ODDS.name]


def test_nothing_is_read_again_while_nothing_has_changed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(engine)
    monkeypatch.setattr("tombola.producers.storage.campaigns.REFRESH_S", 0.0)
    campaigns = Campaigns(engine)
    first = campaigns.find(ODDS.name)
    assert campaigns.find(ODDS.name) is first


def test_a_database_that_is_away_is_an_outage_and_asked_again(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/nowhere/ledger.db")
    campaigns = Campaigns(engine)
    for _ in range(2):
        with pytest.raises((ServiceUnavailable, Exception), match="SQLite file cannot be opened"):
            campaigns.find("winter-2026")


# ---- states ----------------------------------------------------------------------------------------------------------


def move(engine: Engine, state: CampaignState) -> None:
    versions.move(engine, ODDS.name, state, **BY)


def test_a_campaign_is_opened_paused_opened_and_closed_for_good(engine: Engine) -> None:
    publish(engine)
    for state in (CampaignState.OPEN, CampaignState.PAUSED, CampaignState.PAUSED, CampaignState.OPEN):
        move(engine, state)
    move(engine, CampaignState.CLOSED)
    for state in (CampaignState.OPEN, CampaignState.PAUSED):
        with pytest.raises(InvalidRequest, match="is closed"):
            move(engine, state)
    with pytest.raises(InvalidRequest, match="for good"):
        publish(engine, RICHER)
    assert recorded(engine) == [
        "campaign publish",
        "campaign open",
        "campaign pause",
        "campaign open",
        "campaign close",
    ]


def test_a_draft_is_not_paused_and_an_unknown_campaign_not_opened(engine: Engine) -> None:
    publish(engine)
    with pytest.raises(InvalidRequest, match="is draft"):
        move(engine, CampaignState.PAUSED)
    with pytest.raises(CampaignNotFound):
        versions.move(engine, "other", CampaignState.OPEN, **BY)


def test_an_act_without_a_reason_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="say why"):
        versions.publish(engine, ODDS, bounds=BOUNDS, operator="ann", reason=" ")
    assert Campaigns(engine).all() == []


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_odds_that_give_back_too_much_are_refused_unless_allowed(engine: Engine) -> None:
    generous = manifest.parse(
        WINTER.replace("weight = 7000", "weight = 1").replace('amount = "5.00"', 'amount = "20.00"')
    )
    with pytest.raises(InvalidRequest, match="rtp-max"):
        publish(engine, generous)
    versions.publish(engine, generous, bounds=versions.Bounds(return_max=3.0), **BY)


def test_a_prize_beyond_the_value_that_is_allowed_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="phone"):
        versions.publish(engine, ODDS, bounds=versions.Bounds(prize_value_max=Decimal(1000)), **BY)


def test_a_campaign_stays_in_its_asset(engine: Engine) -> None:
    publish(engine)
    with pytest.raises(InvalidRequest, match="paid in POINT"):
        publish(engine, manifest.parse(WINTER.replace('asset = "POINT"', 'asset = "COIN"', 1)))


# ---- stock -----------------------------------------------------------------------------------------------------------


def test_stock_follows_the_manifest(engine: Engine) -> None:
    publish(engine)
    assert left(engine) == {"phone": 3}
    publish(engine, RICHER)
    assert left(engine) == {"phone": 5}
    assert versions.restock(engine, ODDS.name, "phone", 2, **BY) == 7
    assert versions.restock(engine, ODDS.name, "phone", -7, **BY) == 0
    with pytest.raises(InvalidRequest, match="are too many"):
        versions.restock(engine, ODDS.name, "phone", -1, **BY)
    with pytest.raises(InvalidRequest, match="are too many"):
        publish(engine)  # two units fewer, and none is left
    assert left(engine) == {"phone": 0}
    with engine.connect().execution_options(read_only=True) as connection:
        assert stock.published(connection, ODDS.name) == {"phone": 0}


@pytest.mark.parametrize(
    ("code", "why"), [("five", "no prize"), ("car", "no prize"), ("coupon", "campaign codes load winter-2026 coupon")]
)
def test_only_what_has_stock_is_restocked(engine: Engine, code: str, why: str) -> None:
    publish(engine)
    with pytest.raises(InvalidRequest, match=why):
        versions.restock(engine, ODDS.name, code, 1, **BY)


def test_a_large_stock_stands_in_several_rows(engine: Engine) -> None:
    many = manifest.parse(WINTER.replace("stock = 3", "stock = 50003"))
    publish(engine, many)
    with engine.connect().execution_options(read_only=True) as connection:
        units = sorted(connection.execute(select(campaign_stock.c.units)).scalars())
    assert units == [6250] * 5 + [6251] * 3


def test_a_stock_that_grows_is_spread_over_more_rows(engine: Engine) -> None:
    publish(engine)
    publish(engine, manifest.parse(WINTER.replace("stock = 3", "stock = 8000")))
    with engine.connect().execution_options(read_only=True) as connection:
        assert list(connection.execute(select(campaign_stock.c.units)).scalars()) == [1000] * 8


@pytest.mark.parametrize("number", [8])
def test_operators_who_act_at_the_same_time_lose_nothing(engine: Engine, number: int) -> None:
    publish(engine)
    with ThreadPoolExecutor(number) as pool:
        list(pool.map(lambda _: versions.restock(engine, ODDS.name, "phone", 1, **BY), range(number)))
    assert left(engine) == {"phone": 3 + number}


# ---- lists -----------------------------------------------------------------------------------------------------------


def test_lists_of_accounts(engine: Engine) -> None:
    assert lists.put_on(engine, "bad", [3, 1, 3], **BY) == 2
    assert lists.put_on(engine, "bad", [1, 4], **BY) == 1
    assert lists.take_off(engine, "bad", [1, 9], **BY) == 1
    with engine.connect().execution_options(read_only=True) as connection:
        assert lists.accounts_on(connection, "bad") == {3, 4}
        assert lists.accounts_on(connection, "BAD") == set()
        assert lists.sizes(connection) == {"bad": 2}
    assert recorded(engine) == ["list add", "list add", "list remove"]


# ---- differences -----------------------------------------------------------------------------------------------------


def test_differences_name_what_changes() -> None:
    assert list(differences(ODDS, ODDS)) == []
    assert list(differences(None, ODDS)) == ["winter-2026 is new"]
    said = list(differences(ODDS, RICHER))
    assert "prize phone, stock: 3 -> 5" in said
    assert any(line.startswith("prize nothing, chance: 70.0") for line in said)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ('10 = "90.00"', '10 = "80.00"', "price of 10 pull(s): 90.00 -> 80.00"),
        (', 10 = "90.00"', "", "price of 10 pull(s): 90.00 -> none"),
        ("per_day = 20", "per_day = 10", "per_day: 20 -> 10"),
        ("hard_at = 90", "hard_at = 80", "guarantee ssr, hard_at: 90 -> 80"),
        ("phone = 2", "phone = 3", "tier vip: other weights"),
        ('spent_from = "1000.00"', 'spent_from = "900.00"', "tier vip, spent_from: 1000.00 -> 900.00"),
        ('amount = "5.00"', 'amount = "6.00"', "prize five: other grants"),
        ('deny = "blacklist-1"', "", "deny: blacklist-1 -> none"),
    ],
)
def test_every_kind_of_change_is_named(old: str, new: str, line: str) -> None:
    assert line in list(differences(ODDS, manifest.parse(WINTER.replace(old, new))))


def test_a_prize_that_goes_and_one_that_comes_are_named() -> None:
    fewer = dataclasses.replace(ODDS, prizes=ODDS.prizes[:-1], tiers=())
    assert "prize nothing: gone, was 70.0000%" in list(differences(ODDS, fewer))
    assert any(line.startswith("prize nothing: new, 70.0") for line in differences(fewer, ODDS))


# ---- commands --------------------------------------------------------------------------------------------------------


def tombola(*arguments: object, ends_with: int = 0) -> str:
    ended = CliRunner().invoke(app, ["campaign", *map(str, arguments)])
    assert ended.exit_code == ends_with, (ended.output, ended.exception)
    return ended.output


def test_a_campaign_from_its_manifest_to_its_end(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "winter.toml"
    file.write_text(WINTER)

    assert ODDS.odds_hash in tombola("check", file)
    assert "is new" in tombola("diff", file, ends_with=1)
    assert "version 1" in tombola("publish", file, "--reason", "for Monday", "--yes")
    assert "says the same" in tombola("diff", file)
    tombola("open", "winter-2026", "--reason", "go")
    assert "phone of winter-2026: 1 units left" in tombola(
        "restock", "winter-2026", "phone", "-2", "--reason", "broken"
    )
    assert "winter-2026 is open" in tombola("show", "winter-2026")
    assert '"state":"open"' in tombola("list", "--json")
    tombola("accounts", "add", "blacklist-1", 3, 1, "--reason", "cheats")
    assert tombola("accounts", "show", "blacklist-1") == "1\n3\n"
    tombola("close", "winter-2026", "--yes", "--reason", "over")
    assert recorded(engine)[-1] == "campaign close"
