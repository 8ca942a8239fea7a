"""Dead letters: messages set aside with their cause, so that they never stop the others.

The row is committed first, then the message is acked. The same message parked twice is one row.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Engine, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from producers import requests
from producers.broker import QUEUE
from producers.contract import DrawRequest
from producers.database import explain, utc_now
from worker.deliveries import Delivery
from worker.schema import dead_letters as table

BODY_KEPT_BYTES_MAX: Final = 64 * 1024
ERROR_LENGTH_MAX: Final = 2000

TOO_MANY_DELIVERIES: Final = "too many deliveries"


def park(engine: Engine, delivery: Delivery, cause: str, error: str, *, given_up: DrawRequest | None = None) -> bool:
    """Commit a row for this message; whether it is a new one. Raises ServiceUnavailable when that fails: do not ack.

    In the same transaction the request `given_up`, if it was accepted, is marked dead: nobody publishes it again.
    """
    now, sha256 = utc_now(), _sha256(delivery)
    request_key, account_id = _claims(delivery.body)
    again = (
        update(table)
        .where(table.c.body_sha256 == sha256)
        .values(
            cause=cause,
            error=error[:ERROR_LENGTH_MAX],
            deliveries=delivery.count,
            times_parked=table.c.times_parked + 1,
            last_parked_at=now,
        )
    )
    first = insert(table).values(
        body_sha256=sha256,
        cause=cause,
        error=error[:ERROR_LENGTH_MAX],
        body=delivery.body[:BODY_KEPT_BYTES_MAX],
        body_bytes=len(delivery.body),
        request_key=request_key,
        account_id=account_id,
        queue=QUEUE,
        deliveries=delivery.count,
        times_parked=1,
        first_parked_at=now,
        last_parked_at=now,
    )
    try:
        with engine.begin() as connection:
            _give_up(connection, given_up)
            if connection.execute(again).rowcount:
                return False
        try:
            with engine.begin() as connection:
                _give_up(connection, given_up)
                connection.execute(first)
        except IntegrityError:  # somebody else parked it just now
            with engine.begin() as connection:
                _give_up(connection, given_up)
                connection.execute(again)
            return False
    except SQLAlchemyError as raised:
        raise explain(raised) from raised
    return True


def give_up(engine: Engine, request: DrawRequest) -> None:
    """Mark a request dead whose message stays parked; a request that was never accepted has nothing to mark."""
    try:
        with engine.begin() as connection:
            _give_up(connection, request)
    except SQLAlchemyError as raised:
        raise explain(raised) from raised


def _give_up(connection: Connection, request: DrawRequest | None) -> None:
    if request is not None:
        requests.give_up(connection, request.request_key, request.fingerprint(), requests.PARKED)


def unpark(engine: Engine, delivery: Delivery) -> None:
    """Take back the row of a message that went through after all."""
    try:
        with engine.begin() as connection:
            connection.execute(delete(table).where(table.c.body_sha256 == _sha256(delivery)))
    except SQLAlchemyError as raised:
        raise explain(raised) from raised


def count(engine: Engine) -> int:
    """How many messages are parked."""
    with engine.connect().execution_options(read_only=True) as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def _sha256(delivery: Delivery) -> str:
    return hashlib.sha256(delivery.body).hexdigest()


def _claims(body: bytes) -> tuple[str | None, int | None]:
    """The request key and account id that a message names, as far as they fit their columns."""
    try:
        loose: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None, None
    if not isinstance(loose, dict):
        return None, None
    key, account_id = loose.get("request_key"), loose.get("account_id")
    key_fits = isinstance(key, str) and 0 < len(key) <= 64 and key.isascii() and key.isprintable()
    id_fits = isinstance(account_id, int) and not isinstance(account_id, bool) and abs(account_id) < 2**63
    return (key if key_fits else None), (account_id if id_fits else None)
