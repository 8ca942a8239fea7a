"""Accounts: opened here, once per user and asset; and what several of them hold. producers.storage.ledger shows them.

An account begins with nothing: what it is given comes by a request, and so every chain of balances begins at zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal

from sqlalchemy import Connection, insert, select

from tombola.producers.domain.contract import ACCOUNT_ID_MAX
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.money import CENT
from tombola.producers.domain.operations.operation import LockedAccount
from tombola.producers.storage.schema import account_asset_balances as table

_is_asset_code = re.compile(r"[A-Za-z0-9._-]{1,50}").fullmatch


def check_owner(user_id: int, asset_code: str) -> None:
    """Raise InvalidRequest if a user with this id cannot have an account of this asset."""
    if type(user_id) is not int or not 1 <= user_id <= ACCOUNT_ID_MAX:
        raise InvalidRequest(f"user_id is an integer from 1 to {ACCOUNT_ID_MAX}, not {user_id!r:.40}")
    check_asset_code(asset_code)


def check_asset_code(text: str) -> None:
    """Raise InvalidRequest if `text` cannot be the code of an asset."""
    if type(text) is not str or not _is_asset_code(text):
        raise InvalidRequest(f"an asset code is 1 to 50 characters of A-Z a-z 0-9 . _ and -: {text!r:.80}")


def find_id(connection: Connection, user_id: int, asset_code: str) -> int | None:
    """The id of the user's account in this asset; None where there is none."""
    mine = (table.c.user_id == user_id) & (table.c.asset_code == asset_code)
    return connection.execute(select(table.c.id).where(mine)).scalar()


def insert_empty(connection: Connection, user_id: int, asset_code: str, now: datetime) -> int:
    """Open an account with the balance 0; return its id. The unique constraint refuses a second one (1062)."""
    values = {"user_id": user_id, "asset_code": asset_code, "balance": Decimal(0), "created_at": now}
    connection.execute(insert(table).values(**values, updated_at=now))
    account_id = find_id(connection, user_id, asset_code)
    assert account_id is not None
    return account_id


def find_unlocked(connection: Connection, account_ids: Iterable[int]) -> dict[int, LockedAccount]:
    """These accounts by id, as they are now: nothing keeps them so. Missing accounts are not in the result."""
    rows = connection.execute(
        select(table.c.id, table.c.asset_code, table.c.balance).where(table.c.id.in_(sorted(account_ids)))
    )
    return {row.id: LockedAccount(row.asset_code, row.balance.quantize(CENT)) for row in rows}
