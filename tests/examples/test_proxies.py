"""The worked proxies between a shop's pages and the gateway: whose points are spent is what the session says."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import httpx
import pytest

from tests import servers
from tests.books import table
from tests.gateways import TIMEOUT_S, Gateway, gateway, settle
from tests.processes import House, wait_for
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.storage import api_keys

PROXIES = Path(__file__).parents[2] / "producers" / "examples" / "proxy"
NODE_SHOP = """
import {{ createServer }} from 'node:http';
import {{ drawProxy }} from '{proxies}/proxy.mjs';
const accountOf = (request) => ({{ 'member=1': 1, 'member=2': 2 }})[request.headers.cookie] ?? null;
const [gatewayUrl, apiKey] = [process.env.GATEWAY_URL, process.env.GATEWAY_API_KEY];
createServer(drawProxy({{ gatewayUrl, apiKey, accountOf }})).listen({port}, '{host}');
"""
# PHP keeps its session in a file: the login of this shop is the cookie `member`.
PHP_SHOP = """<?php
$member = (int) ($_COOKIE['member'] ?? 0);
session_save_path(__DIR__);
session_id('member' . $member);
session_start();
if ($member) { $_SESSION['account_id'] = $member; } else { unset($_SESSION['account_id']); }
session_write_close();
require '%s/proxy.php';
"""


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, redis_server: servers.Server) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("proxies")
    with House(f"sqlite:///{folder}/ledger.db", redis_server.url, redis_server.url) as house:
        assert house.accounts(2, balance=100) == [1, 2]
        yield house


@pytest.fixture(scope="module")
def api_key(house: House) -> str:
    return api_keys.add(house.engine, "shop")


@pytest.fixture(scope="module")
def behind(house: House) -> Iterator[Gateway]:
    with gateway(house) as started:
        yield started


@contextmanager
def python_shop(gateway_url: str, api_key: str, _folder: Path) -> Iterator[str]:
    spec = importlib.util.spec_from_file_location("shop_proxy", PROXIES / "proxy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def account_of(environ: dict[str, Any]) -> int | None:
        member = SimpleCookie(environ.get("HTTP_COOKIE", "")).get("member")
        return int(member.value) if member is not None else None

    with make_server(
        servers.HOST, 0, module.DrawProxy(gateway_url, api_key, account_of), handler_class=Quiet
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://{servers.HOST}:{server.server_port}"
        finally:
            server.shutdown()


@contextmanager
def run_shop(command: list[str], port: int, gateway_url: str, api_key: str) -> Iterator[str]:
    env = os.environ | {"GATEWAY_URL": gateway_url, "GATEWAY_API_KEY": api_key}
    url = f"http://{servers.HOST}:{port}"
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: _answers(url), within_s=TIMEOUT_S, what=lambda: f"{command[0]} does not answer")
            yield url
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=TIMEOUT_S).status_code > 0
    except httpx.TransportError:
        return False


@contextmanager
def node_shop(gateway_url: str, api_key: str, folder: Path) -> Iterator[str]:
    port = servers._free_port()
    script = folder / "shop.mjs"
    script.write_text(NODE_SHOP.format(proxies=PROXIES, port=port, host=servers.HOST))
    node = servers._binary("node", ("nodejs", "npm"))
    with run_shop([node, str(script)], port, gateway_url, api_key) as url:
        yield url


@contextmanager
def php_shop(gateway_url: str, api_key: str, folder: Path) -> Iterator[str]:
    php = shutil.which("php")
    if php is None:
        pytest.skip("php is not on this machine")
    port = servers._free_port()
    script = folder / "shop.php"
    script.write_text(PHP_SHOP % PROXIES)
    with run_shop([php, "-S", f"{servers.HOST}:{port}", str(script)], port, gateway_url, api_key) as url:
        yield url


@pytest.fixture(scope="module", params=[python_shop, node_shop, php_shop], ids=["python", "node", "php"])
def shop(
    request: pytest.FixtureRequest, behind: Gateway, api_key: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[int | None], httpx.Client]]:
    """A client of the shop for each member: None has not logged in."""
    with request.param(behind.url, api_key, tmp_path_factory.mktemp("shop")) as url:
        clients = {
            member: httpx.Client(
                base_url=url, timeout=TIMEOUT_S, headers={"Cookie": f"member={member}"} if member else {}
            )
            for member in (None, 1, 2)
        }
        yield clients.__getitem__
        for client in clients.values():
            client.close()


def asked(house: House, key: str) -> list[int]:
    return [row["account_id"] for row in table(house.engine, "api_idempotency_requests") if row["request_key"] == key]


def test_the_session_says_who_pays(shop: Any, house: House, request: pytest.FixtureRequest) -> None:
    key = f"pays-{request.node.callspec.id}"
    headers = {"Idempotency-Key": key}
    first = shop(1).post("/v1/draws", json={"account_id": 2}, headers=headers)  # another member's, if it could choose
    assert first.status_code == 202, first.text
    assert asked(house, key) == [1]
    repeat = shop(1).post("/v1/draws", json={}, headers=headers)
    assert (repeat.status_code, repeat.content) == (202, first.content)
    assert repeat.headers["idempotency-replayed"] == "true"
    refused = shop(2).post("/v1/draws", json={"account_id": 1}, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (422, "idempotency-key-reused")
    settle(house, DrawRequest(account_id=1, request_key=key))
    shown = shop(1).get(f"/v1/draws/{key}", params={"wait": 5})
    assert (shown.status_code, shown.json()["status"]) == (200, "completed")
    assert shop(2).get(f"/v1/draws/{key}").status_code == 404


def test_the_nonce_of_the_browser_is_passed_on(shop: Any, house: House, request: pytest.FixtureRequest) -> None:
    key, nonce = f"nonce-{request.node.callspec.id}", "nonce-of-a-browser_0"
    headers = {"Idempotency-Key": key}
    first = shop(1).post("/v1/draws", json={"client_nonce": nonce}, headers=headers)
    assert first.status_code == 202, first.text
    rows = {row["request_key"]: row["terms"] for row in table(house.engine, "api_idempotency_requests")}
    assert rows[key] == f'["default",null,"{nonce}"]'
    assert shop(1).post("/v1/draws", json={"client_nonce": nonce}, headers=headers).content == first.content
    for other in ({}, {"client_nonce": nonce[::-1]}):
        refused = shop(1).post("/v1/draws", json=other, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (422, "idempotency-key-reused")


@pytest.mark.parametrize(
    ("member", "status", "sent"),
    [
        (None, 401, {"json": {}, "headers": {"Idempotency-Key": "x"}}),
        (1, 400, {"json": {}}),
        (1, 400, {"json": {}, "headers": {"Idempotency-Key": "a:consume"}}),
        (1, 400, {"json": [], "headers": {"Idempotency-Key": "x"}}),
        (1, 400, {"content": "{", "headers": {"Idempotency-Key": "x", "Content-Type": "application/json"}}),
        (1, 400, {"data": {"account_id": 1}, "headers": {"Idempotency-Key": "x"}}),
        (1, 413, {"json": {"campaign": "x" * 20_000}, "headers": {"Idempotency-Key": "x"}}),
        (1, 400, {"json": {"client_nonce": "short"}, "headers": {"Idempotency-Key": "x"}}),
        (1, 422, {"json": {"campaign": "nowhere"}, "headers": {"Idempotency-Key": "x"}}),
        (1, 422, {"json": {"pulls": 10}, "headers": {"Idempotency-Key": "x"}}),  # `default` sells single draws
    ],
    ids=[
        *("stranger", "no key", "colon", "list", "broken", "form", "large", "no nonce"),
        *("gateway refuses", "pulls are not sold"),
    ],
)
def test_what_is_refused_reaches_no_account(
    shop: Any, house: House, member: int | None, status: int, sent: dict[str, Any]
) -> None:
    refused = shop(member).post("/v1/draws", **sent)
    assert (refused.status_code, refused.headers["content-type"]) == (status, "application/problem+json")
    assert asked(house, "x") == []


def test_nothing_else_of_the_gateway_is_reached(shop: Any) -> None:
    for path in ("/v1/accounts/2", "/v1/draws/x/transactions", "/openapi.json", "/v1/draws/..%2F..%2Freadyz"):
        assert shop(1).get(path).status_code == 404, path
    assert shop(None).get("/v1/draws/x").status_code == 401
