"""Named lists of accounts, for a campaign's eligibility: who may not draw, or who alone may."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, Engine, delete, func, insert, select

from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.schema import account_lists
from tombola.worker.operators import actions
from tombola.worker.operators.once import once

SHOWN_MAX: Final = 100  # account ids in the record of one act


def put_on(engine: Engine, name: str, account_ids: Sequence[int], *, operator: str, reason: str) -> int:
    """Put accounts on a list; return how many were not on it."""
    why = actions.checked_reason(reason)

    def act(connection: Connection) -> int:
        listed = accounts_on(connection, name)
        new = sorted(set(account_ids) - listed)
        for some in chunks(new):
            connection.execute(insert(account_lists), [{"name": name, "account_id": it} for it in some])
        _record_list(connection, "list add", name, new, operator, why)
        return len(new)

    return once(engine, act)


def take_off(engine: Engine, name: str, account_ids: Sequence[int], *, operator: str, reason: str) -> int:
    """Take accounts off a list; return how many were on it."""
    why = actions.checked_reason(reason)

    def act(connection: Connection) -> int:
        gone = sorted(set(account_ids) & accounts_on(connection, name))
        for some in chunks(gone):
            connection.execute(
                delete(account_lists).where(account_lists.c.name == name, account_lists.c.account_id.in_(some))
            )
        _record_list(connection, "list remove", name, gone, operator, why)
        return len(gone)

    return once(engine, act)


def accounts_on(connection: Connection, name: str) -> set[int]:
    """The accounts on a list."""
    return set(connection.execute(select(account_lists.c.account_id).where(account_lists.c.name == name)).scalars())


def _record_list(
    connection: Connection, action: str, name: str, account_ids: Sequence[int], operator: str, reason: str
) -> None:
    details: dict[str, Any] = {"list": name, "accounts": list(account_ids[:SHOWN_MAX])}
    actions.record(connection, operator=operator, action=action, reason=reason, count=len(account_ids), details=details)


def size(connection: Connection, name: str) -> int:
    """The number of accounts on a list; 0 for a list that is not there."""
    query = select(func.count()).select_from(account_lists).where(account_lists.c.name == name)
    return int(connection.execute(query).scalar_one())


def sizes(connection: Connection) -> dict[str, int]:
    """The number of accounts on each list, by name."""
    rows = connection.execute(
        select(account_lists.c.name, func.count().label("accounts"))
        .group_by(account_lists.c.name)
        .order_by(account_lists.c.name)
    )
    return {row.name: row.accounts for row in rows}
