"""The receivers to copy, in Python and Node: what is signed is acted on once, and nothing else is."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from decimal import Decimal
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import httpx
import pytest

from tests import servers
from tests.fulfilments.books import BY, add_webhook, coupons, pass_time, settings_for, states
from tests.ledgers import migrated
from tests.processes import wait_for
from tombola.producers.storage.engines import open_engine
from tombola.worker.fulfilments import webhooks
from tombola.worker.fulfilments.signatures import make_secret, signature
from tombola.worker.ledger.accounts import open_account
from tombola.worker.relay.fulfilling import Fulfilling

RECEIVERS = Path(__file__).parents[2] / "producers" / "examples" / "webhooks"
TIMEOUT_S = 20
NODE = """
import {{ appendFileSync, existsSync }} from 'node:fs';
import {{ createServer }} from 'node:http';
import {{ onceIn, webhookReceiver }} from '{receivers}/receiver.mjs';
const act = async (event) => {{
  if (existsSync('{folder}/fail')) throw new Error('the shop is on fire');
  await new Promise((resolve) => setTimeout(resolve, 20));
  appendFileSync('{folder}/acts', JSON.stringify(event) + '\\n');
}};
const once = onceIn('{folder}/received', act);
createServer(webhookReceiver({{ secrets: process.env.WEBHOOK_SECRETS.split(' '), once }})).listen({port}, '{host}');
"""

pytestmark = [pytest.mark.process, pytest.mark.timeout(servers.INSTALL_TIMEOUT_S + 60)]


class Shop(NamedTuple):
    """A receiver that runs, and the file with a line for each of its acts. With `fail` there, every act fails."""

    url: str
    folder: Path

    @property
    def acts(self) -> list[dict[str, Any]]:
        file = self.folder / "acts"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def fails(self, wanted: bool) -> None:
        (self.folder / "fail").touch() if wanted else (self.folder / "fail").unlink()


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def get_stderr(self) -> Any:
        return open(os.devnull, "w")


class Threaded(ThreadingMixIn, WSGIServer):
    daemon_threads = True


@contextmanager
def python_receiver(secrets: Sequence[str], folder: Path) -> Iterator[Shop]:
    spec = importlib.util.spec_from_file_location("shop_receiver", RECEIVERS / "receiver.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def act(connection: sqlite3.Connection, event: dict[str, Any]) -> None:
        connection.execute("CREATE TABLE IF NOT EXISTS shipped (code TEXT)")
        connection.execute("INSERT INTO shipped VALUES (?)", (event.get("code"),))
        if (folder / "fail").exists():
            raise RuntimeError("the shop is on fire")
        with (folder / "acts").open("a") as file:
            file.write(json.dumps(event) + "\n")

    receiver = module.WebhookReceiver(secrets, module.Once(str(folder / "received.db"), act))
    with make_server(servers.HOST, 0, receiver, server_class=Threaded, handler_class=Quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield Shop(f"http://{servers.HOST}:{server.server_port}/hook", folder)
        finally:
            server.shutdown()


@contextmanager
def node_receiver(secrets: Sequence[str], folder: Path) -> Iterator[Shop]:
    node = servers._binary("node", ("nodejs", "npm"))
    port = servers._free_port()
    script = folder / "shop.mjs"
    script.write_text(NODE.format(receivers=RECEIVERS, folder=folder, port=port, host=servers.HOST))
    env = os.environ | {"WEBHOOK_SECRETS": " ".join(secrets)}
    url = f"http://{servers.HOST}:{port}/hook"
    with subprocess.Popen([node, str(script)], env=env, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: _answers(url), within_s=TIMEOUT_S, what=lambda: "node does not answer")
            yield Shop(url, folder)
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=TIMEOUT_S).status_code > 0
    except httpx.TransportError:
        return False


@pytest.fixture(params=[python_receiver, node_receiver], ids=["python", "node"])
def receiver(request: pytest.FixtureRequest) -> Any:
    return request.param


SECRET = make_secret()
EVENT = {"event": "grant.coupon", "idempotency_key": "k:coupon", "code": "C-1", "note": "ü €"}


@pytest.fixture
def shop(receiver: Any, tmp_path: Path) -> Iterator[Shop]:
    with receiver([make_secret(), SECRET], tmp_path) as shop:
        yield shop


def signed(body: bytes, secret: str = SECRET, id: str = "msg_1", age_s: float = 0) -> dict[str, str]:
    stamp = int(time.time() - age_s)
    return {
        "Webhook-Id": id,
        "Webhook-Timestamp": str(stamp),
        "Webhook-Signature": signature(secret, id, stamp, body),
        "Content-Type": "application/json",
    }


def post(shop: Shop, body: bytes, headers: dict[str, str]) -> int:
    return httpx.post(shop.url, content=body, headers=headers, timeout=TIMEOUT_S).status_code


def test_what_is_signed_is_acted_on_once(shop: Shop) -> None:
    body = json.dumps(EVENT, ensure_ascii=False).encode()
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda number: post(shop, body, signed(body, id=f"msg_{number}")), range(16)))
    assert statuses == [204] * 16
    assert shop.acts == [EVENT]
    other = json.dumps(EVENT | {"idempotency_key": "k:coupon_2"}).encode()
    assert post(shop, other, signed(other)) == 204
    assert len(shop.acts) == 2


def test_a_further_signature_and_one_of_another_kind_do_no_harm(shop: Shop) -> None:
    body = json.dumps(EVENT).encode()
    headers = signed(body)
    theirs = signature(make_secret(), "msg_1", int(headers["Webhook-Timestamp"]), body)
    headers["Webhook-Signature"] = f"v1a,xyz {theirs} {headers['Webhook-Signature']}"
    assert post(shop, body, headers) == 204
    assert len(shop.acts) == 1


def test_what_is_not_signed_is_refused(shop: Shop) -> None:
    body = json.dumps(EVENT).encode()
    good = signed(body)
    late = {"Webhook-Timestamp": str(int(good["Webhook-Timestamp"]) + 1)}
    for headers, status in [
        (signed(body, make_secret()), 401),
        (signed(body + b" "), 401),
        (good | {"Webhook-Id": "msg_2"}, 401),
        (good | late, 401),
        (good | {"Webhook-Signature": ""}, 401),
        (good | {"Webhook-Signature": "v1,"}, 401),
        (good | {"Webhook-Signature": good["Webhook-Signature"].replace("v1,", "v2,")}, 401),
        (good | {"Webhook-Signature": good["Webhook-Signature"][:-2]}, 401),
        (good | {"Webhook-Timestamp": "soon"}, 400),
        (good | {"Webhook-Timestamp": "9" * 500}, 400),
        (good | {"Webhook-Id": ""}, 400),
        ({}, 400),
        (signed(body, age_s=301), 401),
        (signed(body, age_s=-330), 401),
    ]:
        assert post(shop, body, headers) == status, headers
    large = b"x" * 300_000
    assert post(shop, large, signed(large)) == 413
    assert httpx.get(shop.url, timeout=TIMEOUT_S).status_code == 405
    assert shop.acts == []


def test_an_act_that_fails_is_done_at_the_next_attempt(shop: Shop) -> None:
    body = json.dumps(EVENT).encode()
    shop.fails(True)
    for _ in range(2):
        assert post(shop, body, signed(body)) == 500
    shop.fails(False)
    assert post(shop, body, signed(body)) == 204
    assert shop.acts == [EVENT]
    if (database := shop.folder / "received.db").exists():  # what a failed act had written went with it
        with closing(sqlite3.connect(database)) as connection:
            assert connection.execute("SELECT code FROM shipped").fetchall() == [("C-1",)]


def test_a_relay_and_a_receiver_agree(receiver: Any, tmp_path: Path) -> None:
    """Also while the secret is rotated; what comes a second time is not acted on again."""
    engine = open_engine(f"sqlite:///{tmp_path}/ledger.db")
    migrated(engine)
    account = open_account(engine, user_id=1, balance=Decimal(10))
    port = servers._free_port()  # only to have a URL before there is a secret
    secret = add_webhook(engine, "shop", f"http://{servers.HOST}:{port}/", "*")
    with receiver([secret], tmp_path) as shop:
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE webhooks SET url = ?", (shop.url,))
        keys = coupons(engine, account, 10)
        relay = Fulfilling(engine, settings_for(engine))
        assert relay.run_once() == 10
        webhooks.rotate(engine, "shop", **BY)  # the receiver has the former secret still
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE fulfilments SET state = 'pending'")
        pass_time(engine)
        keys += coupons(engine, account, 5, prefix="more")
        assert relay.run_once() == 15
        assert Counter(it["idempotency_key"] for it in shop.acts) == Counter(keys)
        assert Counter(it["code"] for it in shop.acts) == Counter(f"C-{number}" for number in [*range(10), *range(5)])
    assert set(states(engine).values()) == {"delivered"}
    relay.close()
