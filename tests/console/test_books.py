"""The page of the books: what it shows to viewers as well."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import text

from tests import processes, servers
from tests.consoles import PASSWORD, Console, Visitor
from tombola.producers.domain.books.checkpoints import PrivateKey
from tombola.worker.books import anchors, reconciling, sealing
from tombola.worker.books.reconciling import Payment
from tombola.worker.console import books as page
from tombola.worker.ledger import accounts
from tombola.worker.operators import users as operators

CLOSED = f"redis://{servers.HOST}:1/0"  # this page needs no Redis


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[processes.House]:
    monkeypatch.setattr(page, "BALANCE_KEPT_S", 0.0)
    with processes.House(f"sqlite:///{tmp_path}/ledger.db", CLOSED, CLOSED) as house:
        operators.add(house.engine, "val", "viewer", PASSWORD, by="root")
        yield house


@pytest.fixture
def val(house: processes.House) -> Iterator[Visitor]:
    with Console(house.settings) as console, Visitor(console.url) as visitor:
        assert visitor.log_in("val").status_code == 303
        yield visitor


def test_it_shows_balance_sealing_anchors_and_what_did_not_reconcile(house: processes.House, val: Visitor) -> None:
    shown = val.get("/books").text
    for it in ("No accounts.", "none: no key signs", "nothing was written outside", "everything is sealed", "None yet"):
        assert it in shown, it
    accounts.add(house.engine, user_id=1, balance=Decimal("1234.50"))
    assert "1 rows, the oldest" in val.get("/books").text
    sealing.seal(house.engine, after_s=0)
    anchors.sign_once(house.engine, PrivateKey.make("shop.example/books"), every_s=0)
    anchors.remember_anchored(house.engine)
    found = reconciling.reconcile([Payment("py_<b>", Decimal(1))], [])
    reconciling.record(house.engine, found, file="march.csv", by="shell:ann@host")
    shown = val.get("/books").text
    for it in ("issued 1,234.50", "house/issued", "-1,234.50", "of 1 blocks", "march.csv", "py_&lt;b&gt;"):
        assert it in shown, it
    assert "py_<b>" not in shown
    assert 'class="alert alert-danger"' not in shown


def test_it_says_what_does_not_add_up(house: processes.House, val: Visitor) -> None:
    accounts.add(house.engine, user_id=1, balance=Decimal(10))
    with house.engine.begin() as connection:
        connection.execute(text("UPDATE account_asset_balances SET balance = balance + 500"))
    shown = val.get("/books").text
    assert 'class="alert alert-danger"' in shown
    assert "POINT: users and house together are 5.00, not 0.00" in shown
