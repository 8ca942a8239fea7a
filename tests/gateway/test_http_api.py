"""The HTTP gateway as web frontends meet it: real processes, asked over HTTP."""

import asyncio
import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis.errors import Unsatisfiable
from redis import Redis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as openapi_checks
from sqlalchemy import create_engine, text

from tests import processes, servers
from tests.books import assert_books, table
from tests.gateways import OPEN_TO_ALL, TIMEOUT_S, Gateway, gateway, settle
from tests.kept_results import keep_results
from tests.processes import House, draws, wait_for
from tombola.producers.brokers.registry import open_broker
from tombola.producers.domain.causes import dead_because
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.entry import Entry
from tombola.producers.gateway.app import create_app
from tombola.producers.gateway.problems import KINDS
from tombola.producers.gateway.results import Results
from tombola.producers.results import KEY_PREFIX, ResultStore, StoredResult
from tombola.producers.settings import Settings
from tombola.producers.storage import api_keys
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.requests import Submission
from tombola.worker.relay.given_up import time_out_once
from tombola.worker.relay.overdue import relay_once
from tombola.worker.relay.retention import archive_once

BODY_BYTES_MAX = 16 * 1024
NONCE = "0123456789abcdef-nonce_Z"
WAITS = 1000
CHECKS = [
    not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]
THREADS_MAX = 25


@pytest.fixture(scope="module")
def redis_server() -> Iterator[servers.Server]:
    """One of their own: these tests kill connections, and count what is subscribed."""
    with servers.redis(private=True) as server:
        yield server


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, redis_server: servers.Server) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("gateway")
    with House(f"sqlite:///{folder}/ledger.db", redis_server.url, redis_server.url) as house:
        yield house


@pytest.fixture(scope="module")
def account(house: House) -> int:
    return house.accounts(1, balance=100_000)[0]


@pytest.fixture(scope="module")
def open_gateway(house: House, account: int) -> Iterator[Gateway]:
    """One that asks for no key, for most tests; each has request keys of its own."""
    with gateway(house, **OPEN_TO_ALL) as started:
        yield started


def problem(response: httpx.Response, status: int, code: str | None = None) -> str:
    """What a problem says; that it is one, and of a kind that is documented."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    told = response.json()
    assert told.keys() == {"title", "status", "detail", "code", "type"}
    assert told["status"] == status
    assert (told["code"], status) in {(kind.code, kind.status) for kind in KINDS}
    assert told["code"] == (code or told["code"])
    assert told["type"] == f"/docs/errors#{told['code']}"
    return str(told["detail"])


def events(stream: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in stream.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def rows(house: House, key: str) -> list[dict[str, Any]]:
    return [row for row in table(house.engine, "api_idempotency_requests") if row["request_key"] == key]


# ---- making draws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["bare-1", '"quoted-1"'])
def test_a_draw_is_answered_with_a_ticket(open_gateway: Gateway, house: House, account: int, header: str) -> None:
    key = header.strip('"')
    answer = open_gateway.draw({"account_id": account}, header)
    assert answer.status_code == 202
    assert answer.json() == {"request_key": key, "lottery_session_id": key, "status": "accepted"}
    assert answer.headers["location"] == f"/v1/draws/{key}"
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["idempotency-key"] == key
    assert "idempotency-replayed" not in answer.headers
    assert [row["status"] for row in rows(house, key)] == ["accepted"]


def test_a_repeat_gets_the_same_answer(open_gateway: Gateway, house: House, account: int) -> None:
    first = open_gateway.draw({"account_id": account}, "again")
    for header in ("again", '"again"'):
        repeat = open_gateway.draw({"account_id": account, "campaign": "default"}, header)
        assert repeat.headers["idempotency-replayed"] == "true"
        assert (repeat.status_code, repeat.content) == (202, first.content)
        assert repeat.headers["location"] == first.headers["location"]
    settle(house, DrawRequest(account_id=account, request_key="again"))
    assert open_gateway.draw({"account_id": account}, "again").content == first.content


@pytest.mark.parametrize(
    "other",
    [{"account_id": 2}, {"campaign": "spring"}, {"lottery_session_id": "elsewhere"}, {"client_nonce": NONCE}],
    ids=str,
)
def test_a_key_with_other_content_is_refused(open_gateway: Gateway, account: int, other: dict[str, Any]) -> None:
    open_gateway.draw({"account_id": account}, "taken")
    told = problem(open_gateway.draw({"account_id": account} | other, "taken"), 422, "idempotency-key-reused")
    assert "different request" in told
    # a session of another request's, too
    problem(open_gateway.draw({"account_id": account, "lottery_session_id": "taken"}, "not-taken"), 422)


def test_a_draw_with_a_nonce_is_another_one_with_another_nonce(
    open_gateway: Gateway, house: House, account: int
) -> None:
    asked = {"account_id": account, "client_nonce": NONCE}
    first = open_gateway.draw(asked, "nonce-1")
    assert first.status_code == 202
    assert first.json() == {"request_key": "nonce-1", "lottery_session_id": "nonce-1", "status": "accepted"}
    repeat = open_gateway.draw(asked | {"campaign": "default", "pulls": None}, "nonce-1")
    assert (repeat.content, repeat.headers["idempotency-replayed"]) == (first.content, "true")
    for other in ({"account_id": account}, asked | {"client_nonce": NONCE[::-1]}, asked | {"client_nonce": None}):
        problem(open_gateway.draw(other, "nonce-1"), 422, "idempotency-key-reused")
    request = DrawRequest(account_id=account, request_key="nonce-1", client_nonce=NONCE)
    (row,) = rows(house, "nonce-1")
    assert (row["kind"], row["terms"]) == ("draw", f'["default",null,"{NONCE}"]')
    assert row["fingerprint"] == request.fingerprint()
    (result,) = settle(house, request)
    shown = open_gateway.show("nonce-1")
    assert (shown.status_code, shown.content) == (200, result)
    assert shown.json()["v"] == 1
    # A settled draw refuses another nonce as well.
    problem(open_gateway.draw({"account_id": account}, "nonce-1"), 422, "idempotency-key-reused")


def test_a_draw_without_a_nonce_is_of_contract_v1(open_gateway: Gateway, house: House, account: int) -> None:
    open_gateway.draw({"account_id": account}, "plain-1")
    (row,) = rows(house, "plain-1")
    body = (
        f'{{"v":1,"request_key":"plain-1","lottery_session_id":"plain-1","account_id":{account},"campaign":"default"}}'
    )
    assert (row["kind"], row["terms"]) == (None, None)
    assert row["fingerprint"] == hashlib.sha256(body.encode()).hexdigest()


def test_without_a_key_one_is_made_and_returned(open_gateway: Gateway, account: int) -> None:
    made = open_gateway.draw({"account_id": account})
    key = made.json()["request_key"]
    assert made.headers["idempotency-key"] == key
    assert re.fullmatch(r"lottery_req_\d+_[0-9a-f]{8}_\d{3}", key)
    assert open_gateway.draw({"account_id": account}, key).headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize("key", ["", '""', '" "', "a:consume", "a b", "ü", '"half', "k" * 65, "batch", "..", "."])
def test_a_key_that_cannot_be_one_is_refused(open_gateway: Gateway, house: House, account: int, key: str) -> None:
    before = len(table(house.engine, "api_idempotency_requests"))
    headers = [(b"Idempotency-Key", key.encode("latin-1"))]
    problem(open_gateway.client.post("/v1/draws", json={"account_id": account}, headers=headers), 400)
    assert len(table(house.engine, "api_idempotency_requests")) == before


WRONG_BODIES = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b'{"account_id":"1"}',
    b'{"account_id":1.0}',
    b'{"account_id":true}',
    b'{"account_id":0}',
    b'{"account_id":9223372036854775808}',
    b'{"account_id":1,"amount":1}',
    b'{"account_id":1,"campaign":"a b"}',
    b'{"account_id":1,"client_nonce":""}',
    b'{"account_id":1,"client_nonce":"%b"}' % (b"n" * 15),
    b'{"account_id":1,"client_nonce":"%b"}' % (b"n" * 65),
    b'{"account_id":1,"client_nonce":"%b."}' % (b"n" * 16),
    b'{"account_id":1,"client_nonce":"%b\\n"}' % (b"n" * 16),
    b'{"account_id":1,"client_nonce":1234567890123456}',
    b'{"account_id":1,"lottery_session_id":""}',
    b'{"account_id":1,"lottery_session_id":"a/b"}',
    b'{"account_id":1',
    b'{"account_id":"\xff"}',
    b'{"account_id":' + b"[" * 16_000,
]


@pytest.mark.parametrize("body", WRONG_BODIES, ids=range(len(WRONG_BODIES)))
def test_a_body_that_is_no_draw_is_refused(open_gateway: Gateway, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    in_batch = b'{"draws":[%b]}' % body[: BODY_BYTES_MAX - 20]
    for path, sent in (("/v1/draws", body), ("/v1/draws/batch", in_batch), ("/v1/draws/batch", body)):
        problem(open_gateway.client.post(path, content=sent, headers=headers), 400)


def test_a_form_of_another_page_is_refused(open_gateway: Gateway) -> None:
    for path in ("/v1/draws", "/v1/draws/batch"):
        for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
            sent = open_gateway.client.post(path, content=b'{"account_id":1}', headers={"Content-Type": content_type})
            assert "application/json" in problem(sent, 400)


@pytest.mark.parametrize("path", ["/v1/draws", "/v1/draws/batch"])
def test_a_body_is_not_read_beyond_16_kib(open_gateway: Gateway, path: str) -> None:
    headers = {"Content-Type": "application/json"}
    giant = b'{"account_id":1, "campaign":"' + b"x" * 1_000_000

    def in_chunks() -> Iterator[bytes]:  # without a length
        for start in range(0, len(giant), 4096):
            yield giant[start : start + 4096]

    problem(open_gateway.client.post(path, content=giant, headers=headers), 413, "body-too-large")
    problem(open_gateway.client.post(path, content=in_chunks(), headers=headers), 413)
    problem(open_gateway.client.post(path, content=b" " * (BODY_BYTES_MAX + 1), headers=headers), 413)
    problem(open_gateway.client.post(path, content=b" " * BODY_BYTES_MAX, headers=headers), 400)


def test_each_draw_of_a_batch_has_its_own_answer(open_gateway: Gateway, house: House, account: int) -> None:
    open_gateway.draw({"account_id": account}, "b-known")
    asked = [
        {"account_id": account, "request_key": "b-1", "lottery_session_id": "b-session"},
        {"account_id": account + 1, "request_key": "b-known"},
        {"account_id": account, "request_key": "b-known"},
        {"account_id": account},
        {"account_id": account, "request_key": "b-1", "lottery_session_id": "b-session"},
        {"account_id": account, "request_key": "b-2", "lottery_session_id": "b-session"},
    ]
    answer = open_gateway.client.post("/v1/draws/batch", json={"draws": asked})
    assert answer.status_code == 207
    told = answer.json()["answers"]
    assert [(it["status"], it["replayed"]) for it in told] == [
        (202, False),
        (422, False),
        (202, True),
        (202, False),
        (202, True),
        (422, False),
    ]
    assert told[0]["ticket"] == {"request_key": "b-1", "lottery_session_id": "b-session", "status": "accepted"}
    assert told[1]["ticket"] is None
    assert told[1]["problem"]["status"] == 422
    assert rows(house, told[3]["ticket"]["request_key"])
    assert rows(house, "b-2") == []


def test_the_draws_of_a_batch_have_nonces_of_their_own(open_gateway: Gateway, house: House, account: int) -> None:
    asked = [
        {"account_id": account, "request_key": "bn-1", "client_nonce": NONCE},
        {"account_id": account, "request_key": "bn-1", "client_nonce": NONCE[::-1]},
        {"account_id": account, "request_key": "bn-1", "client_nonce": NONCE},
        {"account_id": account, "request_key": "bn-2"},
    ]
    told = open_gateway.client.post("/v1/draws/batch", json={"draws": asked}).json()["answers"]
    assert [(it["status"], it["replayed"]) for it in told] == [(202, False), (422, False), (202, True), (202, False)]
    assert [row["terms"] for key in ("bn-1", "bn-2") for row in rows(house, key)] == [
        f'["default",null,"{NONCE}"]',
        None,
    ]


def test_an_unknown_campaign_is_refused_before_anything_is_written(
    open_gateway: Gateway, house: House, account: int
) -> None:
    stranger = {"account_id": account, "campaign": "spring"}
    assert "'spring'" in problem(open_gateway.draw(stranger, "u-1"), 422, "unknown-campaign")
    asked = [{"account_id": account, "request_key": "u-2"}, stranger | {"request_key": "u-3"}]
    answer = open_gateway.client.post("/v1/draws/batch", json={"draws": asked})
    assert [it["status"] for it in answer.json()["answers"]] == [202, 422]
    assert "'spring'" in answer.json()["answers"][1]["problem"]["detail"]
    assert [bool(rows(house, key)) for key in ("u-1", "u-2", "u-3")] == [False, True, False]
    problem(open_gateway.show("u-1"), 404, "session-not-found")


def test_a_batch_has_a_limit(open_gateway: Gateway, account: int) -> None:
    draw = {"account_id": account}
    assert len(open_gateway.client.post("/v1/draws/batch", json={"draws": [draw] * 100}).json()["answers"]) == 100
    problem(open_gateway.client.post("/v1/draws/batch", json={"draws": [draw] * 101}), 400)
    problem(open_gateway.client.post("/v1/draws/batch", json={"draws": []}), 400)


# ---- results ---------------------------------------------------------------------------------------------------------


def test_a_result_is_there_or_not_yet_or_unknown(open_gateway: Gateway, house: House, account: int) -> None:
    problem(open_gateway.show("r-1"), 404)
    ticket = open_gateway.draw({"account_id": account}, "r-1")
    not_yet = open_gateway.show("r-1")
    assert (not_yet.status_code, not_yet.content) == (202, ticket.content)
    assert int(not_yet.headers["retry-after"]) >= 1
    (result,) = settle(house, DrawRequest(account_id=account, request_key="r-1"))
    found = open_gateway.show("r-1")
    assert (found.status_code, found.content) == (200, result)
    assert found.headers["content-type"] == "application/json"


def test_a_rejection_is_a_result(open_gateway: Gateway, house: House) -> None:
    open_gateway.draw({"account_id": 4711}, "r-none")
    (result,) = settle(house, DrawRequest(account_id=4711, request_key="r-none"))
    found = open_gateway.show("r-none")
    assert (found.status_code, found.content, found.json()["reason"]) == (200, result, "ACCOUNT_NOT_FOUND")


def test_a_long_poll_is_answered_when_the_result_comes(open_gateway: Gateway, house: House, account: int) -> None:
    open_gateway.draw({"account_id": account}, "r-wait")
    with ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(open_gateway.show, "r-wait", 30) for _ in range(3)]
        wait_until_subscribed(house, 1)
        (result,) = settle(house, DrawRequest(account_id=account, request_key="r-wait"))
        assert [wait.result().content for wait in waits] == [result] * 3
    open_gateway.draw({"account_id": account}, "r-late")
    assert open_gateway.show("r-late", 0.2).status_code == 202


@pytest.mark.parametrize("wait", ["61", "-1", "nan", "soon", ""])
def test_a_wait_has_a_limit(open_gateway: Gateway, wait: str) -> None:
    problem(open_gateway.client.get("/v1/draws/x", params={"wait": wait}), 400)


def test_events_tell_a_result(open_gateway: Gateway, house: House, account: int) -> None:
    ticket = open_gateway.draw({"account_id": account}, "r-events").json()
    with open_gateway.client.stream("GET", "/v1/draws/r-events/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        told = events(stream)
        assert next(told) == ("accepted", ticket)
        (result,) = settle(house, DrawRequest(account_id=account, request_key="r-events"))
        assert list(told) == [("result", json.loads(result))]
    with open_gateway.client.stream("GET", "/v1/draws/r-events/events") as stream:
        assert list(events(stream)) == [("result", json.loads(result))]
    problem(open_gateway.client.get("/v1/draws/unknown/events"), 404)


def test_a_dead_request_is_told_as_one(open_gateway: Gateway, house: House, account: int) -> None:
    open_gateway.draw({"account_id": account}, "r-dead")
    time_out_once(house.engine, timeout_s=0)
    found = open_gateway.show("r-dead", 20)
    assert found.status_code == 200
    assert found.json() == {
        "request_key": "r-dead",
        "lottery_session_id": "r-dead",
        "account_id": account,
        "campaign": "default",
        "status": "dead",
        "reason": "TIMED_OUT",
        "detail": dead_because("TIMED_OUT"),
    }
    assert "operator can replay it" in found.json()["detail"]
    with open_gateway.client.stream("GET", "/v1/draws/r-dead/events") as stream:
        assert list(events(stream)) == [("dead", found.json())]
    assert open_gateway.client.get("/v1/draws/r-dead/transactions").json() == []


def test_a_wait_ends_when_the_draw_dies(open_gateway: Gateway, house: House, account: int) -> None:
    open_gateway.draw({"account_id": account}, "r-dies")
    store = ResultStore.from_settings(house.settings, engine=house.engine)
    with ThreadPoolExecutor(1) as pool:
        wait = pool.submit(open_gateway.show, "r-dies", 60)
        wait_until_subscribed(house, 1)
        time.sleep(2)  # the database was asked when the wait began, and is not asked again
        began = time.monotonic()
        time_out_once(house.engine, timeout_s=0, results=store)
        assert wait.result().json()["status"] == "dead"
        assert time.monotonic() < began + 30
    store.close()


def test_transactions_are_the_ledgers_rows(open_gateway: Gateway, house: House, account: int) -> None:
    open_gateway.draw({"account_id": account}, "r-rows")
    path = "/v1/draws/r-rows/transactions"
    assert open_gateway.client.get(path).json() == []
    (result,) = settle(house, DrawRequest(account_id=account, request_key="r-rows"))
    shown = open_gateway.client.get(path).json()
    kept = [row for row in table(house.engine, "asset_transactions") if row["lottery_session_id"] == "r-rows"]
    assert [row["transaction_id"] for row in shown] == [row["transaction_id"] for row in kept]
    own = ("transaction_id", "account_id", "created_at")
    assert [{name: row[name] for name in row if name not in own} for row in shown] == json.loads(result)["transactions"]
    assert {row["account_id"] for row in shown} == {account}
    problem(open_gateway.client.get("/v1/draws/unknown/transactions"), 404)


def test_an_account_is_shown_with_its_balance(open_gateway: Gateway, house: House, account: int) -> None:
    (row,) = table(house.engine, "account_asset_balances")
    shown = open_gateway.client.get(f"/v1/accounts/{account}")
    assert shown.json() == {
        "account_id": account,
        "user_id": row["user_id"],
        "asset_code": row["asset_code"],
        "balance": f"{row['balance'] // 100}.{row['balance'] % 100:02d}",
        "held": "0.00",
    }
    for unknown in ("4711", "9223372036854775808"):
        problem(open_gateway.client.get(f"/v1/accounts/{unknown}"), 404, "account-not-found")
    for wrong in ("0", "-1", "x", "1e3"):
        problem(open_gateway.client.get(f"/v1/accounts/{wrong}"), 400)


# ---- errors, documents, operations -----------------------------------------------------------------------------------


def test_what_the_framework_refuses_is_a_problem_too(open_gateway: Gateway) -> None:
    client = open_gateway.client
    for method, path in (("GET", "/v1/draws"), ("DELETE", "/v1/draws/x"), ("PUT", "/v1/draws/batch")):
        refused = client.request(method, path)
        problem(refused, 405, "method-not-allowed")
        assert refused.headers["allow"]
    problem(client.get("/nowhere"), 404, "not-found")
    problem(client.get("/v1/draws/a%2Fb"), 404)
    problem(client.get("/v1/draws/a%00"), 400)


def test_the_documents_ask_no_other_host(open_gateway: Gateway) -> None:
    page = open_gateway.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    asked = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page.text)
    own = [path for path in asked if not path.startswith("data:")]
    assert len(own) >= 3
    for path in own:
        assert urlsplit(path).netloc == ""
        file = open_gateway.client.get(path)
        assert file.status_code == 200
        assert int(file.headers["content-length"]) == len(file.content)
        assert open_gateway.client.head(path).headers["content-length"] == file.headers["content-length"]
    assert "http://" not in page.text
    assert "https://" not in page.text
    document = open_gateway.client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/draws",
        "/v1/draws/batch",
        "/v1/draws/{session_id}",
        "/v1/draws/{session_id}/events",
        "/.well-known/tombola-keys.json",
        "/v1/draws/{session_id}/receipt",
        "/v1/draws/{session_id}/proof",
        "/v1/draws/{session_id}/transactions",
        "/v1/draws/{session_id}/refund",
        "/v1/accounts",
        "/v1/accounts/{account_id}",
        "/v1/accounts/{account_id}/transactions",
        "/v1/accounts/{account_id}/statement",
        "/v1/accounts/{account_id}/recharges",
        "/v1/accounts/{account_id}/adjustments",
        "/v1/accounts/{account_id}/holds",
        "/v1/transfers",
        "/v1/movements/{request_key}",
        "/v1/holds/{hold_key}",
        "/v1/holds/{hold_key}/post",
        "/v1/holds/{hold_key}/void",
        "/v1/campaigns",
        "/v1/campaigns/{name}",
        "/v1/odds/{odds_hash}",
        "/v1/checkpoints/latest",
        "/v1/seeds",
        "/healthz",
        "/readyz",
    }
    # Generated clients have methods of these names.
    assert {operation["operationId"] for path in document["paths"].values() for operation in path.values()} == {
        *("makeDraw", "makeDraws", "getDraw", "watchDraw", "listTransactions", "refundDraw"),
        *("listAccounts", "getAccount", "listAccountTransactions", "getStatement"),
        *("openAccount", "recharge", "transfer", "adjust", "getMovement", "hold", "getHold", "postHold", "voidHold"),
        *("listCampaigns", "getCampaign", "getOdds", "getCheckpoint", "listSeeds", "getHealth", "getReadiness"),
        *("getProof", "getReceipt", "listReceiptKeys"),
    }


def test_the_type_of_a_problem_leads_to_what_it_means(open_gateway: Gateway) -> None:
    """Also of those that no other test meets."""
    page = open_gateway.client.get("/docs/errors")
    assert page.headers["content-type"].startswith("text/html")
    assert len({kind.code for kind in KINDS}) == len(KINDS) > 15
    for kind in KINDS:
        path, _, place = kind.type.partition("#")
        assert path == "/docs/errors"
        assert page.text.count(f'id="{place}"') == 1


def test_metrics_count_requests_by_route(open_gateway: Gateway) -> None:
    for session in ("m-1", "m-2", "m-3"):
        open_gateway.show(session)
    told = open_gateway.metrics()
    assert re.search(
        r'^tombola_gateway_requests_total\{method="GET",route="/v1/draws/\{session_id[^}]*\}",status="404"\} [0-9.]+$',
        told,
        re.MULTILINE,
    )
    assert "m-1" not in told
    assert "tombola_accepted_backlog" in told
    problem(open_gateway.client.get("/metrics"), 404)  # not for strangers


def test_a_gateway_with_all_it_needs_is_ready(open_gateway: Gateway) -> None:
    ready = open_gateway.client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {"database": True, "broker": True, "results": True, "missing": []}


@pytest.mark.process
def test_a_gateway_says_what_is_missing_and_nothing_more(tmp_path: Path) -> None:
    nobody = f"redis://:hunter2@{servers.HOST}:{servers._free_port()}/0"
    house = House(f"sqlite:///{tmp_path}/not-migrated.db", nobody, nobody)
    with gateway(house, **OPEN_TO_ALL) as started:
        ready = started.client.get("/readyz")
        assert (ready.status_code, ready.json()["missing"]) == (503, ["database", "broker", "results"])
        refused = started.draw({"account_id": 1}, "k")
        told = problem(refused, 503, "service-unavailable") + problem(started.show("k"), 503) + ready.text
        assert refused.headers["retry-after"]
        for inside in ("sqlite", "migrated", "hunter2", "table"):
            assert inside not in told
        assert started.client.get("/healthz").text == "ok"
    house.engine.dispose()


def test_a_gateway_without_its_settings_does_not_start() -> None:
    with pytest.raises(Exception, match="TOMBOLA_DATABASE_URL is not set"):
        create_app(Settings.from_env({}))


# ---- Redis, down or wrong --------------------------------------------------------------------------------------------


def wait_until_subscribed(house: House, count: int) -> None:
    with Redis.from_url(house.settings.need("result_url")) as client:

        def subscribed() -> int:
            return len(client.pubsub_channels(f"{KEY_PREFIX}*"))

        wait_for(lambda: subscribed() >= count, within_s=30, what=lambda: f"{subscribed()} of {count} subscribed")


def test_what_redis_holds_wrongly_is_not_handed_out(open_gateway: Gateway, house: House, account: int) -> None:
    request = DrawRequest(account_id=account, request_key="w-1")
    open_gateway.draw({"account_id": account}, "w-1")
    other = DrawRequest(account_id=account, request_key="w-other")
    open_gateway.draw({"account_id": account}, "w-other")
    (result,) = settle(house, request, store=False)
    (others,) = settle(house, other)
    with Redis.from_url(house.settings.need("result_url")) as client:
        wrong = [b"", b"\xff\x00", b"{}", b'{"status":"SUCCESS","result":{}}', b"[" * 10_000]
        wrong += [client.get(f"{KEY_PREFIX}w-other")]
        for value in wrong:
            client.set(f"{KEY_PREFIX}w-1", value)
            assert open_gateway.show("w-1").content == result
        client.delete(f"{KEY_PREFIX}w-1")
        client.rpush(f"{KEY_PREFIX}w-1", "a list")
        assert open_gateway.show("w-1").content == result
        client.flushdb()
        assert open_gateway.show("w-other").content == others
    keep_results(house.engine)
    archive_once(house.engine, older_than_s=0)
    assert open_gateway.show("w-1").content == result


def test_a_wait_takes_nothing_but_its_own_result(open_gateway: Gateway, house: House, account: int) -> None:
    open_gateway.draw({"account_id": account}, "w-2")
    channel = f"{KEY_PREFIX}w-2"
    with ThreadPoolExecutor(1) as pool, Redis.from_url(house.settings.need("result_url")) as client:
        wait = pool.submit(open_gateway.show, "w-2", 30)
        wait_until_subscribed(house, 1)
        (others,) = settle(house, DrawRequest(account_id=account, request_key="w-3"), store=False)
        for forged in (b"", b"\xff", StoredResult("w-2", others, utc_now()).envelope()):
            client.publish(channel, forged)
        (result,) = settle(house, DrawRequest(account_id=account, request_key="w-2"))
        assert wait.result().content == result


def test_a_wait_finds_what_redis_has_forgotten(open_gateway: Gateway, house: House, account: int) -> None:
    """Not only when its time is over: the seconds here are many more than it takes."""
    for key in ("w-5", "w-6"):
        open_gateway.draw({"account_id": account}, key)
    (result,) = settle(house, DrawRequest(account_id=account, request_key="w-5"), store=False)
    started = time.monotonic()
    assert open_gateway.show("w-5", 60).content == result
    keep_results(house.engine)
    archive_once(house.engine, older_than_s=0)
    assert open_gateway.show("w-5", 60).content == result
    time_out_once(house.engine, timeout_s=0)
    assert open_gateway.show("w-6", 60).json()["status"] == "dead"
    assert time.monotonic() < started + 50


def test_a_lost_subscription_loses_no_result(open_gateway: Gateway, house: House, account: int) -> None:
    open_gateway.draw({"account_id": account}, "w-4")
    with ThreadPoolExecutor(1) as pool, Redis.from_url(house.settings.need("result_url")) as client:
        started = time.monotonic()
        wait = pool.submit(open_gateway.show, "w-4", 60)
        wait_until_subscribed(house, 1)
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        (result,) = settle(house, DrawRequest(account_id=account, request_key="w-4"))  # announced to nobody
        assert wait.result().content == result
        assert time.monotonic() < started + 50


@pytest.mark.process
def test_waits_outlive_redis_and_its_return(tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(servers.redis(private=True))
        house = stack.enter_context(House(f"sqlite:///{tmp_path}/ledger.db", server.url, server.url))
        (account,) = house.accounts(1)
        started = stack.enter_context(gateway(house, **OPEN_TO_ALL))
        pool = stack.enter_context(ThreadPoolExecutor(4))
        asked = draws([account], 4)

        def post(request: DrawRequest) -> Future[httpx.Response]:
            assert started.draw({"account_id": account}, request.request_key).status_code == 202
            return pool.submit(started.show, request.request_key, 60)

        # It hangs: who does not wait is answered from the database, and so is who waits.
        before = post(asked[0])
        wait_until_subscribed(house, 1)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        results = settle(house, *asked[:2], store=False)
        assert started.show(asked[1].request_key).status_code in (404, 200)
        assert before.result().content == results[0]
        # It is gone: draws are accepted all the same.
        server.kill()
        assert started.client.get("/readyz").json()["missing"] == ["broker", "results"]
        assert started.client.get("/readyz").status_code == 200
        during = post(asked[2])
        results += settle(house, asked[2], store=False)
        assert during.result().content == results[2]
        # It is back, empty: waits are announced as before.
        server.restart()
        wait_for(lambda: started.client.get("/readyz").json()["missing"] == [], within_s=30, what=started.process.log)
        after = post(asked[3])
        wait_until_subscribed(house, 1)
        results += settle(house, asked[3])
        assert after.result().content == results[3]
        assert [started.show(it.request_key).content for it in (asked[0], *asked[2:])] == [results[0], *results[2:]]
        assert_books(house.engine)


# ---- many at once ----------------------------------------------------------------------------------------------------


def queries(house: House) -> int:
    """How many statements the server has run that read or write."""
    with house.engine.connect().execution_options(read_only=True) as connection:
        told = connection.execute(
            text("SHOW GLOBAL STATUS WHERE Variable_name IN ('Com_select', 'Com_insert', 'Com_update')")
        )
        return sum(int(value) for _, value in told)


def test_one_key_in_a_storm_is_one_draw_and_a_handful_of_queries(
    mariadb_url: str, redis_server: servers.Server
) -> None:
    with House(mariadb_url, redis_server.url, redis_server.url) as house, ExitStack() as stack:
        (account,) = house.accounts(1)
        both = [stack.enter_context(gateway(house, **OPEN_TO_ALL)) for _ in range(2)]

        async def storm(count: int) -> list[httpx.Response]:
            headers = {"Idempotency-Key": "storm"}
            async with httpx.AsyncClient(timeout=60, headers=headers, verify=False) as client:
                urls = [f"{both[number % 2].url}/v1/draws" for number in range(count)]
                return await asyncio.gather(*[client.post(url, json={"account_id": account}) for url in urls])

        answers = asyncio.run(storm(50))
        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.content for answer in answers}) == 1
        assert [answer.headers.get("idempotency-replayed") for answer in answers].count(None) == 1
        assert len(rows(house, "storm")) == 1
        before, started = queries(house), time.monotonic()
        answers += [answer for _ in range(10) for answer in asyncio.run(storm(50))]
        # Each gateway counts the backlog once a second, and asks after a key again now and then.
        assert queries(house) - before < 20 + 4 * 2 * (time.monotonic() - started)
        assert len({answer.content for answer in answers}) == 1
        settle(house, DrawRequest(account_id=account, request_key="storm"))
        assert {both[number].show("storm", 20).status_code for number in range(2)} == {200}
        assert len(table(house.engine, "api_idempotency_requests")) == 1
        assert_books(house.engine)


def test_a_key_that_another_transaction_holds_waits_alone(mariadb_url: str, redis_server: servers.Server) -> None:
    """A frontend has accepted it in its own transaction, and takes its time."""
    slow_s = 4.5  # on two busy cores; who waits for the lock waits for longer: the read timeout is 5 s
    with House(mariadb_url, redis_server.url, redis_server.url) as house, ExitStack() as stack:
        (account,) = house.accounts(1)
        # Whoever waits for a lock in the server waits for so long.
        slow = {"TOMBOLA_LOCK_WAIT_S": "10", "TOMBOLA_CLAIM_AFTER_S": "600"}
        started = stack.enter_context(gateway(house, **slow, **OPEN_TO_ALL))
        entry = Entry(house.engine, relay_after_s=60)
        other = stack.enter_context(create_engine(mariadb_url, isolation_level="READ COMMITTED").connect())

        async def post(client: httpx.AsyncClient, key: str) -> tuple[httpx.Response, float]:
            began = time.monotonic()
            answer = await client.post("/v1/draws", json={"account_id": account}, headers={"Idempotency-Key": key})
            return answer, time.monotonic() - began

        async def all_at_once(turns: int, end: Callable[[], None]) -> list[httpx.Response]:
            """Every turn 50 new ones; the held key is asked for in each of the first two."""
            async with httpx.AsyncClient(base_url=started.url, timeout=60) as client:
                held = []
                for turn in range(turns):
                    keys = [f"{time.time_ns()}-{number}" for number in range(50)]
                    if turn < 2:
                        held.append(asyncio.create_task(post(client, "held")))
                    told = await asyncio.gather(*[post(client, key) for key in keys])
                    assert {answer.status_code for answer, _ in told} == {202}, started.process.log()
                    assert max(took_s for _, took_s in told) < slow_s
                end()
                return [answer for answer, _ in await asyncio.gather(*held)]

        entry.accept_with(other, Submission(DrawRequest(account_id=account, request_key="held")))
        for answer in asyncio.run(all_at_once(5, lambda: None)):
            assert "request key" in problem(answer, 503, "request-busy")
            assert answer.headers["retry-after"] == "1"
        told = asyncio.run(all_at_once(2, other.rollback))
        assert [answer.status_code for answer in told] == [202, 202]
        assert len({answer.content for answer in told}) == 1
        assert len(rows(house, "held")) == 1
        assert_books(house.engine)


def test_a_thousand_waits_cost_no_thread_and_no_query(mariadb_url: str, redis_server: servers.Server) -> None:
    with House(mariadb_url, redis_server.url, redis_server.url) as house, gateway(house, **OPEN_TO_ALL) as started:
        asked = draws(house.accounts(20, balance=10_000), WAITS)
        for start in range(0, WAITS, 100):
            body = [{"account_id": it.account_id, "request_key": it.request_key} for it in asked[start : start + 100]]
            assert started.client.post("/v1/draws/batch", json={"draws": body}).status_code == 207

        async def wait(request: DrawRequest) -> tuple[bytes, bytes]:
            reader, writer = await asyncio.open_connection(servers.HOST, urlsplit(started.url).port)
            path = f"/v1/draws/{request.lottery_session_id}?wait=60"
            writer.write(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            return head.partition(b"\r\n")[0], body

        def look_and_settle() -> dict[str, bytes]:
            wait_until_subscribed(house, WAITS)
            before = queries(house)
            time.sleep(2)
            assert queries(house) - before < 20
            status = Path(f"/proc/{started.process.process.pid}/status").read_text()
            assert int(status.partition("Threads:")[2].split()[0]) < THREADS_MAX
            results = []
            for start in range(0, WAITS, 500):
                results += settle(house, *asked[start : start + 500])
            return dict(zip([it.lottery_session_id for it in asked], results, strict=True))

        async def wait_all() -> tuple[list[tuple[bytes, bytes]], dict[str, bytes]]:
            waits = [asyncio.create_task(wait(it)) for it in asked]
            results = await asyncio.to_thread(look_and_settle)
            return await asyncio.gather(*waits), results

        answers, results = asyncio.run(wait_all())
        assert {head for head, _ in answers} == {b"HTTP/1.1 200 OK"}
        assert [body for _, body in answers] == [results[it.lottery_session_id] for it in asked]

        # The same at once for results that are there already.
        async def ask_all() -> list[tuple[bytes, bytes]]:
            return await asyncio.gather(*[wait(it) for it in asked])

        before = queries(house)
        assert [body for _, body in asyncio.run(ask_all())] == [body for _, body in answers]
        assert queries(house) - before < 50
        assert_books(house.engine)


def test_processes_that_share_a_port_tell_their_metrics_together(tmp_path: Path, redis_url: str) -> None:
    with (
        House(f"sqlite:///{tmp_path}/ledger.db", redis_url, redis_url) as house,
        gateway(house, "--processes", "2", **OPEN_TO_ALL) as started,
    ):
        for number in range(20):  # a connection each: whoever is quicker takes it
            answer = httpx.post(f"{started.url}/v1/draws", json={"account_id": 1}, headers={"Idempotency-Key": "k"})
            assert answer.status_code == 202
            assert answer.headers.get("idempotency-replayed") == ("true" if number else None)
        for _ in range(5):
            told = started.metrics()
            assert 'tombola_gateway_requests_total{method="POST",route="/v1/draws",status="202"} 20.0' in told
        started.process.signal(signal.SIGTERM)
        assert started.process.wait() in (0, -signal.SIGTERM), started.process.log()


# ---- its end ---------------------------------------------------------------------------------------------------------


def test_a_gateway_told_to_end_answers_what_is_under_way(tmp_path: Path, redis_url: str) -> None:
    with ExitStack() as stack:
        house = stack.enter_context(House(f"sqlite:///{tmp_path}/ledger.db", redis_url, redis_url))
        (account,) = house.accounts(1)
        pool = stack.enter_context(ThreadPoolExecutor(4))
        started = stack.enter_context(gateway(house, **OPEN_TO_ALL))
        started.draw({"account_id": account}, "e-1")
        wait = pool.submit(started.show, "e-1", 60)
        wait_until_subscribed(house, 1)
        stream = stack.enter_context(started.client.stream("GET", "/v1/draws/e-1/events"))
        told = events(stream)
        assert next(told)[0] == "accepted"
        with house.engine.begin():  # nobody else writes
            post = pool.submit(started.draw, {"account_id": account}, "e-2")
            time.sleep(0.3)
            started.process.signal(signal.SIGTERM)
            assert wait.result().status_code == 202
            assert list(told) == []
        assert post.result().status_code == 202
        assert started.process.wait() in (0, -signal.SIGTERM), started.process.log()
        assert [row["status"] for row in rows(house, "e-2")] == ["accepted"]
        with Redis.from_url(redis_url) as client:
            assert client.xlen("draws") == 2
        assert "Traceback" not in started.process.log()


def test_a_listener_that_loses_a_cancellation_does_not_keep_the_gateway_from_ending() -> None:
    """`asyncio.wait_for` of Python 3.11 loses one that comes as what it waits for ends: every write of redis-py."""

    class Deaf(Results):
        lost = 0

        async def _hear(self) -> None:
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    if self.lost == 2:
                        raise
                    self.lost += 1

        async def _listen(self) -> None:
            await self._hear()

    async def run() -> None:
        with ThreadPoolExecutor(1) as readers:
            results = Deaf("redis://127.0.0.1:1", lambda _: {}, readers)
            results.start()
            await asyncio.sleep(0)
            await asyncio.wait_for(results.close(), 10)
            assert results.lost == 2

    asyncio.run(run())


@pytest.mark.process
def test_what_a_killed_gateway_had_accepted_is_published_by_the_relay(tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(servers.redis(private=True))
        house = stack.enter_context(House(f"sqlite:///{tmp_path}/ledger.db", server.url, server.url))
        with gateway(house, TOMBOLA_RELAY_AFTER_S="0.1", **OPEN_TO_ALL) as started:
            server.kill()
            assert started.draw({"account_id": 1}, "accepted-only").status_code == 202
            started.process.kill()
        server.restart()
        broker = open_broker(server.url, publish_timeout_s=10)
        wait_for(lambda: relay_once(house.engine, broker, after_s=60) == 1, within_s=10, what=lambda: "not published")
        assert broker.backlog() == 1
        broker.close()


# ---- the document, taken at its word ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory, redis_server: servers.Server) -> Iterator[Any]:
    """The OpenAPI document of a gateway that asks for keys, behind which a worker settles what it is sent."""
    folder = tmp_path_factory.mktemp("document")
    url = urlsplit(redis_server.url)._replace(path="/1").geturl()  # apart from what the others left queued
    with House(f"sqlite:///{folder}/ledger.db", url, url) as house, ExitStack() as stack:
        headers = {"Authorization": f"Bearer {api_keys.add(house.engine, 'tester', scopes=api_keys.KEY_SCOPES)}"}
        stack.enter_context(processes.worker(house.env))
        started = stack.enter_context(gateway(house, TOMBOLA_GATEWAY_RATE_MAX="1000000"))
        yield schemathesis.openapi.from_url(f"{started.url}/openapi.json", headers=headers)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_in_the_document(document: Any, mode: GenerationMode) -> None:
    asked = set()
    for operation in [found.ok() for found in document.get_all_operations()]:

        @hypothesis_settings(
            max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            asked.add(case.operation.label)
            case.call_and_validate(checks=CHECKS, timeout=TIMEOUT_S)

        with suppress(Unsatisfiable):  # where nothing can be wrong
            check()
    assert len(asked) >= 6
