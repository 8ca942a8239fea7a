"""What strangers and greedy callers may do to a gateway, and what pages elsewhere may: real processes, over HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from litestar.openapi.spec import OpenAPI

from tests import servers
from tests.gateway.test_http_api import problem
from tests.gateways import OPEN_TO_ALL, Gateway, gateway, settle
from tests.processes import House, draws, wait_for
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN
from tombola.producers.entry import Entry
from tombola.producers.gateway.app import create_app
from tombola.producers.storage import api_keys
from tombola.producers.storage.requests import Submission

pytestmark = pytest.mark.process

SHOP = "https://shop.example"
RATE_MAX = 250
BACKLOG_MAX = 40
CONNECTIONS_MAX = 40
ONE, OTHER = {"X-Forwarded-For": "192.0.2.1"}, {"X-Forwarded-For": "6.6.6.6, 192.0.2.2"}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("strangers")
    with (
        servers.redis(private=True) as server,
        House(f"sqlite:///{folder}/ledger.db", server.url, server.url) as house,
    ):
        yield house


@pytest.fixture(scope="module")
def account(house: House) -> int:
    return house.accounts(1, balance=100_000)[0]


@pytest.fixture(scope="module")
def closed(house: House, account: int) -> Iterator[Gateway]:
    """One that asks for keys, behind a proxy, and has little room."""
    with gateway(
        house,
        TOMBOLA_TRUSTED_PROXIES=servers.HOST,
        TOMBOLA_GATEWAY_RATE_MAX=str(RATE_MAX),
        TOMBOLA_BACKLOG_MAX=str(BACKLOG_MAX),
        TOMBOLA_GATEWAY_CONNECTIONS_MAX=str(CONNECTIONS_MAX),
    ) as started:
        yield started


@pytest.fixture(scope="module")
def named(house: House, account: int) -> Iterator[Gateway]:
    """One as `tombola up` runs it, with a page elsewhere that may call it."""
    with gateway(
        house, **OPEN_TO_ALL, TOMBOLA_ALLOWED_HOSTS="127.0.0.1", TOMBOLA_CORS_ORIGINS=f"{SHOP},http://localhost:3000"
    ) as started:
        yield started


def bearer(house: House, caller: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_keys.add(house.engine, caller)}"}


def wrong_key(number: int) -> dict[str, str]:
    return {"Authorization": f"Bearer tmb_{number:016x}_{'x' * 43}"}


def raw(url: str, request: bytes) -> bytes:
    """What comes back, from a connection of its own that the request is to close."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(request)
        told = b""
        while data := connection.recv(65_536):
            told += data
    return told


# ---- wrong keys ------------------------------------------------------------------------------------------------------


def test_guessing_slows_down_whoever_guesses_and_no_one_else(closed: Gateway, house: House) -> None:
    known, fresh = bearer(house, "known"), bearer(house, "fresh")
    problem(closed.show("x", headers=known | ONE), 404)

    def guess(number: int) -> int:
        return closed.show("x", headers=wrong_key(number) | ONE).status_code

    with ThreadPoolExecutor(16) as pool:
        guesses = pool.map(guess, range(100))
        wait_for(lambda: guess(1000) == 429, within_s=20, what=lambda: "not slowed down")
        # Of the very same address, a key that is remembered, one that was forgotten meanwhile, and one never seen.
        until = time.monotonic() + 6.5
        while time.monotonic() < until:
            problem(closed.show("x", headers=known | ONE), 404)
            time.sleep(0.3)
        problem(closed.show("x", headers=fresh | ONE), 404)
        # Another address has not guessed.
        problem(closed.show("x", headers=wrong_key(2000) | OTHER), 401)
        assert {401, 429} >= set(guesses)


def test_whoever_is_no_caller_waits_beyond_a_hundred_a_second(closed: Gateway, house: House) -> None:
    mine = bearer(house, "hurried")
    problem(closed.show("x", headers=mine | ONE), 404)

    async def storm() -> tuple[list[float], list[float]]:
        limits = httpx.Limits(max_connections=30)
        async with httpx.AsyncClient(base_url=closed.url, timeout=60, limits=limits) as client:

            async def ask(path: str, headers: dict[str, str]) -> float:
                began = time.monotonic()
                answer = await client.get(path, headers=headers)
                assert answer.status_code in (200, 404)
                return time.monotonic() - began

            paths = ["/healthz", "/nowhere", "/openapi.json", "/v1/campaigns", f"/v1/odds/{'0' * 64}"]
            strangers = [asyncio.create_task(ask(paths[number % 5], ONE)) for number in range(250)]
            await asyncio.sleep(0.1)
            return await asyncio.gather(*strangers), [await ask("/v1/draws/x", mine | ONE) for _ in range(3)]

    asked, mine_s = asyncio.run(storm())
    assert sum(took_s >= 1.0 for took_s in asked) >= 50
    assert min(mine_s) < 1.0


def test_what_is_asked_is_not_logged(closed: Gateway, house: House, account: int) -> None:
    """The server would write a line for each, which takes longer than all the rest; and passwords like these an age."""
    mine = bearer(house, "quiet")
    before = len(closed.process.log().splitlines())
    began = time.monotonic()
    for number in range(10):
        assert closed.show(f"x{number}", headers=mine).status_code == 404
        assert closed.client.get(f"/healthz?{'://a:' * 3000}").status_code == 200
    assert closed.client.get(f"/healthz?{'://a:' * 13_000}").status_code == 431
    assert time.monotonic() - began < 15
    assert len(closed.process.log().splitlines()) <= before + 2, closed.process.log()[-2000:]


# ---- greedy callers --------------------------------------------------------------------------------------------------


def test_a_batch_counts_as_its_draws(closed: Gateway, house: House) -> None:
    greedy = bearer(house, "greedy")

    def batch(size: int) -> httpx.Response:
        # Nobody has such an account: nothing else may be in the way.
        asked = [{"account_id": 4711, "campaign": "unknown"} for _ in range(size)]
        return closed.client.post("/v1/draws/batch", json={"draws": asked}, headers=greedy)

    told = [batch(100).status_code for _ in range(5)]
    assert told[:2] == [207, 207]
    assert 429 in told
    wait_for(lambda: batch(100).status_code == 207, within_s=10, what=lambda: "still refused")


def test_a_caller_cannot_use_up_the_backlog_of_all(closed: Gateway, house: House, account: int) -> None:
    hog, other = bearer(house, "hog"), bearer(house, "modest")
    waiting = draws([account], BACKLOG_MAX // 2, prefix="hog")
    Entry(house.engine, relay_after_s=60).accept([Submission(it, "hog") for it in waiting])

    def status(key: str, who: dict[str, str]) -> int:
        return closed.draw({"account_id": account}, key, **who).status_code

    wait_for(lambda: status("hog-more", hog) == 429, within_s=20, what=lambda: "still let in")
    assert "your draws under way" in problem(closed.draw({"account_id": account}, "hog-more-2", **hog), 429)
    assert [status(f"modest-{number}", other) for number in range(5)] == [202] * 5
    asked = [DrawRequest(account_id=account, request_key=f"modest-{number}") for number in range(5)]
    settle(house, *waiting, *asked)
    wait_for(lambda: status("hog-more", hog) == 202, within_s=20, what=lambda: "still kept out")
    settle(house, DrawRequest(account_id=account, request_key="hog-more"))


def test_a_caller_waits_on_half_of_the_connections(closed: Gateway, house: House, account: int) -> None:
    patient, other = bearer(house, "patient"), bearer(house, "someone")
    for who, key in ((patient, "p-1"), (other, "p-2")):
        assert closed.draw({"account_id": account}, key, **who).status_code == 202
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=closed.url, timeout=60))
        half = CONNECTIONS_MAX // 2
        for _ in range(half):
            stream = stack.enter_context(client.stream("GET", "/v1/draws/p-1/events", headers=patient))
            assert stream.status_code == 200
        for path in ("/v1/draws/p-1/events", "/v1/draws/p-1?wait=5"):
            problem(client.get(path, headers=patient), 429)
        assert client.get("/v1/draws/p-1", headers=patient).status_code == 202
        assert client.get("/v1/draws/p-2?wait=0.1", headers=other).status_code == 202
    # Those that have gone are not counted.
    wait_for(
        lambda: closed.client.get("/v1/draws/p-1?wait=0.1", headers=patient).status_code == 202,
        within_s=20,
        what=lambda: "still full",
    )
    settle(house, *(DrawRequest(account_id=account, request_key=key) for key in ("p-1", "p-2")))


# ---- pages elsewhere -------------------------------------------------------------------------------------------------


def test_a_page_that_has_its_name_lead_here_is_not_served(named: Gateway, account: int) -> None:
    port = urlsplit(named.url).port
    json_body = {"json": {"account_id": account}}
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        for method, path in (("POST", "/v1/draws"), ("GET", "/v1/accounts/1"), ("GET", "/docs"), ("GET", "/nowhere")):
            more: dict[str, Any] = json_body if method == "POST" else {}
            problem(named.client.request(method, path, headers={"Host": host}, **more), 421)
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert named.client.get(f"/v1/accounts/{account}", headers={"Host": host}).status_code == 200
    # A balancer asks by address.
    for path in ("/healthz", "/readyz"):
        assert named.client.get(path, headers={"Host": "10.1.2.3"}).status_code == 200
    assert raw(named.url, b"GET /v1/accounts/1 HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 421")


def test_a_page_of_another_origin_sends_nothing(named: Gateway, house: House, account: int) -> None:
    for origin in ("https://evil.example", "null", "https://127.0.0.1.evil.example"):
        refused = named.draw({"account_id": account}, "from-elsewhere", Origin=origin)
        problem(refused, 403)
        assert "access-control-allow-origin" not in refused.headers
    problem(named.show("from-elsewhere"), 404)
    assert named.draw({"account_id": account}, "from-here", Origin=named.url).status_code == 202


def test_an_origin_that_may_is_told_so_on_every_answer(named: Gateway, account: int) -> None:
    answers = [
        named.draw({"account_id": account}, "cors-1", Origin=SHOP),
        named.draw({"account_id": -1}, "cors-1", Origin=SHOP),
        named.show("cors-unknown", headers={"Origin": SHOP}),
        named.client.get("/nowhere", headers={"Origin": SHOP}),
        named.client.get("/v1/draws/cors-1", headers={"Origin": SHOP, "Host": "evil.example"}),
    ]
    assert [it.status_code for it in answers] == [202, 400, 404, 404, 421]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == SHOP
        assert "Origin" in answer.headers["vary"]
        exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
        assert {"idempotency-key", "idempotency-replayed", "location", "retry-after"} <= exposed
        assert "access-control-allow-credentials" not in answer.headers


def test_a_browser_may_ask_beforehand(closed: Gateway, named: Gateway) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,idempotency-key"}
    allowed = named.client.options("/v1/draws", headers={"Origin": SHOP} | asks)
    assert allowed.status_code == 204
    assert allowed.headers["access-control-allow-origin"] == SHOP
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert allowed.headers["access-control-allow-headers"] == asks["Access-Control-Request-Headers"]
    refused = named.client.options("/v1/draws", headers={"Origin": "https://evil.example"} | asks)
    assert "access-control-allow-origin" not in refused.headers
    # Off by default.
    off = closed.client.options("/v1/draws", headers={"Origin": SHOP} | asks)
    assert not [name for name in off.headers if name.startswith("access-control")]


# ---- what proxies and balancers expect -------------------------------------------------------------------------------


ROUTES = [
    *("/healthz", "/readyz", "/docs", "/openapi.json", "/v1/draws/h-1", "/v1/accounts/1", "/v1/draws/h-1/events"),
    *("/v1/campaigns", "/v1/campaigns/default", f"/v1/odds/{DEFAULT_CAMPAIGN.odds_hash}"),
]


def test_a_head_is_a_get_without_its_body(named: Gateway, account: int) -> None:
    named.draw({"account_id": account}, "h-1")
    for path in [*ROUTES, "/nowhere", "/v1/draws/h-1?wait=0.1"]:
        head = named.client.head(path)
        with named.client.stream("GET", path) as get:
            assert head.status_code == get.status_code, path
            for name in ("content-type", "content-length"):
                assert head.headers.get(name) == get.headers.get(name), path
        assert head.content == b""
    assert raw(named.url, b"HEAD /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n").endswith(b"\r\n\r\n")


def test_options_tell_the_methods_and_need_no_key(closed: Gateway) -> None:
    for path in [*ROUTES, "/v1/draws", "/v1/draws/batch"]:
        told = closed.client.options(path)
        assert told.status_code == 204, path
        expected = "POST" if path in ("/v1/draws", "/v1/draws/batch") else "GET"
        assert expected in told.headers["allow"], path
        assert told.content == b""


@pytest.mark.parametrize("name", ["Idempotency-Key", "Authorization", "Content-Type", "Host"])
@pytest.mark.parametrize("path", ["/v1/draws", "/v1/draws/batch"])
def test_a_header_that_comes_twice_is_refused(named: Gateway, account: int, name: str, path: str) -> None:
    body = b'{"account_id":%d}' % account
    headers = [("Host", "localhost"), ("Content-Type", "application/json"), ("Idempotency-Key", "twice-1")]
    headers += [("Authorization", "Bearer x"), ("Content-Length", str(len(body))), ("Connection", "close")]
    headers.append((name, dict(headers)[name]))
    head = "".join(f"{key}: {value}\r\n" for key, value in headers)
    told = raw(named.url, f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
    assert told.startswith(b"HTTP/1.1 400 "), told
    assert b"comes twice" in told
    problem(named.show("twice-1"), 404)


def test_every_answer_says_what_a_browser_may_make_of_it(named: Gateway, closed: Gateway) -> None:
    answers = [named.client.get(path) for path in ("/healthz", "/docs", "/docs/files/docs.js", "/openapi.json", "/no")]
    answers += [named.client.get("/v1/draws/x"), named.client.get("/", headers={"Host": "evil.example"})]
    answers += [named.client.post("/v1/draws", content=b"x" * 20_000), named.client.put("/v1/draws/x")]
    answers += [closed.client.get("/v1/draws/x"), closed.client.options("/v1/draws")]
    assert {200, 204, 400, 401, 404, 405, 421} <= {it.status_code for it in answers}
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        policies = answer.headers.get_list("content-security-policy")
        assert len(policies) == 1
        assert policies[0].startswith("default-src 'self'" if "docs" in answer.url.path else "default-src 'none'")
        assert "frame-ancestors 'none'" in policies[0]


def test_the_document_is_made_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering it takes 18 ms, in which nobody else is answered."""
    app = create_app(house.settings)
    told: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        told.append(message)

    def again(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(OpenAPI, "to_schema", again)
    for _ in range(2):
        scope = {"type": "http", "method": "GET", "path": "/openapi.json", "headers": [], "query_string": b""}
        asyncio.run(app(scope | {"client": None, "scheme": "http", "http_version": "1.1"}, receive, send))
    assert [it["status"] for it in told if "status" in it] == [200, 200]
    assert json.loads(told[1]["body"])["openapi"].startswith("3.")
