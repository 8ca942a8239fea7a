"""The operators: who may look, who may act, and the sessions in which they do.

A password is kept as its Argon2 hash, a session's token as its SHA-256: neither can be read back from the database.
A session ends after half an hour without a request, after half a day in any case, and with its user.
"""

from __future__ import annotations

import functools
import hashlib
import re
import secrets
from datetime import datetime, timedelta
from typing import Final, Literal, NamedTuple, get_args

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import Connection, Engine, delete, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage import clock
from tombola.producers.storage.faults import explain, is_duplicate_key
from tombola.producers.storage.schema import operator_sessions, operators
from tombola.worker.operators import actions

Role = Literal["viewer", "operator"]

ROLES: Final[tuple[str, ...]] = get_args(Role)
PASSWORD_LENGTH_MIN: Final = 12
PASSWORD_LENGTH_MAX: Final = 1024  # hashing a novel takes its time
# zxcvbn's scale goes from 0 to 4; below 3 a password falls to a hundred million guesses.
PASSWORD_SCORE_MIN: Final = 3
SCORED_LENGTH_MAX: Final = 72  # zxcvbn's own limit: what begins well enough is good enough
IDLE: Final = timedelta(minutes=30)
LIFETIME: Final = timedelta(hours=12)
TOUCH_EVERY: Final = timedelta(minutes=1)  # a page is not a write

_is_name = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch


class Operator(NamedTuple):
    """A user of the console: a viewer sees everything, an operator may act."""

    name: str
    role: str
    created_at: datetime

    @property
    def may_act(self) -> bool:
        return self.role == "operator"


# ---- users -----------------------------------------------------------------------------------------------------------


def add(engine: Engine, name: str, role: str, password: str, *, by: str | None = None) -> None:
    """Let somebody in. `by` is who says so, by default who types commands here.

    Raises InvalidRequest for a name, a role or a password that will not do, and for a name that is taken.
    """
    if not _is_name(name):
        raise InvalidRequest(f"a user's name is 1 to 64 characters of A-Z a-z 0-9 . _ and -: {name!r:.80}")
    _check_role(role)
    _check_password(password, name)
    values = {"name": name, "role": role, "password_hash": _hasher().hash(password)}
    try:
        with engine.begin() as connection:
            connection.execute(insert(operators).values(**values, created_at=clock.now(connection)))
            _record(connection, by, "user add", {"name": name, "role": role})
    except SQLAlchemyError as error:
        if is_duplicate_key(error):
            raise InvalidRequest(f"there is a user {name} already") from error
        raise explain(error) from error


def list_all(engine: Engine) -> list[Operator]:
    """Every user, by name."""
    with engine.connect().execution_options(read_only=True) as connection:
        query = select(operators.c.name, operators.c.role, operators.c.created_at).order_by(operators.c.name)
        return [Operator(*row) for row in connection.execute(query)]


def remove(engine: Engine, name: str, *, by: str | None = None) -> None:
    """Let somebody in no more, and end the sessions. Raises InvalidRequest for a user that there is not."""
    with engine.begin() as connection:
        _lock(connection, name)
        connection.execute(delete(operators).where(operators.c.name == name))
        _end_sessions(connection, name)
        _record(connection, by, "user remove", {"name": name})


def change_role(engine: Engine, name: str, role: str, *, by: str | None = None) -> None:
    """Make a viewer an operator, or the other way round: from the next request on."""
    _check_role(role)
    with engine.begin() as connection:
        _lock(connection, name)
        connection.execute(update(operators).where(operators.c.name == name).values(role=role))
        _record(connection, by, "user role", {"name": name, "role": role})


def change_password(engine: Engine, name: str, password: str, *, by: str | None = None) -> None:
    """Give somebody another password, and end the sessions: whoever knows the old one is out."""
    _check_password(password, name)
    password_hash = _hasher().hash(password)
    with engine.begin() as connection:
        _lock(connection, name)
        connection.execute(update(operators).where(operators.c.name == name).values(password_hash=password_hash))
        _end_sessions(connection, name)
        _record(connection, by, "user password", {"name": name})


def verify(engine: Engine, name: str, password: str) -> Operator | None:
    """Who this is; None for a wrong password and, after just as long, for a name that is nobody's, or is no name."""
    row = None
    if _is_name(name):  # MariaDB refuses to compare a column of ASCII with anything else
        with engine.connect().execution_options(read_only=True) as connection:
            row = connection.execute(select(operators).where(operators.c.name == name)).first()
    password_hash = _nobodys_hash() if row is None else row.password_hash
    try:
        _hasher().verify(password_hash, password[: PASSWORD_LENGTH_MAX + 1])
    except (VerificationError, InvalidHashError):
        return None
    if row is None:
        return None
    if _hasher().check_needs_rehash(password_hash):  # made when less was thought enough
        with engine.begin() as connection:
            connection.execute(
                update(operators)
                .where(operators.c.name == name, operators.c.password_hash == password_hash)
                .values(password_hash=_hasher().hash(password))
            )
    return Operator(row.name, row.role, row.created_at)


# ---- sessions --------------------------------------------------------------------------------------------------------


def open_session(engine: Engine, name: str, *, address: str = "") -> str:
    """Begin a session for somebody whose password was right; its token, which only the browser keeps."""
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
    """Whose session this is; None when it is over, or was none.

    With `touch` it goes on for another half hour: a page that refreshes itself must not keep it open.
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
    """End a session; one that is over already stays so."""
    with engine.begin() as connection:
        connection.execute(delete(operator_sessions).where(operator_sessions.c.token_sha256 == _hash(token)))


# ---- inside ----------------------------------------------------------------------------------------------------------


@functools.cache
def _hasher() -> PasswordHasher:
    return PasswordHasher()


@functools.cache
def _nobodys_hash() -> str:
    """What an unknown name's password is compared with, so that it takes as long as a known one's."""
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
    from zxcvbn import zxcvbn  # its lists of common passwords take a moment to load

    found = zxcvbn(password[:SCORED_LENGTH_MAX], user_inputs=[name, "tombola", "operator", "console"])
    if found["score"] < PASSWORD_SCORE_MIN:
        why = found["feedback"]["warning"] or "it is made of common words, names or patterns"
        raise InvalidRequest(f"this password is soon guessed ({why.rstrip('.')}): take another one")


def _lock(connection: Connection, name: str) -> None:
    """Hold the user's row, so that nobody removes it meanwhile; raises InvalidRequest if it is gone, or is no name."""
    mine = select(operators.c.name).where(operators.c.name == name).with_for_update()
    if not _is_name(name) or connection.execute(mine).first() is None:
        raise _no_such_user(name)


def _end_sessions(connection: Connection, name: str) -> None:
    connection.execute(delete(operator_sessions).where(operator_sessions.c.operator == name))


def _record(connection: Connection, by: str | None, action: str, details: dict[str, str]) -> None:
    who = actions.shell_operator() if by is None else by
    actions.record(connection, operator=who, action=action, reason="", count=1, details=details)


def _no_such_user(name: str) -> InvalidRequest:
    return InvalidRequest(f"there is no user {name!r:.80}: `tombola user list` shows them")
