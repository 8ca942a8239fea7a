"""A draw is refunded from its story, by operators, once; and the stories of movements."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal

import pytest

from tests import processes, servers
from tests.books import table
from tests.consoles import PASSWORD, Console, Visitor
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.operations.hold import HoldRequest
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.operations.transfer import TransferRequest
from tombola.producers.domain.operations.void import VoidRequest
from tombola.worker.ledger import accounts
from tombola.worker.movements.settling import settle
from tombola.worker.operators import users as operators
from tombola.worker.settle import tries
from tombola.worker.settle.rules import Rules

pytestmark = pytest.mark.slow

CLOSED = f"redis://{servers.HOST}:1/0"  # these pages need no Redis


@pytest.fixture
def house(database_url: str) -> Iterator[processes.House]:
    with processes.House(database_url, CLOSED, CLOSED) as house:
        operators.add(house.engine, "ann", "operator", PASSWORD, by="root")
        operators.add(house.engine, "val", "viewer", PASSWORD, by="root")
        yield house
        assert house.violations() == []


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


def won(house: processes.House, account_id: int) -> DrawRequest:
    """A draw of 1.00 that has won 5.00."""
    draws = (
        DrawRequest(account_id=account_id, request_key=f"d{number}", lottery_session_id=f"s{number}")
        for number in range(99)
    )
    draw = next(it for it in draws if house.wheels["default"].draw(account_id, it.request_key).amount)
    tries.settle(house.engine, [draw], Rules(house.wheels))
    return draw


def balance_of(house: processes.House, account_id: int) -> int:
    (row,) = (it for it in table(house.engine, "account_asset_balances") if it["id"] == account_id)
    return int(row["balance"])


def hidden(page: str, name: str) -> str:
    found = re.search(rf'name="{name}" value="([^"]*)"', page)
    assert found, page
    return found[1]


def test_a_refund_says_what_it_would_do_and_does_it_once(ann: Visitor, val: Visitor, house: processes.House) -> None:
    (account_id,) = house.accounts(1)
    draw = won(house, account_id)
    accounts.add(house.engine, user_id=77, balance=Decimal(1), key=draw.request_key, by="root")  # no later movement
    refund = f"/story/refund?session={draw.lottery_session_id}"
    assert refund in ann.get(f"/story?q={draw.request_key}").text
    page = ann.get(refund)
    assert page.status_code == 200
    shown = html.unescape(page.text)
    assert "refund reward <b>-5.00 POINT</b>: 1005.00 → 1000.00" in shown
    form = {
        "session": draw.lottery_session_id,
        "key": hidden(page.text, "key"),
        "policy": "refuse",
        "reason": "  a   complaint ",
    }
    with ThreadPoolExecutor(2) as pool:  # a double click
        answers = list(pool.map(lambda _: ann.submit("/story/refund", form, page=refund), range(2)))
    assert {it.status_code for it in answers} == {303}
    assert {it.headers["location"] for it in answers} == {f"/story?q={draw.lottery_session_id}"}
    assert balance_of(house, account_id) == 1000_00
    story = ann.get(f"/story?q={draw.request_key}").text
    assert refund not in story
    assert "Reversal" in story
    assert "policy=refuse reason=a complaint" in story
    action, *_ = table(house.engine, "operator_actions")[::-1]
    assert (action["operator"], action["action"], action["reason"]) == ("ann", "draw refund", "a complaint")
    assert len([it for it in table(house.engine, "operator_actions") if it["action"] == "draw refund"]) == 1
    # Another form finds it refunded, and so does its page.
    again = ann.submit("/story/refund", form | {"key": "another"}, page="/webhooks")
    assert again.status_code == 303
    assert "ALREADY_REFUNDED" in ann.get(again.headers["location"]).text
    page = ann.get(refund)
    assert "ALREADY_REFUNDED: the draw was refunded before" in page.text
    assert '<button class="btn btn-danger' not in page.text
    # The refund has a story of its own.
    story = val.get(f"/story?q={form['key']}").text
    assert "Story of a movement" in story
    assert f'<a href="/story?q={draw.request_key}" class="mono">' in story
    assert re.search(r"<dt>Policy</dt><dd[^>]*>refuse</dd>", story)


def test_a_prize_that_is_spent(ann: Visitor, house: processes.House) -> None:
    account_id, other = house.accounts(2)
    draw = won(house, account_id)
    spend = TransferRequest(account_id=account_id, amount="1003.00", to=other)
    settle(house.engine, spend, operator="root")
    refund = f"/story/refund?session={draw.request_key}"
    page = ann.get(refund)
    assert "PRIZE_SPENT: a prize is spent already" in page.text
    assert re.search(r'value="refuse" required +disabled', page.text)
    assert re.search(r'value="charge_only" required checked', page.text)
    form = {"session": draw.request_key, "key": hidden(page.text, "key"), "reason": "x"}
    for policy, why in (("refuse", "PRIZE_SPENT"), ("some", "a policy of a refund is"), ("", "a policy")):
        answer = ann.submit("/story/refund", form | {"policy": policy}, page=refund)
        assert why in ann.get(answer.headers["location"]).text
    for wrong, why in (
        ({"key": ""}, "must not be empty"),
        ({"key": "a:b"}, "request key"),
        ({"reason": " "}, "say why"),
        ({"reason": "x" * 101}, "up to 100"),
    ):
        answer = ann.submit("/story/refund", form | {"policy": "write_off"} | wrong, page=refund)
        assert why in html.unescape(ann.get(answer.headers["location"]).text), wrong
    assert balance_of(house, account_id) == 1_00
    answer = ann.submit("/story/refund", form | {"policy": "write_off"}, page=refund)
    assert "holds 0.00 now" in ann.get(answer.headers["location"]).text
    assert balance_of(house, account_id) == 0


def test_viewers_and_other_sites_refund_nothing(ann: Visitor, val: Visitor, house: processes.House) -> None:
    (account_id,) = house.accounts(1)
    draw = won(house, account_id)
    refund = f"/story/refund?session={draw.request_key}"
    assert "refund" not in val.get(f"/story?q={draw.request_key}").text.lower()
    assert val.get(refund).status_code == 403
    form = {"session": draw.request_key, "key": "k", "policy": "refuse", "reason": "x"}
    assert val.submit("/story/refund", form, page="/webhooks").status_code == 403
    assert ann.post("/story/refund", data=form).status_code == 403  # without the session's token
    assert ann.submit("/story/refund", form, page=refund, origin="https://elsewhere.test").status_code == 403
    assert balance_of(house, account_id) == 1004_00
    for unknown in ("nothing", "é", ""):
        assert ann.get("/story/refund", params={"session": unknown}).status_code == 404


def test_the_stories_of_movements(val: Visitor, house: processes.House) -> None:
    (account_id,) = house.accounts(1)
    settle(
        house.engine,
        RechargeRequest(account_id=account_id, request_key="r", lottery_session_id="rs", amount="5", reference="<b>o"),
        operator="ann",
    )
    settle(house.engine, HoldRequest(account_id=account_id, request_key="h", amount="4"), operator="ann")
    settle(house.engine, VoidRequest(account_id=account_id, request_key="v", hold="h", reason="off"), operator="ann")
    for query in ("r", "rs"):
        story = val.get(f"/story?q={query}").text
        assert re.search(r"<dt>Kind</dt><dd>recharge</dd>", story)
        assert re.search(r"<dt>Amount</dt><dd[^>]*>5.00</dd>", story)
        assert "&lt;b&gt;o" in story
        assert "<dt>Campaign</dt>" not in story
        assert "settled at once, without an accept" in story
        assert "by operator ann" in story
    story = val.get("/story?q=h").text
    assert "How it ended" in story
    assert '<a href="/story?q=v" class="mono">v</a>' in story
    story = val.get("/story?q=v").text
    assert '<dt>Hold</dt><dd class="text-break"><a href="/story?q=h" class="mono">h</a></dd>' in story
    assert "How it ended" not in story


def test_an_operator_adjusts_a_balance_once(ann: Visitor, val: Visitor, house: processes.House) -> None:
    (account_id,) = house.accounts(1)
    address = f"/accounts/{account_id}"
    page = ann.get(address).text
    assert 'action="/accounts/1/adjust"' in page
    assert "Adjust the balance" not in val.get(address).text
    form = {"key": hidden(page, "key"), "amount": " -5.50 ", "reason": "a mistake"}
    assert val.submit(f"{address}/adjust", form, page="/webhooks").status_code == 403
    assert ann.post(f"{address}/adjust", data=form).status_code == 403
    for wrong, why in (
        ({"amount": "5,50"}, "an amount is text"),
        ({"amount": ""}, "an amount is text"),
        ({"amount": "-1000.01"}, "INSUFFICIENT_BALANCE"),
        ({"reason": ""}, "say why"),
        ({"key": ""}, "must not be empty"),
    ):
        answer = ann.submit(f"{address}/adjust", form | wrong, page=address)
        assert why in html.unescape(ann.get(answer.headers["location"]).text), wrong
    assert balance_of(house, account_id) == 1000_00
    for said in ("The balance is adjusted: 994.50 now", "This form was sent before"):
        answer = ann.submit(f"{address}/adjust", form, page=address)
        assert said in ann.get(answer.headers["location"]).text
    reused = ann.submit(f"{address}/adjust", form | {"amount": "-5.51"}, page=address)
    assert "was used for another request" in ann.get(reused.headers["location"]).text
    assert balance_of(house, account_id) == 994_50
    assert ann.submit("/accounts/4711/adjust", form | {"key": "k"}, page=address).status_code == 303
    action, *_ = table(house.engine, "operator_actions")[::-1]
    assert (action["operator"], action["action"], action["reason"]) == ("ann", "account adjust", "a mistake")
