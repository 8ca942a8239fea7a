"""The demo page keeps the signed receipts that the gateway sends beside its answers, and hands them out as files."""

from __future__ import annotations

import base64
import json
import urllib.request
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
from tombola.producers.domain.receipt_keys import SigningKey, read_jwk_set
from tombola.producers.domain.receipts import Receipt, SettledReceipt, verify

pytestmark = [pytest.mark.process, pytest.mark.timeout(servers.INSTALL_TIMEOUT_S + 180)]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One whose gateway signs receipts."""
    key = SigningKey.make().text
    with deployed(tmp_path_factory.mktemp("receipts"), TOMBOLA_RECEIPT_KEY=key) as deployment:
        yield deployment


@pytest.fixture
def tab(browsing: Browsing) -> Tab:  # noqa: F811
    return browsing.tab()


def verified(deployment: Deployment, receipts: list[str]) -> list[Receipt]:
    """What these receipts say, which the gateway's published keys verify."""
    with urllib.request.urlopen(f"{deployment.gateway.url}.well-known/tombola-keys.json", timeout=10) as answer:
        keys = read_jwk_set(answer.read())
    return [verify(it, keys) for it in receipts]


def unsigned(session: str) -> str:
    """Text of the form of a receipt: the page verifies nothing."""
    said = json.dumps({"receipt": "accepted", "v": 1, "lottery_session_id": session}).encode()
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
    ((key, body),) = set(tab.posts)
    both = kept(tab)[key]
    accepted, settled = verified(deployment, both)
    assert (type(accepted), type(settled)) == (Receipt, SettledReceipt)
    for it in (accepted, settled):
        assert (it.request_key, it.account_id) == (key, tab.account)
        assert it.client_nonce == json.loads(body)["client_nonce"]
    tab.page.reload()
    assert kept(tab) == {key: both}
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
        (promise,) = kept(tab)[key]
        assert [type(it) for it in verified(deployment, [promise])] == [Receipt]
        tab.page.reload()
        tab.says("Accepted")
        assert kept(tab) == {key: [promise]}
        assert file_behind(tab, tab.page.locator("#receipts a")) == ("receipts.jws", f"{promise}\n")
    tab.finished()
    assert kept(tab)[key][0] == promise
    assert [type(it) for it in verified(deployment, kept(tab)[key])] == [Receipt, SettledReceipt]


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
    sent = [unsigned(f"session-{number}") for number in range(205)]
    assert tab.page.evaluate(script, sent) == sent[:4:-1]


def test_without_receipts_there_is_nothing_to_save(browsing: Browsing) -> None:  # noqa: F811
    def without(route: Route) -> None:
        answer = route.fetch()
        headers = {name: value for name, value in answer.headers.items() if name != "tombola-receipt"}
        route.fulfill(response=answer, headers=headers)

    browsing.context.route("**/v1/draws**", without)
    tab = browsing.tab()
    tab.click()
    tab.finished()
    assert kept(tab) == {}
    expect(tab.page.locator(".receipt")).to_have_count(0)
