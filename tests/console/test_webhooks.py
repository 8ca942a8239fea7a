"""The pages of webhooks and fulfilments: a secret is shown once, to an operator, and by no other page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import update

from tests import processes, servers
from tests.books import table
from tests.consoles import PASSWORD, Console, Visitor
from tests.fulfilments.books import add_webhook, coupons, grant, grants, settle
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.schema import fulfilments
from tombola.worker.operators import users as operators

pytestmark = pytest.mark.slow

CLOSED = f"redis://{servers.HOST}:1/0"  # these pages need no Redis
URL = "https://shop.example/hook/of-the-shop?token=abc"
FORM = {"name": "shop", "url": URL, "events": "coupon-won, grant.coupon", "campaign": "", "reason": "it ships"}
SECRET = re.compile(r"whsec_[A-Za-z0-9+/=]{44}")


@pytest.fixture
def house(database_url: str) -> Iterator[processes.House]:
    with processes.House(database_url, CLOSED, CLOSED) as house:
        operators.add(house.engine, "ann", "operator", PASSWORD, by="root")
        operators.add(house.engine, "val", "viewer", PASSWORD, by="root")
        yield house


@pytest.fixture
def console(house: processes.House) -> Iterator[Console]:
    with Console(house.settings) as console:
        yield console


@contextmanager
def visit(console: Console, name: str) -> Iterator[Visitor]:
    with Visitor(console.url) as visitor:
        assert visitor.log_in(name).status_code == 303
        yield visitor


@pytest.fixture
def ann(console: Console) -> Iterator[Visitor]:
    with visit(console, "ann") as visitor:
        yield visitor


@pytest.fixture
def val(console: Console) -> Iterator[Visitor]:
    with visit(console, "val") as visitor:
        yield visitor


def secret_in(text: str) -> str:
    (found,) = set(SECRET.findall(html.unescape(text)))
    return str(found)


def test_a_secret_is_shown_in_the_answer_to_its_form_and_nowhere_else(
    ann: Visitor, val: Visitor, house: processes.House
) -> None:
    answer = ann.submit("/webhooks/add", FORM, page="/webhooks")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    first = secret_in(answer.text)
    rotated = ann.submit("/webhooks/shop/rotate", {"reason": "a laptop was lost"}, page="/webhooks")
    second = secret_in(rotated.text)
    assert "For 24 hours messages are signed by the former secret as well" in rotated.text
    (row,) = table(house.engine, "webhooks")
    assert (row["secret"], row["former_secret"]) == (second, first)
    assert (row["url"], row["events"], row["created_by"]) == (URL, '["coupon-won","grant.coupon"]', "ann")
    for visitor in (ann, val):
        for page in ("/webhooks", "/actions", "/fulfilments", "/"):
            assert not SECRET.search(html.unescape(visitor.get(page).text)), page
    assert not any(it in str(table(house.engine, "operator_actions")) for it in (first, second))
    assert not any(it in str(dict(ann.cookies)) for it in (first, second))


def test_the_path_of_a_url_is_for_operators(ann: Visitor, val: Visitor, house: processes.House) -> None:
    add_webhook(house.engine, "shop", URL, "*")
    assert "token=abc" in ann.get("/webhooks").text
    shown = val.get("/webhooks").text
    assert "https://shop.example/…" in shown
    assert "of-the-shop" not in shown


def test_what_cannot_be_added_is_said_and_changes_nothing(ann: Visitor, house: processes.House) -> None:
    for change, why in [
        ({"url": "http://shop.example/"}, "begins with https://"),
        ({"url": "https://169.254.169.254/"}, "not a public address"),
        ({"events": " "}, "name an event"),
        ({"reason": " "}, "say why"),
        ({"name": "<script>"}, "name is 1 to 64 characters"),
    ]:
        answer = ann.submit("/webhooks/add", FORM | change, page="/webhooks")
        assert (answer.status_code, answer.headers["location"]) == (303, "/webhooks")
        shown = ann.get("/webhooks").text
        assert why in html.unescape(shown)
        assert "<script>" not in re.sub(r"<script nonce=\"[^\"]+\">", "", shown)
    assert table(house.engine, "webhooks") == []
    assert ann.submit("/webhooks/none/rotate", {"reason": "x"}, page="/webhooks").status_code == 303


def test_a_viewer_sees_and_cannot_act(val: Visitor, house: processes.House) -> None:
    add_webhook(house.engine, "shop", URL, "*")
    for path in ("/webhooks/add", "/webhooks/shop/rotate", "/webhooks/shop/remove", "/fulfilments/replay"):
        answer = val.submit(path, FORM | {"reason": "I may not"})
        assert answer.status_code == 403, path
        assert not SECRET.search(answer.text)
    (row,) = table(house.engine, "webhooks")
    assert row["removed_at"] is None


def test_fulfilments_by_state_and_their_replay(ann: Visitor, house: processes.House) -> None:
    (account,) = house.accounts(1)
    add_webhook(house.engine, "shop", URL, "grant.coupon", "draw.settled")
    settle(house.engine, DrawRequest(account_id=account, request_key="settled"))
    keys = coupons(house.engine, account, 3, prefix="won")
    grants(house.engine, grant(account, "n", "notice", notify="coupon-won"))
    with house.engine.begin() as connection:
        connection.execute(
            update(fulfilments)
            .where(fulfilments.c.idempotency_key.in_(keys))
            .values(state="dead", error="<img src=x>", attempts=24, ended_at=utc_now())
        )
    everything = ann.get("/fulfilments").text
    assert "1 notification waits for a" in everything
    assert "<img src=x>" not in everything
    assert all(it in everything for it in ("won_0000", "settled", "none yet"))
    dead = ann.get("/fulfilments?state=dead").text
    assert "settled" not in re.sub(r"draw\.settled", "", dead.partition("<tbody>")[2].partition("</tbody>")[0])
    shown = ann.get("/story?q=won_0001").text
    assert "grant.coupon dead" in shown
    assert "after 24 attempts" in shown
    form = {"state": "dead", "id": "3", "reason": "the shop is back"}
    answer = ann.submit("/fulfilments/replay", form, page="/fulfilments?state=dead")
    assert (answer.status_code, answer.headers["location"]) == (303, "/fulfilments?state=dead")
    assert "1 fulfilments are pending again" in ann.get("/fulfilments").text
    assert [row["state"] for row in table(house.engine, "fulfilments")].count("dead") == 2
    ann.submit("/fulfilments/replay", {"webhook": "shop", "reason": "all of it"}, page="/fulfilments?state=dead")
    assert {row["state"] for row in table(house.engine, "fulfilments")} == {"pending"}
    record = [row for row in table(house.engine, "operator_actions") if row["action"] == "fulfilment replay"]
    assert [(row["operator"], row["reason"], row["count"]) for row in record] == [
        ("ann", "the shop is back", 1),
        ("ann", "all of it", 2),
    ]


def test_a_webhook_is_removed(ann: Visitor, house: processes.House) -> None:
    add_webhook(house.engine, "shop", URL, "*")
    answer = ann.submit("/webhooks/shop/remove", {"reason": "moved"}, page="/webhooks")
    assert answer.status_code == 303
    shown = ann.get("/webhooks").text
    assert "shop is removed" in shown
    assert "No webhooks." in shown
    assert "Removed: shop" in shown
