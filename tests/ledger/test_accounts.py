"""What operators do to accounts and keys: once under one key, whole, and on record."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, event
from typer.testing import CliRunner

from tests.books import assert_books, table
from tests.ledgers import migrated
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.domain.errors import IdempotencyKeyReused, InvalidRequest, ServiceUnavailable
from tombola.producers.storage import api_keys
from tombola.producers.storage.engines import open_engine
from tombola.worker.audit import audit
from tombola.worker.audit.on_record import API_KEY_ADD
from tombola.worker.cli import app
from tombola.worker.ledger import accounts
from tombola.worker.operators import actions, once
from tombola.worker.operators.actions import Act, Action, act_once

WHEELS = {DEFAULT_CAMPAIGN.name: Wheel(DEFAULT_CAMPAIGN, b"seed" * 8)}


@pytest.fixture
def engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    made = open_engine(database_url)
    migrated(made)
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", database_url)
    yield made
    assert_books(made)
    assert audit.audit(made, WHEELS).violations == []
    made.dispose()


def recorded(engine: Engine) -> list[Action]:
    with engine.connect().execution_options(read_only=True) as connection:
        return actions.recent(connection, rows_max=100)


def tombola(*arguments: object, ends_with: int = 0) -> str:
    ended = CliRunner().invoke(app, [*map(str, arguments)])
    assert ended.exit_code == ends_with, (ended.output, ended.exception)
    return ended.output


def rows(engine: Engine) -> list[dict[str, Any]]:
    return table(engine, "asset_transactions")


def test_one_key_by_many_at_once(engine: Engine) -> None:
    with ThreadPoolExecutor(6) as pool:
        opened = list(pool.map(lambda _: accounts.add(engine, balance=Decimal(2), key="new", by="ann"), range(6)))
    assert {it._replace(is_repeat=True) for it in opened} == {opened[0]._replace(is_repeat=True)}
    assert [it.is_repeat for it in opened].count(False) == 1
    assert opened[0].user_id == 1
    with ThreadPoolExecutor(4) as pool:
        users = [it.user_id for it in pool.map(lambda _: accounts.add(engine), range(4))]
    assert sorted(users) == [2, 3, 4, 5]
    assert len(rows(engine)) == 1


def test_an_account_is_opened_whole_or_not_at_all(engine: Engine) -> None:
    @event.listens_for(engine, "before_cursor_execute")
    def fail(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        if "INSERT INTO operator_actions" in statement:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accounts.add(engine, user_id=1, balance=Decimal(5), key="k", by="ann")
    with pytest.raises(KeyboardInterrupt):
        accounts.add(engine, user_id=1, by="ann")
    event.remove(engine, "before_cursor_execute", fail)
    assert table(engine, "account_asset_balances") == []
    assert rows(engine) == []
    opened = accounts.add(engine, user_id=1, balance=Decimal(5), key="k", by="ann", reason="new")
    assert accounts.add(engine, user_id=1, balance=Decimal(5), key="k") == opened._replace(is_repeat=True)
    assert accounts.add(engine, balance=Decimal(5), key="k").is_repeat
    asked: dict[str, Any] = {"balance": Decimal(5), "key": "k"}
    for other in ({"user_id": 2}, {"balance": Decimal(6)}, {"asset_code": "COIN"}):
        with pytest.raises(IdempotencyKeyReused):
            accounts.add(engine, **(asked | other))
    with pytest.raises(InvalidRequest, match="user 1 has a POINT account already"):
        accounts.add(engine, user_id=1)
    with pytest.raises(InvalidRequest, match="an amount is above 0"):
        accounts.add(engine, balance=Decimal(-1))
    with pytest.raises(InvalidRequest, match="an amount is above 0"):
        accounts.add(engine, balance=Decimal("0.001"))
    assert len(table(engine, "account_asset_balances")) == 1
    (action,) = recorded(engine)
    assert (action.action, action.reason) == ("account add", "new")
    assert action.details == {"account_id": opened.account_id, "user_id": 1, "key": "k:opening", "amount": "5.00"}


def test_an_account_with_nothing_is_opened_once_as_well(engine: Engine) -> None:
    opened = accounts.add(engine, key="k", by="ann")
    assert accounts.add(engine, key="k", by="ann") == opened._replace(is_repeat=True)
    assert [(row["idempotency_key"], row["delta_amount"]) for row in rows(engine)] == [("k:opening", 0)]
    assert len(recorded(engine)) == 1


def test_the_command_line_says_what_had_been_done(engine: Engine) -> None:
    said = tombola("account", "add", "--balance", 10, "--key", "first", "--reason", "a new customer")
    assert re.match(r"account (\d+) \(user 1, 10.00 POINT\)", said)
    assert "nothing was done" in tombola("account", "add", "--balance", 10, "--key", "first")
    tombola("account", "add", "--balance", 11, "--key", "first", ends_with=1)
    assert "user 2, 0.00 POINT" in tombola("account", "add")
    found = recorded(engine)
    assert [it.action for it in found] == ["account add", "account add"]
    assert {it.operator.partition(":")[0] for it in found} == {"shell"}
    assert found[-1].reason == "a new customer"


def test_an_unclear_outcome_is_found_out_with_the_key(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_arguments: object, **_options: object) -> None:
        raise ServiceUnavailable("the database does not answer: lost")

    with monkeypatch.context() as patched:
        patched.setattr(once, "again_after_conflicts", lose)
        ended = CliRunner().invoke(app, ["account", "add", "--balance", "5"])
    match = re.search(r"run the same command with --key (\S+);", str(ended.exception))
    assert match
    assert "5.00 POINT" in tombola("account", "add", "--balance", 5, "--key", match[1])


def test_api_keys_are_made_and_revoked_on_record(engine: Engine) -> None:
    key = tombola("api-key", "add", "shop", "--reason", "web").strip()
    key_id = key.split("_")[1]
    tombola("api-key", "revoke", key_id)
    tombola("api-key", "revoke", key_id)
    found = [(it.action, it.reason, it.count, it.details) for it in recorded(engine)]
    details = {"key_id": key_id, "caller": "shop"}
    made = {"caller": "shop", "scopes": "draw,read", "key_id": key_id}
    assert found == [("api-key revoke", "", 1, details), ("api-key add", "web", 1, made)]
    assert key not in str(found)


def test_a_key_that_is_not_on_record_is_not_made(engine: Engine) -> None:
    @event.listens_for(engine, "before_cursor_execute")
    def fail(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        if "INSERT INTO operator_actions" in statement:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        act_once(engine, Act.of(API_KEY_ADD, {}), lambda it: {"key_id": api_keys.id_of(api_keys.add(it, "shop"))})
    event.remove(engine, "before_cursor_execute", fail)
    assert api_keys.list_all(engine) == []
