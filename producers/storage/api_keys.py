"""API keys: who may call the gateway. A key is shown once, when it is made; only its hash is kept.

    tmb_3f9c2a7be1d04c58_<43 characters>
        └ key id          └ secret: 256 random bits, so a plain hash is as good as a slow one

A caller may hold several keys, so that one can be replaced without losing the idempotency keys, which are the caller's.
A key is for all accounts, or for those within its bounds.
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

from tombola.producers.domain.contract import ACCOUNT_ID_MAX
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.keys import check_caller
from tombola.producers.storage import clock
from tombola.producers.storage.schema import api_keys as table

PREFIX: Final = "tmb"
ACCOUNTS_LENGTH_MAX: Final = 2000
_is_range = re.compile(r"([0-9]{1,19})(?:-([0-9]{1,19}))?").fullmatch
_is_prefix = re.compile(r"[1-9][0-9]{0,18}").fullmatch
_is_api_key = re.compile(rf"{PREFIX}_([0-9a-f]{{16}})_([A-Za-z0-9_-]{{43}})").fullmatch


class Bounds(NamedTuple):
    """The accounts that a key is for: these, and those of users whose id begins with `user_prefix`; all if neither.

    `accounts` are ranges of account ids, both ends included.
    """

    accounts: tuple[tuple[int, int], ...] = ()
    user_prefix: str = ""

    @classmethod
    def parse(cls, accounts: str | None, user_prefix: str | None) -> Bounds:
        """From what is written, such as `6,7,100-199` and `42`. Raises InvalidRequest for what is no such thing."""
        ranges = tuple(sorted({_range(it.strip()) for it in accounts.split(",")})) if accounts else ()
        if user_prefix and not _is_prefix(user_prefix):
            raise InvalidRequest(f"a prefix of user ids is 1 to 19 digits, not {user_prefix!r:.40}")
        bounds = cls(ranges, user_prefix or "")
        if len(bounds.accounts_text) > ACCOUNTS_LENGTH_MAX:
            raise InvalidRequest(
                f"the accounts of one key, as 6,7,100-199, take at most {ACCOUNTS_LENGTH_MAX:,} characters"
            )
        return bounds

    @property
    def accounts_text(self) -> str:
        """The ranges as they are written."""
        return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in self.accounts)

    @property
    def are_none(self) -> bool:
        """Whether the key is for all accounts."""
        return not self.accounts and not self.user_prefix

    def __str__(self) -> str:
        users = f"of users {self.user_prefix}…" if self.user_prefix else ""
        return " and ".join(filter(None, (self.accounts_text, users))) or "all"

    def hold_account(self, account_id: int) -> bool:
        """Whether it is one of the accounts that are named. It may still be one of the users'."""
        return self.are_none or any(first <= account_id <= last for first, last in self.accounts)

    def hold_user(self, user_id: int) -> bool:
        """Whether the key is for this user's accounts."""
        return self.are_none or (self.user_prefix != "" and str(user_id).startswith(self.user_prefix))


def _range(text: str) -> tuple[int, int]:
    match = _is_range(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= ACCOUNT_ID_MAX:
        raise InvalidRequest(f"accounts are ids and ranges of ids, such as 6,7,100-199, not {text!r:.40}")
    return first, last


NO_BOUNDS: Final = Bounds()


class Holder(NamedTuple):
    """Whose a key is, and what it is for."""

    caller: str
    bounds: Bounds = NO_BOUNDS


class ApiKey(NamedTuple):
    """A key as it is listed: everything but its secret."""

    key_id: str
    caller: str
    created_at: datetime
    revoked_at: datetime | None
    accounts: str | None = None
    user_prefix: str | None = None

    @property
    def bounds(self) -> Bounds:
        return Bounds.parse(self.accounts, self.user_prefix)


# What is put on record, in the same transaction, of a key that was made or revoked: its id, and whose it is.
Record = Callable[[Connection, str, str], None]


def _forget(_connection: Connection, _key_id: str, _caller: str) -> None:
    """Nothing is put on record."""


def add(engine: Engine, caller: str, bounds: Bounds = NO_BOUNDS, *, record: Record = _forget) -> str:
    """Make a key for `caller` within `bounds` and return it: the only time that anybody sees it.

    Raises InvalidRequest for a name that is none.
    """
    check_caller(caller)
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    with engine.begin() as connection:
        connection.execute(
            insert(table).values(
                key_id=key_id,
                caller=caller,
                secret_sha256=_hash(secret),
                created_at=clock.now(connection),
                accounts=bounds.accounts_text or None,
                user_prefix=bounds.user_prefix or None,
            )
        )
        record(connection, key_id, caller)
    return f"{PREFIX}_{key_id}_{secret}"


def list_all(engine: Engine) -> list[ApiKey]:
    """Every key that was ever made, the oldest first."""
    with engine.connect().execution_options(read_only=True) as connection:
        rows = connection.execute(select(*[table.c[name] for name in ApiKey._fields]).order_by(table.c.created_at))
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


def holder_of(connection: Connection, api_key: str) -> Holder | None:
    """Whose key this is, and what for; None for one that is not, or no longer, a key."""
    return holders_of(connection, [api_key]).get(api_key)


def holders_of(connection: Connection, given: Iterable[str]) -> dict[str, Holder]:
    """Whose keys these are, and what for; what is not, or no longer, a key is absent. One query for all of them."""
    keys = {api_key: match for api_key in given if (match := _is_api_key(api_key))}
    if not keys:
        return {}
    rows = connection.execute(
        select(table.c.key_id, table.c.caller, table.c.secret_sha256, table.c.accounts, table.c.user_prefix).where(
            table.c.key_id.in_({match[1] for match in keys.values()}), table.c.revoked_at.is_(None)
        )
    )
    found = {row.key_id: row for row in rows}
    return {
        api_key: Holder(str(row.caller), Bounds.parse(row.accounts, row.user_prefix))
        for api_key, match in keys.items()
        if (row := found.get(match[1])) is not None and hmac.compare_digest(row.secret_sha256, _hash(match[2]))
    }


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
