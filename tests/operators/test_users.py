"""Operators and their sessions, on both databases."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, select, text, update

from tests.consoles import quick_hashes
from tests.ledgers import migrated
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import operator_sessions
from tombola.producers.storage.schema import operators as table
from tombola.worker.operators import actions
from tombola.worker.operators import users as operators

PASSWORD = "correct horse battery"
OTHER = "another twelve or more"


@pytest.fixture(autouse=True)
def hash_quickly() -> Iterator[None]:
    with quick_hashes():
        yield


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = open_engine(database_url)
    migrated(made)
    yield made
    made.dispose()


def recorded(engine: Engine) -> list[tuple[str, str, dict[str, Any]]]:
    with engine.connect().execution_options(read_only=True) as connection:
        found = actions.recent(connection, rows_max=100)
    return [(it.operator, it.action, it.details) for it in reversed(found)]


def age(engine: Engine, **by: timedelta) -> None:
    """Put every session's times back."""
    with engine.begin() as connection:
        values = {name: utc_now() - span for name, span in by.items()}
        connection.execute(update(operator_sessions).values(values))


def test_who_was_added_gets_in_and_nobody_else(engine: Engine) -> None:
    operators.add(engine, "ann", "operator", PASSWORD, by="root")
    operators.add(engine, "bob", "viewer", OTHER)
    ann = operators.verify(engine, "ann", PASSWORD)
    assert ann is not None
    assert (ann.name, ann.role, ann.can_act) == ("ann", "operator", True)
    for name, password in [("ann", OTHER), ("ann", ""), ("Ann", PASSWORD), ("bob", PASSWORD), ("eve", PASSWORD)]:
        assert operators.verify(engine, name, password) is None
    assert operators.verify(engine, "ann", "x" * 1_000_000) is None
    assert [(it.name, it.role, it.can_act) for it in operators.list_all(engine)] == [
        ("ann", "operator", True),
        ("bob", "viewer", False),
    ]
    assert recorded(engine) == [
        ("root", "user add", {"name": "ann", "role": "operator"}),
        (actions.shell_operator(), "user add", {"name": "bob", "role": "viewer"}),
    ]


def test_no_secret_is_kept(engine: Engine) -> None:
    operators.add(engine, "ann", "operator", PASSWORD)
    token = operators.open_session(engine, "ann")
    with engine.connect().execution_options(read_only=True) as connection:
        for name in ("operators", "operator_sessions", "operator_actions"):
            kept = str(connection.execute(text(f"SELECT * FROM {name}")).all())
            assert PASSWORD not in kept
            assert token not in kept
        assert str(connection.execute(select(table.c.password_hash)).scalar_one()).startswith("$argon2id$")


@pytest.mark.parametrize(
    ("name", "role", "password", "message"),
    [
        ("", "viewer", PASSWORD, "name"),
        ("a b", "viewer", PASSWORD, "name"),
        ("<script>", "viewer", PASSWORD, "name"),
        ("x" * 65, "viewer", PASSWORD, "name"),
        ("eve", "admin", PASSWORD, "role"),
        ("eve", "viewer", "eleven char", "at least 12"),
        ("eve", "viewer", "x" * 1025, "at most 1,024"),
        ("ann", "viewer", PASSWORD, "already"),
    ],
)
def test_what_will_not_do_is_refused(engine: Engine, name: str, role: str, password: str, message: str) -> None:
    operators.add(engine, "ann", "operator", OTHER)
    with pytest.raises(InvalidRequest, match=message):
        operators.add(engine, name, role, password)
    assert [it.name for it in operators.list_all(engine)] == ["ann"]
    assert len(recorded(engine)) == 1


def test_common_passwords_are_refused(engine: Engine) -> None:
    operators.add(engine, "ann", "operator", PASSWORD)
    for password in (
        *("password1234", "Password123!", "passwordpassword", "123456789012", "qwertyuiop12", "qwertyuiop[]\\"),
        *("iloveyou1234", "letmeinletmein", "administrator", "aaaaaaaaaaaa", "abcdefghijkl", "P@ssw0rd1234"),
        *("tombolatombola", "tombola12345", "annannannann", "operator2026"),
    ):
        with pytest.raises(InvalidRequest, match="easily guessed"):
            operators.add(engine, "bob", "operator", password)
        with pytest.raises(InvalidRequest, match="easily guessed"):
            operators.change_password(engine, "ann", password)
    assert operators.verify(engine, "ann", PASSWORD) is not None
    for password in ("Zug um Zug 1897", "vier Pferde, 1 Rad", "q7!dPw0-zzL2", "ß" * 3 + "Übermütig" * 30):
        operators.change_password(engine, "ann", password)
        assert operators.verify(engine, "ann", password) is not None


def test_a_name_that_is_none_is_nobodys(engine: Engine) -> None:
    """MariaDB refuses to compare it with a column of ASCII."""
    operators.add(engine, "ann", "operator", PASSWORD)
    for name in ("é", "Ωmega", "🎰", "ann\x00", "an n", "x" * 500):
        assert operators.verify(engine, name, PASSWORD) is None
        for refused in (
            functools.partial(operators.remove, engine, name),
            functools.partial(operators.change_role, engine, name, "viewer"),
            functools.partial(operators.change_password, engine, name, OTHER),
            functools.partial(operators.open_session, engine, name),
        ):
            with pytest.raises(InvalidRequest, match="no user"):
                refused()
    assert [it[1] for it in recorded(engine)] == ["user add"]


def test_nobody_cannot_be_changed(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="no user"):
        operators.remove(engine, "eve")
    with pytest.raises(InvalidRequest, match="no user"):
        operators.change_password(engine, "eve", PASSWORD)
    with pytest.raises(InvalidRequest, match="no user"):
        operators.change_role(engine, "eve", "viewer")
    with pytest.raises(InvalidRequest, match="no user"):
        operators.open_session(engine, "eve")
    assert recorded(engine) == []


def test_a_removed_user_is_out_at_once(engine: Engine) -> None:
    operators.add(engine, "ann", "operator", PASSWORD)
    token = operators.open_session(engine, "ann", address="192.0.2.7")
    assert operators.session(engine, token) is not None
    operators.remove(engine, "ann", by="root")
    assert operators.session(engine, token) is None
    assert operators.verify(engine, "ann", PASSWORD) is None
    # Nor does the next one of that name find a door open.
    operators.add(engine, "ann", "operator", OTHER)
    assert operators.session(engine, token) is None
    assert recorded(engine)[1:3] == [
        ("ann", "login", {"address": "192.0.2.7"}),
        ("root", "user remove", {"name": "ann"}),
    ]


def test_a_new_password_ends_the_sessions(engine: Engine) -> None:
    operators.add(engine, "ann", "operator", PASSWORD)
    token = operators.open_session(engine, "ann")
    operators.change_password(engine, "ann", OTHER)
    assert operators.session(engine, token) is None
    assert operators.verify(engine, "ann", PASSWORD) is None
    assert operators.verify(engine, "ann", OTHER) is not None


def test_a_role_changes_within_a_session(engine: Engine) -> None:
    operators.add(engine, "ann", "operator", PASSWORD)
    token = operators.open_session(engine, "ann")
    operators.change_role(engine, "ann", "viewer")
    ann = operators.session(engine, token)
    assert ann is not None
    assert not ann.can_act
    assert recorded(engine)[-1][1:] == ("user role", {"name": "ann", "role": "viewer"})


def test_a_session_is_known_by_its_token_alone(engine: Engine) -> None:
    operators.add(engine, "ann", "operator", PASSWORD)
    operators.add(engine, "bob", "viewer", PASSWORD)
    first, second = operators.open_session(engine, "ann"), operators.open_session(engine, "bob")
    for token, name in [(first, "ann"), (second, "bob")]:
        found = operators.session(engine, token)
        assert found is not None
        assert found.name == name
    for token in ("", first[:-1], first.swapcase(), "é"):
        assert operators.session(engine, token) is None
    operators.close_session(engine, first)
    operators.close_session(engine, first)
    assert operators.session(engine, first) is None
    assert operators.session(engine, second) is not None


def test_a_session_ends_without_requests(engine: Engine) -> None:
    operators.add(engine, "ann", "operator", PASSWORD)
    token = operators.open_session(engine, "ann")
    age(engine, seen_at=operators.IDLE - timedelta(seconds=20))
    # A page that refreshes itself is no sign of life ...
    assert operators.session(engine, token, touch=False) is not None
    age(engine, seen_at=operators.IDLE + timedelta(seconds=1))
    assert operators.session(engine, token, touch=False) is None
    # ... a request is.
    age(engine, seen_at=operators.IDLE - timedelta(seconds=20))
    assert operators.session(engine, token) is not None
    with engine.connect().execution_options(read_only=True) as connection:
        (seen_at,) = connection.execute(select(operator_sessions.c.seen_at)).scalars()
    assert utc_now() - seen_at < timedelta(seconds=20)


def test_a_session_ends_after_half_a_day(engine: Engine) -> None:
    operators.add(engine, "ann", "operator", PASSWORD)
    token = operators.open_session(engine, "ann")
    age(engine, expires_at=timedelta(seconds=1))
    assert operators.session(engine, token) is None
    operators.open_session(engine, "ann")  # sweeps
    with engine.connect().execution_options(read_only=True) as connection:
        assert len(connection.execute(select(operator_sessions.c.operator)).all()) == 1
