"""Stock: the units of a prize that are left, in one row or in several (shards), so that lanes seldom wait for a lock.

What is left is the sum over a prize's shards. Every change that is not a draw is a row in campaign_stock_changes, so
published + restocked - left = granted, per prize (ARCHITECTURE, Invariants: I7).

The stock of a prize with codes is its pool: as many units as codes were loaded (worker.campaigns.codes). Settling takes
a unit under the lock of its row, and then any free code: units guard the codes, so a code is there for each unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, func, insert, select, update

from tombola.producers.domain.campaigns.odds import SHARDS, Odds, Prize
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage.schema import campaign_codes
from tombola.producers.storage.schema import campaign_stock as table
from tombola.producers.storage.schema import campaign_stock_changes as stock_changes


def stock_key(campaign: str, code: str, shard: int) -> str:
    """The key of one shard of a prize's stock. Locks are taken in the order of these keys."""
    return f"{campaign}/{code}/{shard}"


def change(
    connection: Connection, campaign: str, prize: Prize, units: int, *, operator: str, reason: str, now: datetime
) -> int:
    """Add `units` of a prize, or take some away if negative, in the caller's transaction; return what is left.

    Raises InvalidRequest when fewer are left than are taken away.
    """
    found = connection.execute(
        select(table.c.stock_key, table.c.units)
        # By key: any other condition would lock, and wait for, the rows of every prize.
        .where(table.c.stock_key.in_([stock_key(campaign, prize.code, shard) for shard in range(SHARDS)]))
        .order_by(table.c.stock_key)
        .with_for_update()
    )
    rows = {row.stock_key: row.units for row in found}
    left: int = sum(rows.values())
    if left + units < 0:
        raise InvalidRequest(f"prize {prize.code!r} of {campaign} has {left:,} units left: {-units:,} are too many")
    keys = sorted({*rows, *(stock_key(campaign, prize.code, shard) for shard in range(prize.shards))})
    for number, key in enumerate(keys):
        share = (left + units) // len(keys) + (number < (left + units) % len(keys))
        if key not in rows:
            connection.execute(insert(table).values(stock_key=key, campaign=campaign, prize=prize.code, units=share))
        elif rows[key] != share:
            connection.execute(update(table).where(table.c.stock_key == key).values(units=share))
    connection.execute(
        insert(stock_changes).values(
            campaign=campaign, prize=prize.code, units=units, operator=operator[:100], reason=reason, at=now
        )
    )
    return left + units


def left(connection: Connection, campaign: str) -> Mapping[str, int]:
    """The units that are left, by prize; a prize without stock is not in the result."""
    rows = connection.execute(
        select(table.c.prize, func.sum(table.c.units)).where(table.c.campaign == campaign).group_by(table.c.prize)
    )
    return {prize: int(units) for prize, units in rows}


def published(connection: Connection, campaign: str) -> Mapping[str, int]:
    """The units that were ever published, restocked and not withdrawn, by prize."""
    rows = connection.execute(
        select(stock_changes.c.prize, func.sum(stock_changes.c.units))
        .where(stock_changes.c.campaign == campaign)
        .group_by(stock_changes.c.prize)
    )
    return {prize: int(units) for prize, units in rows}


class Pool(NamedTuple):
    """The codes of one prize: how many were ever loaded, and how many of them were handed out."""

    prize: str
    loaded: int
    handed_out: int

    @property
    def free(self) -> int:
        """The codes that can still be won."""
        return self.loaded - self.handed_out


def pools(connection: Connection, campaign: str) -> list[Pool]:
    """The pools of a campaign's prizes, by prize; a prize without codes is not in the result."""
    rows = connection.execute(
        select(campaign_codes.c.prize, func.count(), func.count(campaign_codes.c.taken_by))
        .where(campaign_codes.c.campaign == campaign)
        .group_by(campaign_codes.c.prize)
        .order_by(campaign_codes.c.prize)
    )
    return [Pool(prize, loaded, handed_out) for prize, loaded, handed_out in rows]


def refuse_mixed(connection: Connection, odds: Odds) -> None:
    """Raise InvalidRequest for a prize with codes some of whose units would have none, or the other way round.

    So it is where an earlier version gave the prize a stock without codes. Only the holder of the campaign's lock
    changes what is compared here: both count what was ever added, whatever was drawn meanwhile.
    """
    loaded = {pool.prize: pool.loaded for pool in pools(connection, odds.name)}
    units = published(connection, odds.name)
    for prize in odds.prizes:
        codes = loaded.get(prize.code, 0)
        if prize.has_codes and units.get(prize.code, 0) != codes:
            raise InvalidRequest(
                f"prize {prize.code!r} had units without codes in an earlier version: give the new prize another code"
            )
        if prize.stock is not None and codes:
            raise InvalidRequest(
                f"prize {prize.code!r} handed out codes in an earlier version: give the new prize another code"
            )
