"""Proofs over HTTP and from the command, and the page and programs that verify them, from a real gateway."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from tests import servers
from tests.gateways import OPEN_TO_ALL, Gateway, gateway, settle
from tests.processes import House
from tests.verifiers.draws import BOOKS_KEY, RECEIPT_KEY
from tests.verifiers.running import VERIFIERS, in_node, in_python
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.gateway import verify_page
from tombola.producers.storage import api_keys
from tombola.worker import cli

pytestmark = pytest.mark.process

KEYS = {"TOMBOLA_RECEIPT_KEY": RECEIPT_KEY.text, "TOMBOLA_BOOKS_KEY": BOOKS_KEY.text}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("proofs")
    with (
        servers.redis(private=True) as server,
        House(f"sqlite:///{folder}/ledger.db", server.url, server.url, **KEYS) as house,
    ):
        yield house


@pytest.fixture(scope="module")
def account(house: House) -> int:
    return house.accounts(1, balance=100_000)[0]


@pytest.fixture(scope="module")
def asked(house: House) -> Iterator[Gateway]:
    with gateway(house, **OPEN_TO_ALL, **KEYS) as started:
        yield started


def drawn(asked: Gateway, house: House, account: int, key: str) -> None:
    """Make a draw over HTTP with a nonce, and settle it."""
    nonce = "0123456789abcdef"
    assert asked.draw({"account_id": account, "client_nonce": nonce}, key).status_code == 202
    settle(house, DrawRequest(account_id=account, request_key=key, client_nonce=nonce))


def run(house: House, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of a command."""
    for name, value in house.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["tombola", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_stranger_verifies_what_the_gateway_answers(
    asked: Gateway, house: House, account: int, tmp_path: Path
) -> None:
    drawn(asked, house, account, "k-1")
    answer = asked.client.get("/v1/draws/k-1/proof")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json()["result"] == asked.client.get("/v1/draws/k-1").text
    assert answer.json()["receipts"]["settled"] == asked.client.get("/v1/draws/k-1/receipt").text
    [report] = in_python(tmp_path, [answer.text])
    assert in_node(tmp_path, [(answer.text, {})]) == [report]
    verdicts = {it["claim"]: it["verdict"] for it in report["claims"]}
    assert "false" not in verdicts.values()
    for claim in ("request", "accepted", "odds", "rows", "result", "settled"):
        assert verdicts[claim] == "proven", report


def test_the_command_writes_the_same(
    asked: Gateway, house: House, account: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:  # fmt: skip
    drawn(asked, house, account, "k-2")
    served = asked.client.get("/v1/draws/k-2/proof").content
    file = tmp_path / "proof.json"
    assert run(house, monkeypatch, "proof", "k-2", "--out", str(file)) == 0
    assert file.read_bytes() == served
    capsysbinary.readouterr()
    assert run(house, monkeypatch, "proof", "k-2") == 0
    assert capsysbinary.readouterr().out.strip() == served


@pytest.mark.parametrize(("session", "says"), [("nobody", b"no request has"), ("\N{SNOWMAN}", b"no request has")])
def test_the_command_refuses_what_is_no_draw(
    session: str, says: bytes, house: House, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert run(house, monkeypatch, "proof", session) != 0
    assert says in capsysbinary.readouterr().err


def test_a_file_that_cannot_be_written(
    asked: Gateway, house: House, account: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:  # fmt: skip
    drawn(asked, house, account, "k-3")
    assert run(house, monkeypatch, "proof", "k-3", "--out", str(tmp_path / "no" / "proof.json")) != 0
    assert b"cannot be written" in capsysbinary.readouterr().err


def test_unknown_sessions_and_movements_have_no_proof(asked: Gateway, account: int) -> None:
    unknown = asked.client.get("/v1/draws/nobody/proof")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "session-not-found")
    paid = asked.client.post(
        f"/v1/accounts/{account}/recharges", json={"amount": "1.00"}, headers={"Idempotency-Key": "pay-1"}
    )
    assert paid.status_code == 202, paid.text
    answer = asked.client.get("/v1/draws/pay-1/proof")
    assert (answer.status_code, answer.json()["code"]) == (404, "proof-not-found")


def test_only_the_caller_of_a_draw_gets_its_proof(house: House, account: int) -> None:
    own, other = (api_keys.add(house.engine, caller) for caller in ("shop", "other"))
    with gateway(house, TOMBOLA_GATEWAY_AUTH="api-key", **KEYS) as asked:
        made = asked.draw({"account_id": account}, "owned", Authorization=f"Bearer {own}")
        assert made.status_code == 202, made.text
        path = "/v1/draws/owned/proof"
        assert asked.client.get(path).status_code == 401
        assert asked.client.get(path, headers={"Authorization": f"Bearer {other}"}).status_code == 404
        assert asked.client.get(path, headers={"Authorization": f"Bearer {own}"}).status_code == 200
        # The page and the programs need no key: they know nothing of anybody.
        assert asked.client.get("/verify").status_code == 200
        assert asked.client.get("/verify/verify.py").status_code == 200


def test_the_page_and_its_programs(asked: Gateway) -> None:
    page = asked.client.get("/verify")
    assert page.content == verify_page.page()
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy == f"{verify_page.policy()}; frame-ancestors 'none'"
    assert re.search(r"connect-src|unsafe|https?:", policy) is None
    for name in ("verify.py", "verify.js"):
        program = asked.client.get(f"/verify/{name}")
        assert program.content == (VERIFIERS / name).read_bytes()
        assert program.headers["content-disposition"] == f'attachment; filename="{name}"'
    assert asked.client.get("/verify/verify.html").content == page.content
    assert asked.client.get("/verify/page.css").status_code == 404
    assert asked.client.get("/verify/..%2fverify.py").status_code == 404


def test_a_draw_that_old_code_has_made_has_no_proof(asked: Gateway, house: House, account: int) -> None:
    drawn(asked, house, account, "old")
    with house.engine.begin() as connection:
        changed = connection.execute(
            text("UPDATE asset_transactions SET notes = NULL WHERE idempotency_key = 'old:consume'")
        )
        assert changed.rowcount == 1
    answer = asked.client.get("/v1/draws/old/proof")
    assert (answer.status_code, json.loads(answer.content)["code"]) == (404, "proof-not-found")
