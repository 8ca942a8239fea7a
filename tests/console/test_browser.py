"""The console in a real browser, beside a real worker: what somebody sees and does at 3 a.m."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from redis import Redis
from sqlalchemy import insert, select

from tests import processes, servers
from tests.consoles import PASSWORD, Console
from tests.domain.test_manifest import WINTER
from tests.fulfilments.books import add_webhook
from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.operations.hold import HoldRequest
from tombola.producers.domain.operations.post import PostRequest
from tombola.producers.storage.campaigns import CampaignState
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.requests import Submission, accept
from tombola.producers.storage.schema import dead_letters as table
from tombola.producers.storage.schema import fulfilments
from tombola.producers.storage.transactions import transaction
from tombola.producers.telemetry.pulse import Pulse
from tombola.worker.campaigns import codes, versions
from tombola.worker.dead_letters import letters as dead_letters
from tombola.worker.dead_letters import parking
from tombola.worker.dead_letters.letters import Selection
from tombola.worker.dead_letters.message import Parking
from tombola.worker.deliveries import Delivery
from tombola.worker.movements.settling import settle
from tombola.worker.operators import actions
from tombola.worker.operators import users as operators

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_PACKAGES = ("chromium",)
CHROMIUM_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Another site, for links and forged forms.
    f"--host-resolver-rules=MAP elsewhere.test {servers.HOST}",
)
EXPECT_TIMEOUT_MS = 20_000
OPERATOR, VIEWER = "ann", "val"
GOOD, POISONED = 12, 12
# Keys as they are, and one that is as long as a key may be.
MOVED = "post_of_trade_4711"
NIGHT, NOPE = "lottery_req_1795424054123_1c80fef5_{:03d}", "nope_{:03d}" + "_and_so_on" * 5 + "_end_"
# Set it to a folder to have a picture of each page put there.
SHOTS = os.environ.get("TEST_CONSOLE_SHOTS", "")

# The first test may have to install Chromium.
pytestmark = [pytest.mark.process, pytest.mark.timeout(servers.INSTALL_TIMEOUT_S + 180)]


# ---- a deployment with a bad night -----------------------------------------------------------------------------------


@dataclass
class Night:
    """What there is to look at: draws that settled, and dead letters that could and could not settle now."""

    house: processes.House
    worker: processes.Worker
    console: Console
    accounts: list[int]
    wrong: list[str] = field(default_factory=list)

    def state(self, id: int) -> str:
        with self.house.engine.connect().execution_options(read_only=True) as connection:
            return str(connection.execute(select(table.c.state).where(table.c.id == id)).scalar_one())

    def ids(self, cause: str) -> list[int]:
        with self.house.engine.connect().execution_options(read_only=True) as connection:
            found = dead_letters.some(connection, Selection(cause=cause), rows_max=1000)
        return sorted(it.id for it in found)

    def recorded(self) -> list[tuple[str, str, str]]:
        with self.house.engine.connect().execution_options(read_only=True) as connection:
            return [(it.operator, it.action, it.reason) for it in actions.recent(connection, rows_max=1000)]


def failure(number: int) -> BaseException:
    try:
        raise RuntimeError(f"the pool of prize table 7 has no row {number} <script>alert(1)</script>")
    except RuntimeError as error:
        return error


def park_good(house: processes.House, accounts: list[int]) -> None:
    """Draws that a bad deploy could not settle, and that settle now."""
    parkings = []
    for number in range(GOOD):
        request = DrawRequest(account_id=accounts[number % len(accounts)], request_key=NIGHT.format(number))
        error = failure(number)
        delivery = Delivery(request.encode(), b"0", count=5, headers={"traceparent": "00-" + "ab" * 16 + "-01"})
        parkings.append(Parking(delivery, Cause.FAILED_ALONE, str(error), request, error))
    parking.park(house.engine, parkings, worker="celery@lot-3")


def publish_winter(house: processes.House) -> None:
    """A campaign with everything that a manifest can say, in two versions, open."""
    by = {"operator": OPERATOR, "reason": "the winter draw begins on Monday"}
    for text in (WINTER, WINTER.replace("stock = 3", "stock = 5")):
        versions.publish(house.engine, manifest.parse(text), bounds=versions.Bounds(), **by)
    versions.move(house.engine, "winter-2026", CampaignState.OPEN, **by)
    codes.load(house.engine, "winter-2026", "coupon", {f"CODE-{number}": number for number in range(1, 501)}, **by)


@contextmanager
def relaying(house: processes.House) -> Iterator[None]:
    """What a relay looks like to those who ask who is alive."""
    pulse = Pulse.open(house.settings, "relay", "relay@lot-1")
    assert pulse is not None
    yield
    pulse.stop()


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    folder = tmp_path_factory.mktemp("console")
    with (
        servers.redis(private=True) as redis,
        processes.House(f"sqlite:///{folder}/ledger.db", redis.url, redis.url) as house,
        processes.worker(house.env) as worker,
        Console(house.settings) as console,
        relaying(house),
    ):
        accounts = house.accounts(5)
        operators.add(house.engine, OPERATOR, "operator", PASSWORD, by="shell:root@lot")
        operators.add(house.engine, VIEWER, "viewer", PASSWORD, by="shell:root@lot")
        asked = DrawRequest(account_id=accounts[0], request_key="story_1", lottery_session_id="session_of_story_1")
        with transaction(house.engine) as open_transaction:
            now = utc_now()
            accept(open_transaction, [Submission(asked, "shop")], now, publish_at=now, is_published=True)
        house.enqueue([asked, *processes.draws(accounts, 40)])
        house.publish(
            *[b'{"v":1,"request_key":"cut_%d","account_' % number for number in range(6)],
            b"\xff\xfe\x00<script>alert(1)</script>",
            b'{"v":9,"request_key":"new_1"}',
            *[
                DrawRequest(account_id=accounts[0], request_key=NOPE.format(number), campaign="spring").encode()
                for number in range(POISONED)
            ],
        )
        park_good(house, accounts)
        publish_winter(house)
        house.wait_settled(41, within_s=40, log=worker.log)
        processes.wait_for(
            lambda: house.dead() == GOOD + POISONED + 8, within_s=40, what=lambda: f"{house.causes()}\n{worker.log()}"
        )
        fulfil(house, accounts[0])
        move(house, accounts)
        yield Night(house, worker, console, accounts)
        assert house.violations() == []


def move(house: processes.House, accounts: list[int]) -> None:
    """A hold, and its end by a payment to another account."""
    payer, to, *_ = accounts
    hold = HoldRequest(account_id=payer, request_key="trade_4711", amount="20.00", reference="order-4711")
    post = PostRequest(account_id=payer, request_key=MOVED, hold=hold.request_key, amount="1.00", to=to)
    for request in (hold, post):
        settle(house.engine, request, operator=OPERATOR, reason="a customer at the counter")


def fulfil(house: processes.House, account_id: int) -> None:
    """A webhook, and fulfilments that were delivered and given up: keys as long as they come."""
    add_webhook(house.engine, "shop-of-the-east", "https://shop.example/webhooks/tombola?from=night", "grant.item", "*")
    now = utc_now()
    common = {"webhook": "shop-of-the-east", "campaign": "winter-2026", "account_id": account_id, "next_at": now}
    with house.engine.begin() as connection:
        for number in range(8):
            session = f"lottery_req_1795424054123_1c80fef5_{number:03d}"
            values = {
                "idempotency_key": f"{session}:coupon_{number}",
                "lottery_session_id": session,
                "event": "coupon-of-the-winter-won" if number % 2 else "grant.coupon",
                "state": "dead" if number % 2 else "delivered",
                "attempts": 24 if number % 2 else 1,
                "error": f"answered 503: the shop is closed{' until Monday' * 10}" if number % 2 else None,
            }
            connection.execute(insert(fulfilments).values(**common, **values, created_at=now, ended_at=now))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    binary = next(filter(None, map(shutil.which, CHROMIUM)), None) or servers._binary(CHROMIUM[0], CHROMIUM_PACKAGES)
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=binary, args=CHROMIUM_ARGUMENTS) as launched,
    ):
        yield launched


# ---- somebody at the console -----------------------------------------------------------------------------------------


class Seat:
    """A browser profile; at its end nothing may have gone wrong in any of its pages."""

    def __init__(self, browser: Browser, night: Night, **options: Any) -> None:
        self.night = night
        self.wrong: list[str] = []
        self.context: BrowserContext = browser.new_context(base_url=night.console.url, **options)
        self.context.set_default_timeout(EXPECT_TIMEOUT_MS)
        self.page = self.tab()

    def tab(self) -> Page:
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", lambda said: self._said(said.type, said.text))
        page.on("dialog", lambda dialog: self.wrong.append(f"a dialog: {dialog.message}"))
        page.on("request", lambda request: self._sent(request.url))
        return page

    def log_in(self, name: str, password: str = PASSWORD, *, at: str = "/login") -> None:
        self.page.goto(at)
        self.page.get_by_label("Name").fill(name)
        self.page.get_by_label("Password").fill(password)
        self.page.get_by_role("button", name="Log in").click()

    def title(self, title: str) -> None:
        expect(self.page).to_have_title(f"{title} · tombola")

    def shoot(self, name: str) -> None:
        """Take a picture, if somebody wants them."""
        if SHOTS:
            self.page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)

    def _said(self, kind: str, said: str) -> None:
        if kind in ("error", "warning") and "Failed to load resource" not in said:
            self.wrong.append(said)

    def _sent(self, url: str) -> None:
        if urlsplit(url).scheme in ("http", "https") and urlsplit(url).port != self.night.console.port:
            self.wrong.append(f"a request to {url}")


@contextmanager
def seated(browser: Browser, night: Night, **options: Any) -> Iterator[Seat]:
    expect.set_options(timeout=EXPECT_TIMEOUT_MS)
    seat = Seat(browser, night, **options)
    yield seat
    seat.context.close()
    assert seat.wrong == []


@pytest.fixture
def nobody(browser: Browser, night: Night) -> Iterator[Seat]:
    with seated(browser, night, viewport={"width": 1280, "height": 800}) as seat:
        yield seat


@pytest.fixture(scope="module")
def cookies(browser: Browser, night: Night) -> dict[str, Any]:
    """Logged in once for all tests: every login counts against the limit."""
    states = {}
    for name in (OPERATOR, VIEWER):
        with seated(browser, night) as seat:
            seat.log_in(name)
            seat.title("Overview")
            states[name] = seat.context.storage_state()
    return states


@pytest.fixture
def operator(browser: Browser, night: Night, cookies: dict[str, Any]) -> Iterator[Seat]:
    with seated(browser, night, storage_state=cookies[OPERATOR], viewport={"width": 1280, "height": 800}) as seat:
        yield seat


@pytest.fixture
def viewer(browser: Browser, night: Night, cookies: dict[str, Any]) -> Iterator[Seat]:
    with seated(browser, night, storage_state=cookies[VIEWER], viewport={"width": 1280, "height": 800}) as seat:
        yield seat


# ---- coming in -------------------------------------------------------------------------------------------------------


def test_one_logs_in_where_one_wanted_to_go_and_out_again(nobody: Seat) -> None:
    nobody.page.goto("/dead-letters?cause=failed+alone")
    nobody.title("Log in")
    nobody.shoot("login")
    nobody.page.get_by_label("Name").fill(OPERATOR)
    nobody.page.get_by_label("Password").fill("not the password")
    nobody.page.get_by_role("button", name="Log in").click()
    expect(nobody.page.get_by_role("alert")).to_have_text("The name or the password is wrong.")
    nobody.page.get_by_label("Password").fill(PASSWORD)
    nobody.page.get_by_role("button", name="Log in").click()
    nobody.title("Dead letters")
    expect(nobody.page.locator("#count")).to_have_text(str(GOOD))
    (session,) = [dict(it) for it in nobody.context.cookies() if it["name"] == "tombola_session"]
    assert session["httpOnly"]
    assert session["sameSite"] == "Strict"
    assert nobody.page.evaluate("document.cookie") == ""
    nobody.page.locator("header [aria-label='Open user menu']").click()
    nobody.page.get_by_role("button", name="Logout").click()
    nobody.title("Log in")
    # The old session is over, not only forgotten by the browser.
    again: Any = session
    nobody.context.add_cookies([again])
    nobody.page.goto("/")
    nobody.title("Log in")


def test_a_shared_address_opens_from_another_site(operator: Seat, night: Night) -> None:
    id = night.ids(Cause.FAILED_ALONE)[0]
    operator.page.route(
        "http://elsewhere.test/**",
        lambda route: route.fulfill(
            content_type="text/html", body=f'<a href="{night.console.url}/dead-letters/{id}">see here</a>'
        ),
    )
    operator.page.goto("http://elsewhere.test/chat")
    operator.page.get_by_role("link", name="see here").click()
    operator.title(f"Dead letter {id}")
    operator.wrong = [it for it in operator.wrong if "elsewhere.test" not in it]


def test_a_form_on_another_site_does_nothing(operator: Seat, night: Night) -> None:
    id = night.ids(Cause.FAILED_ALONE)[0]
    operator.page.goto(f"/dead-letters/{id}")
    token = operator.page.locator("input[name=csrftoken]").first.get_attribute("value")
    form = (
        f'<form method="post" action="{night.console.url}/dead-letters/{id}/discard">'
        f'<input name="reason" value="forged"><input name="csrftoken" value="{token}"><button>Win!</button></form>'
    )
    operator.page.route("http://elsewhere.test/**", lambda route: route.fulfill(content_type="text/html", body=form))
    operator.page.goto("http://elsewhere.test/win")
    operator.page.get_by_role("button", name="Win!").click()
    operator.page.wait_for_url(f"{night.console.url}/**")
    assert night.state(id) == "parked"
    assert "forged" not in str(night.recorded())
    operator.wrong = [it for it in operator.wrong if "elsewhere.test" not in it]


# ---- looking ---------------------------------------------------------------------------------------------------------


def test_the_overview_lives(operator: Seat, night: Night) -> None:
    operator.page.goto("/")
    operator.title("Overview")
    page = operator.page
    expect(page.locator("#backlog")).to_have_text("0")
    expect(page.locator("#oldest")).to_have_text("–")
    expect(page.locator("#broker_backlog")).to_have_text("0")
    expect(page.locator("#open")).to_have_text(str(night.house.dead()))
    expect(page.locator("#causes")).to_contain_text("failed alone")
    expect(page.locator("#warnings")).to_be_empty()
    with Redis.from_url(night.house.settings.need("result_url")) as client:
        pulse = Pulse(client, "worker", "celery@lot-7")
        pulse.add("parked", 3)
        pulse.flush_once()
        pulse.beat_once()
        expect(page.locator("#members")).to_contain_text("celery@lot-7")
        page.wait_for_function(
            "Chart.getChart('troubles').data.datasets[1].data.at(-1) + "
            "Chart.getChart('troubles').data.datasets[1].data.at(-2) >= 3"
        )
    assert page.evaluate("Chart.getChart('draws').data.labels.length") == 60
    page.locator("#causes").get_by_text("failed alone").click()
    expect(page.locator("#count")).to_have_text(str(GOOD))


def test_filters_find_what_is_asked_for(operator: Seat, night: Night) -> None:
    page = operator.page
    page.goto("/dead-letters")
    operator.title("Dead letters")
    page.get_by_label("Cause").select_option("unknown campaign")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("#count")).to_have_text(str(POISONED))
    page.get_by_role("textbox", name="Request key", exact=True).fill(NOPE.format(3))
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("#count")).to_have_text("1")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.get_by_role("link", name="Clear").click()
    page.get_by_label("Parked before").select_option("1h")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("#count")).to_have_text("0")
    page.goto("/dead-letters/groups")
    row = page.locator("tbody tr").filter(has_text="failed alone")
    expect(row).to_have_count(1)
    row.get_by_role("link", name="List").click()
    expect(page.locator("#count")).to_have_text(str(GOOD))


def test_a_message_shows_all_and_runs_nothing(operator: Seat, night: Night) -> None:
    page = operator.page
    id = night.ids(Cause.FAILED_ALONE)[0]
    page.goto(f"/dead-letters/{id}")
    expect(page.locator("#error")).to_contain_text("<script>alert(1)</script>")
    expect(page.locator("#traceback")).to_contain_text("in failure")
    expect(page.locator("#body")).to_contain_text(f'"request_key":"{NIGHT.format(0)}"')
    expect(page.locator("dd").filter(has_text="celery@lot-3")).to_be_visible()
    page.locator("summary").filter(has_text="Headers").click()
    expect(page.locator("#headers")).to_contain_text("traceparent")
    binary = next(it for it in night.ids(Cause.UNPARSABLE) if b"\xff" in night_body(night, it))
    page.goto(f"/dead-letters/{binary}")
    expect(page.locator("#body")).to_contain_text("00000000  ff fe 00 3c 73")


def night_body(night: Night, id: int) -> bytes:
    with night.house.engine.connect().execution_options(read_only=True) as connection:
        return dead_letters.get(connection, id).body


def test_the_story_of_a_draw(operator: Seat, night: Night) -> None:
    page = operator.page
    page.goto("/")
    page.get_by_role("searchbox", name="Story of a draw").fill("session_of_story_1")
    page.keyboard.press("Enter")
    operator.title("Story of a draw")
    story = page.locator("#story")
    for words in ("accepted by shop", "published the first attempt", "lottery consume -1.00 POINT", "completed by"):
        expect(story).to_contain_text(words)
    times = story.locator("time").evaluate_all("(all) => all.map((it) => it.dateTime)")
    assert times == sorted(times)
    expect(page.locator("dd").filter(has_text="in Redis, for another")).to_be_visible()
    operator.shoot("story")
    # From there to the account, and back to another of its draws.
    page.locator("dd a").filter(has_text=re.compile(r"^\d+$")).click()
    operator.title(f"Account {night.accounts[0]}")
    expect(page.locator("tbody tr").filter(has_text="session_of_story_1")).to_be_visible()
    page.goto("/story?q=never-heard-of")
    expect(page.get_by_text("Nothing found for")).to_be_visible()


# ---- acting ----------------------------------------------------------------------------------------------------------


def test_a_viewer_sees_everything_and_cannot_act(viewer: Seat, night: Night) -> None:
    page = viewer.page
    id = night.ids(Cause.FAILED_ALONE)[0]
    for address in ("/", "/dead-letters", "/dead-letters/groups", f"/dead-letters/{id}", f"/replays/new?ids={id}"):
        assert page.goto(address)
        expect(page.locator("main, .page-wrapper")).to_be_visible()
        expect(page.locator(".page-wrapper form[method=post]")).to_have_count(0)
    expect(page.locator("#outcomes")).to_contain_text("would charge")
    expect(page.get_by_role("button", name="Start the replay")).to_have_count(0)
    # A form made by hand, with the session's own token: the menu's logout form has one.
    for path in ("/replays", f"/dead-letters/{id}/discard", "/dead-letters/discard", f"/dead-letters/{id}/edit"):
        status = page.evaluate(
            """async (path) => (await fetch(path, { method: 'POST', body: new URLSearchParams({
                csrftoken: document.querySelector('input[name=csrftoken]').value,
                reason: 'I may not', body: '{}' }) })).status""",
            path,
        )
        assert status == 403, path
    assert night.state(id) == "parked"
    assert "I may not" not in str(night.recorded())


def test_a_canary_stops_by_itself_when_the_cause_comes_back(operator: Seat, night: Night) -> None:
    page = operator.page
    page.goto("/dead-letters/groups")
    row = page.locator("tbody tr").filter(has_text="unknown campaign")
    row.get_by_role("link", name="Replay…").click()
    operator.title("Replay dead letters")
    expect(page.locator("#outcomes")).to_contain_text("unknown campaign")
    expect(page.get_by_label("Canary")).to_have_value("10")  # it looks hopeless
    page.get_by_label("Canary").fill("2")
    page.get_by_label("Reason").fill("is the spring campaign back?")
    page.get_by_role("button", name="Start the replay").click()
    warning = "12 of 12 would stay parked, or be parked again. Nothing was started."
    expect(page.locator("#hopeless")).to_contain_text(warning)
    expect(page.get_by_label("Canary")).to_have_value("2")
    expect(page.get_by_label("Reason")).to_have_value("is the spring campaign back?")
    assert ("ann", "replay", "is the spring campaign back?") not in night.recorded()
    operator.shoot("replay-hopeless")
    page.get_by_role("button", name="Replay anyway").click()
    because = page.locator("#because")
    expect(because).to_contain_text("the cause came back: 2 of 2 parked again")
    expect(page.locator("#status")).to_have_text("stopped")
    expect(page.locator("#status .bg-red-lt")).to_be_visible()
    expect(page.locator("[data-figure=sent]")).to_have_text("2")
    operator.shoot("replay-stopped")
    # The other ten were never touched.
    with night.house.engine.connect().execution_options(read_only=True) as connection:
        counts = dead_letters.counts(connection)
    assert counts["parked", "unknown campaign"] == POISONED - 2
    assert counts["parked again", "unknown campaign"] == 2
    assert ("ann", "replay", "is the spring campaign back?") in night.recorded()


def test_a_replay_settles_what_can_settle_now(operator: Seat, night: Night) -> None:
    page = operator.page
    page.goto("/replays/new?cause=failed+alone")
    expect(page.locator("#outcomes")).to_contain_text("would charge")
    expect(page.locator("#outcomes tr").first).to_contain_text(str(GOOD))
    expect(page.locator("#lines tbody tr")).to_have_count(GOOD)
    operator.shoot("forecast")
    page.get_by_label("Canary").fill("3")
    page.get_by_label("Reason").fill("deploy 1.4.2 is rolled back")
    page.get_by_role("button", name="Start the replay").click()
    expect(page.locator("#status")).to_have_text("done")
    expect(page.locator("#status .bg-green-lt")).to_be_visible()
    expect(page.locator("[data-figure=settled]")).to_have_text(str(GOOD))
    operator.shoot("replay")
    # Its story tells all of it.
    page.goto(f"/story?q={NIGHT.format(4)}")
    for words in ("parked", "deploy 1.4.2 is rolled back", "completed", "lottery consume"):
        expect(page.locator("#story")).to_contain_text(words)
    page.goto("/actions")
    expect(page.locator("tbody")).to_contain_text("deploy 1.4.2 is rolled back")


def test_a_replay_is_stopped_by_a_button(operator: Seat, night: Night) -> None:
    page = operator.page
    page.goto("/replays/new?cause=unknown+campaign")
    page.get_by_label("Per second").fill("0.5")
    page.get_by_label("Reason").fill("slowly now")
    page.get_by_role("button", name="Start the replay").click()
    page.get_by_role("button", name="Replay anyway").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#because")).to_contain_text("stopped by ann")
    expect(page.locator("#status")).to_have_text("stopped")
    assert ("ann", "stop replay", "asked to stop") in night.recorded()


def test_discard_restore_and_edit(operator: Seat, night: Night) -> None:
    page = operator.page
    id = night.ids(Cause.UNPARSABLE)[0]
    page.goto(f"/dead-letters/{id}")
    page.locator("summary").filter(has_text="Discard…").click()
    page.get_by_label("Reason").first.fill("garbage")
    page.get_by_role("button", name="Discard", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("discarded")
    assert night.state(id) == "discarded"
    page.locator("summary").filter(has_text="Restore…").click()
    page.get_by_label("Reason").first.fill("not garbage")
    page.get_by_role("button", name="Restore").click()
    expect(page.get_by_role("alert")).to_contain_text("parked again")
    assert night.state(id) == "parked"
    page.locator("summary").filter(has_text="Edit a copy…").click()
    page.get_by_label("Body").fill("{")
    page.get_by_label("Reason").last.fill("its end was cut off")
    page.get_by_role("button", name="Park the edited copy").click()
    expect(page.get_by_role("alert")).to_contain_text("Not edited")
    body = {"v": 1, "request_key": "cut_0", "account_id": night.accounts[1]}
    page.locator("summary").filter(has_text="Edit a copy…").click()
    page.get_by_label("Body").fill(json.dumps(body, indent=2))
    page.get_by_label("Reason").last.fill("its end was cut off")
    page.get_by_role("button", name="Park the edited copy").click()
    expect(page.get_by_role("alert")).to_contain_text("edited copy")
    expect(page.get_by_role("link", name=str(id), exact=True)).to_be_visible()
    assert {"discard", "restore", "edit"} <= {action for who, action, _ in night.recorded() if who == OPERATOR}


def test_an_operator_writes_simulates_publishes_and_pauses_a_campaign(operator: Seat, night: Night) -> None:
    page = operator.page
    page.goto("/campaigns")
    page.get_by_role("link", name="New campaign").click()
    operator.title("New campaign")
    text = WINTER.replace("winter-2026", "night")
    editor = page.get_by_label("Manifest (TOML)")
    editor.fill(text.replace("weight = 999", "weight = 9.99"))
    page.get_by_role("button", name="Check").click()
    expect(page.locator("#mistake")).to_contain_text("this is a whole number, not 9.99")
    expect(page.locator("#mistake pre")).to_contain_text("weight = 9.99")
    editor.fill(text)
    page.get_by_role("button", name="Check").click()
    expect(page.locator("#outlook")).to_contain_text("night: a manifest without mistakes")
    assert look_at(operator, "campaign-checked") == {}
    page.get_by_label("Requests").fill("2000")
    page.get_by_role("button", name="Simulate").click()
    expect(page.locator("#returns")).to_be_visible()
    expect(page.locator("#outlook")).to_contain_text("in 2,000 pulls")
    expect(editor).to_have_value(text)
    assert look_at(operator, "campaign-simulated") == {}
    operator.shoot("campaign-simulated-desktop")
    page.get_by_role("button", name="Publish…").click()
    expect(page.locator("#changes")).to_contain_text("night is new")
    assert look_at(operator, "campaign-asked") == {}
    page.get_by_label("Reason").fill("for the night")
    page.get_by_role("button", name="Publish", exact=True).click()
    operator.title("night")
    page.get_by_label("Reason").first.fill("go")
    page.get_by_role("button", name="Open", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("night is open.")
    # Something is wrong: two clicks and a word from the list of campaigns.
    page.goto("/campaigns")
    page.get_by_role("link", name="night", exact=True).click()
    page.get_by_label("Reason").first.fill("too many winners")
    page.get_by_role("button", name="Pause", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("night is paused.")
    assert (OPERATOR, "campaign pause", "too many winners") in night.recorded()


def test_live_figures_of_a_campaign_live(operator: Seat, night: Night) -> None:
    page = operator.page
    page.goto("/campaigns/winter-2026")
    left = page.locator("[data-figure='left phone']")
    expect(left).to_have_text("5")
    by = {"operator": OPERATOR, "reason": "one broke"}
    versions.restock(night.house.engine, "winter-2026", "phone", -1, **by)
    expect(left).to_have_text("4")


# ---- on a phone, and in pictures -------------------------------------------------------------------------------------

PAGES = {
    "overview": "/",
    "dead-letters": "/dead-letters?state=all",
    "groups": "/dead-letters/groups",
    "dead-letter": "/dead-letters/1",
    "replay-new": "/replays/new",
    "replay-hopeless": "/replays/new?cause=unknown+campaign",
    "replays": "/replays",
    "replay-one": "/replays/1",
    "story-of-a-draw": f"/story?q={NIGHT.format(1)}",
    "story-of-an-account": "/story?q=1",
    "refund": "/story/refund?session=session_of_story_1",
    "story-of-a-movement": f"/story?q={MOVED}",
    "account": "/accounts/1",
    "campaigns": "/campaigns",
    "campaign": "/campaigns/winter-2026",
    "campaign-versions": "/campaigns/winter-2026/versions",
    "campaign-new": "/campaigns/new?from=winter-2026",
    "webhooks": "/webhooks",
    "fulfilments": "/fulfilments?state=dead",
    "books": "/books",
    "conformity": "/conformity/default",
    "actions": "/actions",
    "users": "/users",
    "not-found": "/dead-letters/987654",
}


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_its_screen(browser: Browser, night: Night, cookies: dict[str, Any], width: int) -> None:
    with seated(
        browser,
        night,
        storage_state=cookies[OPERATOR],
        viewport={"width": width, "height": 844 if width < 600 else 800},
    ) as seat:
        for name, address in PAGES.items():
            seat.page.goto(address)
            if name == "overview":
                expect(seat.page.locator("#open")).not_to_have_text("…")
            if name in ("replay-new", "replay-hopeless"):
                expect(seat.page.locator("#outcomes")).to_be_visible()
            wide: int = seat.page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{address} is {wide} px wide"
            if width == 1280:  # nor does anything scroll inside of it
                cut = seat.page.locator(".table-responsive").evaluate_all(
                    "(all) => all.map((it) => it.scrollWidth - it.clientWidth)"
                )
                assert not [it for it in cut if it > 0], f"{address}: a table is {max(cut)} px too wide"
            seat.shoot(f"{name}-{'phone' if width < 600 else 'desktop'}")


def test_it_follows_the_system_into_the_dark(browser: Browser, night: Night, cookies: dict[str, Any]) -> None:
    with seated(browser, night, storage_state=cookies[OPERATOR], color_scheme="dark") as seat:
        seat.page.goto("/dead-letters")
        background: str = seat.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(int(it) for it in re.findall(r"\d+", background)[:3]) < 80
        seat.shoot("dead-letters-dark")


# ---- for everybody ---------------------------------------------------------------------------------------------------


# What is in order is not told in detail: that is most of the answer.
VIOLATIONS: dict[str, Any] = {"resultTypes": ["violations"]}


def look_at(seat: Seat, name: str) -> dict[str, list[str]]:
    """What axe-core has against the page that is open, with all that can be opened on it open; and whether it can be
    read in the dark, which changes nothing but colours."""
    found = {}
    seat.page.evaluate("document.querySelectorAll('details').forEach((it) => { it.open = true; })")
    for scheme, options in (("light", VIOLATIONS), ("dark", VIOLATIONS | {"runOnly": ["color-contrast"]})):
        seat.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
        seat.page.evaluate(
            "document.getAnimations().forEach((it) => { try { it.finish(); } catch (endless) { it.cancel(); } })"
        )
        for it in Axe().run(seat.page, options=options).response["violations"]:
            where = [f"{node['html'][:200]}: {node['failureSummary']}" for node in it["nodes"][:5]]
            found[f"{name}, {scheme}: {it['id']}, {it['help']}"] = where
    seat.page.emulate_media(color_scheme="light")
    return found


def look_with_axe(seat: Seat, pages: dict[str, str]) -> dict[str, list[str]]:
    """What axe-core has against these pages."""
    found: dict[str, list[str]] = {}
    for page, address in pages.items():
        seat.page.goto(address)
        if page == "overview":
            expect(seat.page.locator("#open")).not_to_have_text("…")
        if page in ("replay-new", "replay-hopeless"):
            expect(seat.page.locator("#outcomes")).to_be_visible()
        found |= look_at(seat, page)
    return found


def test_axe_finds_nothing(browser: Browser, night: Night, cookies: dict[str, Any]) -> None:
    """No page keeps anybody out who cannot see well, or uses no mouse: axe-core's rules, all of them."""
    found: dict[str, list[str]] = {}
    with seated(browser, night, storage_state=cookies[OPERATOR]) as seat:
        found |= look_with_axe(seat, PAGES)
    with seated(browser, night, storage_state=cookies[VIEWER]) as seat:
        found |= look_with_axe(
            seat, {f"{name} (viewer)": PAGES[name] for name in ("dead-letter", "replays", "campaign", "campaign-new")}
        )
    with seated(browser, night) as seat:
        found |= look_with_axe(seat, {"login": "/login"})
    assert found == {}, json.dumps(found, indent=1)
