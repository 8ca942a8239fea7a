"""The sample campaigns of `tombola up`: there after the first start, and an operator's from then on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests.domain.test_manifest import WINTER
from tests.ledgers import migrated
from tombola.producers.domain.campaigns import figures, manifest
from tombola.producers.storage.campaigns import Campaigns, CampaignState
from tombola.producers.storage.engines import open_engine
from tombola.worker.campaigns import stock, versions
from tombola.worker.embedded import sample
from tombola.worker.embedded.sample_campaigns import publish_and_open, samples
from tombola.worker.operators import actions
from tombola.worker.operators.actions import Action

BY = {"operator": "ann", "reason": "mine"}
RAFFLE, STARS = samples()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = open_engine(f"sqlite:///{tmp_path}/ledger.db")
    migrated(made)
    yield made
    made.dispose()


def recorded(engine: Engine) -> list[Action]:
    with engine.connect().execution_options(read_only=True) as connection:
        return actions.recent(connection, rows_max=100)


def test_one_has_stock_and_a_ten_pull_and_one_has_a_guarantee() -> None:
    assert RAFFLE.has_stock
    assert set(RAFFLE.cost) == {1, 10}
    assert STARS.guarantees
    for odds in samples():
        assert versions.why_not(odds, versions.Bounds()) is None
        # The first prizes of a campaign are seen soon, and its stock lasts for a while.
        assert all(lasts.early > 200 for lasts in figures.stock_lasts(odds, figures.effective_chances(odds)))
        assert max(odds.cost.values()) <= sample.BALANCE / 2


def test_the_first_start_publishes_and_opens_them(engine: Engine) -> None:
    publish_and_open(engine)
    found = Campaigns(engine).all()
    assert [(it.name, it.state, it.odds) for it in found] == [
        ("raffle", CampaignState.OPEN, RAFFLE),
        ("stars", CampaignState.OPEN, STARS),
    ]
    acts = recorded(engine)
    assert [it.action for it in reversed(acts)] == ["campaign publish", "campaign open"] * 2
    assert {it.operator for it in acts} == {"tombola up"}
    with engine.connect().execution_options(read_only=True) as connection:
        assert stock.left(connection, "raffle") == {"headphones": 5, "mug": 300}


def test_the_next_start_changes_nothing(engine: Engine) -> None:
    publish_and_open(engine)
    before = recorded(engine)
    publish_and_open(engine)
    assert recorded(engine) == before


def test_what_an_operator_changed_stays(engine: Engine) -> None:
    publish_and_open(engine)
    changed = manifest.parse(WINTER.replace("winter-2026", "stars"))
    versions.publish(engine, changed, bounds=versions.Bounds(), **BY)
    versions.move(engine, "stars", CampaignState.PAUSED, **BY)
    versions.move(engine, "raffle", CampaignState.CLOSED, **BY)
    versions.restock(engine, "raffle", "mug", -5, **BY)
    before = recorded(engine)

    publish_and_open(engine)

    assert recorded(engine) == before
    raffle, stars = Campaigns(engine).all()
    assert (raffle.state, stars.state, stars.odds) == (CampaignState.CLOSED, CampaignState.PAUSED, changed)


def test_a_name_that_an_operator_has_taken_stays_the_operators(engine: Engine) -> None:
    mine = manifest.parse(WINTER.replace("winter-2026", "raffle"))
    versions.publish(engine, mine, bounds=versions.Bounds(), **BY)
    publish_and_open(engine)
    raffle, stars = Campaigns(engine).all()
    assert (raffle.state, raffle.odds) == (CampaignState.DRAFT, mine)
    assert stars.state is CampaignState.OPEN


def test_a_start_that_ended_half_way_is_finished(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(versions, "move", lambda *_a, **_o: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish_and_open(engine)
    publish_and_open(engine)
    assert {it.state for it in Campaigns(engine).all()} == {CampaignState.OPEN}
    assert sum(it.action == "campaign publish" for it in recorded(engine)) == 2
