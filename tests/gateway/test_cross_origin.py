"""`draw.js` on a page of another origin than the gateway's: it draws where it may, and says so where it may not."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast

import pytest
from playwright.sync_api import Browser, Page
from sqlalchemy import select

from tests import servers
from tests.gateway.test_demo_page import browser  # noqa: F401
from tests.gateways import OPEN_TO_ALL, gateway, settle
from tests.processes import House, wait_for
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.gateway.routes.page import PAGE
from tombola.producers.storage.requests import request_of
from tombola.producers.storage.schema import api_idempotency_requests as requests

DRAW = """([base, account]) => import('/draw.js').then(({ draw }) => {
    window.told = [];
    window.pending = draw(account, { base, tell: (what) => window.told.push(what) })
        .then((result) => `${result.status}`, (error) => `${error.name} ${error.status}: ${error.message}`)
        .then((end) => { window.end = end; });
})"""

pytestmark = [pytest.mark.process, pytest.mark.timeout(servers.INSTALL_TIMEOUT_S + 180)]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("elsewhere")
    with (
        servers.redis(private=True) as server,
        House(f"sqlite:///{folder}/ledger.db", server.url, server.url) as house,
    ):
        yield house


@pytest.fixture(scope="module")
def account(house: House) -> int:
    return house.accounts(1)[0]


class Shop(BaseHTTPRequestHandler):
    """A site with a page, and a copy of draw.js on it."""

    def do_GET(self) -> None:
        kind, body = "text/html", b"<!doctype html><title>shop</title>"
        if self.path == "/draw.js":
            kind, body = "text/javascript", (PAGE / "draw.js").read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextmanager
def shop(browser: Browser, port: int) -> Iterator[Page]:  # noqa: F811
    """A tab with the page of http://127.0.0.1:{port}."""
    with ThreadingHTTPServer((servers.HOST, port), Shop) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.set_default_timeout(30_000)
        page.goto(f"http://{servers.HOST}:{port}/")
        yield page
        page.close()
        site.shutdown()


def pending(page: Page) -> list[str]:
    names: list[str] = page.evaluate("() => Object.keys(localStorage)")
    return names


def rows(house: House) -> list[DrawRequest]:
    with house.engine.connect() as connection:
        return [cast(DrawRequest, request_of(it)) for it in connection.execute(select(requests))]


def test_a_page_that_may_not_is_told_so_at_once(browser: Browser, house: House, account: int) -> None:  # noqa: F811
    with gateway(house, **OPEN_TO_ALL) as started, shop(browser, servers._free_port()) as page:
        page.evaluate(DRAW, [started.url, account])
        page.wait_for_function("() => window.end !== undefined")
        assert re.match(r"\w+ 0: .*TOMBOLA_CORS_ORIGINS", page.evaluate("() => window.end"))
        assert page.evaluate("() => window.told") == ["sending", "refused"]
        assert len(pending(page)) == 1, "it is kept: another page, or a mended gateway, can send it"
        assert rows(house) == []


def test_a_page_that_may_draws(browser: Browser, house: House, account: int) -> None:  # noqa: F811
    port = servers._free_port()
    origin = f"http://{servers.HOST}:{port}"
    with gateway(house, **OPEN_TO_ALL, TOMBOLA_CORS_ORIGINS=origin) as started, shop(browser, port) as page:
        page.evaluate(DRAW, [started.url, account])
        wait_for(lambda: len(rows(house)) == 1, within_s=30, what=lambda: page.evaluate("() => window.told"))
        settle(house, *rows(house))
        page.wait_for_function("() => window.end !== undefined")
        assert page.evaluate("() => window.end") == "completed"
        assert pending(page) == []


def test_a_gateway_elsewhere_that_is_away_is_waited_for(browser: Browser, house: House) -> None:  # noqa: F811
    """Whether it will let this page in is not known while it does not answer."""
    with shop(browser, servers._free_port()) as page:
        page.evaluate(DRAW, [f"http://{servers.HOST}:{servers._free_port()}", 1])
        page.wait_for_function("() => window.told.filter((it) => it === 'again').length >= 2")
        assert page.evaluate("() => window.end === undefined")


def test_the_docs_run_under_their_policy(browser: Browser, house: House) -> None:  # noqa: F811
    with gateway(house, **OPEN_TO_ALL) as started:
        page = browser.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"{started.url}/docs")
        page.get_by_text("Make a draw").first.wait_for()
        assert not [it for it in said if "Content Security Policy" in it or "Error" in it], said
        page.close()
