"""The users of the console, their roles, and their sessions.

A password is stored as its Argon2 hash, a session's token as its SHA-256: neither can be read from the database.
A session ends after half an hour without a request, after half a day in any case, and when its user is removed.
"""

from __future__ import annotations

import functools
import hashlib
import re
import secrets
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final, Literal, NamedTuple, get_args

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import Connection, Engine, delete, insert, select, update

from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage import clock
from tombola.producers.storage.schema import operator_sessions, operators
from tombola.worker.operators import actions
from tombola.worker.operators.actions import USER_ADD, USER_PASSWORD, USER_REMOVE, USER_ROLE, Act, Done, act_once

Role = Literal["viewer", "operator"]

ROLES: Final[tuple[str, ...]] = get_args(Role)
PASSWORD_LENGTH_MIN: Final = 12
PASSWORD_LENGTH_MAX: Final = 1024  # bounds the time of hashing
# zxcvbn's scale goes from 0 to 4; a password with a score below 3 falls to a hundred million guesses.
PASSWORD_SCORE_MIN: Final = 3
SCORED_LENGTH_MAX: Final = 72  # zxcvbn's own limit: only the beginning is scored
IDLE: Final = timedelta(minutes=30)
LIFETIME: Final = timedelta(hours=12)
TOUCH_EVERY: Final = timedelta(minutes=1)  # so that not every page writes

_is_name = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch


class Operator(NamedTuple):
    """A user of the console: a viewer sees everything, an operator can act."""

    name: str
    role: str
    created_at: datetime

    @property
    def can_act(self) -> bool:
        return self.role == "operator"


# ---- users -----------------------------------------------------------------------------------------------------------


# All of these are on record (worker.operators.actions): `by` is the operator, by default that of this shell. Under one
# `key` each happens once; without one it gets a new key. All raise ServiceUnavailable or ConfigurationError when the
# database cannot be used, and IdempotencyKeyReused.


def add(
    engine: Engine, name: str, role: str, password: str, *, by: str | None = None, reason: str = "", key: str = ""
) -> Done:
    """Add a user. Raises InvalidRequest for an invalid name, role or password, and for a name that is taken."""
    if not _is_name(name):
        raise InvalidRequest(f"a user's name is 1 to 64 characters of A-Z a-z 0-9 . _ and -: {name!r:.80}")
    _check_role(role)
    _check_password(password, name)
    values = {"name": name, "role": role, "password_hash": _hasher().hash(password)}

    def do(connection: Connection) -> Mapping[str, str]:
        if connection.execute(select(operators.c.name).where(operators.c.name == name)).first() is not None:
            raise InvalidRequest(f"there is a user {name} already")
        connection.execute(insert(operators).values(**values, created_at=clock.now(connection)))
        return {}

    act = Act.of(USER_ADD, {"name": name, "role": role}, by=by, reason=reason, key=key)
    return act_once(engine, act, do)


def list_all(engine: Engine) -> list[Operator]:
    """All users, by name."""
    with engine.connect().execution_options(read_only=True) as connection:
        query = select(operators.c.name, operators.c.role, operators.c.created_at).order_by(operators.c.name)
        return [Operator(*row) for row in connection.execute(query)]


def remove(engine: Engine, name: str, *, by: str | None = None, reason: str = "", key: str = "") -> Done:
    """Remove a user and end the user's sessions. Raises InvalidRequest for an unknown user."""

    def do(connection: Connection) -> Mapping[str, str]:
        _lock(connection, name)
        connection.execute(delete(operators).where(operators.c.name == name))
        _end_sessions(connection, name)
        return {}

    return act_once(engine, Act.of(USER_REMOVE, {"name": name}, by=by, reason=reason, key=key), do)


def change_role(
    engine: Engine, name: str, role: str, *, by: str | None = None, reason: str = "", key: str = ""
) -> Done:
    """Change a user's role, from the user's next request on. Raises InvalidRequest for an unknown user or role."""
    _check_role(role)

    def do(connection: Connection) -> Mapping[str, str]:
        _lock(connection, name)
        connection.execute(update(operators).where(operators.c.name == name).values(role=role))
        return {}

    return act_once(engine, Act.of(USER_ROLE, {"name": name, "role": role}, by=by, reason=reason, key=key), do)


def change_password(
    engine: Engine, name: str, password: str, *, by: str | None = None, reason: str = "", key: str = ""
) -> Done:
    """Change a user's password, and end the sessions that were opened with the old one.

    Raises InvalidRequest for an unknown user or an invalid password.
    """
    _check_password(password, name)
    password_hash = _hasher().hash(password)

    def do(connection: Connection) -> Mapping[str, str]:
        _lock(connection, name)
        connection.execute(update(operators).where(operators.c.name == name).values(password_hash=password_hash))
        _end_sessions(connection, name)
        return {}

    return act_once(engine, Act.of(USER_PASSWORD, {"name": name}, by=by, reason=reason, key=key), do)


def verify(engine: Engine, name: str, password: str) -> Operator | None:
    """The user with this name and password; None for a wrong password or, after as long a time, an unknown name."""
    row = None
    if _is_name(name):  # MariaDB refuses to compare an ASCII column with other text
        with engine.connect().execution_options(read_only=True) as connection:
            row = connection.execute(select(operators).where(operators.c.name == name)).first()
    password_hash = _hash_for_unknown() if row is None else row.password_hash
    try:
        _hasher().verify(password_hash, password[: PASSWORD_LENGTH_MAX + 1])
    except (VerificationError, InvalidHashError):
        return None
    if row is None:
        return None
    if _hasher().check_needs_rehash(password_hash):  # made with weaker parameters than today's
        with engine.begin() as connection:
            connection.execute(
                update(operators)
                .where(operators.c.name == name, operators.c.password_hash == password_hash)
                .values(password_hash=_hasher().hash(password))
            )
    return Operator(row.name, row.role, row.created_at)


# ---- sessions --------------------------------------------------------------------------------------------------------


def open_session(engine: Engine, name: str, *, address: str = "") -> str:
    """Open a session for a user whose password was verified; return its token, which only the browser keeps.

    Raises InvalidRequest if the user was removed meanwhile.
    """
    token, now = secrets.token_urlsafe(32), clock.now(engine)
    with engine.begin() as connection:
        over = operator_sessions.c.expires_at <= now
        connection.execute(delete(operator_sessions).where(over | (operator_sessions.c.seen_at <= now - IDLE)))
        _lock(connection, name)
        connection.execute(
            insert(operator_sessions).values(
                token_sha256=_hash(token), operator=name, created_at=now, seen_at=now, expires_at=now + LIFETIME
            )
        )
        actions.record(connection, operator=name, action="login", reason="", count=1, details={"address": address})
    return token


def session(engine: Engine, token: str, *, touch: bool = True) -> Operator | None:
    """The user of the session with this token; None if the session is over or unknown.

    `touch` extends the session by half an hour; pages that refresh themselves pass False, so that the session ends.
    """
    now, mine = clock.now(engine), operator_sessions.c.token_sha256 == _hash(token)
    query = (
        select(operators.c.name, operators.c.role, operators.c.created_at, operator_sessions.c.seen_at)
        .join(operators, operators.c.name == operator_sessions.c.operator)
        .where(mine, operator_sessions.c.expires_at > now, operator_sessions.c.seen_at > now - IDLE)
    )
    with engine.connect().execution_options(read_only=True) as connection:
        row = connection.execute(query).first()
    if row is None:
        return None
    if touch and row.seen_at <= now - TOUCH_EVERY:
        with engine.begin() as connection:
            connection.execute(update(operator_sessions).where(mine).values(seen_at=now))
    return Operator(row.name, row.role, row.created_at)


def close_session(engine: Engine, token: str) -> None:
    """Close a session, if it is still open."""
    with engine.begin() as connection:
        connection.execute(delete(operator_sessions).where(operator_sessions.c.token_sha256 == _hash(token)))


# ---- inside ----------------------------------------------------------------------------------------------------------


@functools.cache
def _hasher() -> PasswordHasher:
    return PasswordHasher()


@functools.cache
def _hash_for_unknown() -> str:
    """The hash that an unknown name's password is verified with, so that it takes as long as for a known name."""
    return _hasher().hash(secrets.token_urlsafe(32))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise InvalidRequest(f"a user's role is {' or '.join(ROLES)}: {role!r:.80}")


def _check_password(password: str, name: str) -> None:
    if not PASSWORD_LENGTH_MIN <= len(password) <= PASSWORD_LENGTH_MAX:
        raise InvalidRequest(
            f"a password has at least {PASSWORD_LENGTH_MIN} characters, and at most {PASSWORD_LENGTH_MAX:,}"
        )
    from zxcvbn import zxcvbn  # loading its lists of common passwords takes a moment

    found = zxcvbn(password[:SCORED_LENGTH_MAX], user_inputs=[name, "tombola", "operator", "console"])
    if found["score"] < PASSWORD_SCORE_MIN:
        why = found["feedback"]["warning"] or "it is made of common words, names or patterns"
        raise InvalidRequest(f"this password is easily guessed ({why.rstrip('.')}): choose another one")


def _lock(connection: Connection, name: str) -> None:
    """Lock the user's row, so that it is not removed meanwhile; raises InvalidRequest for an unknown user."""
    mine = select(operators.c.name).where(operators.c.name == name).with_for_update()
    if not _is_name(name) or connection.execute(mine).first() is None:
        raise _no_such_user(name)


def _end_sessions(connection: Connection, name: str) -> None:
    connection.execute(delete(operator_sessions).where(operator_sessions.c.operator == name))


def _no_such_user(name: str) -> InvalidRequest:
    return InvalidRequest(f"there is no user {name!r:.80}: `tombola user list` shows them")
