"""What operators' movements refer to: the draw that a refund takes back, the hold that a post or a void ends."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import Connection, select

from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import InvalidRequest, SessionNotFound
from tombola.producers.domain.operations.operation import HoldState
from tombola.producers.storage import ledger
from tombola.producers.storage.requests import DESCRIBED, request_of
from tombola.producers.storage.schema import account_holds as holds
from tombola.producers.storage.schema import api_idempotency_requests as requests


class Hold(NamedTuple):
    """A hold as it stands. An open hold is voided from `expires_at` on."""

    hold_key: str
    account_id: int
    asset_code: str
    amount: Decimal
    state: HoldState
    expires_at: datetime
    created_at: datetime


def find_draw(connection: Connection, name: str) -> DrawRequest:
    """The draw with this lottery session or request key.

    Raises SessionNotFound, and InvalidRequest where the name is that of a request of another kind.
    """
    if name.isascii():  # MariaDB raises an error when it compares other text with an ASCII column
        for column in (requests.c.lottery_session_id, requests.c.request_key):
            row = connection.execute(select(*DESCRIBED).where(column == name)).first()
            if row is not None:
                found = request_of(row)
                if not isinstance(found, DrawRequest):
                    raise InvalidRequest(f"{name} is a request of kind {found.kind}: only draws can be refunded")
                return found
    raise SessionNotFound(f"no draw has the lottery session or the request key {name:.100}")


def find_hold(connection: Connection, hold_key: str) -> Hold:
    """The hold that was opened under this request key. Raises InvalidRequest if there is none."""
    found = ledger.find_hold(connection, hold_key) if hold_key.isascii() else None
    if found is None:
        raise InvalidRequest(f"there is no hold {hold_key:.100}: `tombola account holds ID` lists those of an account")
    return _hold([found[name] for name in Hold._fields])


def holds_of(connection: Connection, account_id: int, *, rows_max: int, open_only: bool = True) -> list[Hold]:
    """Up to `rows_max` holds of an account, the next one to expire first; with the ended ones, the latest first."""
    query = _HOLDS.where(holds.c.account_id == account_id)
    if open_only:
        query = query.where(holds.c.state == HoldState.OPEN).order_by(holds.c.expires_at, holds.c.hold_key)
    else:
        query = query.order_by(holds.c.created_at.desc(), holds.c.hold_key)
    return [_hold(row) for row in connection.execute(query.limit(rows_max))]


_HOLDS = select(*(holds.c[name] for name in Hold._fields))


def _hold(values: Iterable[Any]) -> Hold:
    hold = Hold(*values)
    return hold._replace(state=HoldState(hold.state))
