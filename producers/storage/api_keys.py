"""API keys: the right to call the gateway. A key is shown once, when it is made; the database keeps only its hash.

    tmb_3f9c2a7be1d04c58_<43 characters>
        └ key id          └ secret: 256 random bits, so a plain hash is as good as a slow one

A caller may hold several keys, so that a key can be replaced while the caller keeps its idempotency keys. A key is
valid for all accounts or for those within its bounds, for what its scopes name, and until it expires or is revoked.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from datetime import datetime
from typing import Final, Literal, NamedTuple, get_args

from sqlalchemy import Connection, Engine, insert, or_, select, update

from tombola.producers.domain.contract import ACCOUNT_ID_MAX
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.keys import check_caller
from tombola.producers.storage import clock
from tombola.producers.storage.schema import api_keys as table

KeyScope = Literal["draw", "read", "money"]

PREFIX: Final = "tmb"
KEY_SCOPES: Final[tuple[KeyScope, ...]] = get_args(KeyScope)
SCOPES_DEFAULT: Final[frozenset[str]] = frozenset({"draw", "read"})  # of keys that name no scopes: all older keys
ACCOUNTS_LENGTH_MAX: Final = 2000
_is_range = re.compile(r"([0-9]{1,19})(?:-([0-9]{1,19}))?").fullmatch
_is_prefix = re.compile(r"[1-9][0-9]{0,18}").fullmatch
_is_api_key = re.compile(rf"{PREFIX}_([0-9a-f]{{16}})_([A-Za-z0-9_-]{{43}})").fullmatch


class Bounds(NamedTuple):
    """The accounts that a key is valid for: `accounts`, and the accounts of users whose id begins with `user_prefix`.

    `accounts` are ranges of account ids, both ends included. Without both, the key is valid for all accounts.
    """

    accounts: tuple[tuple[int, int], ...] = ()
    user_prefix: str = ""

    @classmethod
    def parse(cls, accounts: str | None, user_prefix: str | None) -> Bounds:
        """Parse bounds such as `6,7,100-199` and `42`. Raises InvalidRequest for any other text."""
        ranges = tuple(sorted({_range(it.strip()) for it in accounts.split(",")})) if accounts else ()
        if user_prefix and not _is_prefix(user_prefix):
            raise InvalidRequest(f"a prefix of user ids has 1 to 19 digits, not {user_prefix!r:.40}")
        bounds = cls(ranges, user_prefix or "")
        if len(bounds.accounts_text) > ACCOUNTS_LENGTH_MAX:
            raise InvalidRequest(
                f"the accounts of one key, as 6,7,100-199, take at most {ACCOUNTS_LENGTH_MAX:,} characters"
            )
        return bounds

    @property
    def accounts_text(self) -> str:
        """The ranges as text, such as `6,7,100-199`."""
        return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in self.accounts)

    @property
    def are_none(self) -> bool:
        """Whether the key is valid for all accounts."""
        return not self.accounts and not self.user_prefix

    def __str__(self) -> str:
        users = f"of users {self.user_prefix}…" if self.user_prefix else ""
        return " and ".join(filter(None, (self.accounts_text, users))) or "all"

    def hold_account(self, account_id: int) -> bool:
        """Whether `accounts` has this account. If not, the bounds may still have its user (`hold_user`)."""
        return self.are_none or any(first <= account_id <= last for first, last in self.accounts)

    def hold_user(self, user_id: int) -> bool:
        """Whether the key is valid for this user's accounts."""
        return self.are_none or (self.user_prefix != "" and str(user_id).startswith(self.user_prefix))


def _range(text: str) -> tuple[int, int]:
    match = _is_range(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= ACCOUNT_ID_MAX:
        raise InvalidRequest(f"accounts are ids and ranges of ids, such as 6,7,100-199, not {text!r:.40}")
    return first, last


NO_BOUNDS: Final = Bounds()


def checked_scopes(names: Iterable[str]) -> frozenset[str]:
    """These scopes; SCOPES_DEFAULT for none. Raises InvalidRequest for a name that is not in KEY_SCOPES."""
    scopes = frozenset(names)
    if unknown := sorted(scopes.difference(KEY_SCOPES)):
        raise InvalidRequest(f"the scopes of an API key are {', '.join(KEY_SCOPES)}, not {unknown[0]!r:.40}")
    return scopes or SCOPES_DEFAULT


def scopes_text(scopes: Iterable[str]) -> str:
    """Scopes as text, such as `draw,read`, in the order of KEY_SCOPES; scopes that this release does not know last."""
    return ",".join(sorted(scopes, key=lambda it: (KEY_SCOPES.index(it) if it in KEY_SCOPES else len(KEY_SCOPES), it)))


class Holder(NamedTuple):
    """The caller that holds a key, and what the key allows: `scopes`, within `bounds`, before `expires_at`."""

    caller: str
    bounds: Bounds = NO_BOUNDS
    scopes: frozenset[str] = SCOPES_DEFAULT
    expires_at: datetime | None = None


class ApiKey(NamedTuple):
    """A key as it is listed, without its secret."""

    key_id: str
    caller: str
    created_at: datetime
    revoked_at: datetime | None
    accounts: str | None = None
    user_prefix: str | None = None
    scopes: str = ""
    expires_at: datetime | None = None

    @property
    def bounds(self) -> Bounds:
        return Bounds.parse(self.accounts, self.user_prefix)


def add(
    database: Engine | Connection,
    caller: str,
    bounds: Bounds = NO_BOUNDS,
    *,
    scopes: Iterable[str] = SCOPES_DEFAULT,
    expires_at: datetime | None = None,
) -> str:
    """Make a key for `caller`, and return it; its secret is shown this once and never again.

    An Engine commits it, a Connection leaves that to its transaction. Raises InvalidRequest for a `caller` that is not
    a valid name, for unknown `scopes`, and for an `expires_at` in the past.
    """
    check_caller(caller)
    if isinstance(database, Engine):
        with database.begin() as connection:
            return add(connection, caller, bounds, scopes=scopes, expires_at=expires_at)
    allowed, now = checked_scopes(scopes), clock.now(database)
    if expires_at is not None and expires_at <= now:
        raise InvalidRequest(f"a key cannot expire in the past: it is {now:%Y-%m-%d %H:%M} UTC")
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    database.execute(
        insert(table).values(
            key_id=key_id,
            caller=caller,
            secret_sha256=_hash(secret),
            created_at=now,
            accounts=bounds.accounts_text or None,
            user_prefix=bounds.user_prefix or None,
            scopes=scopes_text(allowed),
            expires_at=expires_at,
        )
    )
    return f"{PREFIX}_{key_id}_{secret}"


def list_all(engine: Engine) -> list[ApiKey]:
    """All keys, revoked keys among them, the oldest first."""
    with engine.connect().execution_options(read_only=True) as connection:
        rows = connection.execute(select(*[table.c[name] for name in ApiKey._fields]).order_by(table.c.created_at))
        return [ApiKey(*row)._replace(scopes=scopes_text(_scopes(row.scopes))) for row in rows]


def revoke(database: Engine | Connection, key_id: str) -> str | None:
    """Revoke a key, by its id or as a whole; return its caller, or None if it was revoked already.

    An Engine commits it, as in `add`. Raises InvalidRequest for an unknown key.
    """
    if isinstance(database, Engine):
        with database.begin() as connection:
            return revoke(connection, key_id)
    key_id = id_of(key_id)
    mine = table.c.key_id == key_id
    caller: str | None = database.execute(select(table.c.caller).where(mine)).scalar()
    if caller is None:
        raise InvalidRequest(f"there is no API key {key_id}: `tombola api-key list` shows all keys")
    revoking = update(table).where(mine, table.c.revoked_at.is_(None)).values(revoked_at=clock.now(database))
    return caller if database.execute(revoking).rowcount else None


def id_of(api_key: str) -> str:
    """The id in a key, or in the beginning of a key as it is listed."""
    return api_key.removeprefix(f"{PREFIX}_")[:16]


def is_api_key(text: str) -> bool:
    """Whether `text` has the form of an API key."""
    return _is_api_key(text) is not None


def holder_of(connection: Connection, api_key: str) -> Holder | None:
    """The holder of this key; None for an unknown, revoked or expired key."""
    return holders_of(connection, [api_key]).get(api_key)


def holders_of(connection: Connection, given: Iterable[str]) -> dict[str, Holder]:
    """The holders of these keys, by key, without unknown, revoked and expired keys. One query for all keys."""
    keys = {api_key: match for api_key in given if (match := _is_api_key(api_key))}
    if not keys:
        return {}
    rows = connection.execute(
        select(table).where(
            table.c.key_id.in_({match[1] for match in keys.values()}),
            table.c.revoked_at.is_(None),
            or_(table.c.expires_at.is_(None), table.c.expires_at > clock.now(connection)),
        )
    )
    found = {row.key_id: row for row in rows}
    return {
        api_key: Holder(
            str(row.caller), Bounds.parse(row.accounts, row.user_prefix), _scopes(row.scopes), row.expires_at
        )
        for api_key, match in keys.items()
        if (row := found.get(match[1])) is not None and hmac.compare_digest(row.secret_sha256, _hash(match[2]))
    }


def _scopes(stored: str | None) -> frozenset[str]:
    return SCOPES_DEFAULT if stored is None else frozenset(stored.split(","))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
