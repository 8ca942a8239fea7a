"""What operators do to keys and users: once under one key, whole, and on record with who and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, insert
from typer.testing import CliRunner

from tests.books import table
from tests.consoles import PASSWORD, quick_hashes
from tests.ledgers import migrated
from tombola.producers.domain.errors import IdempotencyKeyReused, InvalidKey, InvalidRequest
from tombola.producers.storage import clock
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import account_lists
from tombola.worker.cli import app
from tombola.worker.operators import users as operators
from tombola.worker.operators.actions import Act, act_once

ACT = Act("list add", {"name": "vip", "accounts": [1, 2]}, "ann", "they asked", "night")


@pytest.fixture
def engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    made = open_engine(database_url, lock_wait_s=5)
    migrated(made)
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", database_url)
    with quick_hashes():
        yield made
    made.dispose()


def add_row(connection: Connection) -> Mapping[str, Any]:
    name = f"list-{clock.now(connection).timestamp()}"
    connection.execute(insert(account_lists).values(name=name, account_id=7))
    return {"list": name}


def test_an_act_happens_once_and_tells_the_first_outcome(engine: Engine) -> None:
    first = act_once(engine, ACT, add_row)
    again = act_once(engine, ACT._replace(operator="bob", reason="again"), add_row)
    assert (first.is_repeat, again.is_repeat) == (False, True)
    assert first.details == again.details
    (action,) = table(engine, "operator_actions")
    assert (action["operator"], action["action"], action["reason"], action["count"]) == (
        "ann", "list add", "they asked", 1,
    )  # fmt: skip
    assert action["act_key"] == "night"
    for other in ({"name": "list remove"}, {"asked": {"name": "other"}}, {"asked": {"more": 1}}):
        with pytest.raises(IdempotencyKeyReused, match="night"):
            act_once(engine, ACT._replace(**other), add_row)
    assert len(table(engine, "account_lists")) == 1
    act_once(engine, ACT._replace(key="morning"), add_row)
    assert len(table(engine, "account_lists")) == 2


def test_what_changes_nothing_is_not_on_record(engine: Engine) -> None:
    assert act_once(engine, ACT, lambda _connection: None).details == ACT.asked
    assert table(engine, "operator_actions") == []
    act_once(engine, ACT, add_row)  # the key is still free
    assert len(table(engine, "operator_actions")) == 1


def test_what_fails_leaves_nothing(engine: Engine) -> None:
    def fail(connection: Connection) -> Mapping[str, Any]:
        add_row(connection)
        raise InvalidRequest("no")

    with pytest.raises(InvalidRequest):
        act_once(engine, ACT, fail)
    assert table(engine, "account_lists") == table(engine, "operator_actions") == []


def test_twenty_at_once_have_one_effect(engine: Engine) -> None:
    with ThreadPoolExecutor(20) as pool:
        done = list(pool.map(lambda _: act_once(engine, ACT, add_row), range(20)))
    assert [it.is_repeat for it in done].count(False) == 1
    assert {it.details["list"] for it in done} == {table(engine, "account_lists")[0]["name"]}
    assert len(table(engine, "account_lists")) == len(table(engine, "operator_actions")) == 1


def test_an_act_says_who_and_why_in_a_valid_form() -> None:
    act = Act.of("user add", {}, reason="  a   new\ncolleague ")
    assert act.operator.startswith("shell:")
    assert act.reason == "a new colleague"
    assert act.key.startswith("user_add_")
    assert Act.of("user add", {}).key != act.key
    assert Act.of("user add", {}, by="ann", key="k-1")[2:] == ("ann", "", "k-1")
    with pytest.raises(InvalidKey):
        Act.of("user add", {}, key="k:1")
    with pytest.raises(InvalidRequest, match="at most"):
        Act.of("user add", {}, reason="x" * 1001)


def test_acts_on_users_happen_once_from_the_shell(engine: Engine) -> None:
    def tombola(*arguments: str) -> str:
        ended = CliRunner().invoke(app, arguments, input=f"{PASSWORD}\n")
        assert ended.exit_code == 0, (ended.output, ended.exception)
        return ended.output

    for command, outcome in (
        (["user", "add", "ann", "--role", "operator", "--password-stdin"], "ann can look and act"),
        (["user", "role", "ann", "viewer"], "ann can look"),
        (["user", "password", "ann", "--password-stdin"], "ann has a new password"),
        (["user", "remove", "ann"], "ann is no longer a user"),
    ):
        key, why = f"key-{command[1]}", f"because of {command[1]}"
        said = [tombola(*command, "--key", key, "--reason", why) for _ in range(2)]
        assert said[0] == f"{outcome}\n"
        assert said[1] == f"{outcome}: so it was done before under this key; nothing was done\n"
        (action,) = [it for it in table(engine, "operator_actions") if it["act_key"] == key]
        assert (action["action"], action["reason"]) == (f"user {command[1]}", why)
        assert PASSWORD not in str(action)
    # The user is gone: the repeat of `add` under its key does not bring it back.
    assert "nothing was done" in tombola(
        "user", "add", "ann", "--role", "operator", "--password-stdin", "--key", "key-add"
    )
    assert operators.list_all(engine) == []
    # Without a key each is an act of its own.
    tombola("user", "add", "ann", "--password-stdin")
    with pytest.raises(InvalidRequest, match="there is a user ann already"):
        CliRunner().invoke(app, ["user", "add", "ann", "--password-stdin"], input=PASSWORD, catch_exceptions=False)
