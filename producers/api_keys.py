"""API keys: who may call the gateway. A key is shown once, when it is made; only its hash is kept.

    tmb_3f9c2a7be1d04c58_<43 characters>
        └ key id          └ secret: 256 random bits, so a plain hash is as good as a slow one

A caller may hold several keys, so that one can be replaced without losing the idempotency keys, which are the caller's.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Final, NamedTuple

from sqlalchemy import Connection, Engine, insert, select, update

from producers import clock
from producers.errors import InvalidRequest
from producers.schema import api_keys as table

PREFIX: Final = "tmb"
_is_caller = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch
_is_api_key = re.compile(rf"{PREFIX}_([0-9a-f]{{16}})_([A-Za-z0-9_-]{{43}})").fullmatch


class ApiKey(NamedTuple):
    """A key as it is listed: everything but its secret."""

    key_id: str
    caller: str
    created_at: datetime
    revoked_at: datetime | None


# What is put on record, in the same transaction, of a key that was made or revoked: its id, and whose it is.
Record = Callable[[Connection, str, str], None]


def _forget(_connection: Connection, _key_id: str, _caller: str) -> None:
    """Nothing is put on record."""


def add(engine: Engine, caller: str, *, record: Record = _forget) -> str:
    """Make a key for `caller` and return it: the only time that anybody sees it.

    Raises InvalidRequest for a name that is none.
    """
    if not _is_caller(caller):
        raise InvalidRequest(f"a caller's name is 1 to 64 characters of A-Z a-z 0-9 . _ and -: {caller!r:.80}")
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    with engine.begin() as connection:
        connection.execute(
            insert(table).values(
                key_id=key_id, caller=caller, secret_sha256=_hash(secret), created_at=clock.now(connection)
            )
        )
        record(connection, key_id, caller)
    return f"{PREFIX}_{key_id}_{secret}"


def list_all(engine: Engine) -> list[ApiKey]:
    """Every key that was ever made, the oldest first."""
    with engine.connect().execution_options(read_only=True) as connection:
        rows = connection.execute(
            select(table.c.key_id, table.c.caller, table.c.created_at, table.c.revoked_at).order_by(table.c.created_at)
        )
        return [ApiKey(*row) for row in rows]


def revoke(engine: Engine, key_id: str, *, record: Record = _forget) -> None:
    """Let a key in no more. Raises InvalidRequest for one that is not known; revoking twice changes nothing."""
    key_id = key_id.removeprefix(f"{PREFIX}_")[:16]
    mine = table.c.key_id == key_id
    with engine.begin() as connection:
        caller = connection.execute(select(table.c.caller).where(mine)).scalar()
        if caller is None:
            raise InvalidRequest(f"there is no API key {key_id}: `tombola api-key list` shows them")
        revoked_at = clock.now(connection)
        if connection.execute(
            update(table).where(mine, table.c.revoked_at.is_(None)).values(revoked_at=revoked_at)
        ).rowcount:
            record(connection, key_id, caller)


def is_api_key(text: str) -> bool:
    """Whether this has the form of one."""
    return _is_api_key(text) is not None


def caller_of(connection: Connection, api_key: str) -> str | None:
    """Whose key this is; None for one that is not, or no longer, a key."""
    return callers_of(connection, [api_key]).get(api_key)


def callers_of(connection: Connection, given: Iterable[str]) -> dict[str, str]:
    """Whose keys these are; what is not, or no longer, a key is not in the result. One query for all of them."""
    keys = {api_key: match for api_key in given if (match := _is_api_key(api_key))}
    if not keys:
        return {}
    known = table.c.key_id.in_({match[1] for match in keys.values()}), table.c.revoked_at.is_(None)
    rows = connection.execute(select(table.c.key_id, table.c.caller, table.c.secret_sha256).where(*known))
    found = {row.key_id: row for row in rows}
    return {
        api_key: str(row.caller)
        for api_key, match in keys.items()
        if (row := found.get(match[1])) is not None and hmac.compare_digest(row.secret_sha256, _hash(match[2]))
    }


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
