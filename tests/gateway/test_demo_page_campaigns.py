"""The demo page with campaigns: odds before payment, a button for each price, ten pulls at one price."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Route, expect

from tests import servers
from tests.gateway.campaigns import BY, GARDEN, published
from tests.gateway.test_demo_page import (
    Browsing,
    Deployment,
    Tab,
    browser,  # noqa: F401
    browsing,  # noqa: F401
    deployed,
)
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN
from tombola.producers.storage.campaigns import CampaignState
from tombola.worker.campaigns import versions

pytestmark = [pytest.mark.process, pytest.mark.timeout(servers.INSTALL_TIMEOUT_S + 180)]

OPEN, PAUSED = CampaignState.OPEN, CampaignState.PAUSED


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Of its own: tests.books knows the rows of the built-in campaign alone."""
    with deployed(tmp_path_factory.mktemp("campaigns")) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def garden(deployment: Deployment) -> Odds:
    return published(deployment.house.engine, GARDEN, OPEN)


@pytest.fixture
def tab(garden: Odds, browsing: Browsing) -> Tab:  # noqa: F811
    """A tab that shows the garden, and an account that can pay for it."""
    tab = browsing.tab()
    choose(tab, "garden")
    return tab


def choose(tab: Tab, name: str) -> None:
    """Choose a campaign, which the gateway may have heard of only just now; its odds are shown then."""
    option = tab.page.locator(f"#campaign option[value='{name}']")
    for _ in range(10):
        if option.count():
            break
        tab.page.wait_for_timeout(1_000)
        tab.page.reload()
        tab.page.get_by_label("Account").fill(str(tab.account))
    tab.page.get_by_label("Campaign").select_option(name)
    expect(tab.page.locator("#odds")).to_contain_text("A phone")


def button(tab: Tab, name: str) -> None:
    tab.page.get_by_role("button", name=name).click()


def under_the_pointer(tab: Tab) -> str:
    """The class of the segment at the top of the wheel."""
    found: str = tab.page.evaluate(
        """() => {
            const { x, y, width, height } = document.querySelector('.wheel').getBoundingClientRect();
            const top = document.elementFromPoint(x + width / 2, y + height * 0.25);
            return top.closest('g[class]').getAttribute('class');
        }"""
    )
    return found


# ---- before payment --------------------------------------------------------------------------------------------------


def test_a_player_sees_the_odds_before_paying(tab: Tab, garden: Odds) -> None:
    rows = tab.page.locator("#odds table tbody tr")
    expect(rows).to_have_count(3)
    texts = [re.sub(r"\s+", " ", text) for text in rows.all_inner_texts()]
    assert texts[0].startswith("A phone Limited: while stock lasts; 1 per account; then 5.00 POINT 0.01 % 1/10000 0.0")
    assert texts[1].startswith("5.00 POINT 29.99 % 2999/10000 30.")
    assert texts[2].startswith("No prize 70 % 7/10 69.")
    expect(tab.page.locator("#odds thead th")).to_have_text(["Prize", "Chance", "With guarantees"])
    odds = tab.page.locator("#odds")
    expect(odds).to_contain_text("One of A phone, 5.00 POINT at the latest at every 10th pull.")
    expect(odds).to_contain_text("At most 1000 pulls a day (Asia/Shanghai).")
    link = odds.get_by_role("link", name=garden.odds_hash)
    answer = tab.page.request.get(f"{tab.page.url.rstrip('/')}{link.get_attribute('href')}")
    assert answer.body() == garden.canonical
    names = tab.page.locator("#buttons button").all_inner_texts()
    assert names == ["Draw for 10 POINT", "10 pulls for 90 POINT"]
    assert tab.posts == []


def test_the_wheel_has_a_segment_for_each_prize_also_a_tiny_one(tab: Tab) -> None:
    wheel = tab.page.get_by_role("img", name=re.compile("Wheel: A phone 0.01 %, 5.00 POINT 29.99 %, No prize 70 %"))
    expect(wheel).to_be_visible()
    assert tab.page.evaluate("() => [...document.querySelectorAll('#wheel > g')].map((it) => it.classList[0])") == [
        *("prize", "prize", "blank")
    ]
    width = tab.page.evaluate("() => document.querySelector('#wheel path').getBoundingClientRect().width")
    assert width > 3, "the sliver of 1 in 10,000 can be seen"
    expect(tab.page.locator("#wheel text")).to_have_text(["5"])


def test_the_built_in_campaign_is_there_as_before(browsing: Browsing) -> None:  # noqa: F811
    page = browsing.tab().page
    expect(page.locator("#wheel > g")).to_have_count(2)
    expect(page.locator("#odds")).to_contain_text(DEFAULT_CAMPAIGN.odds_hash)
    assert page.locator("#buttons button").all_inner_texts() == ["Draw for 1 POINT"]
    expect(page.get_by_role("img", name="Wheel: 5.00 POINT 30 %, No prize 70 %")).to_be_visible()


def test_the_choice_is_remembered(tab: Tab) -> None:
    tab.page.reload()
    expect(tab.page.get_by_label("Campaign")).to_have_value("garden")
    expect(tab.page.locator("#odds")).to_contain_text("A phone")
    choose_default = tab.page.get_by_label("Campaign")
    choose_default.select_option("default")
    expect(tab.page.locator("#buttons button")).to_have_text(["Draw for 1 POINT"])
    tab.page.reload()
    expect(choose_default).to_have_value("default")


def test_a_reader_of_the_page_finds_no_fault(tab: Tab) -> None:
    button(tab, "10 pulls for 90 POINT")
    finished(tab)
    found = Axe().run(tab.page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("width", [320, 1200])
def test_nothing_is_wider_than_the_screen(browsing: Browsing, garden: Odds, width: int) -> None:  # noqa: F811
    tab = browsing.tab(width=width)
    choose(tab, "garden")
    button(tab, "10 pulls for 90 POINT")
    finished(tab)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


# ---- drawing ---------------------------------------------------------------------------------------------------------


def finished(tab: Tab, count: int = 1) -> None:
    """Wait until `count` draws are listed, and none is under way."""
    expect(tab.page.locator("#draws li")).to_have_count(count)
    expect(tab.page.locator("#draw")).to_have_attribute("aria-disabled", "false")
    tab.forgotten()


def test_ten_pulls_are_one_charge_and_ten_cards(deployment: Deployment, tab: Tab) -> None:
    tab.page.emulate_media(reduced_motion="no-preference")
    button(tab, "10 pulls for 90 POINT")
    finished(tab)
    (posted,) = tab.posts
    body = json.loads(posted[1])
    assert len(body.pop("client_nonce")) == 32
    assert body == {"account_id": tab.account, "campaign": "garden", "pulls": 10}
    assert deployment.charges(tab.account) == [posted[0]]

    cards = tab.page.locator("#pulls li")
    expect(cards).to_have_count(10)
    result = tab.page.request.get(f"{tab.page.url}v1/draws/{posted[0]}").json()
    names = {"phone": "A phone", "five": "5.00 POINT", "nothing": "No prize"}
    assert cards.all_inner_texts() == [names[it["code"]] for it in result["prizes"]]
    won = sum(bool(it["grants"]) for it in result["prizes"])
    assert won >= 1, "the guarantee"
    tab.told(f"Won in {won} of 10 pulls")
    expect(tab.page.locator("#draws li")).to_contain_text(f"won in {won} of 10 pulls")
    expect(tab.page.locator("#draws li")).to_contain_text("garden")
    expect(tab.page.get_by_label("Balance")).to_have_text(f"{deployment.balance(tab.account)} POINT")
    assert under_the_pointer(tab).startswith("prize")  # on the rarest of the ten


def test_a_single_pull_comes_to_rest_on_its_prize(deployment: Deployment, tab: Tab) -> None:
    for count in (1, 2, 3):
        button(tab, "Draw for 10 POINT")
        finished(tab, count)
        outcome = tab.page.locator("#outcome").inner_text()
        assert under_the_pointer(tab).startswith("prize" if "Won" in outcome else "blank")
        expect(tab.page.locator("#pulls li")).to_have_count(0)
    assert len(deployment.charges(tab.account)) == 3


def test_a_reload_in_mid_draw_finishes_the_same_ten_pulls(deployment: Deployment, tab: Tab) -> None:
    with deployment.worker_paused():
        button(tab, "10 pulls for 90 POINT")
        tab.says("Accepted")
        # Whatever the page shows meanwhile: the wheel of the draw is there when its result comes.
        tab.page.get_by_label("Campaign").select_option("default")
        expect(tab.page.locator("#buttons button")).to_have_count(1)
        tab.page.reload()
        tab.says("Accepted")
    finished(tab)
    expect(tab.page.locator("#pulls li")).to_have_count(10)
    expect(tab.page.locator("#wheel > g")).to_have_count(3)
    assert len(set(tab.posts)) == 1
    assert deployment.charges(tab.account) == list(tab.keys)


def test_a_paused_campaign_says_so_and_takes_nothing(deployment: Deployment, browsing: Browsing) -> None:  # noqa: F811
    published(deployment.house.engine, GARDEN.replace('"garden"', '"pausing"'), OPEN)
    tab = browsing.tab()
    choose(tab, "pausing")
    versions.move(deployment.house.engine, "pausing", PAUSED, **BY)
    tab.page.wait_for_timeout(3_000)  # the gateway looks every second or two
    button(tab, "Draw for 10 POINT")
    tab.told("did not accept this draw")
    tab.says("Campaign pausing is paused")
    assert tab.kept() == {}, "a player who comes back later has not asked again"
    expect(tab.page.locator("#odds")).to_contain_text("This campaign is paused.")
    expect(tab.page.locator("#campaign option[value='pausing']")).to_have_text("Winter garden (paused)")
    assert deployment.charges(tab.account) == []


def test_nobody_pays_for_odds_that_are_not_shown(deployment: Deployment, browsing: Browsing) -> None:  # noqa: F811
    text = GARDEN.replace('"garden"', '"changing"')
    published(deployment.house.engine, text, OPEN)
    tab = browsing.tab()
    choose(tab, "changing")
    published(deployment.house.engine, text.replace('1 = "10.00"', '1 = "20.00"'))
    tab.page.wait_for_timeout(3_000)
    button(tab, "Draw for 10 POINT")
    tab.told("The odds have changed")
    tab.says("Nothing was sent")
    assert tab.posts == []
    button(tab, "Draw for 20 POINT")
    finished(tab)
    assert len(deployment.charges(tab.account)) == 1


def test_the_built_in_campaign_is_shown_until_others_can_be(browsing: Browsing, garden: Odds) -> None:  # noqa: F811
    """The gateway is away when the page asks for campaigns, and comes back."""
    failures: list[str] = []

    def fail(route: Route) -> None:
        failures.append(route.request.url)
        route.abort("connectionrefused")

    browsing.context.route("**/v1/campaigns", fail, times=2)
    tab = browsing.tab()
    expect(tab.page.locator("#campaign option")).not_to_have_count(0)
    assert len(failures) == 2
    expect(tab.page.locator("#odds")).to_contain_text(DEFAULT_CAMPAIGN.odds_hash)
