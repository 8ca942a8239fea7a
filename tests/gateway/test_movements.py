"""Movements over HTTP: two gateways on one ledger, SQLite and MariaDB in turn; a consumer in this process settles."""

import asyncio
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from typing import Any

import httpx
import pytest
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.engine import make_url

from tests import servers
from tests.books import table
from tests.gateway.test_http_api import problem
from tests.gateways import OPEN_TO_ALL, Gateway, gateway
from tests.kept_results import keep_results
from tests.processes import House
from tombola.producers.domain.contract import parse_movement_result
from tombola.producers.storage import api_keys
from tombola.producers.storage.grants import Deployment, statements
from tombola.producers.storage.mysql_connections import connect_by
from tombola.worker.ledger.accounts import open_account
from tombola.worker.relay.given_up import time_out_once
from tombola.worker.relay.retention import archive_once
from tombola.worker.settle.consumer import Consumer

pytestmark = pytest.mark.process

REPEATS = 50
WAIT_S = 30
KINDS = ("recharge", "transfer", "adjust", "refund", "hold", "post", "void", "account")

_numbers = itertools.count(1)


@pytest.fixture(scope="module", params=["sqlite", "mariadb"])
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with ExitStack() as stack:
        redis = stack.enter_context(servers.redis(private=True))
        if request.param == "sqlite":
            url = f"sqlite:///{tmp_path_factory.mktemp('movements')}/ledger.db"
        else:
            server: servers.Server = request.getfixturevalue("mariadb_server")
            url = server.url.rpartition("/")[0] + "/movements_over_http"
            engine = create_engine(server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
            connect_by(engine)
            with engine.connect() as connection:
                connection.execute(text("DROP DATABASE IF EXISTS movements_over_http"))
                connection.execute(text("CREATE DATABASE movements_over_http"))
        yield stack.enter_context(House(url, redis.url, redis.url))


@pytest.fixture(scope="module")
def both(house: House) -> Iterator[list[Gateway]]:
    """Two gateways that ask for no key."""
    with ExitStack() as stack:
        yield [stack.enter_context(gateway(house, **OPEN_TO_ALL)) for _ in range(2)]


@pytest.fixture(scope="module")
def client(both: list[Gateway]) -> httpx.Client:
    return both[0].client


@pytest.fixture(scope="module")
def closed(house: House) -> Iterator[Gateway]:
    """One that asks for keys."""
    with gateway(house, TOMBOLA_GATEWAY_RATE_MAX="1000000") as started:
        yield started


# ---- helpers ---------------------------------------------------------------------------------------------------------


@contextmanager
def settling(house: House) -> Iterator[None]:
    """A consumer settles what the gateways publish."""
    consumer = Consumer.open(house.settings, house.engine, house.wheels)
    consumer.start()
    try:
        yield
    finally:
        assert consumer.stop(timeout_s=20)


def account(house: House, balance: int = 100) -> int:
    return open_account(house.engine, user_id=next(_numbers), balance=Decimal(balance))


def key(name: str) -> str:
    return f"{name}-{next(_numbers)}"


def post(
    client: httpx.Client, path: str, body: object, request_key: str | None = None, headers: Mapping[str, str] = {}
) -> httpx.Response:
    named = {} if request_key is None else {"Idempotency-Key": request_key}
    return client.post(path, json=body, headers={**headers, **named})


def settled(client: httpx.Client, answer: httpx.Response) -> dict[str, Any]:
    """The result of an accepted movement or draw."""
    assert answer.status_code == 202, answer.text
    found = client.get(answer.headers["location"], params={"wait": WAIT_S})
    assert found.status_code == 200, found.text
    told: dict[str, Any] = found.json()
    return told


def balance(client: httpx.Client, account_id: int) -> str:
    return str(client.get(f"/v1/accounts/{account_id}").json()["balance"])


def rows_of(house: House, ledger_key: str) -> list[dict[str, Any]]:
    return [
        it for it in table(house.engine, "asset_transactions") if it["idempotency_key"].startswith(f"{ledger_key}:")
    ]


def draw(client: httpx.Client, account_id: int, request_key: str) -> dict[str, Any]:
    """A settled draw."""
    return settled(client, post(client, "/v1/draws", {"account_id": account_id}, request_key))


def winning_key(house: House, account_id: int) -> str:
    """The key of a draw that wins 5.00."""
    return next(it for it in (key("win") for _ in range(1000)) if house.wheels["default"].draw(account_id, it).amount)


def held(client: httpx.Client, account_id: int, amount: str = "30", valid_s: int = 900) -> str:
    """The key of a hold that has settled."""
    name = key("hold")
    body = {"amount": amount, "valid_s": valid_s}
    assert settled(client, post(client, f"/v1/accounts/{account_id}/holds", body, name))["status"] == "completed"
    return name


def asked_for(kind: str, house: House, client: httpx.Client) -> tuple[str, dict[str, Any], list[str]]:
    """Path and body of a movement that goes well, and the types of the ledger rows that it writes.

    What comes before it (a draw, a hold) has settled.
    """
    if kind == "account":
        return "/v1/accounts", {"user_id": next(_numbers), "amount": "12.50"}, ["recharge"]
    mine = account(house)
    if kind == "recharge":
        return f"/v1/accounts/{mine}/recharges", {"amount": "5", "channel": "cards", "reference": "p-1"}, ["recharge"]
    if kind == "transfer":
        return "/v1/transfers", {"from": mine, "to": account(house), "amount": "7"}, ["transfer_out", "transfer_in"]
    if kind == "adjust":
        return f"/v1/accounts/{mine}/adjustments", {"amount": "-3.50", "reason": "counted wrong"}, ["adjust"]
    if kind == "hold":
        return f"/v1/accounts/{mine}/holds", {"amount": "30", "valid_s": 60}, ["hold"]
    if kind == "refund":
        name = winning_key(house, mine)
        draw(client, mine, name)
        return f"/v1/draws/{name}/refund", {"reason": "it was the child"}, ["refund", "refund_reward"]
    name = held(client, mine)
    if kind == "post":
        body = {"amount": "20.00", "to": account(house), "reference": "trade-1"}
        return f"/v1/holds/{name}/post", body, ["post", "transfer_out", "transfer_in"]
    return f"/v1/holds/{name}/void", {"reason": "no trade"}, ["void"]


def ledger_key(path: str, request_key: str) -> str:
    """What the keys of the ledger rows begin with: that of the draw or of the hold for what ends one."""
    return path.split("/")[3] if path.startswith(("/v1/draws/", "/v1/holds/")) else request_key


# ---- each movement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_movement_is_answered_with_a_ticket_and_then_with_its_result(
    house: House, client: httpx.Client, kind: str
) -> None:
    with settling(house):
        path, body, types = asked_for(kind, house, client)
    name = key(kind)
    first = post(client, path, body, f'"{name}"')
    assert first.status_code == 202, first.text
    ticket = {"request_key": name, "lottery_session_id": name, "status": "accepted"}
    assert (first.json()["ticket"] if kind == "account" else first.json()) == ticket
    assert first.headers["location"] == f"/v1/movements/{name}"
    assert (first.headers["retry-after"], first.headers["idempotency-key"]) == ("1", f"{name}")
    assert "idempotency-replayed" not in first.headers
    again = post(client, path, body, name)
    assert (again.status_code, again.content, again.headers["idempotency-replayed"]) == (202, first.content, "true")
    pending = client.get(f"/v1/movements/{name}")
    assert (pending.status_code, pending.json(), pending.headers["retry-after"]) == (202, ticket, "1")
    with settling(house):
        told = client.get(f"/v1/movements/{name}", params={"wait": WAIT_S})
    assert told.status_code == 200, told.text
    result = parse_movement_result(told.content)
    assert (result.status, result.reason, result.request_key) == ("completed", None, name)
    assert result.kind == ("recharge" if kind == "account" else kind)
    keys = [f"{ledger_key(path, name)}:{it}" for it in types]
    assert [it.idempotency_key for it in result.transactions] == keys
    after = post(client, path, body, name)
    assert (after.status_code, after.headers["idempotency-replayed"]) == (200, "true")
    assert after.headers["location"] == f"/v1/movements/{name}"
    shown = json.dumps(after.json()["recharge"], separators=(",", ":")).encode() if kind == "account" else after.content
    assert shown == told.content
    assert house.violations() == []


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_repeats_on_two_gateways_are_one_movement(house: House, both: list[Gateway], kind: str) -> None:
    with settling(house):
        path, body, types = asked_for(kind, house, both[0].client)
        name = key(kind)

        async def storm() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=60, headers={"Idempotency-Key": name}, verify=False) as client:
                urls = [f"{both[number % 2].url}{path}" for number in range(REPEATS)]
                return await asyncio.gather(*[client.post(url, json=body) for url in urls])

        answers = asyncio.run(storm())
        shown = [it.client.get(f"/v1/movements/{name}", params={"wait": WAIT_S}) for it in both]
        answers += asyncio.run(storm())
    assert {it.status_code for it in answers} <= {200, 202}, {it.text for it in answers}
    assert len({(it.status_code, it.content) for it in answers}) == len({it.status_code for it in answers}) == 2
    assert [it.headers.get("idempotency-replayed") for it in answers].count(None) == 1
    assert [it.status_code for it in shown] == [200, 200]
    assert len({it.content for it in shown}) == 1
    assert [it["idempotency_key"].partition(":")[2] for it in rows_of(house, ledger_key(path, name))][
        -len(types) :
    ] == types
    requests = [it for it in table(house.engine, "api_idempotency_requests") if it["request_key"] == name]
    assert [it["status"] for it in requests] == ["completed"]
    if kind == "account":
        (opened,) = [it for it in table(house.engine, "account_asset_balances") if it["user_id"] == body["user_id"]]
        assert opened["balance"] == 1250
    assert house.violations() == []


def test_ten_keys_at_once_refund_a_draw_once(house: House, both: list[Gateway]) -> None:
    mine = account(house, 10)
    name, keys = winning_key(house, mine), [key("refund") for _ in range(10)]
    with settling(house):
        draw(both[0].client, mine, name)
        before = both[1].show(name).content

        async def storm() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=60, verify=False) as client:
                path = f"/v1/draws/{name}/refund"
                asked = [(f"{both[number % 2].url}{path}", {"Idempotency-Key": it}) for number, it in enumerate(keys)]
                return await asyncio.gather(*[client.post(url, json={}, headers=headers) for url, headers in asked])

        answers = asyncio.run(storm())
        results = [settled(both[0].client, it) for it in answers if it.status_code == 202]
        for it in answers:
            if it.status_code != 202:
                problem(it, 409, "already-refunded")
    assert [it["status"] for it in results].count("completed") == 1
    assert {it["reason"] for it in results} <= {None, "ALREADY_REFUNDED"}
    types = [it["idempotency_key"].partition(":")[2] for it in rows_of(house, name)]
    assert types == ["consume", "reward", "refund", "refund_reward"]
    assert balance(both[0].client, mine) == "10.00"
    problem(post(both[0].client, f"/v1/draws/{name}/refund", {}, key("refund")), 409, "already-refunded")
    # The draw's result is what it was; the session shows what became of it.
    assert both[0].show(name).content == before
    listed = both[0].client.get(f"/v1/draws/{name}/transactions").json()
    assert [it["idempotency_key"] for it in listed] == [f"{name}:{it}" for it in types]
    assert [it["delta_amount"] for it in listed] == ["-1.00", "5.00", "1.00", "-5.00"]
    assert house.violations() == []


def test_ten_keys_at_once_end_a_hold_once(house: House, both: list[Gateway]) -> None:
    mine = account(house)
    with settling(house):
        name = held(both[0].client, mine, "30")

        async def storm() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=60, verify=False) as client:
                asked = [
                    (f"{both[number % 2].url}/v1/holds/{name}/{('post', 'void')[number % 2]}", key("end"))
                    for number in range(10)
                ]
                return await asyncio.gather(
                    *[client.post(url, json={}, headers={"Idempotency-Key": it}) for url, it in asked]
                )

        answers = asyncio.run(storm())
        results = [settled(both[0].client, it) for it in answers if it.status_code == 202]
        for it in answers:
            if it.status_code != 202:
                problem(it, 409, "hold-ended")
    assert [it["status"] for it in results].count("completed") == 1
    assert {it["reason"] for it in results} <= {None, "HOLD_ENDED"}
    state = both[1].client.get(f"/v1/holds/{name}").json()["state"]
    assert (state, balance(both[0].client, mine)) in (("posted", "70.00"), ("voided", "100.00"))
    assert house.violations() == []


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_for_one_request_of_whatever_kind(house: House, client: httpx.Client) -> None:
    mine, other = account(house), account(house)
    drawn, recharged = key("was-a-draw"), key("was-a-recharge")
    path, body = f"/v1/accounts/{mine}/recharges", {"amount": "5"}
    with settling(house):
        draw(client, mine, drawn)
        settled(client, post(client, path, body, recharged))
    reused = [
        post(client, path, body, drawn),
        post(client, path, {"amount": "6"}, recharged),
        post(client, path, {"amount": "5", "reference": "x"}, recharged),
        post(client, f"/v1/accounts/{other}/recharges", body, recharged),
        post(client, f"/v1/accounts/{mine}/holds", body, recharged),
        post(client, "/v1/transfers", {"from": mine, "to": other, "amount": "5"}, recharged),
        post(client, "/v1/draws", {"account_id": mine}, recharged),
        post(client, f"/v1/draws/{drawn}/refund", {}, drawn),
        post(client, f"/v1/accounts/{10**12}/recharges", body, recharged),  # no account, and no new key
    ]
    for it in reused:
        problem(it, 422, "idempotency-key-reused")
    # The account and its amount are one: without the recharge, no account.
    user = next(_numbers)
    problem(post(client, "/v1/accounts", {"user_id": user, "amount": "5"}, drawn), 422, "idempotency-key-reused")
    assert not [it for it in table(house.engine, "account_asset_balances") if it["user_id"] == user]
    assert balance(client, mine) in ("104.00", "109.00")


@pytest.mark.parametrize("path", [
    "/v1/accounts", "/v1/accounts/1/recharges", "/v1/accounts/1/adjustments", "/v1/accounts/1/holds", "/v1/transfers",
    "/v1/draws/x/refund", "/v1/holds/x/post", "/v1/holds/x/void",
])  # fmt: skip
def test_a_key_is_required_and_a_body_is_what_it_says(house: House, client: httpx.Client, path: str) -> None:
    count = len(table(house.engine, "api_idempotency_requests"))
    bodies: dict[str, dict[str, Any]] = {
        "accounts": {"user_id": 1, "amount": "5"}, "recharges": {"amount": "5", "reference": "r", "channel": "c"},
        "holds": {"amount": "5", "reference": "r"},
        "adjustments": {"amount": "5", "reason": "why"}, "transfers": {"from": 1, "to": 2, "amount": "5"},
        "refund": {"reason": "why", "policy": "refuse"}, "post": {"amount": "5", "reference": "r"},
        "void": {"reason": "why"},
    }  # fmt: skip
    good = bodies[path.rpartition("/")[2]]
    assert "Idempotency-Key" in problem(post(client, path, good), 400)
    problem(post(client, path, good, "a:b"), 400)
    problem(post(client, path, good, ".."), 400)
    problem(post(client, path, good | {"more": 1}, key("bad")), 400)
    problem(post(client, path, [good], key("bad")), 400)
    deep = client.post(
        path, content=b"[" * 10_000, headers={"Idempotency-Key": "b", "Content-Type": "application/json"}
    )
    problem(deep, 400)
    wrong_values: list[object] = [5.0, 0, True, [], "x" * 101]
    for name in good:
        for value in wrong_values:
            problem(post(client, path, good | {name: value}, key("bad")), 400)
    for wrong in ("1e2", "--1", "-", "5.001", "123456789", " 5", "٥", ""):
        if "amount" in good:
            problem(post(client, path, good | {"amount": wrong}, key("bad")), 400)
    if "reference" in good:
        problem(post(client, path, good | {"reference": "a b"}, key("bad")), 400)
    if path == "/v1/accounts/1/adjustments":
        problem(post(client, path, good | {"reason": "a\nb"}, key("bad")), 400)
    elif "amount" in good:
        problem(post(client, path, good | {"amount": "-5"}, key("bad")), 400)
    assert len(table(house.engine, "api_idempotency_requests")) == count


# ---- what evidently stands against a movement ------------------------------------------------------------------------


def test_what_evidently_cannot_be_is_refused_before_a_write(house: House, client: httpx.Client) -> None:
    mine, nobody = account(house), 10**12
    poor = account(house, 1)
    with settling(house):
        won = winning_key(house, poor)
        draw(client, poor, won)
        settled(client, post(client, "/v1/transfers", {"from": poor, "to": mine, "amount": "5"}, key("spend")))
        void = held(client, mine)
        settled(client, post(client, f"/v1/holds/{void}/void", {}, key("void")))
        brief = held(client, mine, "1", 1)
        rejected = key("hold")
        told = settled(client, post(client, f"/v1/accounts/{mine}/holds", {"amount": "9999"}, rejected))
        assert (told["status"], told["reason"]) == ("rejected", "INSUFFICIENT_BALANCE")
    pending, waiting = key("draw"), key("hold")
    assert post(client, "/v1/draws", {"account_id": mine}, pending).status_code == 202
    assert post(client, f"/v1/accounts/{mine}/holds", {"amount": "1"}, waiting).status_code == 202
    time.sleep(1.1)  # `brief` was valid for a second
    count = len(table(house.engine, "api_idempotency_requests"))
    amount = {"amount": "5"}
    for path, body, status, code in [
        (f"/v1/accounts/{nobody}/recharges", amount, 404, "account-not-found"),
        ("/v1/accounts/x/recharges", amount, 404, "account-not-found"),
        (f"/v1/accounts/{2**63}/holds", amount, 404, "account-not-found"),
        (f"/v1/accounts/{nobody}/adjustments", amount | {"reason": "why"}, 404, "account-not-found"),
        (f"/v1/accounts/{nobody}/holds", amount, 404, "account-not-found"),
        ("/v1/transfers", amount | {"from": nobody, "to": mine}, 404, "account-not-found"),
        ("/v1/transfers", amount | {"from": mine, "to": nobody}, 404, "account-not-found"),
        ("/v1/draws/nothing/refund", {}, 404, "session-not-found"),
        (f"/v1/draws/{void}/refund", {}, 404, "session-not-found"),
        (f"/v1/draws/{pending}/refund", {}, 409, "draw-not-completed"),
        (f"/v1/draws/{won}/refund", {}, 409, "prize-spent"),
        ("/v1/holds/nothing/post", {}, 404, "hold-not-found"),
        ("/v1/holds/ü/post", {}, 400, "invalid-key"),
        (f"/v1/holds/{won}/void", {}, 404, "hold-not-found"),
        (f"/v1/holds/{waiting}/post", {}, 409, "hold-not-completed"),
        (f"/v1/holds/{rejected}/void", {}, 409, "hold-not-completed"),
        (f"/v1/holds/{void}/post", {}, 409, "hold-ended"),
        (f"/v1/holds/{void}/void", {}, 409, "hold-ended"),
        (f"/v1/holds/{brief}/post", {}, 409, "hold-expired"),
    ]:
        problem(post(client, path, body, key("no")), status, code)
    assert len(table(house.engine, "api_idempotency_requests")) == count
    problem(client.get("/v1/movements/nothing"), 404, "movement-not-found")
    problem(client.get(f"/v1/movements/{won}"), 404, "movement-not-found")
    problem(client.get("/v1/holds/nothing"), 404, "hold-not-found")
    problem(client.get(f"/v1/holds/{rejected}"), 404, "hold-not-found")
    assert client.get(f"/v1/holds/{waiting}").status_code == 202
    # Where the prize is spent, the charge alone can be returned.
    with settling(house):
        path = f"/v1/draws/{won}/refund"
        assert settled(client, post(client, path, {"policy": "charge_only"}, key("refund")))["status"] == "completed"
        assert settled(client, post(client, f"/v1/holds/{brief}/void", {}, key("void")))["status"] == "completed"
    assert house.violations() == []


def test_a_hold_is_shown(house: House, client: httpx.Client) -> None:
    mine, other = account(house), account(house, 0)
    with settling(house):
        name = held(client, mine, "30", 600)
        shown = client.get(f"/v1/holds/{name}").json()
        assert balance(client, mine) == "70.00"
        paid = settled(client, post(client, f"/v1/holds/{name}/post", {"amount": "20", "to": other}, key("post")))
    assert (paid["balance_after"], balance(client, mine), balance(client, other)) == ("80.00", "80.00", "20.00")
    assert {it: shown[it] for it in ("request_key", "account_id", "asset_code", "amount", "state")} == {
        "request_key": name,
        "account_id": mine,
        "asset_code": "POINT",
        "amount": "30.00",
        "state": "open",
    }
    assert shown["expires_at"] > shown["created_at"]
    assert client.get(f"/v1/holds/{name}").json()["state"] == "posted"


def test_a_movement_that_was_given_up_says_so(house: House, client: httpx.Client) -> None:
    name = key("dead")
    body = {"amount": "5"}
    path = f"/v1/accounts/{account(house)}/recharges"
    assert post(client, path, body, name).status_code == 202
    assert time_out_once(house.engine, timeout_s=0) >= 1
    told = client.get(f"/v1/movements/{name}").json()
    assert (told["status"], told["reason"], told["kind"], told["request_key"]) == (
        "dead",
        "TIMED_OUT",
        "recharge",
        name,
    )
    assert post(client, path, body, name).status_code == 202  # as for a draw: its result says that it is dead


def test_an_archived_movement_is_answered_byte_for_byte(house: House, client: httpx.Client) -> None:
    mine, name = account(house), key("archived")
    path, body = f"/v1/accounts/{mine}/recharges", {"amount": "5", "reference": "r-1"}
    with settling(house):
        settled(client, post(client, path, body, name))
    first = post(client, path, body, name)
    assert first.status_code == 200
    keep_results(house.engine, name)
    assert post(client, path, body, name).content == first.content
    assert archive_once(house.engine, older_than_s=-3600) == 1
    (row,) = [it for it in table(house.engine, "api_idempotency_requests") if it["request_key"] == name]
    assert row["result"] is None
    assert post(client, path, body, name).content == first.content
    assert client.get(f"/v1/movements/{name}").content == first.content


# ---- accounts --------------------------------------------------------------------------------------------------------


def test_an_account_is_opened_once(house: House, client: httpx.Client) -> None:
    user, name = next(_numbers), key("open")
    body = {"user_id": user, "asset_code": "COIN", "amount": "0.00"}
    first = post(client, "/v1/accounts", body, name)
    assert first.status_code == 200, first.text
    told = first.json()
    assert told == {
        "account_id": told["account_id"], "user_id": user, "asset_code": "COIN", "ticket": None, "recharge": None,
    }  # fmt: skip
    assert first.headers["location"] == f"/v1/accounts/{told['account_id']}"
    assert "idempotency-replayed" not in first.headers
    again = post(client, "/v1/accounts", body, key("open"))
    assert (again.status_code, again.content, again.headers["idempotency-replayed"]) == (200, first.content, "true")
    # An account that exists gets no amount: only its opening gives one.
    late = post(client, "/v1/accounts", body | {"amount": "5"}, key("open"))
    assert (late.status_code, late.json()) == (200, told)
    other = post(client, "/v1/accounts", {"user_id": user, "amount": "5"}, name)
    assert other.status_code == 202
    assert other.json()["account_id"] != told["account_id"]
    with settling(house):
        assert settled(client, other)["balance_after"] == "5.00"
    assert balance(client, told["account_id"]) == "0.00"
    problem(post(client, "/v1/accounts", {"user_id": user, "amount": "6"}, name), 422, "idempotency-key-reused")
    assert house.violations() == []


# ---- whose -----------------------------------------------------------------------------------------------------------


def bearer(house: House, caller: str, *scopes: str, accounts: str = "", users: str = "") -> dict[str, str]:
    bounds = api_keys.Bounds.parse(accounts, users)
    return {"Authorization": f"Bearer {api_keys.add(house.engine, caller, bounds, scopes=scopes)}"}


def test_a_movement_needs_the_scope_money(house: House, closed: Gateway) -> None:
    mine, caller = account(house), key("scoped")
    reads, moves = bearer(house, caller, "draw", "read"), bearer(house, caller, "money")
    name = key("hold")
    paths = {
        "/v1/accounts": {"user_id": 1}, f"/v1/accounts/{mine}/recharges": {"amount": "5"},
        f"/v1/accounts/{mine}/adjustments": {"amount": "5", "reason": "why"},
        f"/v1/accounts/{mine}/holds": {"amount": "5"}, "/v1/transfers": {"from": mine, "to": mine + 1, "amount": "5"},
        "/v1/draws/x/refund": {}, f"/v1/holds/{name}/post": {}, f"/v1/holds/{name}/void": {},
    }  # fmt: skip
    for path, body in paths.items():
        problem(post(closed.client, path, body, name, reads), 403, "missing-scope")
        problem(post(closed.client, path, body, name), 401)
    assert post(closed.client, f"/v1/accounts/{mine}/holds", {"amount": "5"}, name, moves).status_code == 202
    for path in (f"/v1/movements/{name}", f"/v1/holds/{name}"):
        problem(closed.client.get(path, headers=moves), 403, "missing-scope")
        assert closed.client.get(path, headers=reads).status_code == 202


def test_the_bounds_of_a_key_hold_for_who_pays_and_who_is_recharged(house: House, closed: Gateway) -> None:
    mine, other = account(house), account(house)
    caller = key("bound")
    free, bound = (
        bearer(house, caller, "draw", "read", "money"),
        bearer(house, caller, "draw", "read", "money", accounts=f"{mine}", users="987"),
    )
    drawn, name = key("draw"), key("hold")
    with settling(house):
        assert closed.draw({"account_id": other}, drawn, **free).status_code == 202
        assert post(closed.client, f"/v1/accounts/{other}/holds", {"amount": "5"}, name, free).status_code == 202
        assert closed.client.get(f"/v1/movements/{name}", params={"wait": WAIT_S}, headers=free).status_code == 200
        assert closed.show(drawn, WAIT_S, headers=free).status_code == 200
    amount = {"amount": "5"}
    for path, body in [
        (f"/v1/accounts/{other}/recharges", amount), (f"/v1/accounts/{other}/adjustments", amount | {"reason": "why"}),
        (f"/v1/accounts/{other}/holds", amount), ("/v1/transfers", amount | {"from": other, "to": mine}),
        (f"/v1/draws/{drawn}/refund", {}), (f"/v1/holds/{name}/post", {}), (f"/v1/holds/{name}/void", {}),
        ("/v1/accounts", {"user_id": next(_numbers)}), ("/v1/accounts", {"user_id": 10**6, "amount": "5"}),
    ]:  # fmt: skip
        problem(post(closed.client, path, body, key("out"), bound), 403, "out-of-bounds")
    for path in (f"/v1/movements/{name}", f"/v1/holds/{name}"):
        problem(closed.client.get(path, headers=bound), 403, "out-of-bounds")
    assert (
        post(closed.client, "/v1/transfers", amount | {"from": mine, "to": other}, key("in"), bound).status_code == 202
    )
    user = 987_000_000 + next(_numbers)
    opened = post(closed.client, "/v1/accounts", {"user_id": user, "amount": "5"}, key("in"), bound)
    assert opened.status_code == 202
    recharged = post(closed.client, f"/v1/accounts/{opened.json()['account_id']}/recharges", amount, key("in"), bound)
    assert recharged.status_code == 202


def test_keys_belong_to_callers(house: House, closed: Gateway) -> None:
    """A second caller gets an alias, and finds what is its own by the name that it chose."""
    mine, other = account(house), account(house)
    first, second = (bearer(house, key(it), "read", "money") for it in ("first", "second"))
    name = key("shared")
    with settling(house):
        body = {"amount": "5"}
        for account_id, headers in ((mine, first), (other, second)):
            assert post(closed.client, f"/v1/accounts/{account_id}/holds", body, name, headers).status_code == 202
        results = [
            closed.client.get(f"/v1/movements/{name}", params={"wait": WAIT_S}, headers=it).json()
            for it in (first, second)
        ]
        assert [it["account_id"] for it in results] == [mine, other]
        assert results[0]["request_key"] == name
        alias = results[1]["request_key"]
        assert alias.startswith("alias_")
        assert closed.client.get(f"/v1/movements/{alias}", headers=second).json() == results[1]
        problem(closed.client.get(f"/v1/movements/{alias}", headers=first), 404, "movement-not-found")
        problem(closed.client.get(f"/v1/holds/{name}", headers=bearer(house, "third", "read")), 404, "hold-not-found")
        ended = post(closed.client, f"/v1/holds/{name}/void", {}, key("void"), second)
        told = closed.client.get(ended.headers["location"], params={"wait": WAIT_S}, headers=second).json()
        assert [it["idempotency_key"] for it in told["transactions"]] == [f"{alias}:void"]
    assert closed.client.get(f"/v1/holds/{name}", headers=first).json()["state"] == "open"
    assert closed.client.get(f"/v1/holds/{name}", headers=second).json()["state"] == "voided"
    assert house.violations() == []


# ---- least privilege -------------------------------------------------------------------------------------------------


def test_a_gateway_moves_money_under_a_user_of_its_own(mariadb_url: str, redis_url: str) -> None:
    """With the rights that `tombola grants` gives it, and no more."""
    url = make_url(mariadb_url)
    with House(mariadb_url, redis_url, redis_url) as root, ExitStack() as stack:
        lines = statements(["gateway"], Deployment(str(url.database)))
        made, *granted = [it for it in lines if it[:2] not in ("", "--")]
        with root.engine.begin() as connection:
            for line in (made, *granted):
                connection.exec_driver_sql(line.replace("%", "%%"))
        stack.callback(_drop_user, root)
        user = url.set(username="tombola_gateway", password=made.split("'")[-2])
        own = House(user.render_as_string(hide_password=False), redis_url, redis_url)
        client = stack.enter_context(gateway(own, **OPEN_TO_ALL)).client
        for kind in KINDS:
            with settling(root):
                path, body, types = asked_for(kind, root, client)
                told = settled(client, post(client, path, body, key(kind)))
            assert told["status"] == "completed"
            assert [it["idempotency_key"].partition(":")[2] for it in told["transactions"]] == types
        (_, hold, *_) = table(root.engine, "account_holds")
        assert client.get(f"/v1/holds/{hold['hold_key']}").json()["state"] == "posted"
        assert root.violations() == []


def _drop_user(root: House) -> None:
    with root.engine.begin() as connection:
        connection.exec_driver_sql("DROP USER 'tombola_gateway'@'%%'")
