"""Simulations from a shell: the figures, the bars, the chart in a file."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from tests.domain.test_manifest import WINTER
from tombola.producers.domain.campaigns import figures, manifest
from tombola.worker.campaigns import chart
from tombola.worker.campaigns.outlook import Outlook
from tombola.worker.campaigns.simulation import BUCKETS, Simulation, simulate
from tombola.worker.cli import app

ODDS = manifest.parse(WINTER)


def tombola(*arguments: object, ends_with: int = 0) -> str:
    ended = CliRunner().invoke(app, ["campaign", *map(str, arguments)])
    assert ended.exit_code == ends_with, (ended.output, ended.exception)
    return ended.output


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "winter.toml"
    path.write_text(WINTER)
    return path


def returns(*shares: float) -> Simulation:
    found = Simulation(ODDS)
    found.returns = list(shares)
    return found


def test_accounts_are_sorted_by_what_came_back() -> None:
    assert returns().by_return() == []
    assert returns(0.0, 0.05, 0.1, 0.31).by_return() == [
        ("0 to 10 %", 2),
        ("10 to 20 %", 1),
        ("20 to 30 %", 0),
        ("30 to 40 %", 1),
    ]
    rich = returns(1.99, 2.0, 400.0).by_return()
    assert len(rich) == BUCKETS
    assert rich[-2:] == [("190 to 200 %", 1), ("200 % and more", 2)]


def test_a_chart_is_well_formed_and_its_bars_are_as_long_as_their_numbers() -> None:
    svg = ElementTree.fromstring(
        chart.bars("<a> & b", [("one & only", 50, "50"), ("none", 0, "0"), ("<two>", 100, "1")])
    )
    name = "{http://www.w3.org/2000/svg}"
    widths = [float(it.attrib["width"]) for it in svg.iter(f"{name}rect")]
    assert widths == [chart.BAR_WIDTH_MAX / 2, 0, chart.BAR_WIDTH_MAX]
    texts = [it.text for it in svg.iter(f"{name}text")]
    assert texts == ["<a> & b", "one & only", "50", "none", "0", "<two>", "1"]
    assert svg.attrib["aria-label"] == "<a> & b"


def test_a_chart_of_nothing_is_a_title() -> None:
    assert not list(ElementTree.fromstring(chart.of_returns([])).iter("{http://www.w3.org/2000/svg}rect"))


def test_a_shell_shows_bars_and_writes_a_chart(file: Path, tmp_path: Path) -> None:
    target = tmp_path / "returns.svg"
    said = tombola("simulate", file, "--draws", 2000, "--accounts", 100, "--chart", target)
    assert "value that came back to an account" in said
    assert "█" in said
    rows = ElementTree.parse(target).getroot().findall("{http://www.w3.org/2000/svg}rect")
    found = simulate(ODDS, draws=2000, accounts=100)
    assert len(rows) == len(found.by_return())


def test_a_chart_that_cannot_be_written_is_one_message(file: Path, tmp_path: Path) -> None:
    ended = CliRunner().invoke(
        app, ["campaign", "simulate", str(file), "--draws", "10", "--chart", str(tmp_path / "nowhere" / "x.svg")]
    )
    assert ended.exit_code == 1
    assert "cannot be written" in str(ended.exception)


def test_json_has_the_exact_figures_and_the_drawn_ones(file: Path) -> None:
    checked = json.loads(tombola("check", file, "--json"))
    assert checked == {"odds_hash": ODDS.odds_hash, **Outlook.of(ODDS).told()}
    drawn = json.loads(tombola("simulate", file, "--draws", 500, "--accounts", 5, "--per-day", 10, "--json"))
    assert drawn["simulated"]["pulls"] == 500
    assert {name: drawn[name] for name in checked} == checked


def test_draws_that_are_all_refused_are_shown(file: Path) -> None:
    file.write_text(WINTER.replace("per_day = 20\nper_account = 200", "per_account = 5"))
    said = tombola("simulate", file, "--draws", 10, "--pulls", 10)
    assert "0.0000%" in said


def test_an_outlook_knows_the_chances_of_each_tier() -> None:
    outlook = Outlook.of(ODDS)
    assert outlook.by_tier == {"vip": figures.effective_chances(ODDS, "vip")}
    assert outlook.by_tier["vip"]["phone"] > outlook.effective["phone"]
