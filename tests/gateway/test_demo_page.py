"""The demo page, in a real browser against a real gateway and worker: whatever one does to it, one charge."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, Route, expect, sync_playwright
from sqlalchemy import select

from tests import forks, processes, servers
from tests.books import assert_books
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.operations.draw import CONSUME, REWARD
from tombola.producers.storage.schema import account_asset_balances, api_idempotency_requests, asset_transactions
from tombola.worker.ledger.accounts import open_account

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_PACKAGES = ("chromium",)
# A name that is not this machine's own: on plain http such a page gets no locks and no randomUUID.
PLAIN_HOST = "tombola.test"
CHROMIUM_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--host-resolver-rules=MAP {PLAIN_HOST} {servers.HOST}",
)
GATEWAY = (str(Path(sys.executable).with_name("tombola")), "gateway")
GATEWAY_TIMEOUT_S = 40.0
EXPECT_TIMEOUT_MS = 20_000
AWAY_MS = 2_000
BALANCE = Decimal("100.00")
POSTS = "**/v1/draws"
RESULTS = "**/v1/draws/*"

# What the browser itself says of a request that failed.
NETWORK_ERROR = "Failed to load resource"

# The first test may have to install Chromium.
pytestmark = [pytest.mark.process, pytest.mark.timeout(servers.INSTALL_TIMEOUT_S + 180)]


# Runs in every page before its own scripts: what it sent when, and all that it said.
WATCH = """{
    const send = window.fetch;
    const sent = window.sentAtMs = [];
    window.fetch = (url, init) => {
        const key = init?.headers?.['Idempotency-Key'];
        if (key) {
            sent.push(performance.now());
            // A draw that is sent without having been kept would be lost in a reload.
            const kept = localStorage.getItem('tombola.pending.' + key);
            if (kept !== init.body) console.error('sent, but not kept:', key);
        }
        return send(url, init);
    };
    const said = window.said = [];
    addEventListener('DOMContentLoaded', () => {
        const state = document.getElementById('state');
        const listen = () => said.push(state.textContent);
        listen();
        new MutationObserver(listen).observe(state, { childList: true, characterData: true, subtree: true });
    });
}"""


# ---- a deployment, for all tests here: each takes an account of its own ----------------------------------------------


@dataclass
class Gateway:
    """A gateway process with the page; it comes back at the same address."""

    env: dict[str, str]
    folder: Path
    port: int
    process: forks.Process | None = None

    @property
    def url(self) -> str:
        return f"http://{servers.HOST}:{self.port}/"

    def start(self) -> None:
        with (self.folder / "gateway.log").open("ab") as log:
            command = [*GATEWAY, "--host", servers.HOST, "--port", str(self.port)]
            self.process = forks.start(command, env=processes.environment(self.env), cwd=self.folder, log=log)
        processes.wait_for(self._answers, within_s=GATEWAY_TIMEOUT_S, what=self.log)

    def kill(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def log(self) -> str:
        return (self.folder / "gateway.log").read_text(errors="replace")[-4000:]

    def _answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise AssertionError(f"the gateway has ended:\n{self.log()}")
        with suppress(OSError), urllib.request.urlopen(f"{self.url}healthz", timeout=2) as answer:
            return bool(answer.status == 200)
        return False


@dataclass
class Deployment:
    """A gateway with the page, a worker, and the books."""

    house: processes.House
    worker: processes.Worker
    gateway: Gateway
    accounts: int = 0

    def account(self, balance: Decimal = BALANCE) -> int:
        self.accounts += 1
        return open_account(self.house.engine, user_id=self.accounts, balance=balance)

    def charges(self, account_id: int) -> list[str]:
        """The sessions that this account was charged for."""
        return self._rows(account_id, CONSUME)

    def prizes(self, account_id: int) -> list[str]:
        return self._rows(account_id, REWARD)

    def balance(self, account_id: int) -> str:
        table = account_asset_balances
        with self.house.engine.connect().execution_options(read_only=True) as connection:
            return f"{connection.execute(select(table.c.balance).where(table.c.id == account_id)).scalar_one():.2f}"

    @contextmanager
    def worker_paused(self) -> Iterator[None]:
        """Draws are accepted and stay so."""
        group = self.worker.process.pid
        try:
            os.killpg(group, signal.SIGSTOP)
            # SQLite has one writer at a time: a worker that is stopped in mid-write would stop the gateway too.
            while not self._writable():
                os.killpg(group, signal.SIGCONT)
                time.sleep(0.05)
                os.killpg(group, signal.SIGSTOP)
            yield
        finally:
            os.killpg(group, signal.SIGCONT)

    def _writable(self) -> bool:
        assert self.house.engine.url.database is not None
        with closing(sqlite3.connect(self.house.engine.url.database, timeout=0.2, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
            return True

    def _rows(self, account_id: int, business_type: str) -> list[str]:
        table = asset_transactions
        rows = select(table.c.lottery_session_id).where(
            table.c.account_id == account_id, table.c.business_type == business_type
        )
        with self.house.engine.connect().execution_options(read_only=True) as connection:
            return list(connection.execute(rows).scalars())


@contextmanager
def deployed(folder: Path, **env: str) -> Iterator[Deployment]:
    """A deployment whose audit finds nothing at its end; `env` is the gateway's."""
    with (
        servers.redis(private=True) as redis,
        processes.House(f"sqlite:///{folder}/ledger.db", redis.url, redis.url) as house,
        processes.worker(house.env) as worker,
    ):
        page_env = {"TOMBOLA_GATEWAY_AUTH": "none", "TOMBOLA_GATEWAY_PAGE": "true"}
        gateway = Gateway(house.env | page_env | env, folder, servers._free_port())
        gateway.start()
        try:
            yield Deployment(house, worker, gateway)
            assert house.violations() == []
        finally:
            gateway.kill()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("page")) as deployment:
        yield deployment
        assert_books(deployment.house.engine)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    binary = next(filter(None, map(shutil.which, CHROMIUM)), None) or servers._binary(CHROMIUM[0], CHROMIUM_PACKAGES)
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=binary, args=CHROMIUM_ARGUMENTS) as launched,
    ):
        yield launched


# ---- the page, as its user sees it -----------------------------------------------------------------------------------


@dataclass
class Tab:
    """One tab with the page, and what it sent."""

    page: Page
    account: int
    posts: list[tuple[str, str]] = field(default_factory=list)  # key and body

    def click(self) -> None:
        self.page.get_by_role("button", name="Draw for 1 POINT").click()

    @property
    def keys(self) -> set[str]:
        return {key for key, _ in self.posts}

    def says(self, text: str) -> None:
        """Wait until the line under the button says it, or find that it has, since the page was loaded."""
        self.page.wait_for_function("(text) => window.said.some((line) => line.includes(text))", arg=text)

    def told(self, text: str) -> None:
        expect(self.page.locator("#outcome")).to_contain_text(text)

    def finished(self, count: int = 1) -> list[str]:
        """Wait until `count` draws are listed and none is under way; the list, the last draw first."""
        items = self.page.locator("#draws li")
        expect(items).to_have_count(count)
        expect(self.page.locator("#draw")).to_have_attribute("aria-disabled", "false")
        expect(self.page.locator("#outcome")).to_contain_text(re.compile("Won|No prize|does not cover"))
        self.forgotten()
        return items.all_inner_texts()

    def kept(self) -> dict[str, str]:
        """The pending draws in this browser: body by key."""
        kept: dict[str, str] = self.page.evaluate(
            """() => Object.fromEntries(Object.entries(localStorage)
                .filter(([name]) => name.startsWith('tombola.pending.'))
                .map(([name, body]) => [name.slice('tombola.pending.'.length), body]))"""
        )
        return kept

    def forgotten(self) -> None:
        self.page.wait_for_function(
            "() => !Object.keys(localStorage).some((name) => name.startsWith('tombola.pending.'))"
        )


class Browsing:
    """One browser profile with any number of tabs; at its end, nothing may have gone wrong in any of them."""

    def __init__(self, browser: Browser, deployment: Deployment, account: int) -> None:
        self._deployment = deployment
        self._account = account
        self.wrong: list[str] = []
        self.context: BrowserContext = browser.new_context(reduced_motion="reduce")
        self.context.set_default_timeout(EXPECT_TIMEOUT_MS)
        self.context.add_init_script(WATCH)

    def tab(self, *, host: str = servers.HOST, account: int | None = None, width: int = 1000) -> Tab:
        page = self.context.new_page()
        page.set_viewport_size({"width": width, "height": 800})
        tab = Tab(page, self._account if account is None else account)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", lambda message: self._console(message.type, message.text))
        page.on("request", lambda request: self._request(tab, request))
        page.goto(f"http://{host}:{self._deployment.gateway.port}/")
        page.get_by_label("Account").fill(str(tab.account))
        return tab

    def _console(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and NETWORK_ERROR not in text:
            self.wrong.append(text)

    def _request(self, tab: Tab, request: Request) -> None:
        if urlsplit(request.url).port != self._deployment.gateway.port:
            self.wrong.append(f"a request to {request.url}")
        if request.method == "POST":
            tab.posts.append((request.headers["idempotency-key"], request.post_data or ""))


@pytest.fixture
def browsing(browser: Browser, deployment: Deployment) -> Iterator[Browsing]:
    browsing = Browsing(browser, deployment, deployment.account())
    expect.set_options(timeout=EXPECT_TIMEOUT_MS)
    yield browsing
    browsing.context.close()
    assert browsing.wrong == []


@pytest.fixture
def tab(browsing: Browsing) -> Tab:
    return browsing.tab()


def assert_one_charge(deployment: Deployment, tab: Tab) -> None:
    """One draw, however often it was sent: under one key, with one body, and charged once."""
    assert len(set(tab.posts)) == 1, tab.posts
    assert deployment.charges(tab.account) == list(tab.keys)


# ---- one draw --------------------------------------------------------------------------------------------------------


def test_one_click_is_one_draw(deployment: Deployment, tab: Tab) -> None:
    failed: list[str] = []
    tab.page.on("requestfailed", lambda request: failed.append(request.url))
    tab.page.on("response", lambda response: failed.append(response.url) if response.status >= 400 else None)
    balance = tab.page.get_by_label("Balance")
    expect(balance).to_have_text("100.00 POINT")
    expect(tab.page.locator("#none")).to_be_visible()
    tab.click()
    (listed,) = tab.finished()
    assert_one_charge(deployment, tab)
    won = bool(deployment.prizes(tab.account))
    tab.told("Won 5.00 POINT" if won else "No prize this time")
    expect(balance).to_have_text("104.00 POINT" if won else "99.00 POINT")
    assert listed.splitlines()[0] == ("won 5.00" if won else "no prize")
    assert next(iter(tab.keys)) in listed
    assert f"account {tab.account}" in listed
    assert len(tab.posts) == 1
    assert failed == []


def test_the_page_is_its_own_files(deployment: Deployment) -> None:
    with urllib.request.urlopen(deployment.gateway.url, timeout=10) as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        html = answer.read().decode()
    named = re.findall(r'(?:src|href)="([^"#]+)"', html)
    assert {"/page/draw.js", "/page/page.js", "/page/style.css"} <= set(named)
    for path in named:
        with urllib.request.urlopen(deployment.gateway.url.rstrip("/") + path, timeout=10) as answer:
            assert answer.read()


def test_the_wheel_turns_and_comes_to_rest_on_the_outcome(deployment: Deployment, browsing: Browsing) -> None:
    tab = browsing.tab()
    tab.page.emulate_media(reduced_motion="no-preference")
    turning = "() => document.getElementById('wheel').getAnimations().length > 0"
    under_the_pointer = """() => {
        const { x, y, width, height } = document.querySelector('.wheel').getBoundingClientRect();
        return document.elementFromPoint(x + width / 2, y + height * 0.25).closest('.prize') !== null;
    }"""
    for count in (1, 2):
        tab.click()
        tab.page.wait_for_function(turning)
        tab.finished(count)
        assert not tab.page.evaluate(turning)
        assert tab.page.evaluate(under_the_pointer) == ("Won" in tab.page.locator("#outcome").inner_text())
    assert len(deployment.charges(tab.account)) == 2


def test_the_account_is_asked_for_and_remembered(deployment: Deployment, browsing: Browsing, tab: Tab) -> None:
    other = deployment.account(Decimal("7.00"))
    account = tab.page.get_by_label("Account")
    account.fill(str(other))
    expect(tab.page.get_by_label("Balance")).to_have_text("7.00 POINT")
    account.fill("999999")
    expect(tab.page.get_by_label("Balance")).to_have_text("no such account")
    account.fill(str(other))
    tab.page.reload()
    expect(account).to_have_value(str(other))
    account.press("Enter")  # the keyboard will do
    tab.finished()
    assert len(deployment.charges(other)) == 1
    account.fill("0")
    tab.click()  # the browser says what is wrong with it
    assert len(tab.posts) == 1


def test_a_new_visitor_finds_account_6(browsing: Browsing, deployment: Deployment) -> None:
    page = browsing.context.new_page()
    page.goto(deployment.gateway.url)
    expect(page.get_by_label("Account")).to_have_value("6")


@pytest.mark.parametrize("width", [320, 360, 1200])
def test_nothing_is_wider_than_the_screen(deployment: Deployment, browsing: Browsing, width: int) -> None:
    tab = browsing.tab(width=width)
    tab.click()
    tab.finished()
    tab.page.get_by_label("Account").fill(str(deployment.account(Decimal(0))))
    tab.click()
    tab.finished(2)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


# ---- one charge ------------------------------------------------------------------------------------------------------


def test_a_double_click_is_one_charge(deployment: Deployment, tab: Tab) -> None:
    tab.page.locator("#draw").dblclick()
    tab.finished()
    assert_one_charge(deployment, tab)


def test_ten_fast_clicks_are_one_charge(deployment: Deployment, tab: Tab) -> None:
    button = tab.page.locator("#draw")
    with deployment.worker_paused():
        button.evaluate("(button) => { for (let click = 0; click < 5; click += 1) button.click(); }")
        tab.says("Accepted")
        button.evaluate("(button) => { for (let click = 0; click < 5; click += 1) button.click(); }")
        tab.page.get_by_label("Account").press("Enter")
    tab.finished()
    assert_one_charge(deployment, tab)
    assert len(tab.posts) == 1


def test_a_reload_in_mid_draw_finishes_the_same_draw(deployment: Deployment, tab: Tab) -> None:
    with deployment.worker_paused():
        tab.click()
        tab.says("Accepted")
        tab.page.reload()
        tab.says("Accepted")  # without a click
        tab.page.reload()
        tab.says("Accepted")
        assert tab.kept() == dict(tab.posts)
    tab.finished()
    assert len(tab.posts) == 3
    assert_one_charge(deployment, tab)
    tab.page.reload()
    expect(tab.page.locator("#outcome")).to_contain_text("Ready")
    assert len(tab.posts) == 3  # what was shown is not sent again


def test_a_reload_before_the_result_is_shown_shows_it(deployment: Deployment, browsing: Browsing) -> None:
    """The result has come, the wheel still turns."""
    tab = browsing.tab()
    tab.page.emulate_media(reduced_motion="no-preference")
    with tab.page.expect_response(lambda response: "wait=" in response.url and response.status == 200):
        tab.click()
    assert tab.kept() == dict(tab.posts)
    tab.page.reload()
    tab.finished()
    assert_one_charge(deployment, tab)


def test_a_reload_while_the_request_is_on_its_way(deployment: Deployment, tab: Tab) -> None:
    """The gateway has it, the page has heard nothing."""

    def swallow(route: Route) -> None:
        route.fetch()  # and never fulfilled

    tab.page.route(POSTS, swallow, times=1)
    tab.click()
    processes.wait_for(lambda: bool(_pump(tab) and deployment.charges(tab.account)), within_s=20, what=lambda: "charge")
    tab.says("Sending")
    tab.page.reload()
    tab.finished()
    assert_one_charge(deployment, tab)
    assert len(tab.posts) == 2


def _pump(tab: Tab) -> bool:
    """Let the handlers of routes run: they do while the page is asked something."""
    tab.page.wait_for_timeout(20)
    return True


def test_a_connection_dropped_after_the_request_is_one_charge(deployment: Deployment, tab: Tab) -> None:
    def drop(route: Route) -> None:
        route.fetch()
        route.abort("connectionreset")

    tab.page.route(POSTS, drop, times=2)
    tab.click()
    tab.finished()
    assert len(tab.posts) == 3
    assert_one_charge(deployment, tab)


def test_a_connection_dropped_while_waiting_is_one_charge(deployment: Deployment, tab: Tab) -> None:
    tab.page.route(RESULTS, lambda route: route.abort("connectionreset"), times=2)
    tab.click()
    tab.says("No answer. Sending again")
    tab.finished()
    assert len(tab.posts) == 3
    assert_one_charge(deployment, tab)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (503, '{"title":"Service Unavailable","status":503,"detail":"…"}', "Service Unavailable. Sending again"),
        (429, '{"title":"Too Many Requests","status":429,"detail":"…"}', "Too Many Requests. Sending again"),
        (502, "<h1>Bad Gateway</h1>", "HTTP 502. Sending again"),
        (200, "<h1>Please log in to this hotel</h1>", "No answer. Sending again"),
    ],
)
def test_a_passing_failure_is_sent_again(deployment: Deployment, tab: Tab, status: int, body: str, said: str) -> None:
    def fail(route: Route) -> None:
        route.fulfill(status=status, body=body, headers={"Retry-After": "1", "Content-Type": "text/html"})

    tab.page.route(POSTS, fail, times=1)
    tab.click()
    tab.says(said)
    tab.finished()
    first, second = tab.page.evaluate("window.sentAtMs")
    assert second - first >= 1000  # Retry-After
    assert_one_charge(deployment, tab)


def test_a_gateway_that_was_away_is_sent_the_draw_when_it_is_back(deployment: Deployment, tab: Tab) -> None:
    deployment.gateway.kill()
    try:
        tab.click()
        tab.says("No answer. Sending again")
        tab.page.wait_for_timeout(AWAY_MS)
        assert tab.kept() == dict(tab.posts)
    finally:
        deployment.gateway.start()
    tab.finished()
    assert_one_charge(deployment, tab)


def test_a_gateway_that_dies_in_mid_draw_is_one_charge(deployment: Deployment, tab: Tab) -> None:
    with deployment.worker_paused():
        tab.click()
        tab.says("Accepted")
        deployment.gateway.kill()
        tab.says("No answer. Sending again")
        deployment.gateway.start()
    tab.finished()
    assert_one_charge(deployment, tab)


def test_a_draw_that_was_never_sent_is_sent_by_the_next_visit(deployment: Deployment, browsing: Browsing) -> None:
    """The machine died between the keeping and the sending."""
    tab = browsing.tab()
    tab.page.route(POSTS, lambda route: None)
    tab.click()
    tab.says("Sending")
    tab.page.close()
    assert deployment.charges(tab.account) == []
    later = browsing.tab()
    later.finished()
    assert tab.posts == later.posts
    assert_one_charge(deployment, later)


# ---- what is not a prize ---------------------------------------------------------------------------------------------


def test_an_empty_account_is_told(deployment: Deployment, browsing: Browsing) -> None:
    tab = browsing.tab(account=deployment.account(Decimal("0.99")))
    tab.click()
    tab.told("The balance does not cover a draw")
    tab.says("Nothing was charged")
    (listed,) = tab.finished()
    assert listed.startswith("rejected: insufficient balance")
    expect(tab.page.get_by_label("Balance")).to_have_text("0.99 POINT")
    assert deployment.charges(tab.account) == []


def test_a_draw_given_up_is_told(tab: Tab) -> None:
    def dead(route: Route) -> None:
        draw = {"request_key": key(route), "lottery_session_id": key(route), "account_id": tab.account}
        route.fulfill(json=draw | {"campaign": "default", "status": "dead", "reason": "TIMED_OUT"})

    def key(route: Route) -> str:
        return urlsplit(route.request.url).path.rpartition("/")[2]

    tab.page.route("**/v1/draws/*?*", dead)
    tab.click()
    tab.told("This draw is dead")
    expect(tab.page.locator("#draws li")).to_contain_text("dead: timed out")
    tab.forgotten()


@pytest.mark.parametrize(("status", "is_kept"), [(400, False), (409, False), (413, False), (401, True), (403, True)])
def test_a_refusal_is_told_and_not_repeated(deployment: Deployment, tab: Tab, status: int, is_kept: bool) -> None:
    def refuse(route: Route) -> None:
        problem = {"type": "about:blank", "title": "No", "status": status, "detail": "this is why."}
        route.fulfill(status=status, body=json.dumps(problem), content_type="application/problem+json")

    tab.page.route(POSTS, refuse, times=1)
    tab.click()
    tab.told("did not accept this draw")
    tab.says("This is why.")
    expect(tab.page.locator("#draw")).to_have_attribute("aria-disabled", "false")
    assert len(tab.posts) == 1
    assert tab.kept() == (dict(tab.posts) if is_kept else {})
    if is_kept:  # it may yet be taken, after a login, say
        tab.says("The draw is sent again when this page is loaded again.")
        tab.page.reload()
        tab.finished()
        assert_one_charge(deployment, tab)


def test_a_key_that_is_another_draws_is_refused_and_forgotten(deployment: Deployment, tab: Tab) -> None:
    key, other = f"another_draws_{tab.account}", deployment.account()
    deployment.house.enqueue([DrawRequest(account_id=tab.account, request_key=key)])
    processes.wait_for(lambda: deployment.charges(tab.account) == [key], within_s=20, what=deployment.worker.log)
    tab.page.evaluate(f"localStorage.setItem('tombola.pending.{key}', JSON.stringify({{ account_id: {other} }}))")
    tab.page.reload()
    tab.told("did not accept this draw")
    tab.forgotten()
    assert deployment.charges(other) == []
    assert deployment.charges(tab.account) == [key]


def test_what_cannot_be_kept_is_not_sent(deployment: Deployment, tab: Tab) -> None:
    tab.page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('the quota is used up'); }; }")
    tab.click()
    tab.told("This draw was not sent")
    tab.says("The quota is used up.")
    assert tab.posts == []


def test_a_browser_that_keeps_nothing_is_told(deployment: Deployment, browsing: Browsing) -> None:
    browsing.context.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new Error('it is blocked'); } })"
    )
    page = browsing.context.new_page()
    page.goto(deployment.gateway.url)
    expect(page.locator("#outcome")).to_contain_text("does not let the page store anything")
    page.get_by_role("button").click()
    expect(page.locator("#outcome")).to_contain_text("This draw was not sent")


# ---- several tabs ----------------------------------------------------------------------------------------------------


def test_tabs_draw_side_by_side(deployment: Deployment, browsing: Browsing) -> None:
    tabs = [browsing.tab(), browsing.tab()]
    with deployment.worker_paused():
        for tab in tabs:
            tab.click()
            tab.says("Accepted")
        assert tabs[0].kept() == dict(tabs[0].posts + tabs[1].posts)
    for tab in tabs:
        tab.finished(2)
        assert len(tab.posts) == 1
        balance = f"{deployment.balance(tab.account)} POINT"
        expect(tab.page.get_by_label("Balance")).to_have_text(balance)  # that of the other draw, too
    assert sorted(deployment.charges(tab.account)) == sorted(tabs[0].keys | tabs[1].keys)


def test_a_second_tab_leaves_a_draw_under_way_alone(deployment: Deployment, browsing: Browsing) -> None:
    first = browsing.tab()
    with deployment.worker_paused():
        first.click()
        first.says("Accepted")
        second = browsing.tab()
        expect(second.page.locator("#outcome")).to_contain_text("Ready")
    first.finished()
    expect(second.page.locator("#draws li")).to_have_count(1)  # but hears of it
    assert second.posts == []
    assert_one_charge(deployment, first)


def test_a_second_tab_that_hears_late_of_a_finished_draw_leaves_it_alone(
    deployment: Deployment, browsing: Browsing
) -> None:
    """Browsers hand localStorage from tab to tab with a delay: here it is as long as the test."""
    first = browsing.tab()
    first.page.evaluate("Storage.prototype.removeItem = () => {}")
    with deployment.worker_paused():
        first.click()
        first.says("Accepted")
        second = browsing.tab()
        expect(second.page.locator("#outcome")).to_contain_text("Ready")
    expect(first.page.locator("#draws li")).to_have_count(1)
    second.forgotten()  # it has had the lock, and has found out
    third = browsing.tab()
    expect(third.page.locator("#draws li")).to_have_count(1)
    expect(third.page.locator("#outcome")).to_contain_text("Ready")
    assert (second.posts, third.posts) == ([], [])
    assert_one_charge(deployment, first)


def test_a_browser_without_indexeddb_draws_all_the_same(deployment: Deployment, browsing: Browsing) -> None:
    """It is there, and never answers."""
    browsing.context.add_init_script("indexedDB.open = IDBFactory.prototype.open = () => ({})")
    tab = browsing.tab()
    tab.click()
    tab.finished()
    assert_one_charge(deployment, tab)


def test_a_second_tab_takes_over_from_one_that_was_closed(deployment: Deployment, browsing: Browsing) -> None:
    first, second = browsing.tab(), None
    with deployment.worker_paused():
        first.click()
        first.says("Accepted")
        second = browsing.tab()
        first.page.close()
        second.says("Accepted")
    second.finished()
    assert second.posts == first.posts
    assert_one_charge(deployment, second)


def test_several_unfinished_draws_are_all_finished(deployment: Deployment, browsing: Browsing) -> None:
    tabs = [browsing.tab() for _ in range(3)]
    with deployment.worker_paused():
        for tab in tabs:
            tab.click()
            tab.says("Accepted")
            tab.page.close()
        last = browsing.tab()
        last.says("Accepted")
    last.finished(3)
    assert last.keys == set().union(*(tab.keys for tab in tabs))
    assert sorted(deployment.charges(last.account)) == sorted(last.keys)


def test_plain_http_from_another_machine(deployment: Deployment, browsing: Browsing) -> None:
    """No locks there: two tabs take up the same draw. Still one charge, one line in the list, and both show it."""
    first = browsing.tab(host=PLAIN_HOST)
    assert first.page.evaluate("[isSecureContext, 'locks' in navigator, 'randomUUID' in crypto]") == [False] * 3
    with deployment.worker_paused():
        first.click()
        first.says("Accepted")
        second = browsing.tab(host=PLAIN_HOST)
        second.says("Accepted")
        first.page.reload()
        first.says("Accepted")
    for tab in (first, second):
        tab.finished()
    assert_one_charge(deployment, first)
    assert_one_charge(deployment, second)


# ---- draw.js by itself, as others use it -----------------------------------------------------------------------------


def test_a_draw_has_a_nonce_that_is_kept_before_it_is_sent(deployment: Deployment, tab: Tab) -> None:
    """Made with the key, and the same one in every retry: also after a reload, which loses what the page knew."""
    kept: list[dict[str, str]] = []
    script = """() => {
        const send = window.fetch;
        window.fetch = (url, init) => {
            if (init?.method === 'POST') {
                window.keptThen = localStorage.getItem(`tombola.pending.${init.headers['Idempotency-Key']}`);
            }
            return send(url, init);
        };
    }"""
    tab.page.evaluate(script)
    with deployment.worker_paused():
        tab.click()
        tab.says("Accepted")
        assert tab.page.evaluate("window.keptThen") == tab.posts[0][1]
        kept.append(tab.kept())
        tab.page.reload()
        tab.says("Accepted")
        kept.append(tab.kept())
    tab.finished()
    assert len(tab.posts) == 2
    assert_one_charge(deployment, tab)
    assert kept == [dict(tab.posts)] * 2
    (key,) = tab.keys
    body = json.loads(tab.posts[0][1])
    assert body.keys() == {"account_id", "client_nonce"}
    assert re.fullmatch(r"[0-9a-f]{32}", body["client_nonce"])
    assert body["client_nonce"] not in key
    # The request that settled is the one with this nonce.
    request = DrawRequest(account_id=tab.account, request_key=key, client_nonce=body["client_nonce"])
    with deployment.house.engine.connect().execution_options(read_only=True) as connection:
        row = connection.execute(
            select(api_idempotency_requests).where(api_idempotency_requests.c.request_key == key)
        ).one()
    assert (row.terms, row.fingerprint) == (request.terms, request.fingerprint())


def test_every_draw_of_a_page_has_another_nonce(deployment: Deployment, browsing: Browsing) -> None:
    tab = browsing.tab()
    for count in range(1, 4):
        tab.click()
        tab.finished(count)
    assert len({json.loads(body)["client_nonce"] for _, body in tab.posts}) == 3


def test_draw_js_gives_the_result_to_its_caller(deployment: Deployment, tab: Tab) -> None:
    draw = "async (account) => (await import('/page/draw.js')).draw(account, { campaign: 'default' })"
    result: dict[str, Any] = tab.page.evaluate(draw, tab.account)
    assert (result["v"], result["status"], result["account_id"]) == (1, "completed", tab.account)
    tab.forgotten()
    assert_one_charge(deployment, tab)


def test_draw_js_keeps_the_key_of_a_result_that_was_not_shown(deployment: Deployment, tab: Tab) -> None:
    script = """async (account) => {
        const { draw, pending, resume } = await import('/page/draw.js');
        const show = () => { throw new Error('not shown'); };
        const said = await draw(account, { show }).catch((error) => error.message);
        const before = pending().length;
        const [{ status, value }] = await resume();
        return [said, before, status, value.status, pending().length];
    }"""
    assert tab.page.evaluate(script, tab.account) == ["not shown", 1, "fulfilled", "completed", 0]
    assert_one_charge(deployment, tab)


@pytest.mark.parametrize(
    "arguments",
    [
        *("0", "1.5", "'6'", "2 ** 53", "undefined"),
        *("6, { pulls: 0 }", "6, { pulls: 1.5 }", "6, { pulls: '10' }", "6, { pulls: null }"),
    ],
)
def test_draw_js_refuses_what_is_no_account_or_no_number_of_pulls(tab: Tab, arguments: str) -> None:
    script = f"import('/page/draw.js').then(({{ draw }}) => draw({arguments})).catch((error) => error.name)"
    assert tab.page.evaluate(script) == "RangeError"
    assert tab.posts == []
    assert tab.kept() == {}
