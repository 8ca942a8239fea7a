"""Receipts over HTTP, from real gateways: beside every answer, and the same to the byte wherever they come from."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator

import httpx
import pytest
from redis import Redis
from sqlalchemy import text

from tests import servers
from tests.gateway.campaigns import GARDEN, SEEN_WITHIN_S, published
from tests.gateway.test_http_api import events, problem
from tests.gateways import OPEN_TO_ALL, Gateway, gateway, settle
from tests.kept_results import keep_results
from tests.processes import House, wait_for
from tombola.producers.client import DrawClient
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN
from tombola.producers.domain.errors import ReceiptNotFound, SessionNotFound
from tombola.producers.domain.receipt_keys import SigningKey, read_jwk_set
from tombola.producers.domain.receipts import Receipt, SettledReceipt, parse, verify
from tombola.producers.results import KEY_PREFIX, StoredResult
from tombola.producers.settings import Settings
from tombola.producers.storage import api_keys
from tombola.producers.storage.campaigns import CampaignState
from tombola.producers.storage.clock import utc_now
from tombola.worker import cli
from tombola.worker.relay.given_up import time_out_once
from tombola.worker.relay.retention import archive_once

pytestmark = pytest.mark.process

KEY = SigningKey.make()
SIGNING = OPEN_TO_ALL | {"TOMBOLA_RECEIPT_KEY": KEY.text}
RECEIPT = "tombola-receipt"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("receipts")
    with (
        servers.redis(private=True) as server,
        House(f"sqlite:///{folder}/ledger.db", server.url, server.url, TOMBOLA_RECEIPT_KEY=KEY.text) as house,
    ):
        yield house


@pytest.fixture(scope="module")
def account(house: House) -> int:
    return house.accounts(1, balance=100_000)[0]


@pytest.fixture(scope="module")
def one(house: House, account: int) -> Iterator[Gateway]:
    with gateway(house, **SIGNING) as started:
        yield started


@pytest.fixture(scope="module")
def two(house: House, one: Gateway) -> Iterator[Gateway]:
    """Another gateway with the same key, which remembers nothing of what the first one accepted."""
    with gateway(house, **SIGNING) as started:
        yield started


def receipt_at(asked: Gateway, session: str, **headers: str) -> httpx.Response:
    return asked.client.get(f"/v1/draws/{session}/receipt", headers=headers)


def read(asked: Gateway, jws: str) -> Receipt:
    """What a stranger makes of a receipt, with the keys that the gateway lists."""
    listed = asked.client.get("/.well-known/tombola-keys.json")
    assert (listed.status_code, listed.headers["content-type"]) == (200, "application/jwk-set+json")
    return verify(jws, read_jwk_set(listed.content))


# ---- one receipt, wherever it is asked for ---------------------------------------------------------------------------


def test_a_draw_that_is_accepted_has_a_receipt(one: Gateway, two: Gateway, house: House, account: int) -> None:
    answer = one.draw({"account_id": account, "lottery_session_id": "s-1"}, "k-1")
    signed = answer.headers[RECEIPT]
    said = read(two, signed)
    assert type(said) is Receipt
    assert (said.request_key, said.lottery_session_id, said.account_id) == ("k-1", "s-1", account)
    assert (said.kind, said.campaign, said.pulls, said.client_nonce) == ("draw", "default", None, None)
    assert said.odds_hash == DEFAULT_CAMPAIGN.odds_hash
    with house.engine.connect() as connection:
        row = connection.execute(text("SELECT accepted_at FROM api_idempotency_requests WHERE request_key = 'k-1'"))
        assert said.accepted_at == f"{row.scalar_one()}Z".replace(" ", "T")
    for asked in (one, two):
        again = receipt_at(asked, "s-1")
        assert (again.status_code, again.headers["content-type"]) == (200, "application/jose")
        assert again.text == signed
        not_yet = asked.show("s-1")
        assert (not_yet.status_code, not_yet.headers[RECEIPT]) == (202, signed)
        repeat = asked.draw({"account_id": account, "lottery_session_id": "s-1"}, "k-1")
        assert repeat.headers["idempotency-replayed"] == "true"
        assert repeat.headers[RECEIPT] == signed


def test_a_draw_that_has_settled_has_a_receipt_of_its_result(
    one: Gateway, two: Gateway, house: House, account: int
) -> None:
    asked = DrawRequest(account_id=account, request_key="settled-1")
    accepted = read(one, one.draw({"account_id": account}, "settled-1").headers[RECEIPT])
    (result,) = settle(house, asked)
    shown = one.show("settled-1", wait_s=5)
    assert (shown.status_code, shown.content) == (200, result)
    signed = shown.headers[RECEIPT]
    said = read(two, signed)
    assert isinstance(said, SettledReceipt)
    assert said.result_sha256 == hashlib.sha256(result).hexdigest()
    assert (said.accepted_at, said.odds_hash) == (accepted.accepted_at, accepted.odds_hash)
    assert accepted.accepted_at is not None
    assert accepted.accepted_at < said.settled_at

    def everywhere() -> set[str]:
        return {
            *(receipt_at(it, "settled-1").text for it in (one, two)),
            *(it.show("settled-1").headers[RECEIPT] for it in (one, two)),
            two.draw({"account_id": account}, "settled-1").headers[RECEIPT],
        }

    assert everywhere() == {signed}
    assert settle(house, asked) == [result]  # delivered again
    assert everywhere() == {signed}
    keep_results(house.engine, "settled-1")  # as older releases did
    assert everywhere() == {signed}
    assert archive_once(house.engine, older_than_s=-60.0)
    assert everywhere() == {signed}
    with gateway(house, **SIGNING) as third:  # which knows it from the archived row alone
        assert third.draw({"account_id": account}, "settled-1").headers[RECEIPT] == signed
        assert receipt_at(third, "settled-1").text == signed


def test_waiting_for_a_result_brings_its_receipt(one: Gateway, house: House, account: int) -> None:
    one.draw({"account_id": account}, "waited-1")
    settle(house, DrawRequest(account_id=account, request_key="waited-1"))
    shown = one.show("waited-1", wait_s=10)
    assert isinstance(read(one, shown.headers[RECEIPT]), SettledReceipt)
    with one.client.stream("GET", "/v1/draws/waited-1/events") as stream:
        assert RECEIPT not in stream.headers
        assert [name for name, _ in events(stream)] == ["result"]


def test_rejected_dead_and_by_the_broker_alone(one: Gateway, two: Gateway, house: House) -> None:
    one.draw({"account_id": 4711}, "rejected-1")
    (result,) = settle(house, DrawRequest(account_id=4711, request_key="rejected-1"))
    said = read(one, receipt_at(one, "rejected-1").text)
    assert isinstance(said, SettledReceipt)
    assert said.result_sha256 == hashlib.sha256(result).hexdigest()
    keep_results(house.engine, "rejected-1")
    assert read(one, receipt_at(two, "rejected-1").text) == said
    assert archive_once(house.engine, older_than_s=-60.0)
    assert read(one, receipt_at(two, "rejected-1").text) == said

    signed = one.draw({"account_id": 4711}, "dead-1").headers[RECEIPT]
    assert time_out_once(house.engine, timeout_s=-1.0)
    dead = two.show("dead-1")
    assert (dead.json()["status"], dead.headers[RECEIPT]) == ("dead", signed)

    settle(house, DrawRequest(account_id=4711, request_key="broker-1"))
    with house.engine.begin() as connection:
        row = connection.execute(
            text("SELECT accepted_at FROM api_idempotency_requests WHERE request_key = 'broker-1'")
        )
        assert row.scalar_one() is None
    said = read(one, one.draw({"account_id": 4711}, "broker-1").headers[RECEIPT])
    assert isinstance(said, SettledReceipt)
    assert said.accepted_at is None


def test_pulls_of_a_campaign_are_bound_to_its_odds(one: Gateway, house: House, account: int) -> None:
    odds = published(house.engine, GARDEN, CampaignState.OPEN)
    ask = {"account_id": account, "campaign": "garden", "pulls": 10}

    def accepted() -> bool:
        return one.draw(ask, "pulls-1").status_code == 202

    wait_for(accepted, within_s=SEEN_WITHIN_S, what=lambda: one.draw(ask, "pulls-1").text)
    said = read(one, receipt_at(one, "pulls-1").text)
    assert (said.campaign, said.pulls, said.odds_hash) == ("garden", 10, odds.odds_hash)
    assert one.draw(ask, "pulls-1").headers[RECEIPT] == receipt_at(one, "pulls-1").text


def test_each_draw_of_a_batch_has_its_receipt(one: Gateway, two: Gateway, house: House, account: int) -> None:
    settle(house, DrawRequest(account_id=account, request_key="b-old"))
    draws = [{"account_id": account, "request_key": key} for key in ("b-1", "b-2", "b-old")]
    answer = one.client.post(
        "/v1/draws/batch", json={"draws": [*draws, {"account_id": account + 1, "request_key": "b-1"}]}
    )
    told = answer.json()["answers"]
    assert [it["status"] for it in told] == [202, 202, 202, 422]
    assert "receipt" not in told[3]
    for it, kind in zip(told, (Receipt, Receipt, SettledReceipt), strict=False):
        assert it["receipt"] == receipt_at(two, it["ticket"]["lottery_session_id"]).text
        assert type(read(one, it["receipt"])) is kind
    assert RECEIPT not in answer.headers


def test_a_movement_has_a_receipt_as_well(one: Gateway, house: House, account: int) -> None:
    asked = {"amount": "5.00", "channel": "cards"}
    answer = one.client.post(f"/v1/accounts/{account}/recharges", json=asked, headers={"Idempotency-Key": "paid-1"})
    said = read(one, answer.headers[RECEIPT])
    assert (said.kind, said.request_key, said.campaign, said.odds_hash) == ("recharge", "paid-1", None, None)
    assert receipt_at(one, "paid-1").text == answer.headers[RECEIPT]


def test_the_client_and_the_command_make_the_same_receipt(
    one: Gateway, house: House, account: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signed = one.draw({"account_id": account}, "client-1").headers[RECEIPT]
    with DrawClient.from_settings(house.settings) as client:
        assert client.receipt("client-1") == signed
        with pytest.raises(SessionNotFound):
            client.receipt("nobody")
    with DrawClient.from_settings(house.settings, caller="somebody") as client, pytest.raises(SessionNotFound):
        client.receipt("client-1")
    lean = Settings.from_env(house.env | {"TOMBOLA_RECEIPT_KEY": ""})
    with DrawClient.from_settings(lean) as client, pytest.raises(ReceiptNotFound):
        client.receipt("client-1")

    for name, value in house.env.items():
        monkeypatch.setenv(name, value)

    def tombola(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tombola", *words])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    assert tombola("receipt", "client-1")[:2] == (0, f"{signed}\n")
    told = json.loads(tombola("receipt", "client-1", "--json")[1])
    assert (told["kid"], told["jws"], told["payload"]["request_key"]) == (KEY.kid, signed, "client-1")
    for unknown in ("nobody", "né"):
        assert tombola("receipt", unknown)[0] == 1
    keys = tombola("receipt-key", "list", "--json")[1]
    assert json.loads(keys) == one.client.get("/.well-known/tombola-keys.json").json()
    assert KEY.kid in tombola("receipt-key", "list")[1]
    code, made, _ = tombola("receipt-key", "make")
    assert code == 0
    assert SigningKey.read(made.strip().removeprefix("TOMBOLA_RECEIPT_KEY=")).kid != KEY.kid
    for kid in ("0" * 16, "0", "é" * 16):
        code, _, said = tombola("receipt-key", "end", kid)
        assert (code, "tombola receipt-key list" in said) == (1, True)
    monkeypatch.setenv("TOMBOLA_RECEIPT_KEY", "")
    code, _, said = tombola("receipt", "client-1")
    assert (code, "TOMBOLA_RECEIPT_KEY" in said) == (1, True)


# ---- what a receipt must not be --------------------------------------------------------------------------------------


def test_what_redis_says_is_never_signed(one: Gateway, house: House, account: int) -> None:
    """Whoever can write there changes what is kept of the result: the answer and its receipt are the database's."""
    one.draw({"account_id": account}, "forged-1")
    (result,) = settle(house, DrawRequest(account_id=account, request_key="forged-1"))
    with Redis.from_url(house.settings.need("result_url")) as redis:
        name = f"{KEY_PREFIX}forged-1"
        stored = redis.get(name)
        assert isinstance(stored, bytes)
        prize = json.loads(result)["prize_amount"].encode()
        forged = StoredResult("forged-1", result.replace(prize, b"9999.00"), utc_now()).envelope()
        redis.set(name, forged)
    shown = one.show("forged-1")
    assert shown.content == result
    said = read(one, shown.headers[RECEIPT])
    assert isinstance(said, SettledReceipt)
    assert said.result_sha256 == hashlib.sha256(result).hexdigest()


def test_a_caller_sees_receipts_of_its_own_draws_alone(house: House, one: Gateway, account: int) -> None:
    made = [api_keys.add(house.engine, caller) for caller in ("mine", "yours")]
    made.append(api_keys.add(house.engine, "mine", scopes=["draw"]))
    mine, yours, drawing = ({"Authorization": f"Bearer {it}"} for it in made)
    with gateway(house, **SIGNING | {"TOMBOLA_GATEWAY_AUTH": "api-key"}) as closed:
        signed = closed.draw({"account_id": account}, "own-1", **mine).headers[RECEIPT]
        assert receipt_at(closed, "own-1", **mine).text == signed
        problem(receipt_at(closed, "own-1", **yours), 404, "session-not-found")
        problem(receipt_at(closed, "nobody", **mine), 404, "session-not-found")
        problem(receipt_at(closed, "own-1", **drawing), 403, "missing-scope")
        problem(receipt_at(closed, "own-1"), 401, "not-allowed")
        assert verify(signed, read_jwk_set(closed.client.get("/.well-known/tombola-keys.json").content))
        described = closed.client.get("/openapi.json").json()["paths"]
        assert described["/v1/draws/{session_id}/receipt"]["get"]["security"] == [{"api-key": ["read"]}]
        assert list(described["/v1/draws/{session_id}/receipt"]["get"]["responses"]["200"]["content"]) == [
            "application/jose"
        ]
        assert described["/.well-known/tombola-keys.json"]["get"]["security"] == [{}]


def test_without_a_key_there_is_no_receipt(house: House, account: int) -> None:
    with gateway(house, **OPEN_TO_ALL | {"TOMBOLA_RECEIPT_KEY": ""}) as silent:
        answer = silent.draw({"account_id": account}, "silent-1")
        assert (answer.status_code, RECEIPT in answer.headers) == (202, False)
        assert RECEIPT not in silent.show("silent-1").headers
        batch = silent.client.post("/v1/draws/batch", json={"draws": [{"account_id": account}]}).json()
        assert "receipt" not in batch["answers"][0]
        problem(receipt_at(silent, "silent-1"), 404, "receipt-not-found")
        # Receipts of before can still be verified.
        assert silent.client.get("/.well-known/tombola-keys.json").status_code == 200


def test_a_page_of_another_origin_reads_the_header(house: House, account: int) -> None:
    with gateway(house, **SIGNING, TOMBOLA_CORS_ORIGINS="https://shop.example") as shared:
        answer = shared.draw({"account_id": account}, "cors-1", Origin="https://shop.example")
        assert "Tombola-Receipt" in answer.headers["access-control-expose-headers"].split(", ")
        assert answer.headers[RECEIPT]


def test_a_gateway_without_its_table_draws_without_receipts(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("lost")
    with servers.redis(private=True) as server, House(f"sqlite:///{folder}/l.db", server.url, server.url) as lost:
        with lost.engine.begin() as connection:
            connection.execute(text("DROP TABLE receipt_keys"))
        with gateway(lost, **SIGNING) as started:
            answer = started.draw({"account_id": 1}, "lost-1")
            assert (answer.status_code, RECEIPT in answer.headers) == (202, False)
            problem(receipt_at(started, "lost-1"), 503, "service-unavailable")
            assert "there are no receipts" in started.process.log()


# ---- rotation --------------------------------------------------------------------------------------------------------


def test_a_key_is_replaced_and_receipts_of_before_stay(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("rotation")
    new = SigningKey.make()
    with servers.redis(private=True) as server, House(f"sqlite:///{folder}/l.db", server.url, server.url) as shop:
        account = shop.accounts(1)[0]
        with gateway(shop, **OPEN_TO_ALL, TOMBOLA_RECEIPT_KEY=KEY.text) as first:
            before = first.draw({"account_id": account}, "before").headers[RECEIPT]
            assert parse(before).kid == KEY.kid
            with gateway(shop, **OPEN_TO_ALL, TOMBOLA_RECEIPT_KEY=f"{new.text}, {KEY.text}") as second:
                assert receipt_at(second, "before").text == before
                after = second.draw({"account_id": account}, "after").headers[RECEIPT]
                assert parse(after).kid == new.kid
                # The first gateway still has the old key alone, and what it signs is valid.
                assert read(second, first.draw({"account_id": account}, "during").headers[RECEIPT])
        with gateway(shop, **OPEN_TO_ALL, TOMBOLA_RECEIPT_KEY=new.text) as third:
            listed = third.client.get("/.well-known/tombola-keys.json").json()["keys"]
            assert [(it["kid"], "exp" in it) for it in listed] == [(new.kid, False), (KEY.kid, True)]
            assert read(third, before).request_key == "before"
            again = receipt_at(third, "before").text
            assert parse(again).kid == new.kid
            assert read(third, again) == read(third, before)
            assert receipt_at(third, "after").text == after
