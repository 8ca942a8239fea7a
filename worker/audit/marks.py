"""Where the last clean audit ended, so that the next one goes on from there: rows of our own between audits.

Who can write to the database can write to these rows as well. So they carry an HMAC under a secret that is not in the
database: a mark that it does not fit is none, and the audit examines everything. An older mark with its own rows still
fits; with it an audit examines more, not less. `tombola books verify` and sealed blocks (I9) are for rows below a mark.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Final, NamedTuple

import msgspec
from sqlalchemy import Connection, delete, insert, select

from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.schema import audit_marks, audited_accounts
from tombola.worker.audit.chains import Band, Chains
from tombola.worker.audit.issued import PrizeName

ROWS_MAX: Final = 100  # bands in one statement, of 6.5 KiB each
_CONTEXT: Final = b"tombola-audit-mark-1"


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """Everything up to here was examined, and in order.

    Ledger rows up to `transaction_id`; requests that settled, and were to be published before `publish_at`; actions of
    operators up to `action_id`; sealed blocks up to number `block`, whose hash is `block_hash`. `at` is when that audit
    began, by the database's clock. `granted` are the units of stocked prizes that draws up to there were granted, as
    campaign, prize and number; `assets` the assets of `Chains`.
    """

    at: datetime
    transaction_id: int
    publish_at: datetime
    action_id: int
    block: int
    block_hash: str
    granted: list[tuple[str, str, int]]
    assets: list[str]

    def granted_by_prize(self) -> Counter[PrizeName]:
        """The units by campaign and prize."""
        return Counter({(campaign, prize): units for campaign, prize, units in self.granted})


class Kept(NamedTuple):
    """A mark as it was read, the chains at it, and its seal."""

    mark: Mark
    bands: dict[int, Band]
    mac: str


class Reached(NamedTuple):
    """A mark to keep. `follows` is the seal of the mark that this audit went on from, None if it began at the first
    row; `secret` seals this one."""

    mark: Mark
    chains: Chains
    follows: str | None
    secret: bytes


def load(connection: Connection, secret: bytes) -> Kept | None:
    """The mark, if the secret has sealed it and the chains at it; None if there is none."""
    row = connection.execute(select(audit_marks.c.mark, audit_marks.c.mac)).first()
    if row is None:
        return None
    rows = connection.execute(select(audited_accounts.c.band, audited_accounts.c.state))
    states = {band: bytes(state) for band, state in rows}
    try:
        if not hmac.compare_digest(_mac(secret, row.mark, states), str(row.mac)):
            return None
        mark = msgspec.json.decode(row.mark, type=Mark)
        return Kept(mark, {number: Band.decoded(state) for number, state in states.items()}, row.mac)
    except (msgspec.DecodeError, ValueError, TypeError):  # rows of another release
        return None


def keep(connection: Connection, reached: Reached) -> bool:
    """Replace the mark by the one that was reached, in the caller's transaction; return whether it was replaced.

    It is not if another audit has ended meanwhile: then that one's mark stands.
    """
    query = select(audit_marks.c.mac).where(audit_marks.c.id == 1).with_for_update()
    found = connection.execute(query).scalar()
    chains, mark = reached.chains, reached.mark
    if reached.follows is None:
        connection.execute(delete(audited_accounts))
        changed = sorted(chains.bands)
    elif found != reached.follows:
        return False
    else:
        changed = sorted(chains.touched)
        for some in chunks(changed, ROWS_MAX):
            connection.execute(delete(audited_accounts).where(audited_accounts.c.band.in_(some)))
    for some in chunks(changed, ROWS_MAX):
        rows = [{"band": number, "state": chains.bands[number].encoded()} for number in some]
        connection.execute(insert(audited_accounts), rows)
    text = msgspec.json.encode(mark).decode()
    mac = _mac(reached.secret, text, {number: band.encoded() for number, band in chains.bands.items()})
    connection.execute(delete(audit_marks))
    connection.execute(insert(audit_marks).values(id=1, mark=text, mac=mac))
    return True


def _mac(secret: bytes, mark: str, states: Mapping[int, bytes]) -> str:
    """64 hex digits over the mark and all bands in their order, each part with its length."""
    told = hmac.new(secret, _CONTEXT, "sha256")
    parts = [mark.encode()]
    for number in sorted(states):
        parts += [str(number).encode(), hashlib.sha256(states[number]).digest()]
    for part in parts:
        told.update(len(part).to_bytes(4, "big") + part)
    return told.hexdigest()
