"""The console's page of accounts: found by user or id, with open holds and the whole history."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import insert

from tests.books import table
from tests.consoles import PASSWORD, Console, Visitor
from tests.gateways import settle
from tests.processes import House
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.schema import account_holds
from tombola.worker.ledger.accounts import open_account
from tombola.worker.operators import users


@pytest.fixture
def house(tmp_path: Path, redis_url: str) -> Iterator[House]:
    with House(f"sqlite:///{tmp_path}/ledger.db", redis_url, redis_url) as house:
        users.add(house.engine, "val", "viewer", PASSWORD, by="root")
        yield house


@pytest.fixture
def val(house: House) -> Iterator[Visitor]:
    with Console(house.settings) as console, Visitor(console.url) as visitor:
        assert visitor.log_in("val").status_code == 303
        yield visitor


def test_an_account_is_found_by_its_user_and_by_its_id(val: Visitor, house: House) -> None:
    point, coin = (
        open_account(house.engine, user_id=42, asset_code=it, balance=Decimal(7)) for it in ("POINT", "COIN")
    )
    open_account(house.engine, user_id=421)
    page = val.get("/accounts?user=42").text
    assert re.findall(r'href="/accounts/(\d+)"', page) == [str(point), str(coin)]
    assert "User 9 has no account." in val.get("/accounts?user=9").text
    found = val.get(f"/accounts?account={coin}")
    assert (found.status_code, found.headers["location"]) == (303, f"/accounts/{coin}")
    assert "<b>7.00 COIN</b>" in val.get(f"/accounts/{coin}").text
    assert val.get("/accounts/4711").status_code == 404
    assert val.get(f"/accounts/{2**70}").status_code == 404
    assert val.get("/accounts/x").status_code == 404
    assert val.get("/accounts?user=x").status_code == 400


def test_an_account_shows_its_holds_and_all_of_its_history(val: Visitor, house: House) -> None:
    account = open_account(house.engine, user_id=1, balance=Decimal(1000))
    settle(house, *[DrawRequest(account_id=account, request_key=f"d-{number}") for number in range(120)], store=False)
    now = utc_now()
    with house.engine.begin() as connection:
        for key, state in (("trade-1", "open"), ("trade-2", "voided")):
            connection.execute(
                insert(account_holds).values(
                    hold_key=key, account_id=account, asset_code="POINT", amount=Decimal("12.50"), state=state,
                    expires_at=now + timedelta(hours=1), created_at=now, updated_at=now,
                )
            )  # fmt: skip
    page = val.get(f"/accounts/{account}").text
    assert "trade-1" in page
    assert "trade-2" not in page
    assert "<dd>12.50" in page
    seen: list[int] = []
    following: str | None = f"/accounts/{account}"
    while following:
        page = val.get(following).text
        seen += [int(it) for it in re.findall(r"<tr><td>(\d+)</td><td class=\"text-nowrap\">", page)]
        link = re.search(r'rel="next" href="([^"]+)"', page)
        following = link[1] if link else None
    whole = [row["transaction_id"] for row in table(house.engine, "asset_transactions")]
    assert len(whole) > 120
    assert seen == sorted(whole, reverse=True)
    story = val.get(f"/story?q={account}").text
    assert f'href="/accounts/{account}"' in story
