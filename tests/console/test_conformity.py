"""The page of conformity: reports of campaigns with and without draws, what viewers see, and what is no day."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import processes, servers
from tests.books.conftest import seal_all
from tests.consoles import PASSWORD, Console, Visitor
from tombola.producers.domain.contract import DrawRequest
from tombola.worker.books import head
from tombola.worker.conformity import counting, nightly, reading
from tombola.worker.console import conformity as page
from tombola.worker.operators import users as operators
from tombola.worker.settle import tries
from tombola.worker.settle.rules import Rules

pytestmark = pytest.mark.slow

CLOSED = f"redis://{servers.HOST}:1/0"  # this page needs no Redis


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[processes.House]:
    monkeypatch.setattr(page, "REPORTS_KEPT_S", 0.0)
    monkeypatch.setattr(head, "SEEN_EVERY", head.SEEN_EVERY * 0)
    with processes.House(f"sqlite:///{tmp_path}/ledger.db", CLOSED, CLOSED) as house:
        operators.add(house.engine, "val", "viewer", PASSWORD, by="root")
        yield house


@pytest.fixture
def val(house: processes.House) -> Iterator[Visitor]:
    with Console(house.settings) as console, Visitor(console.url) as visitor:
        assert visitor.log_in("val").status_code == 303
        yield visitor


def draw(house: processes.House, keys: list[str]) -> None:
    """Draws of one account, sealed and counted."""
    (id,) = house.accounts(1)
    asked = [DrawRequest(account_id=id, request_key=key) for key in keys]
    tries.settle(house.engine, asked, Rules(house.wheels, tries_max=3))
    seal_all(house.engine)
    counting.count(house.engine)


def test_it_shows_the_draws_beside_their_odds(house: processes.House, val: Visitor) -> None:
    assert "none on record" in val.get("/conformity").text
    assert "No draw of this campaign is sealed and counted" in val.get("/conformity/default").text
    draw(house, [f"k{number}" for number in range(60)])
    shown = val.get("/conformity/default").text
    for it in ("The 60 pulls are as the odds say", "Wins by hour", "Tickets in 100 bins", "60 tickets", "The luckiest"):
        assert it in shown, it
    told = val.get("/conformity/default/report.json").json()
    assert told["conforms"]
    (version,) = told["versions"]
    assert version["pulls"] == 60
    assert len(version["tickets"]["bins"]) == 100
    assert [it["code"] for it in version["prizes"]] == ["5.00", "0.00"]
    assert "No draw of this campaign" in val.get("/conformity/default?until=2020-01-01").text
    assert 'value="2020-01-01"' in val.get("/conformity/default?until=2020-01-01").text
    assert val.get("/conformity/default/report.json?since=2020-01-01").json()["since"] == "2020-01-01T00:00:00Z"


def test_it_says_what_deviates(house: processes.House, val: Visitor) -> None:
    wheel, keys = house.wheels["default"], [f"k{number}" for number in range(200)]
    (id,) = house.accounts(1)
    tries.settle(
        house.engine,
        [DrawRequest(account_id=id, request_key=key) for key in keys if wheel.draw(id, key).amount][:40],
        Rules(house.wheels, tries_max=3),
    )
    seal_all(house.engine)
    counting.count(house.engine)
    shown = val.get("/conformity/default").text
    assert 'class="alert alert-danger"' in shown
    assert f"account {id}: 40 of 40 pulls" in shown
    nightly.record(house.engine, [reading.report_on(house.engine, "default")], by="tombola.conformity")
    listed = val.get("/conformity").text
    assert "deviates" in listed
    assert "alert-danger" in listed


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/conformity/summer", 404),
        ("/conformity/default?since=tomorrow", 400),
        ("/conformity/default?until=2026-13-01", 400),
        ("/conformity/default/report.json?since=<script>", 400),
    ],
)
def test_what_is_not_there(val: Visitor, address: str, status: int) -> None:
    answer = val.get(address)
    assert answer.status_code == status
    assert "<script>alert" not in answer.text
