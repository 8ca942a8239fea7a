"""I12: every operator action is on record. What moved money or keys is compared with `operator_actions`, both ways.

Books of older releases hold recharges, accounts and API keys without a record. So only ledger rows with the note
ON_RECORD (worker.ledger.accounts) are looked up in the record. What the record names must exist in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, select

from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.money import CENT
from tombola.producers.storage.api_keys import NO_BOUNDS, Bounds
from tombola.producers.storage.schema import api_keys, dead_letters, operator_actions, operators, replays
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.audit.report import Violation
from tombola.worker.audit.stored import FETCH_SIZE
from tombola.worker.ledger.accounts import ACCOUNT_ADD, ACCOUNT_RECHARGE, ON_RECORD
from tombola.worker.operators.actions import USER_ADD, USER_REMOVE, USER_ROLE

API_KEY_ADD: Final = "api-key add"
API_KEY_REVOKE: Final = "api-key revoke"

Found = tuple[str, str]  # the subject, and what is wrong with it


def check_record(connection: Connection) -> Iterator[Violation]:
    """What is missing from the record, and what the record says that is not so."""
    for check in (_replays, _recharges, _api_keys, _users):
        for subject, what in check(connection):
            yield Violation("I12", subject, what)


def _replays(connection: Connection) -> Iterator[Found]:
    """A dead letter that was replayed names its replay, whose begin and end are on record."""
    begun = {row.id: row.ended_at for row in connection.execute(select(replays.c.id, replays.c.ended_at))}
    recorded: dict[str, set[int | None]] = {}
    for action, replay_id in connection.execute(
        select(operator_actions.c.action, operator_actions.c.replay_id).where(operator_actions.c.replay_id.is_not(None))
    ):
        recorded.setdefault(action, set()).add(replay_id)
    for replay_id, ended_at in begun.items():
        if replay_id not in recorded.get("replay", ()):
            yield f"replay {replay_id}", "its begin is not on record"
        if ended_at is not None and replay_id not in recorded.get("replay ended", ()):
            yield f"replay {replay_id}", "its end is not on record"
    named = connection.execute(
        select(dead_letters.c.replay_id).where(dead_letters.c.replay_id.is_not(None)).distinct()
    ).scalars()
    for replay_id in named:
        if replay_id not in begun:
            yield f"replay {replay_id}", "dead letters name it, and it does not exist"


def _recharges(connection: Connection) -> Iterator[Found]:
    """Recharges by operators: the same account and amount in the ledger and on record, once each."""
    recorded: dict[str, tuple[int, str]] = {}
    for id, _, details in _recorded(connection, ACCOUNT_ADD, ACCOUNT_RECHARGE):
        if details is None:
            yield f"action {id}", "its details cannot be read"
        elif details.get("key"):  # an account that was opened with nothing has no row
            recorded[str(details["key"])] = (details.get("account_id", 0), str(details.get("amount")))
    rows = connection.execution_options(yield_per=FETCH_SIZE).execute(
        select(
            transactions.c.idempotency_key,
            transactions.c.account_id,
            transactions.c.delta_amount,
        ).where(transactions.c.notes == ON_RECORD)
    )
    for key, account_id, amount in rows:
        said = recorded.pop(key, None)
        if said is None:
            yield f"recharge {key}", "it is not on record"
        elif said != (account_id, str(Decimal(amount).quantize(CENT))):
            yield (
                f"recharge {key}",
                f"is {amount} to account {account_id}, on record are {said[1]} to account {said[0]}",
            )
    for key, (account_id, amount_said) in recorded.items():
        yield f"recharge {key}", f"{amount_said} to account {account_id} are on record, and not in the ledger"


def _api_keys(connection: Connection) -> Iterator[Found]:
    """An API key that was made on record exists and may do what is on record; one that was revoked is revoked."""
    columns = ("key_id", "revoked_at", "scopes", "expires_at", "accounts", "user_prefix")
    keys = {row.key_id: row for row in connection.execute(select(*[api_keys.c[name] for name in columns]))}
    for id, action, details in _recorded(connection, API_KEY_ADD, API_KEY_REVOKE):
        key_id = (details or {}).get("key_id")
        if details is None:
            yield f"action {id}", "its details cannot be read"
        elif key_id not in keys:
            yield f"API key {key_id}", "is on record, and gone"
        elif action == API_KEY_REVOKE and keys[key_id].revoked_at is None:
            yield f"API key {key_id}", "was revoked on record, and is valid again"
        # Older releases recorded no scopes.
        elif action == API_KEY_ADD and "scopes" in details and not _is_as_recorded(keys[key_id], details):
            yield f"API key {key_id}", "may do other things than on record: its scopes, accounts or end were changed"


def _is_as_recorded(key: Any, details: dict[str, Any]) -> bool:
    try:
        bounds = Bounds.parse(key.accounts, key.user_prefix)
    except InvalidRequest:
        return False
    has = (key.scopes, "" if key.expires_at is None else key.expires_at.isoformat(), str(bounds))
    return has == (details["scopes"], details.get("expires_at", ""), details.get("for", str(NO_BOUNDS)))


def _users(connection: Connection) -> Iterator[Found]:
    """The users of the console are those that were added on record and not removed, each in the last role on record."""
    recorded: dict[str, str] = {}
    for id, action, details in _recorded(connection, USER_ADD, USER_ROLE, USER_REMOVE):
        name, role = (details or {}).get("name"), (details or {}).get("role")
        if not isinstance(name, str):
            yield f"action {id}", "its details cannot be read"
        elif action == USER_REMOVE:
            recorded.pop(name, None)
        else:
            recorded[name] = str(role)
    there = {row.name: row.role for row in connection.execute(select(operators.c.name, operators.c.role))}
    for name in sorted(there.keys() | recorded.keys()):
        if name not in recorded:
            yield f"user {name}", "is not on record"
        elif name not in there:
            yield f"user {name}", "is on record, and gone"
        elif there[name] != recorded[name]:
            yield f"user {name}", f"is {there[name]}, on record {recorded[name]}"


def _recorded(connection: Connection, *actions: str) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """Id, name and details of these actions, the oldest first; details None where they are no JSON object."""
    rows = connection.execute(
        select(operator_actions.c.id, operator_actions.c.action, operator_actions.c.details)
        .where(operator_actions.c.action.in_(actions))
        .order_by(operator_actions.c.id)
    )
    for id, action, details in rows:
        try:
            said = msgspec.json.decode(details)
        except (msgspec.DecodeError, TypeError):
            said = None
        yield id, action, said if isinstance(said, dict) else None
