"""The pages of campaigns over HTTP, on both databases: what is shown, what operators do, and what viewers cannot."""

from __future__ import annotations

import html
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, insert

from tests import servers
from tests.consoles import PASSWORD, Console, Visitor
from tests.domain.test_manifest import WINTER
from tests.ledgers import migrated
from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.record import DrawNotes
from tombola.producers.settings import Settings
from tombola.producers.storage.campaigns import CampaignState
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import asset_transactions
from tombola.worker.campaigns import codes, history, lists, stock, versions
from tombola.worker.console import simulations
from tombola.worker.ledger.accounts import open_account
from tombola.worker.operators import actions
from tombola.worker.operators import users as operators

pytestmark = pytest.mark.slow

OPERATOR, VIEWER = "ann", "val"
ODDS = manifest.parse(WINTER)
RICHER_TEXT = WINTER.replace("weight = 7000", "weight = 6000")
RICHER = manifest.parse(RICHER_TEXT)
XSS = "<script>alert(1)</script><img src=x onerror=alert(2)>"
BY = {"operator": "root", "reason": "for Monday"}
PAGE = f"/campaigns/{ODDS.name}"


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = open_engine(database_url)
    migrated(made)
    operators.add(made, OPERATOR, "operator", PASSWORD, by="root")
    operators.add(made, VIEWER, "viewer", PASSWORD, by="root")
    yield made
    made.dispose()


@pytest.fixture
def winter(engine: Engine) -> None:
    versions.publish(engine, ODDS, bounds=versions.Bounds(), **BY)


@pytest.fixture
def console(engine: Engine, database_url: str) -> Iterator[Console]:
    env = {"TOMBOLA_DATABASE_URL": database_url, "TOMBOLA_BROKER_URL": f"redis://{servers.HOST}:1/0"}
    with Console(Settings.from_env(env)) as console:
        yield console


@contextmanager
def visit(console: Console, name: str) -> Iterator[Visitor]:
    with Visitor(console.url) as visitor:
        assert visitor.log_in(name).status_code == 303
        yield visitor


@pytest.fixture
def ann(console: Console) -> Iterator[Visitor]:
    with visit(console, OPERATOR) as visitor:
        yield visitor


@pytest.fixture
def val(console: Console) -> Iterator[Visitor]:
    with visit(console, VIEWER) as visitor:
        yield visitor


def state(engine: Engine, name: str = ODDS.name) -> CampaignState:
    with engine.connect().execution_options(read_only=True) as connection:
        return history.standing(connection, name).state


def recorded(engine: Engine) -> list[tuple[str, str, str]]:
    with engine.connect().execution_options(read_only=True) as connection:
        found = actions.recent(connection, rows_max=100)
    return [(it.operator, it.action, it.reason) for it in reversed(found) if it.action.startswith("campaign")]


def said(visitor: Visitor, path: str) -> str:
    """The text of a page, after the redirect that a form answers with."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", visitor.get(path).text)).split())


def body(page: str) -> str:
    """What follows a page's header."""
    _, found, rest = page.partition('<div class="page-body')
    assert found
    return rest


def submit(visitor: Visitor, path: str, **form: Any) -> str:
    """Send a form and return the text of the page that answers, redirects followed."""
    answer = visitor.submit(path, form)
    while answer.status_code == 303:
        answer = visitor.get(answer.headers["location"])
    assert answer.status_code == 200, answer.text
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", answer.text)).split())


# ---- looking ---------------------------------------------------------------------------------------------------------


def test_without_campaigns_there_is_the_built_in_one(val: Visitor) -> None:
    shown = said(val, "/campaigns")
    assert "No campaigns beside the built-in one." in shown
    assert "default is built in" in shown
    assert val.get("/campaigns/default").status_code == 404


@pytest.mark.usefixtures("winter")
def test_the_list_says_state_version_window_and_price(val: Visitor) -> None:
    shown = said(val, "/campaigns")
    for words in ("winter-2026 draft 1", "from 2026-11-30 16:00:00", "until 2026-12-31 16:00:00", "1 for 10.00"):
        assert words in shown
    assert f'href="{PAGE}"' in val.get("/campaigns").text


@pytest.mark.usefixtures("winter")
def test_a_campaign_shows_its_odds_figures_terms_and_record(val: Visitor, engine: Engine) -> None:
    lists.put_on(engine, "blacklist-1", [3, 1], **BY)
    codes.load(engine, ODDS.name, "coupon", {"SECRET-1": 1, "SECRET-2": 2}, **BY)
    shown = said(val, PAGE)
    for words in (
        "1/10000",  # exact
        "0.0100%",
        "Guarantee ssr at the latest every 90 pulls, likelier from 75 on",
        "3 of 3 units left",
        "2 of 2 codes left",
        "blacklist-1 2 accounts",
        "of one account; days begin in Asia/Shanghai",
        "Stock is worth 11,997.00 POINT",
        ODDS.odds_hash,
        "codes load by root",
        "2 codes",
    ):
        assert words in shown, words
    assert "SECRET" not in val.get(PAGE).text


@pytest.mark.usefixtures("winter")
def test_live_figures_are_those_of_the_ledger(val: Visitor, engine: Engine) -> None:
    open_account(engine, user_id=1)
    with engine.begin() as connection:
        for number, prizes in enumerate((("five",), ("nothing",) * 10)):
            text = DrawNotes(ODDS.odds_hash, "0123456789abcdef", prizes).written()
            row = {"account_id": 1, "business_id": "x", "lottery_session_id": "x", "notes": text, "asset_code": "POINT"}
            amounts = {"delta_amount": -10, "balance_before": 10, "balance_after": 0}
            times = {"created_at": utc_now(), "updated_at": utc_now()}
            key = {"idempotency_key": f"key_{number}:consume", "business_type": "lottery_consume"}
            connection.execute(insert(asset_transactions).values(**row, **amounts, **times, **key))
    live = val.get(f"{PAGE}/live.json").json()
    assert live["figures"]["pulls"] == "11"
    assert live["figures"]["won nothing"] == "10"
    assert live["figures"]["share five"] == "9.0909%"
    assert live["figures"]["return"] == "5.0000%"  # 5 of 10 and 90
    assert live["figures"]["left phone"] == "3"
    assert live["bars"]["left phone"] == 100
    assert "the last 2 ledger rows at most" in said(val, PAGE)
    assert val.get("/campaigns/other/live.json").status_code == 404


@pytest.mark.usefixtures("winter")
def test_any_two_versions_stand_side_by_side(val: Visitor, engine: Engine) -> None:
    for text in (RICHER_TEXT, WINTER.replace("hard_at = 90", "hard_at = 80")):
        versions.publish(engine, manifest.parse(text), bounds=versions.Bounds(), **BY)
    newest = said(val, f"{PAGE}/versions")
    assert "guarantee ssr, hard_at: 90 -> 80" in newest
    first = said(val, f"{PAGE}/versions?a=1&b=2")
    assert "prize nothing, chance: " in first
    assert "hard_at: " not in first
    for odds in (ODDS, RICHER):
        assert odds.canonical.decode() in first
        assert odds.odds_hash in first
    assert "Nothing." in said(val, f"{PAGE}/versions?a=2&b=2")
    assert val.get(f"{PAGE}/versions?a=9").status_code == 404
    assert val.get(f"{PAGE}/versions?a=x").status_code == 400
    assert val.get("/campaigns/other/versions").status_code == 404


@pytest.mark.parametrize("name", ["other", "é", "%F0%9F%8E%B0", "%00", "x" * 3000, "default", "'; DROP TABLE"])
def test_a_campaign_that_is_not_there_is_not_found(ann: Visitor, name: str) -> None:
    for path in (f"/campaigns/{name}", f"/campaigns/{name}/live.json", f"/campaigns/{name}/versions"):
        assert ann.get(path).status_code == 404, path
    assert ann.get(f"/campaigns/new?from={name}").status_code == 404
    for act in ("open", "pause"):
        assert ann.submit(f"/campaigns/{name}/{act}", {"reason": "x"}).status_code == 404, act


# ---- acting ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("winter")
def test_open_pause_open_and_close(ann: Visitor, engine: Engine) -> None:
    for act, expected in (("open", "open"), ("pause", "paused"), ("open", "open")):
        assert f"winter-2026 is {expected}." in submit(ann, f"{PAGE}/{act}", reason=f"to {act}")
        assert state(engine) == expected
    assert "Not closed" in submit(ann, f"{PAGE}/close", reason="over")
    assert state(engine) == CampaignState.OPEN
    assert "winter-2026 is closed." in submit(ann, f"{PAGE}/close", reason="over", sure="yes")
    assert "cannot become open" in submit(ann, f"{PAGE}/open", reason="again")
    assert recorded(engine)[1:] == [
        ("ann", "campaign open", "to open"),
        ("ann", "campaign pause", "to pause"),
        ("ann", "campaign open", "to open"),
        ("ann", "campaign close", "over"),
    ]


@pytest.mark.usefixtures("winter")
def test_the_first_form_of_an_open_campaign_pauses_it(ann: Visitor, engine: Engine) -> None:
    """At 3 a.m. it is to be found at once: nothing to unfold, nothing above it."""
    versions.move(engine, ODDS.name, CampaignState.OPEN, **BY)
    page = body(ann.get(PAGE).text)
    first = page.index("<form")
    assert f'action="{PAGE}/pause"' in page[first : first + 200]
    assert "<details" not in page[:first]


@pytest.mark.usefixtures("winter")
def test_without_a_reason_nothing_is_done(ann: Visitor, engine: Engine) -> None:
    for act in ("open", "close", "restock"):
        assert "say why" in submit(ann, f"{PAGE}/{act}", reason=" ", sure="yes", prize="phone", units="1")
    assert state(engine) == CampaignState.DRAFT


@pytest.mark.usefixtures("winter")
def test_restock(ann: Visitor, engine: Engine) -> None:
    assert "phone: 5 units left." in submit(ann, f"{PAGE}/restock", prize="phone", units="2", reason="found two")
    assert "phone: 4 units left." in submit(ann, f"{PAGE}/restock", prize="phone", units="-1", reason="broken")
    for form, words in [
        ({"prize": "phone", "units": "-9"}, "are too many"),
        ({"prize": "phone", "units": ""}, "not 0"),
        ({"prize": "five", "units": "1"}, "no prize 'five' with stock"),
        ({"prize": "coupon", "units": "1"}, "hands out codes"),
    ]:
        assert words in submit(ann, f"{PAGE}/restock", reason="x", **form)
    assert ann.submit(f"{PAGE}/restock", {"prize": "phone", "units": "two", "reason": "x"}).status_code == 400
    with engine.connect().execution_options(read_only=True) as connection:
        assert stock.left(connection, ODDS.name) == {"phone": 4}


@pytest.mark.usefixtures("winter")
def test_a_viewer_sees_all_of_it_and_does_none_of_it(val: Visitor, engine: Engine) -> None:
    for path in ("/campaigns", PAGE, f"{PAGE}/versions", "/campaigns/new", f"/campaigns/new?from={ODDS.name}"):
        page = val.get(path)
        assert page.status_code == 200, path
        forms = re.findall(r"<form[^>]*>", body(page.text))
        assert not [it for it in forms if 'method="post"' in it], path
    for act in ("open", "pause", "close", "restock"):
        answer = val.submit(f"{PAGE}/{act}", {"reason": "I may not", "sure": "yes", "prize": "phone", "units": "1"})
        assert answer.status_code == 403, act
    for step in ("check", "simulate", "publish", "confirm"):
        form = {"manifest": RICHER_TEXT, "step": step, "reason": "I may not", "odds_hash": RICHER.odds_hash}
        assert val.submit("/campaigns/new", {**form, "live_hash": ODDS.odds_hash}).status_code == 403, step
    assert [action for _, action, _ in recorded(engine)] == ["campaign publish"]
    assert state(engine) == CampaignState.DRAFT


@pytest.mark.usefixtures("winter")
def test_forged_forms_are_refused(ann: Visitor, engine: Engine) -> None:
    for path in (f"{PAGE}/open", f"{PAGE}/restock", "/campaigns/new"):
        assert ann.post(path, data={"reason": "forged", "csrftoken": "0" * 64}).status_code == 403, path
        assert ann.get(path).status_code == (200 if path.endswith("new") else 405)
    assert state(engine) == CampaignState.DRAFT


# ---- the editor ------------------------------------------------------------------------------------------------------


def test_a_mistake_is_shown_with_its_line(ann: Visitor) -> None:
    text = WINTER.replace("weight = 999", "weight = -1")
    number = text.split("\n").index("weight = -1") + 1
    shown = submit(ann, "/campaigns/new", manifest=text.replace("\n", "\r\n"), step="check")
    assert f"line {number}: prize[2].weight: a weight is at least 1, not -1" in shown
    assert f"{number}: weight = -1" in shown
    assert 'name = "winter-2026"' in shown  # the text is still there


@pytest.mark.parametrize("text", ["", "é 🎰", "\x00", "[" * 5000, "name = 1", XSS, "a = 1\n" * 9999])
@pytest.mark.parametrize("step", ["check", "simulate", "publish", "confirm", "", "é"])
def test_what_is_no_manifest_is_a_mistake_at_every_step(ann: Visitor, text: str, step: str) -> None:
    answer = ann.submit("/campaigns/new", {"manifest": text, "step": step, "reason": "x"})
    assert answer.status_code == 200
    assert 'id="mistake"' in answer.text
    assert "<img src=x" not in answer.text


def test_check_says_what_it_comes_to(ann: Visitor) -> None:
    shown = submit(ann, "/campaigns/new", manifest=WINTER, step="check")
    for words in ("winter-2026: a manifest without mistakes", "1/10000", "20 losses in a row", ODDS.odds_hash):
        assert words in shown


def test_the_text_comes_back_as_it_was_written(ann: Visitor) -> None:
    text = "\n\n# first\n" + WINTER.replace('day = "Asia/Shanghai"', 'day = "Asia/Shanghai"  # <b>&amp;')
    page = ann.submit("/campaigns/new", {"manifest": text, "step": "check"}).text
    area = re.search(r"<textarea[^>]*>\n(.*?)</textarea>", page, re.DOTALL)
    assert area
    assert html.unescape(area[1]) == text


def test_a_simulation_is_run_and_shown(ann: Visitor) -> None:
    answer = ann.submit("/campaigns/new", {"manifest": WINTER, "step": "simulate", "draws": "1500", "pulls": "10"})
    assert answer.status_code == 303
    address = answer.headers["location"]
    job = address.partition("job=")[2]
    deadline = time.monotonic() + 60
    while "data-forecast" in (page := ann.get(address).text):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ann.get(f"/campaigns/new/simulation.json?job={job}").json() == {"done": 1500, "is_over": True}
    assert 'id="returns"' in page
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())
    assert "in 15,000 pulls" in text
    assert 'name = "winter-2026"' in text


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"draws": "1000000"}, "at most 200,000 pulls here, not 1,000,000"),
        ({"draws": "50000", "pulls": "10"}, "at most 200,000 pulls"),
        ({"draws": "10", "pulls": "3"}, "sells 1, 10 pulls at once, not 3"),
        ({"draws": "many"}, "draws: a whole number"),
        ({"draws": "0"}, "draws: at least 1"),
    ],
)
def test_a_simulation_is_bounded(ann: Visitor, form: dict[str, str], words: str) -> None:
    assert words in submit(ann, "/campaigns/new", manifest=WINTER, step="simulate", **form)


def test_a_simulation_that_is_not_kept_any_more(ann: Visitor) -> None:
    answer = ann.get("/campaigns/new?job=forgotten")
    assert answer.headers["location"] == "/campaigns/new"
    assert "not kept any more" in said(ann, "/campaigns/new")
    assert ann.get("/campaigns/new/simulation.json?job=forgotten").status_code == 404


def test_only_so_many_simulations_wait(ann: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations, "simulate", lambda *_a, **_o: time.sleep(1))
    found = [
        ann.submit("/campaigns/new", {"manifest": WINTER, "step": "simulate", "draws": "10"}).status_code
        for _ in range(simulations.KEPT_MAX)
    ]
    assert set(found) == {303}
    shown = submit(ann, "/campaigns/new", manifest=WINTER, step="simulate", draws="10")
    assert "too many simulations are under way" in shown


def confirmed(visitor: Visitor, text: str, **form: str) -> tuple[str, str]:
    """Ask to publish, then confirm what the page shows with `form`; the two pages' texts."""
    page = visitor.submit("/campaigns/new", {"manifest": text, "step": "publish"}).text
    hidden = dict(re.findall(r'name="(odds_hash|live_hash)" value="([^"]*)"', page))
    asked = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())
    return asked, submit(visitor, "/campaigns/new", manifest=text, step="confirm", **hidden, **form)


def test_publishing_shows_what_changes_and_asks(ann: Visitor, engine: Engine) -> None:
    asked, done = confirmed(ann, WINTER, reason="for Monday")
    assert "winter-2026 is new" in asked
    assert "Version 1 of winter-2026 is live." in done
    asked, done = confirmed(ann, RICHER_TEXT, reason="richer")
    assert "prize nothing, chance: " in asked
    assert "Version 2 of winter-2026 is live." in done
    assert recorded(engine) == [("ann", "campaign publish", "for Monday"), ("ann", "campaign publish", "richer")]


@pytest.mark.usefixtures("winter")
def test_the_live_version_needs_no_publishing(ann: Visitor) -> None:
    shown = ann.submit("/campaigns/new", {"manifest": WINTER, "step": "publish"}).text
    assert "The live version says the same." in shown
    assert 'value="confirm"' not in shown


def test_nothing_is_published_that_was_not_shown(ann: Visitor, engine: Engine) -> None:
    assert (
        "these are the changes now"
        in submit(
            ann, "/campaigns/new", manifest=WINTER, step="confirm", reason="unseen", odds_hash="", live_hash=""
        ).lower()
    )
    # Another operator publishes meanwhile: the differences that were shown are not those that would be.
    page = ann.submit("/campaigns/new", {"manifest": RICHER_TEXT, "step": "publish"}).text
    hidden = dict(re.findall(r'name="(odds_hash|live_hash)" value="([^"]*)"', page))
    versions.publish(engine, ODDS, bounds=versions.Bounds(), **BY)
    shown = submit(ann, "/campaigns/new", manifest=RICHER_TEXT, step="confirm", reason="x", **hidden)
    assert "another version has become live" in shown
    assert "prize nothing, chance: " in shown
    assert len(recorded(engine)) == 1


def test_publishing_is_refused_with_its_reason(ann: Visitor, engine: Engine) -> None:
    generous = WINTER.replace('amount = "5.00"', 'amount = "500.00"')
    for step in ("publish", "confirm"):
        shown = submit(ann, "/campaigns/new", manifest=generous, step=step, reason="x")
        assert "give back" in shown
        assert "Publish winter-2026?" not in shown
    _, done = confirmed(ann, WINTER, reason=" ")
    assert "say why" in done
    assert recorded(engine) == []
    versions.publish(engine, ODDS, bounds=versions.Bounds(), **BY)
    versions.move(engine, ODDS.name, CampaignState.CLOSED, **BY)
    assert "closed, for good" in confirmed(ann, RICHER_TEXT, reason="x")[1]


@pytest.mark.usefixtures("winter")
def test_a_new_version_begins_with_the_live_one(ann: Visitor) -> None:
    page = ann.get(f"/campaigns/new?from={ODDS.name}").text
    area = re.search(r"<textarea[^>]*>\n(.*?)</textarea>", page, re.DOTALL)
    assert area
    assert manifest.parse(html.unescape(area[1])) == ODDS
    example = re.search(r"<textarea[^>]*>\n(.*?)</textarea>", ann.get("/campaigns/new").text, re.DOTALL)
    assert example
    manifest.parse(html.unescape(example[1]))


@pytest.mark.usefixtures("winter")
def test_reasons_and_titles_are_shown_and_never_run(ann: Visitor) -> None:
    titled = WINTER.replace('asset = "POINT"', f'title = "{XSS}"\nasset = "POINT"', 1)
    asked, _ = confirmed(ann, titled, reason=XSS)
    assert "title: none -> " in asked
    ann.submit(f"{PAGE}/open", {"reason": XSS})
    for path in ("/campaigns", PAGE, f"{PAGE}/versions", f"/campaigns/new?from={ODDS.name}"):
        page = ann.get(path).text
        assert "<img src=x" not in page, path
        assert "&lt;script&gt;alert(1)" in page, path
