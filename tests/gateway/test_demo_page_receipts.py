"""The demo page keeps the signed receipts that the gateway sends beside its answers, and hands them out as files."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Route, expect

from tests import servers
from tests.gateway.test_demo_page import (
    Browsing,
    Deployment,
    Tab,
    assert_one_charge,
    browser,  # noqa: F401
    browsing,  # noqa: F401
    deployed,
)

pytestmark = [pytest.mark.process, pytest.mark.timeout(servers.INSTALL_TIMEOUT_S + 180)]

DRAWS = "**/v1/draws**"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("receipts")) as deployment:
        yield deployment


@pytest.fixture
def tab(browsing: Browsing) -> Tab:  # noqa: F811
    """A tab whose gateway sends receipts."""
    browsing.context.route(DRAWS, _with_receipt)
    return browsing.tab()


def _with_receipt(route: Route) -> None:
    answer = route.fetch()
    if not answer.ok:
        route.fulfill(response=answer)
        return
    kind = "settled" if answer.status == 200 else "accepted"
    headers = answer.headers | {"Tombola-Receipt": receipt(kind, answer.json()["lottery_session_id"])}
    route.fulfill(response=answer, headers=headers)


def receipt(kind: str, session: str) -> str:
    """Text of the form of a receipt: the page verifies nothing."""
    said = json.dumps({"receipt": kind, "v": 1, "lottery_session_id": session}).encode()
    parts = (b'{"alg":"EdDSA","typ":"tombola-receipt+jws"}', said, b"\xfb\xff" * 32)
    return ".".join(base64.urlsafe_b64encode(it).decode().rstrip("=") for it in parts)


def file_behind(tab: Tab, link: Locator) -> tuple[str, str]:
    """The name and the text of the file that a link saves."""
    with tab.page.expect_download() as saved:
        link.click()
    return saved.value.suggested_filename, saved.value.path().read_text()


def kept(tab: Tab) -> dict[str, list[str]]:
    """The receipts in this browser, by lottery session."""
    script = """() => Object.fromEntries(Object.entries(localStorage)
        .filter(([name]) => name.startsWith('tombola.receipts.'))
        .map(([name, text]) => [name.slice('tombola.receipts.'.length), JSON.parse(text).receipts]))"""
    found: dict[str, list[str]] = tab.page.evaluate(script)
    return found


def test_the_receipts_of_a_draw_are_kept_with_it(deployment: Deployment, tab: Tab) -> None:
    tab.click()
    tab.finished()
    assert_one_charge(deployment, tab)
    (key,) = tab.keys
    both = [receipt("accepted", key), receipt("settled", key)]
    assert kept(tab) == {key: both}
    tab.page.reload()
    links = tab.page.locator("#draws li .receipt")
    expect(links).to_have_text(["receipt: accepted", "receipt: settled"])
    assert [file_behind(tab, it) for it in links.all()] == [
        (f"{key}.accepted.jws", f"{both[0]}\n"),
        (f"{key}.settled.jws", f"{both[1]}\n"),
    ]
    every = tab.page.locator("#receipts a")
    expect(every).to_have_text("All signed receipts in this browser: 2")
    assert file_behind(tab, every) == ("receipts.jws", "".join(f"{it}\n" for it in both))


def test_a_promise_is_kept_before_the_result_comes(deployment: Deployment, tab: Tab) -> None:
    """Where the result never comes, this receipt is what the player has; a retry brings the same one."""
    with deployment.worker_paused():
        tab.click()
        tab.says("Accepted")
        (key,) = tab.keys
        assert kept(tab) == {key: [receipt("accepted", key)]}
        tab.page.reload()
        tab.says("Accepted")
        assert kept(tab) == {key: [receipt("accepted", key)]}
        every = tab.page.locator("#receipts a")
        assert file_behind(tab, every) == ("receipts.jws", f"{receipt('accepted', key)}\n")
    tab.finished()
    assert kept(tab) == {key: [receipt("accepted", key), receipt("settled", key)]}


def test_a_receipt_that_cannot_be_kept_does_not_stop_the_draw(
    deployment: Deployment,
    browsing: Browsing,  # noqa: F811
    tab: Tab,
) -> None:
    full = """() => {
        const keep = Storage.prototype.setItem;
        Storage.prototype.setItem = function (name, value) {
            if (name.startsWith('tombola.receipts.')) throw new Error('the storage is full');
            keep.call(this, name, value);
        };
    }"""
    tab.page.evaluate(full)
    tab.click()
    tab.finished()
    assert_one_charge(deployment, tab)
    assert kept(tab) == {}
    assert browsing.wrong
    assert all("the storage is full" in it for it in browsing.wrong)
    browsing.wrong.clear()


@pytest.mark.parametrize("text", ["", "x", "a.b.c", "eyJ9.bnVsbA.x", "a.eyJsb3R0ZXJ5X3Nlc3Npb25faWQiOjd9.c"])
def test_text_that_is_no_receipt_is_not_kept(browsing: Browsing, text: str) -> None:  # noqa: F811
    tab = browsing.tab()
    tab.page.evaluate("async (text) => (await import('/page/receipts.js')).keepReceipt(text)", text)
    assert kept(tab) == {}


def test_the_oldest_receipts_make_room(browsing: Browsing) -> None:  # noqa: F811
    tab = browsing.tab()
    script = """async (receipts) => {
        const { allReceipts, keepReceipt } = await import('/page/receipts.js');
        let now = 1;
        Date.now = () => now++;
        receipts.forEach((it) => keepReceipt(it));
        return allReceipts();
    }"""
    sent = [receipt("accepted", f"session-{number}") for number in range(205)]
    assert tab.page.evaluate(script, sent) == sent[:4:-1]


def test_without_receipts_there_is_nothing_to_download(browsing: Browsing) -> None:  # noqa: F811
    tab = browsing.tab()
    tab.click()
    tab.finished()
    assert kept(tab) == {}
    expect(tab.page.locator(".receipt")).to_have_count(0)
