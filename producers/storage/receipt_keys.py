"""The keys of receipts that everybody may see: `receipt_keys`. A key is listed before it signs, and for ever.

A process lists the keys in its settings when it first needs them. A key that has left the settings ends when a process
with a *newer* key comes: during a rolling restart, a process that still has the old settings must not end the new key.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import Connection, Engine, insert, select, update

from tombola.producers.domain.receipt_keys import ReceiptKey, SigningKey
from tombola.producers.domain.receipts import Signer, time_shown
from tombola.producers.storage import clock
from tombola.producers.storage.schema import receipt_keys as table
from tombola.producers.storage.transactions import again_after_conflicts

TRIES_MAX: Final = 5


def list_keys(connection: Connection) -> list[ReceiptKey]:
    """All keys that ever signed, the newest first."""
    rows = connection.execute(select(table).order_by(table.c.valid_from.desc(), table.c.kid))
    return [ReceiptKey(bytes.fromhex(row.public_key), row.valid_from, row.valid_until) for row in rows]


def open_signer(engine: Engine, keys: Sequence[SigningKey]) -> Signer:
    """List these keys of a process, the newest first and at least one, and return what signs with them.

    Ends the keys that have left the settings. Raises SQLAlchemy's errors.
    """
    # A duplicate key is a conflict: another process lists the same key at this moment.
    since = again_after_conflicts(engine, lambda connection: _list(connection, keys), tries_max=TRIES_MAX)
    return Signer(tuple((time_shown(since[key.kid]), key) for key in keys))


def end(connection: Connection, kid: str) -> bool:
    """End a key now, so that nothing later is believed of it; return whether there was such a key that signs."""
    now = clock.now(connection)
    ending = update(table).where(table.c.kid == kid, table.c.valid_until.is_(None)).values(valid_until=now)
    return bool(connection.execute(ending).rowcount)


def _list(connection: Connection, keys: Sequence[SigningKey]) -> dict[str, datetime]:
    """List keys, end others; since when each of `keys` signs, by its id."""
    now, listed = clock.now(connection), {it.kid: it for it in list_keys(connection)}
    new = [key for key in keys if key.kid not in listed]
    if new:
        values = [{"kid": key.kid, "public_key": key.public_raw.hex(), "valid_from": now} for key in new]
        connection.execute(insert(table), values)
    since = {key.kid: listed[key.kid].valid_from if key.kid in listed else now for key in keys}
    mine = table.c.kid.in_(sorted(since))
    if any(key.kid in listed and listed[key.kid].valid_until is not None for key in keys):
        connection.execute(update(table).where(mine).values(valid_until=None))  # it came back
    newest = since[keys[0].kid]
    if any(it.kid not in since and it.valid_until is None and it.valid_from < newest for it in listed.values()):
        is_older = table.c.valid_from < newest
        connection.execute(update(table).where(~mine, is_older, table.c.valid_until.is_(None)).values(valid_until=now))
    return since
