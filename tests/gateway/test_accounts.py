"""Accounts over HTTP: lists, histories and statements, within the bounds of API keys."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import insert
from typer.testing import CliRunner

from tests import servers
from tests.books import table
from tests.gateway.test_http_api import problem
from tests.gateways import Gateway, gateway, settle
from tests.processes import House
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import AccountNotFound, InvalidRequest
from tombola.producers.storage import api_keys
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.schema import account_holds
from tombola.worker.cli import app
from tombola.worker.ledger.accounts import open_account

pytestmark = pytest.mark.process

LONG_AGO, FAR_AHEAD = "2026-01-01", "2100-01-01T00:00:00%2B01:00"
USER = 42


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("accounts")
    with (
        servers.redis(private=True) as server,
        House(f"sqlite:///{folder}/ledger.db", server.url, server.url) as house,
    ):
        yield house


@pytest.fixture(scope="module")
def account(house: House) -> int:
    """An account of USER with 61 rows."""
    made = open_account(house.engine, user_id=USER, balance=Decimal(1000))
    settle(house, *[DrawRequest(account_id=made, request_key=f"d-{number:03d}") for number in range(45)], store=False)
    return made


@pytest.fixture(scope="module")
def door(house: House, account: int) -> Iterator[Gateway]:
    with gateway(house, TOMBOLA_GATEWAY_RATE_MAX="1000000") as started:
        yield started


@pytest.fixture(scope="module")
def mine(house: House) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_keys.add(house.engine, 'shop')}"}


def hold(house: House, account_id: int, key: str, amount: int, state: str = "open") -> None:
    """A hold's row alone: settling holds is tested elsewhere."""
    now = utc_now()
    values = {"hold_key": key, "account_id": account_id, "asset_code": "POINT", "amount": Decimal(amount)}
    with house.engine.begin() as connection:
        connection.execute(
            insert(account_holds).values(
                **values, state=state, expires_at=now + timedelta(days=1), created_at=now, updated_at=now
            )
        )


def own_rows(house: House, account: int) -> list[dict[str, Any]]:
    return [row for row in table(house.engine, "asset_transactions") if row["account_id"] == account]


def cents(text: str) -> int:
    return int(Decimal(text) * 100)


def test_a_balance_and_what_is_held(door: Gateway, house: House, mine: dict[str, str]) -> None:
    account = open_account(house.engine, user_id=7001, balance=Decimal(100))
    shown = {"account_id": account, "user_id": 7001, "asset_code": "POINT", "balance": "100.00"}
    assert door.client.get(f"/v1/accounts/{account}", headers=mine).json() == shown | {"held": "0.00"}
    hold(house, account, "h-1", 30)
    hold(house, account, "h-2", 5)
    hold(house, account, "h-3", 50, "voided")
    assert door.client.get(f"/v1/accounts/{account}", headers=mine).json() == shown | {"held": "35.00"}


def test_the_accounts_of_a_user(door: Gateway, house: House, account: int, mine: dict[str, str]) -> None:
    more = [open_account(house.engine, user_id=USER, asset_code=f"COIN.{number}") for number in range(4)]
    open_account(house.engine, user_id=421)
    whole = sorted([account, *more])
    found, after = [], 0
    while True:
        answer = door.client.get(f"/v1/accounts?user_id={USER}&limit=2&after={after}", headers=mine).json()
        found += answer["accounts"]
        if answer["next_after"] is None:
            break
        assert len(answer["accounts"]) == 2
        after = answer["next_after"]
    assert [it["account_id"] for it in found] == whole
    assert {it["user_id"] for it in found} == {USER}
    assert door.client.get("/v1/accounts?user_id=9999", headers=mine).json() == {"accounts": [], "next_after": None}
    for wrong in ("", "?user_id=0", "?user_id=x", f"?user_id={2**63}", "?user_id=1&limit=501", "?user_id=1&after=-1"):
        problem(door.client.get(f"/v1/accounts{wrong}", headers=mine), 400)


def test_a_history_in_pages(door: Gateway, house: House, account: int, mine: dict[str, str]) -> None:
    whole, found, after = own_rows(house, account), [], 0
    while True:
        path = f"/v1/accounts/{account}/transactions?limit=7&after={after}"
        answer = door.client.get(path, headers=mine).json()
        found += answer["transactions"]
        if answer["next_after"] is None:
            break
        after = answer["next_after"]
        assert after == answer["transactions"][-1]["transaction_id"]
    assert [it["transaction_id"] for it in found] == [row["transaction_id"] for row in whole]
    for it, row in zip(found, whole, strict=True):
        assert (cents(it["delta_amount"]), cents(it["balance_after"])) == (row["delta_amount"], row["balance_after"])
        assert (it["idempotency_key"], it["lottery_session_id"], it["business_type"]) == (
            row["idempotency_key"], row["lottery_session_id"], row["business_type"],
        )  # fmt: skip
    assert "notes" not in str(found)
    default = door.client.get(f"/v1/accounts/{account}/transactions", headers=mine).json()
    assert default["transactions"] == found[:100]
    problem(door.client.get("/v1/accounts/471147/transactions", headers=mine), 404, "account-not-found")
    problem(door.client.get("/v1/accounts/x/transactions", headers=mine), 400)


def test_a_statement_in_pages_adds_up(door: Gateway, house: House, account: int, mine: dict[str, str]) -> None:
    whole, found, after = own_rows(house, account), [], 0
    while True:
        path = f"/v1/accounts/{account}/statement?from={LONG_AGO}&until={FAR_AHEAD}&limit=10&after={after}"
        answer = door.client.get(path, headers=mine)
        told = answer.json()
        found += told["transactions"]
        if told["next_after"] is None:
            break
        after = told["next_after"]
    assert [it["transaction_id"] for it in found] == [row["transaction_id"] for row in whole]
    balance = door.client.get(f"/v1/accounts/{account}", headers=mine).json()["balance"]
    assert (told["opening_balance"], told["closing_balance"], told["is_final"]) == ("0.00", balance, False)
    assert cents(balance) == sum(cents(it["delta_amount"]) for it in found)
    assert (told["from"], told["until"]) == ("2026-01-01T00:00:00+00:00", "2099-12-31T23:00:00+00:00")
    assert (told["account_id"], told["user_id"], told["asset_code"]) == (account, USER, "POINT")
    past = door.client.get(f"/v1/accounts/{account}/statement?from=2025-01-01&until=2026-01-01", headers=mine).json()
    assert (past["opening_balance"], past["closing_balance"], past["transactions"]) == ("0.00", "0.00", [])
    assert past["is_final"]
    open_end = door.client.get(f"/v1/accounts/{account}/statement?from={LONG_AGO}", headers=mine).json()
    assert (open_end["until"], open_end["closing_balance"]) == (None, balance)
    for wrong in ("", "?from=", "?from=yesterday", "?from=2026-11-01T00:00:00", "?from=2026-11-02&until=2026-11-01",
                  "?from=2026-11-01&format=xml", "?from=2026-11-01&limit=0", "?from=0001-01-01T00:00:00%2B10:00",
                  "?from=2026-02-30"):  # fmt: skip
        problem(door.client.get(f"/v1/accounts/{account}/statement{wrong}", headers=mine), 400)
    assert "write + as %2B" in problem(
        door.client.get(f"/v1/accounts/{account}/statement?from=2026-11-01T00:00:00+01:00", headers=mine), 400
    )


@pytest.mark.parametrize("by_header", [True, False])
def test_a_statement_as_csv_is_whole(
    door: Gateway, house: House, account: int, mine: dict[str, str], by_header: bool
) -> None:
    path = f"/v1/accounts/{account}/statement?from={LONG_AGO}" + ("" if by_header else "&format=csv")
    answer = door.client.get(path, headers=mine | ({"Accept": "text/csv"} if by_header else {}))
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert f"statement-{account}.csv" in answer.headers["content-disposition"]
    lines = list(csv.DictReader(io.StringIO(answer.text)))
    first, *rows, last = lines
    assert (first["business_type"], last["business_type"]) == ("opening balance", "closing balance")
    assert len(rows) == len(own_rows(house, account))
    moved = sum(Decimal(it["delta_amount"]) for it in rows)
    assert Decimal(first["balance_after"]) + moved == Decimal(last["balance_after"])


def test_the_bounds_of_a_key_hold(door: Gateway, house: House, account: int) -> None:
    other = open_account(house.engine, user_id=43)
    sibling = open_account(house.engine, user_id=USER, asset_code="TICKET")
    by_account = api_keys.Bounds.parse(str(account), "")
    by_user = api_keys.Bounds.parse("", str(USER))
    paths = ("", "/transactions", f"/statement?from={LONG_AGO}")
    for bounds, allowed in ((by_account, {account}), (by_user, {account, sibling})):
        bound = {"Authorization": f"Bearer {api_keys.add(house.engine, 'tenant', bounds)}"}
        for number in (account, sibling, other, 471147):
            for path in paths:
                answer = door.client.get(f"/v1/accounts/{number}{path}", headers=bound)
                if number in allowed:
                    assert answer.status_code == 200
                else:
                    problem(answer, 403, "out-of-bounds")
        listed = door.client.get(f"/v1/accounts?user_id={USER}", headers=bound).json()["accounts"]
        assert allowed <= {it["account_id"] for it in listed}
        if bounds is by_account:
            assert [it["account_id"] for it in listed] == [account]
        assert door.client.get("/v1/accounts?user_id=43", headers=bound).json()["accounts"] == []


def test_the_same_from_the_shell(house: House, account: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in house.env.items():
        monkeypatch.setenv(name, value)

    def tombola(*arguments: object) -> str:
        ended = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
        assert ended.exit_code == 0, ended.output
        return ended.output

    whole = own_rows(house, account)
    assert f" {account} " in tombola("account", "list", "--user", USER)
    assert account in [it["account_id"] for it in json.loads(tombola("account", "list", "--user", USER, "--json"))]
    newest = tombola("account", "history", account, "--limit", 3)
    listed = json.loads(tombola("account", "history", account, "--limit", 3, "--json"))
    assert [it["transaction_id"] for it in listed] == [row["transaction_id"] for row in whole[:-4:-1]]
    assert whole[-1]["idempotency_key"] in newest
    older = tombola("account", "history", account, "--limit", 1, "--before", whole[-1]["transaction_id"], "--json")
    assert [it["transaction_id"] for it in json.loads(older)] == [whole[-2]["transaction_id"]]
    said = tombola("account", "statement", account, "--from", LONG_AGO)
    assert "opening balance  0.00" in said
    assert f"closing balance  {whole[-1]['balance_after'] / 100:.2f}" in said
    lines = list(csv.DictReader(io.StringIO(tombola("account", "statement", account, "--from", LONG_AGO, "--csv"))))
    assert len(lines) == len(whole) + 2
    told = tombola("account", "statement", account, "--from", LONG_AGO, "--until", "2026-01-02", "--json")
    assert json.loads(told)["is_final"]
    with pytest.raises(AccountNotFound):
        tombola("account", "history", 471147)
    with pytest.raises(InvalidRequest):
        tombola("account", "statement", account, "--from", "2026-02-01", "--until", "2026-01-01")
