"""What the database user of each process may do, and no more: `tombola grants`.

    for line in statements(["worker", "gateway"], Deployment("tombola")):
        print(line)

GRANTS decides for each table of the schema what each role may do with it; tests/storage/test_grants.py fails for a
table without a decision. Only the migrator may change or delete rows of the ledger, of the record of operators' actions
and of the sealed books. Where a process changes some columns only, the grant names these columns: a request's key,
account, kind and terms stay as they were accepted. A role reads a secret only if its process uses the secret.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Literal, NamedTuple, get_args

from tombola.producers.domain.errors import InvalidRequest

Role = Literal["worker", "gateway", "relay", "console", "operator", "auditor", "migrator"]
Server = Literal["mariadb", "mysql"]

ROLES: Final[tuple[Role, ...]] = get_args(Role)
SERVERS: Final[tuple[Server, ...]] = get_args(Server)
DOES: Final[Mapping[Role, str]] = {
    "worker": "celery -A tombola.worker worker, beat's tasks included: settles, relays, archives, audits, seals",
    "gateway": "tombola gateway, and every DrawClient: accepts requests, opens accounts, reads results and accounts",
    "relay": "tombola relay: publishes again, gives up, voids expired holds, delivers to webhooks, seals the books",
    "console": "tombola console: shows everything but secrets, replays, refunds, adjusts, publishes campaigns",
    "operator": "the shell commands of operators: account, api-key, user, campaign, webhook, dead-letters, books",
    "auditor": "tombola audit and tombola books verify: reads, and puts the audit on record",
    "migrator": "tombola migrate and tombola legacy: changes tables",
}
# Tables whose rows are only added. The doctor warns of users who may change or delete rows of these tables.
APPEND_ONLY: Final = (
    *("asset_transactions", "operator_actions", "books_blocks", "books_house", "seed_chains"),
    *("conformity_parts", "conformity_counts", "conformity_accounts"),
)

Grants = Mapping[Role, str]

READ: Final = "SELECT"
APPEND: Final = "SELECT, INSERT"
ALL: Final = "SELECT, INSERT, UPDATE, DELETE"
_REPLACED: Final = "SELECT, INSERT, DELETE"
_BALANCES: Final = "SELECT, INSERT, UPDATE (balance, updated_at)"
_BALANCES_MOVED: Final = "SELECT, UPDATE (balance, updated_at)"
_HELD: Final = "SELECT, INSERT, UPDATE (state, updated_at)"
_OUTBOX: Final = "publish_attempts, publish_error, published_at, publish_at"
_OUTCOME: Final = "result, settled_at, deliveries, settled_by, balance_told"
_REPLAYED: Final = f"SELECT, INSERT, UPDATE (caller, accepted_at, status, reason, seed_epoch, {_OUTCOME}, {_OUTBOX})"
_KEYS_SHOWN: Final = "SELECT (key_id, caller, created_at, revoked_at, accounts, user_prefix, scopes, expires_at)"
_LETTERS_MOVED: Final = "SELECT, INSERT, UPDATE (state, state_at, replay_id)"
_CAMPAIGNS_CHANGED: Final = "SELECT, INSERT, UPDATE (live_hash, state, revision, updated_at)"
_STOCKED: Final = "SELECT, INSERT, UPDATE (units)"
_SUBSCRIBED: Final = (
    "SELECT, INSERT, UPDATE (url, secret, events, campaign, former_secret, former_until, created_by, created_at, "
    "removed_at)"
)
_SEALED: Final = "SELECT, INSERT, UPDATE (seen, peaks, checkpoint, checkpoint_at, anchored_at)"
_REVEALED: Final = "SELECT, INSERT, UPDATE (revealed, revealed_at)"
_ROTATED: Final = "SELECT, INSERT, UPDATE (closes_at, revealed, revealed_at)"
_LISTED: Final = "SELECT, INSERT, UPDATE (valid_until)"
_DELIVERED: Final = "SELECT, UPDATE (webhook, state, attempts, next_at, error, ended_at)"


# By table, what each role may do with it; a role that is not named may do nothing. The migrator is not named: MIGRATOR
# says what it may do with all tables.
GRANTS: Final[Mapping[str, Grants]] = {
    "account_asset_balances": {
        "worker": _BALANCES, "gateway": APPEND, "console": _BALANCES_MOVED, "operator": _BALANCES, "auditor": READ,
    },
    "asset_transactions": {
        "worker": APPEND, "gateway": READ, "relay": READ, "console": APPEND, "operator": APPEND, "auditor": READ,
    },
    "api_idempotency_requests": {
        "worker": _REPLAYED,
        "gateway": "SELECT, INSERT, UPDATE (caller)",
        "relay": f"SELECT, INSERT, UPDATE (status, reason, {_OUTBOX})",
        "console": _REPLAYED, "operator": _REPLAYED, "auditor": READ,
    },
    "api_keys": {
        "worker": _KEYS_SHOWN, "gateway": READ, "operator": "SELECT, INSERT, UPDATE (revoked_at)",
        "auditor": _KEYS_SHOWN,
    },
    "dead_letters": {
        "worker": ALL, "relay": "SELECT, INSERT, UPDATE", "console": _LETTERS_MOVED, "operator": _LETTERS_MOVED,
        "auditor": READ,
    },
    "replays": {
        "worker": READ, "relay": READ, "console": "SELECT, INSERT, UPDATE", "operator": "SELECT, INSERT, UPDATE",
        "auditor": READ,
    },
    "operators": {
        "worker": "SELECT (name, role)", "auditor": "SELECT (name, role)",
        "console": "SELECT, UPDATE (password_hash)",
        "operator": "SELECT, INSERT, UPDATE (role, password_hash), DELETE",
    },
    "operator_sessions": {"console": ALL, "operator": "SELECT (operator), DELETE"},
    "operator_actions": {
        "worker": APPEND, "relay": READ, "console": APPEND, "operator": APPEND, "auditor": APPEND,
    },
    "campaigns": {
        "worker": READ, "gateway": READ, "console": _CAMPAIGNS_CHANGED, "operator": _CAMPAIGNS_CHANGED,
        "auditor": READ,
    },
    "campaign_versions": {
        "worker": READ, "gateway": READ, "relay": READ, "console": APPEND, "operator": APPEND, "auditor": READ,
    },
    "campaign_accounts": {
        "worker": "SELECT, INSERT, UPDATE (standing, updated_at)", "console": READ, "operator": READ, "auditor": READ,
    },
    "campaign_stock": {
        "worker": "SELECT, UPDATE (units)", "console": _STOCKED, "operator": _STOCKED, "auditor": READ,
    },
    "campaign_stock_changes": {"worker": APPEND, "console": APPEND, "operator": APPEND, "auditor": READ},
    "campaign_codes": {
        "worker": "SELECT, UPDATE (taken_by)", "console": READ, "operator": APPEND,
        "auditor": "SELECT (code, campaign, prize, taken_by)",
    },
    "account_lists": {"worker": READ, "console": READ, "operator": "SELECT, INSERT, DELETE", "auditor": READ},
    "webhooks": {
        "worker": READ, "relay": READ, "console": _SUBSCRIBED, "operator": _SUBSCRIBED,
        "auditor": "SELECT (name, url, events, campaign, removed_at)",
    },
    "fulfilments": {
        "worker": ALL, "relay": _DELIVERED, "console": _DELIVERED, "operator": _DELIVERED, "auditor": READ,
    },
    "seed_chains": {
        "worker": APPEND, "gateway": READ, "console": READ, "operator": APPEND, "auditor": READ,
    },
    "seed_epochs": {
        "worker": _REVEALED, "gateway": READ, "console": READ, "operator": _ROTATED, "auditor": READ,
    },
    "account_holds": {
        "worker": _HELD, "gateway": READ, "relay": READ, "console": READ, "operator": _HELD, "auditor": READ,
    },
    "books_blocks": {
        "worker": APPEND, "gateway": READ, "relay": APPEND, "console": READ, "operator": APPEND, "auditor": READ,
    },
    "books_house": {"worker": APPEND, "relay": APPEND, "console": READ, "operator": APPEND, "auditor": READ},
    "books_head": {
        "worker": _SEALED, "gateway": READ, "relay": _SEALED, "console": READ, "operator": _SEALED, "auditor": READ,
    },
    "books_snapshots": {"worker": APPEND, "relay": APPEND, "console": READ, "operator": APPEND, "auditor": READ},
    "audit_marks": {"worker": _REPLACED, "operator": _REPLACED, "auditor": _REPLACED},
    "audited_accounts": {"worker": _REPLACED, "operator": _REPLACED, "auditor": _REPLACED},
    "receipt_keys": {"gateway": _LISTED, "console": READ, "operator": _LISTED, "auditor": READ},
    "conformity_parts": {"worker": APPEND, "relay": APPEND, "console": READ, "operator": APPEND, "auditor": READ},
    "conformity_counts": {"worker": APPEND, "relay": APPEND, "console": READ, "operator": APPEND, "auditor": READ},
    "conformity_accounts": {"worker": APPEND, "relay": APPEND, "console": READ, "operator": APPEND, "auditor": READ},
}  # fmt: skip
MIGRATOR: Final = (
    "SELECT, INSERT, UPDATE, DELETE, CREATE, DROP, ALTER, INDEX, REFERENCES, CREATE VIEW, SHOW VIEW, TRIGGER, "
    "LOCK TABLES"
)
VERSION_TABLE: Final = "tombola_version"  # all roles read it; tombola.migrations writes it


# In a ledger that was old code's (`tombola legacy`), whose rows workers give their keys until the contract step.
_LEGACY_TABLE: Final = "legacy_migration"
_LEGACY_READERS: Final = ("worker", "relay", "console", "operator", "auditor")
_LEGACY_KEYS: Final = "UPDATE (idempotency_key, lottery_session_id, created_at, updated_at)"


class Deployment(NamedTuple):
    """Where the users are made: the database, the server's kind, and the hosts that they may log in from.

    `is_legacy` says that the ledger was old code's.
    """

    database: str
    server: Server = "mariadb"
    host: str = "%"
    is_legacy: bool = False


def statements(roles: Iterable[Role], where: Deployment, *, are_new: bool = True) -> Iterator[str]:
    """SQL lines that make the user of each role, tombola_{role}, and grant the user what the role needs.

    A new user gets a random password. With `are_new` False the users exist, and only grants are printed: for a release
    with new tables.
    """
    for role in roles:
        user = f"'tombola_{role}'@{_text(where.host)}"
        yield f"-- {role}: {DOES[role]}"
        if are_new:
            yield f"CREATE USER {user} IDENTIFIED BY '{secrets.token_urlsafe(24)}';"
        for what, of_what in grants_of(role, where):
            yield f"GRANT {what} ON {of_what} TO {user};"
        yield ""


def grants_of(role: Role, where: Deployment) -> Iterator[tuple[str, str]]:
    """The privileges of a role, each with the quoted name of the table, or of all tables, that they are for."""
    database = where.database
    # In a grant on a database, _ and % stand for other characters.
    everywhere = f"{_name(database.replace('_', chr(92) + '_').replace('%', chr(92) + '%'))}.*"
    if role == "migrator":
        yield MIGRATOR, everywhere
        return
    # A process must see that `legacy_migration` exists even if it may not read that table: it then refuses to start.
    yield "SHOW VIEW", everywhere
    if where.server == "mysql" and role in ("worker", "console", "operator"):
        # On MySQL, SELECT … FOR UPDATE needs UPDATE, DELETE or LOCK TABLES; only the last one changes no row.
        yield "LOCK TABLES", everywhere
    yield READ, f"{_name(database)}.{_name(VERSION_TABLE)}"
    for table, grants in GRANTS.items():
        if role in grants:
            yield grants[role], f"{_name(database)}.{_name(table)}"
    if where.is_legacy and role in _LEGACY_READERS:
        yield READ, f"{_name(database)}.{_name(_LEGACY_TABLE)}"
    if where.is_legacy and role == "worker":
        yield _LEGACY_KEYS, f"{_name(database)}.`asset_transactions`"


def checked_roles(names: Iterable[str]) -> tuple[Role, ...]:
    """These roles in the order of ROLES, all roles for none. Raises InvalidRequest for an unknown one."""
    wanted = set(names)
    if unknown := sorted(wanted.difference(ROLES)):
        raise InvalidRequest(f"the roles are {', '.join(ROLES)}, not {unknown[0]!r:.40}")
    return tuple(role for role in ROLES if role in wanted or not wanted)


def _name(identifier: str) -> str:
    return f"`{identifier.replace('`', '``')}`"


def _text(value: str) -> str:
    doubled = value.replace("\\", "\\\\").replace("'", "''")
    return f"'{doubled}'"
