"""Movements from a shell: what is typed, asked, printed, and which exit code it ends with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, text
from typer.testing import CliRunner

from tests.books import table
from tests.ledgers import migrated, recharge
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.domain.errors import DrawError, ServiceUnavailable
from tombola.producers.storage.engines import open_engine
from tombola.worker.audit import audit
from tombola.worker.cli import app
from tombola.worker.ledger.accounts import open_account
from tombola.worker.operators import actions, once
from tombola.worker.settle import tries
from tombola.worker.settle.rules import Rules

pytestmark = pytest.mark.slow

WHEELS = {DEFAULT_CAMPAIGN.name: Wheel(DEFAULT_CAMPAIGN, b"seed" * 8)}


@pytest.fixture
def engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    made = open_engine(database_url)
    migrated(made)
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", database_url)
    yield made
    assert audit.audit(made, WHEELS).violations == []
    made.dispose()


@pytest.fixture
def ids(engine: Engine) -> tuple[int, int]:
    """Two accounts of 10.00."""
    return open_account(engine, user_id=1, balance=Decimal(10)), open_account(engine, user_id=2, balance=Decimal(10))


def tombola(*arguments: object) -> str:
    ended = CliRunner().invoke(app, [*map(str, arguments)])
    assert ended.exit_code == 0, (ended.output, ended.exception)
    return ended.output


def refused(*arguments: object) -> str:
    """The error of a command that changes nothing."""
    ended = CliRunner().invoke(app, [*map(str, arguments)])
    assert ended.exit_code != 0
    assert isinstance(ended.exception, DrawError | SystemExit), ended.exception
    return str(ended.exception) if isinstance(ended.exception, DrawError) else ended.output


def balances(engine: Engine) -> dict[int, int]:
    return {row["id"]: row["balance"] for row in table(engine, "account_asset_balances")}


def acts(engine: Engine) -> list[tuple[str, str, str]]:
    with engine.connect().execution_options(read_only=True) as connection:
        found = actions.recent(connection, rows_max=100)
    return [(it.operator.partition(":")[0], it.action, it.reason) for it in reversed(found)]


def test_a_recharge_says_its_key_and_a_repeat_what_had_been_done(engine: Engine, ids: tuple[int, int]) -> None:
    account_id, _ = ids
    said = tombola("account", "recharge", "--account", account_id, "--amount", 5, "--reason", "a gift")
    assert said.startswith(f"account {account_id}: balance 15.00\n")
    key = said.split()[-1]
    assert re.fullmatch(r"account_recharge_\d{13}_[0-9a-f]{6}", key)
    again = ("account", "recharge", "--account", account_id, "--amount", "5.00", "--key", key)
    assert "done before under this key, balance 15.00 then; nothing was done now" in tombola(*again)
    told: dict[str, Any] = json.loads(tombola(*again, "--json"))
    assert (told["request_key"], told["is_repeat"], told["result"]["balance_after"]) == (key, True, "15.00")
    (row,) = (it for it in table(engine, "asset_transactions") if it["idempotency_key"] == f"{key}:recharge")
    assert row["notes"] == "channel=shell"
    assert "was used for another request" in refused(*again, "--amount", 6)
    assert acts(engine) == [("shell", "account recharge", "a gift")]


def test_what_an_older_release_has_recharged_is_said(engine: Engine, ids: tuple[int, int]) -> None:
    recharge(engine, ids[0], Decimal(5), row_key="night:recharge")
    said = tombola("account", "recharge", "--account", ids[0], "--amount", 5, "--key", "night")
    assert "done before under this key, balance 15.00 then" in said
    assert balances(engine)[ids[0]] == 15_00


def test_an_unclear_outcome_is_found_out_with_the_key(
    engine: Engine, ids: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_arguments: object, **_options: object) -> None:
        raise ServiceUnavailable("the database does not answer: lost")

    asked = ("account", "recharge", "--account", ids[0], "--amount", "5")
    with monkeypatch.context() as patched:
        patched.setattr(once, "again_after_conflicts", lose)
        match = re.search(r"run the same command with --key (\S+);", refused(*asked))
    assert match
    assert "balance 15.00" in tombola(*asked, "--key", match[1])


def test_money_leaves_only_after_a_yes(engine: Engine, ids: tuple[int, int]) -> None:
    first, second = ids
    asked = ("account", "transfer", first, second, "4.00", "--key", "t", "--reference", "order-7")
    assert "no terminal to ask for confirmation on: add --yes" in refused(*asked)
    assert "--json asks for no confirmation: add --yes" in refused(*asked, "--json")
    assert "no terminal" in refused("account", "adjust", first, "-5", "--reason", "a mistake")
    assert balances(engine) == {first: 10_00, second: 10_00}
    said = tombola(*asked, "--yes")
    assert f"account {first}: balance 6.00" in said
    assert "transfer_out" in said
    assert "nothing was done now" in tombola(*asked, "--yes")
    tombola("account", "adjust", first, "-5.50", "--reason", "a mistake", "--yes", "--key", "a")
    tombola("account", "adjust", second, "1", "--reason", "a mistake, too", "--yes")
    assert balances(engine) == {first: 50, second: 15_00}
    assert acts(engine) == [
        ("shell", "account transfer", ""),
        ("shell", "account adjust", "a mistake"),
        ("shell", "account adjust", "a mistake, too"),
    ]


def test_a_rejection_is_one_line_and_nothing_is_left(engine: Engine, ids: tuple[int, int]) -> None:
    first, second = ids
    before = table(engine, "api_idempotency_requests")
    for asked, why in (
        (("transfer", first, second, "10.01", "--yes"), "INSUFFICIENT_BALANCE: the account holds 10.00"),
        (("transfer", first, 4711, "1", "--yes"), "ACCOUNT_NOT_FOUND"),
        (("transfer", first, first, "1", "--yes"), "cannot transfer to itself"),
        (("recharge", "--account", 4711, "--amount", "1"), "ACCOUNT_NOT_FOUND"),
        (("recharge", "--account", first, "--amount", "0"), "an amount is text"),
        (("recharge", "--account", first, "--amount", "1.001"), "an amount is text"),
        (("recharge", "--account", first, "--amount", "1", "--key", "a:b"), "request key"),
        (("hold", first, "11"), "INSUFFICIENT_BALANCE"),
        (("post", "none", "--yes"), "there is no hold none"),
        (("adjust", first, "1", "--reason", "x" * 101, "--yes"), "a reason has up to 100"),
        (("adjust", first, "1"), "reason"),
    ):
        assert why in refused("account", *asked), asked
    assert table(engine, "api_idempotency_requests") == before
    assert acts(engine) == []


def test_a_hold_is_listed_posted_and_voided(engine: Engine, ids: tuple[int, int]) -> None:
    first, second = ids
    for key in ("h1", "h2"):
        tombola("account", "hold", first, "3", "--key", key, "--valid-s", 60)
    assert re.findall(r"^ *(h\d) +open +3\.00 +POINT", tombola("account", "holds", first), re.M) == ["h1", "h2"]
    tombola("account", "post", "h1", "--amount", "2", "--to", second, "--yes")
    tombola("account", "void", "h2", "--reason", "the trade fell through")
    assert balances(engine) == {first: 8_00, second: 12_00}
    assert json.loads(tombola("account", "holds", first, "--json")) == []
    ended = json.loads(tombola("account", "holds", first, "--all", "--json"))
    assert {it["hold_key"]: it["state"] for it in ended} == {"h1": "posted", "h2": "voided"}
    assert "HOLD_ENDED" in refused("account", "void", "h2")


def test_a_draw_is_refunded(engine: Engine, ids: tuple[int, int]) -> None:
    account_id, other = ids
    draws = (DrawRequest(account_id=account_id, request_key=f"d{number}") for number in range(100))
    draw = next(it for it in draws if WHEELS["default"].draw(account_id, it.request_key).amount)
    tries.settle(engine, [draw], Rules(WHEELS))  # 14.00
    tombola("account", "transfer", account_id, other, "12", "--yes")
    refund = ("draw", "refund", draw.lottery_session_id, "--reason", "a complaint", "--key", "r")
    assert "it would be rejected, PRIZE_SPENT: a prize is spent already" in refused(*refund)
    assert "PRIZE_SPENT" in refused(*refund, "--yes")
    ended = CliRunner().invoke(app, [*refund, "--policy", "write_off"])
    assert "no terminal" in str(ended.exception)
    assert re.search(r"refund_reward +-3\.00 POINT", ended.output)
    assert f"account {account_id} would hold 0.00" in ended.output
    said = tombola(*refund, "--policy", "write_off", "--yes")
    assert f"account {account_id}: balance 0.00" in said
    assert f"{draw.request_key}:refund_reward" in said
    assert "nothing was done now" in tombola(*refund, "--policy", "write_off")
    assert "ALREADY_REFUNDED" in refused("draw", "refund", draw.request_key, "--reason", "x", "--yes")
    assert "a policy of a refund is" in refused(*refund, "--policy", "some")
    assert "no draw has" in refused("draw", "refund", "nothing", "--reason", "x")
    assert "say why" in refused("draw", "refund", draw.request_key, "--reason", " ", "--yes")
    assert acts(engine)[-1] == ("shell", "draw refund", "a complaint")


def test_points_expire(engine: Engine, ids: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "POINT does not expire" in refused("account", "expire")
    monkeypatch.setenv("TOMBOLA_POINTS_VALID_DAYS", "POINT=365, COIN=30")
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE asset_transactions SET created_at = '2024-01-01' WHERE account_id = {ids[0]}"))
    asked = ("account", "expire", "--month", "2026-06")
    said = tombola(*asked, "--dry-run")
    assert "2026-06: 10.00 POINT would expire on 1 of 2 accounts, earned before 2025-06-01" in said
    assert balances(engine)[ids[0]] == 10_00
    assert "2026-06: 10.00 POINT expired on 1 of 2 accounts" in tombola(*asked, "--reason", "june")
    assert balances(engine) == {ids[0]: 0, ids[1]: 10_00}
    told = json.loads(tombola(*asked, "--json"))
    assert (told["expired"], told["amount"], told["is_through"]) == (0, "0", True)
    assert "are not due before" in refused("account", "expire", "--month", "2999-01")
    assert acts(engine) == [("shell", "account expire", "june"), ("shell", "account expire", "")]


@pytest.mark.parametrize("value", ["POINT", "POINT=0", "POINT=36501", "=3", "POINT=3,POINT=4", "P T=3", "POINT=3.5"])
def test_a_validity_is_checked(engine: Engine, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMBOLA_POINTS_VALID_DAYS", value)
    assert "TOMBOLA_POINTS_VALID_DAYS" in refused("account", "expire")
