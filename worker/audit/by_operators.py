"""I12 of movements that operators settled: each is on record, and what is on record has settled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec
from sqlalchemy import Connection, select

from tombola.producers.domain.causes import Status
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import operator_actions
from tombola.worker.movements.settling import ACTS, SETTLED_BY

FETCH_SIZE: Final = 2_000


def check_movements(connection: Connection) -> Iterator[tuple[str, str]]:
    """The subject of each violation, and what is wrong with it."""
    recorded: dict[str, tuple[str, object]] = {}
    for id, action, text in connection.execute(
        select(operator_actions.c.id, operator_actions.c.action, operator_actions.c.details)
        .where(operator_actions.c.action.in_(ACTS.values()))
        .order_by(operator_actions.c.id)
    ):
        try:
            details = msgspec.json.decode(text, type=dict)
        except (msgspec.DecodeError, TypeError):
            yield f"action {id}", "its details cannot be read"
            continue
        if key := details.get("request_key"):  # recharges of older releases have none
            recorded[str(key)] = action, details.get("account_id")
    # The options are the statement's: on the connection they would stream what is read after this, too.
    rows = connection.execute(
        select(requests.c.request_key, requests.c.kind, requests.c.account_id, requests.c.status)
        .where(requests.c.kind.in_(ACTS), requests.c.settled_by.startswith(SETTLED_BY))
        .execution_options(yield_per=FETCH_SIZE)
    )
    for key, kind, account_id, status in rows:
        said = recorded.pop(key, None)
        if said is None:
            yield f"{kind} {key}", "an operator has settled it, and it is not on record"
        elif said != (ACTS[kind], account_id) or status != Status.COMPLETED:
            yield f"{kind} {key}", f"is {status} on account {account_id}, on record is {said[0]} of account {said[1]}"
    for key, (action, account_id) in recorded.items():
        yield f"{action} {key}", f"of account {account_id} is on record, and no operator has settled it"
