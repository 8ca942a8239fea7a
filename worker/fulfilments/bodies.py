"""The body of a fulfilment: JSON, rebuilt from the ledger when it is sent, so that every attempt has equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, select

from tombola.producers.domain.campaigns.record import read_grant_notes
from tombola.producers.domain.errors import DrawError
from tombola.producers.domain.money import CENT
from tombola.producers.storage import requests
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.schema import asset_transactions as ledger
from tombola.worker.fulfilments.events import DRAW_SETTLED, NOTICE
from tombola.worker.fulfilments.fulfilments import Fulfilment


class _About(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of every body. `at` is UTC with microseconds."""

    event: str
    campaign: str
    account_id: int
    request_key: str
    lottery_session_id: str
    idempotency_key: str
    at: str


class DrawSettled(_About, frozen=True, kw_only=True):
    """`result` is the draw's result, to the byte."""

    result: msgspec.Raw


class GrantMade(_About, frozen=True, kw_only=True):
    """A grant of pull number `pull`. A notification has no asset; `code` is empty unless one was handed out."""

    asset_code: str
    amount: str
    prize: str
    pull: int
    code: str


class Unsendable(DrawError):
    """This fulfilment has no body: the ledger does not have what it is about."""


def bodies(connection: Connection, fulfilments: Sequence[Fulfilment]) -> Mapping[int, bytes | DrawError]:
    """The body of each of these fulfilments by its id, or why it has none."""
    rows: dict[str, Any] = {}
    keys = [it.idempotency_key for it in fulfilments if it.event != DRAW_SETTLED]
    for some in chunks(keys):
        found = connection.execute(select(ledger).where(ledger.c.idempotency_key.in_(some)))
        rows |= {row.idempotency_key: row for row in found}
    return {it.id: _body(connection, it, rows) for it in fulfilments}


def _body(connection: Connection, fulfilment: Fulfilment, rows: Mapping[str, Any]) -> bytes | DrawError:
    try:
        if fulfilment.event == DRAW_SETTLED:
            return msgspec.json.encode(_of_draw(connection, fulfilment))
        return msgspec.json.encode(_of_grant(fulfilment, rows[fulfilment.idempotency_key]))
    except KeyError:
        return Unsendable()
    except DrawError as error:
        return error


def _of_draw(connection: Connection, fulfilment: Fulfilment) -> DrawSettled:
    state = requests.state_of_session(connection, fulfilment.lottery_session_id)
    if state is None or state.result is None or state.settled_at is None:
        raise Unsendable
    return DrawSettled(**_about(fulfilment, state.settled_at), result=msgspec.Raw(state.result))


def _of_grant(fulfilment: Fulfilment, row: Any) -> GrantMade:
    notes = read_grant_notes(row.notes or "")
    return GrantMade(
        **_about(fulfilment, row.created_at),
        asset_code="" if row.business_type == NOTICE else row.asset_code,
        amount=str(row.delta_amount.quantize(CENT)),
        prize=notes.prize,
        pull=notes.pull,
        code=notes.code,
    )


def _about(fulfilment: Fulfilment, at: datetime) -> dict[str, Any]:
    return {
        "event": fulfilment.event,
        "campaign": fulfilment.campaign,
        "account_id": fulfilment.account_id,
        "request_key": fulfilment.idempotency_key.partition(":")[0],
        "lottery_session_id": fulfilment.lottery_session_id,
        "idempotency_key": fulfilment.idempotency_key,
        "at": at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z",
    }
