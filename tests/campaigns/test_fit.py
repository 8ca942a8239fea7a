"""Goodness of fit by fresh seeds: right odds pass, wrong ones do not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from scipy import stats
from typer.testing import CliRunner

from tests.domain.test_manifest import WINTER
from tombola.producers.domain.campaigns import figures, manifest
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.errors import InvalidRequest
from tombola.worker.campaigns.fit import CELLS_MAX, Fit, _cells, fit
from tombola.worker.cli import app

pytestmark = pytest.mark.slow

ODDS = manifest.parse(WINTER)
PLAIN = dataclasses.replace(ODDS, guarantees=(), tiers=())
SEED = b"the same seed, the same pulls"
DRAWS = 30_000


@pytest.mark.parametrize("odds", [PLAIN, ODDS], ids=["plain", "with a guarantee"])
def test_right_odds_fit(odds: Odds) -> None:
    found = fit(odds, draws=DRAWS, seed=SEED)
    assert found.is_fit(), found
    assert found.pulls == sum(found.drawn.values()) >= DRAWS
    assert found.degrees == 2  # phone is too rare for a cell of its own


def test_accounts_of_a_tier_are_tested_by_its_weights() -> None:
    found = fit(ODDS, draws=DRAWS, tier="vip", seed=SEED)
    assert found.is_fit(), found
    assert found.expected == figures.effective_chances(ODDS, "vip")


@pytest.mark.parametrize("odds", [PLAIN, ODDS], ids=["plain", "with a guarantee"])
def test_chances_that_are_a_little_off_do_not_fit(odds: Odds, monkeypatch: pytest.MonkeyPatch) -> None:
    right = figures.effective_chances(odds)
    wrong = {**right, "five": right["five"] - 0.015, "nothing": right["nothing"] + 0.015}
    monkeypatch.setattr(figures, "effective_chances", lambda *_: wrong)
    found = fit(odds, draws=DRAWS, seed=SEED)
    assert not found.is_fit(), found


def test_a_prize_without_a_chance_must_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    right = figures.effective_chances(PLAIN)
    wrong = {**right, "five": 0.0, "nothing": right["nothing"] + right["five"]}
    monkeypatch.setattr(figures, "effective_chances", lambda *_: wrong)
    assert fit(PLAIN, draws=2_000, seed=SEED).p_value == 0.0


def test_a_certain_prize_fits() -> None:
    certain = manifest.parse('name = "a"\nasset = "P"\ncost = { 1 = "1" }\n[[prize]]\ncode = "x"\nweight = 1\n')
    assert fit(certain, draws=10).p_value == 1.0


def test_too_few_draws_tell_nothing() -> None:
    with pytest.raises(InvalidRequest, match="too few"):
        fit(PLAIN, draws=20)


def test_every_run_has_a_seed_of_its_own() -> None:
    one, two = (fit(PLAIN, draws=2_000).drawn for _ in range(2))
    assert one != two  # equal by chance in one of thousands of runs: the counts of three prizes


def test_rare_prizes_share_a_cell() -> None:
    chances = {"a": 0.9, "b": 0.099, "c": 0.0009, "d": 0.0001, "never": 0.0}
    assert _cells(chances, 1_000_000, 20) == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert _cells(chances, 30_000, 20) == {"a": 0, "b": 1, "d": 2, "c": 2}  # with d alone, the cell would be too small
    many = _cells({f"{number}": 0.001 for number in range(1_000)}, 10**6, 20)
    assert len(set(many.values())) == CELLS_MAX
    assert Counter(many.values())[CELLS_MAX - 1] == 1_000 - (CELLS_MAX - 1)


@pytest.mark.slow
@pytest.mark.parametrize("odds", [PLAIN, ODDS], ids=["plain", "with a guarantee"])
def test_p_values_of_right_odds_are_uniform(odds: Odds) -> None:
    """So one run in a thousand fails by chance, as is said, and not more."""
    found: list[Fit] = [fit(odds, draws=3_000, seed=bytes([number])) for number in range(80)]
    assert stats.kstest([it.p_value for it in found], "uniform").pvalue > 0.001


def test_from_a_shell(tmp_path: Path) -> None:
    file = tmp_path / "winter.toml"
    file.write_text(WINTER)
    said = CliRunner().invoke(app, ["campaign", "fit", str(file), "--draws", "20000", "--json"])
    assert said.exit_code in (0, 1), said.output  # one run in a thousand does not fit
    assert f'"odds_hash":"{ODDS.odds_hash}"' in said.output
    assert said.output.count('"p_value"') == 2  # without a tier, and of vip
    assert Counter(said.output)["\n"] == 1
