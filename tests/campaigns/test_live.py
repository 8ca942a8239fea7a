"""Live figures: what the newest ledger rows say of a campaign, and nothing else."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal

import pytest
from sqlalchemy import Engine, insert
from typer.testing import CliRunner

from tests.domain.test_manifest import WINTER
from tests.ledgers import migrated
from tombola.producers.domain.campaigns import figures, manifest
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.campaigns.record import DrawNotes
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import asset_transactions
from tombola.worker.campaigns import live, versions
from tombola.worker.campaigns.live import Live
from tombola.worker.cli import app
from tombola.worker.ledger.accounts import open_account

ODDS = manifest.parse(WINTER)
EARLIER = manifest.parse(WINTER.replace('value = "10.00"', 'value = "20.00"'))
OTHER = manifest.parse(WINTER.replace("winter-2026", "spring"))
SEED_ID = "0123456789abcdef"


@pytest.fixture
def engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    made = open_engine(database_url)
    migrated(made)
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", database_url)
    for odds in (EARLIER, ODDS, OTHER):
        versions.publish(made, odds, bounds=versions.Bounds(), operator="ann", reason="for Monday")
    open_account(made, user_id=1)
    yield made
    made.dispose()


def notes(odds: Odds, *prizes: str) -> str:
    return DrawNotes(odds.odds_hash, SEED_ID, prizes).written()


def post(
    engine: Engine,
    *texts: str | None,
    cost: Decimal = Decimal(10),
    at: datetime | None = None,
    business_type: str = "lottery_consume",
) -> None:
    """A ledger row with each of these notes."""
    moment = at or utc_now()
    with engine.begin() as connection:
        for text in texts:
            connection.execute(
                insert(asset_transactions).values(
                    account_id=1,
                    business_id="x",
                    lottery_session_id="x",
                    idempotency_key=f"key_{secrets.token_hex(8)}:consume",
                    business_type=business_type,
                    asset_code="POINT",
                    delta_amount=-cost,
                    balance_before=cost,
                    balance_after=Decimal(0),
                    notes=text,
                    created_at=moment,
                    updated_at=moment,
                )
            )


def look(engine: Engine, rows_max: int = live.ROWS_MAX) -> Live:
    with engine.connect().execution_options(read_only=True) as connection:
        return live.look(connection, ODDS, rows_max=rows_max)


def test_an_empty_ledger_has_no_pulls(engine: Engine) -> None:
    found = look(engine)
    assert (found.campaign.count, found.version.count, found.pulls_per_minute) == (0, 0, 0.0)
    assert (found.campaign.return_to_player, found.campaign.share("five")) == (0.0, 0.0)


def test_pulls_are_counted_by_prize_and_by_version(engine: Engine) -> None:
    post(engine, notes(EARLIER, "coupon"), notes(ODDS, "five"), notes(ODDS, "nothing"))
    post(engine, notes(ODDS, *["coupon"] * 2, *["nothing"] * 8), cost=Decimal(90))

    found = look(engine)

    assert (found.campaign.count, found.version.count) == (13, 12)
    assert found.campaign.prizes == {"coupon": 3, "five": 1, "nothing": 9}
    assert found.version.prizes == {"coupon": 2, "five": 1, "nothing": 9}
    assert (found.campaign.spent, found.version.spent) == (Decimal(120), Decimal(110))
    # A coupon of the earlier version is worth 20, one of this version 10; "five" pays 5.
    assert (found.campaign.value, found.version.value) == (Decimal(45), Decimal(25))
    assert found.version.return_to_player == pytest.approx(25 / 110)
    assert found.version.share("coupon") == pytest.approx(2 / 12)


def test_what_was_to_be_expected_is_by_the_versions_that_were_drawn_by(engine: Engine) -> None:
    post(engine, notes(EARLIER, "nothing"), notes(ODDS, "nothing"), notes(ODDS, "nothing"))

    def mean(odds: Odds) -> float:
        return figures.return_to_player(odds, figures.effective_chances(odds), 1) * 10

    found = look(engine)
    assert found.version.return_expected == pytest.approx(mean(ODDS) / 10)
    assert found.campaign.return_expected == pytest.approx((mean(EARLIER) + 2 * mean(ODDS)) / 30)
    assert mean(EARLIER) > mean(ODDS)


@pytest.mark.parametrize(
    "text",
    [
        *(None, "", "on record", "odds=", f"odds={ODDS.odds_hash}", f"odds={ODDS.odds_hash} seed={SEED_ID}"),
        f"odds={ODDS.odds_hash} seed={SEED_ID} prizes=",
        f"odds={ODDS.odds_hash} seed={SEED_ID} prizes=five,five",  # two pulls are not sold
        f"odds={ODDS.odds_hash} seed={SEED_ID} pulls=3 prizes=five",
        f"odds={ODDS.odds_hash}{SEED_ID} prizes={'five,' * 5000}",
        f"seed={SEED_ID} odds={ODDS.odds_hash} prizes=five",
        f"odds={ODDS.odds_hash.upper()[:63]}é prizes=five \x00 🎰",
    ],
)
def test_notes_that_are_garbage_are_left_out(engine: Engine, text: str | None) -> None:
    post(engine, text, notes(ODDS, "five"))
    assert look(engine).campaign.count == 1


def test_what_follows_the_prizes_makes_no_difference(engine: Engine) -> None:
    text = DrawNotes(ODDS.odds_hash, SEED_ID, ("five",), "vip", 17, (3,), ((1, "phone"),)).written()
    post(engine, text, notes(ODDS, "five"))
    assert look(engine).campaign.prizes == {"five": 2}


def test_a_prize_that_the_version_does_not_have_is_worth_nothing(engine: Engine) -> None:
    post(engine, notes(ODDS, "car"))
    found = look(engine).campaign
    assert (found.count, found.value, found.prizes) == (1, Decimal(0), {"car": 1})


def test_other_campaigns_and_other_rows_are_left_out(engine: Engine) -> None:
    post(engine, notes(OTHER, "five"))
    post(engine, notes(ODDS, "five"), business_type="lottery_reward")
    assert look(engine).campaign.count == 0


def test_it_looks_back_so_many_rows_and_no_further(engine: Engine) -> None:
    old = utc_now() - timedelta(days=1)
    post(engine, *[notes(ODDS, "five")] * 3, at=old)
    post(engine, *[notes(ODDS, "nothing")] * 2)
    found = look(engine, rows_max=2)
    assert found.campaign.prizes == {"nothing": 2}
    assert found.rows == 2
    assert found.since is not None
    assert found.since > old
    whole = look(engine)
    assert whole.campaign.count == 5
    assert whole.since is not None
    assert whole.since <= old + timedelta(seconds=1)


def test_pulls_a_minute_are_those_of_the_last_minutes(engine: Engine) -> None:
    now = utc_now()
    post(engine, notes(ODDS, *["five"] * 10), at=now - timedelta(hours=1))
    post(engine, notes(ODDS, *["five"] * 10), at=now - timedelta(minutes=2))
    assert look(engine).pulls_per_minute == pytest.approx(10 / 5, rel=0.01)
    # Where the rows reach back for one minute alone, it is that minute.
    post(engine, notes(ODDS, *["five"] * 10), at=now - timedelta(minutes=1))
    assert look(engine, rows_max=1).pulls_per_minute == pytest.approx(10, rel=0.05)


def test_a_shell_shows_them(engine: Engine) -> None:
    post(engine, notes(ODDS, "five"), notes(EARLIER, "nothing"))
    said = CliRunner().invoke(app, ["campaign", "show", ODDS.name])
    assert said.exit_code == 0, said.output
    assert "all versions: 2 pulls, 25.00% came back" in said.output
    assert "the live version: 1 pulls, 50.00% came back" in said.output
    as_json = CliRunner().invoke(app, ["campaign", "show", ODDS.name, "--json"])
    assert '"prizes":{"five":1}' in as_json.output
