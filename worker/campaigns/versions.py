"""What operators do to campaigns: publish a version, open, pause, close, restock.

Each act is one transaction with its row in the record of operators' actions. An act raises every campaign's revision,
so that all processes see it within a second (producers.storage.campaigns).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Engine, func, insert, select, update

from tombola.producers.domain.campaigns import figures, manifest
from tombola.producers.domain.campaigns.odds import Odds, Prize
from tombola.producers.domain.errors import CampaignNotFound, InvalidRequest
from tombola.producers.storage import clock
from tombola.producers.storage.campaigns import CampaignState
from tombola.producers.storage.schema import campaign_versions, campaigns
from tombola.worker.campaigns import stock
from tombola.worker.operators import actions
from tombola.worker.operators.once import once

RETURN_MAX: Final = 1.0  # of what is paid, unless the operator allows more

# Which states a campaign may be put into, from each state.
MOVES: Final[Mapping[CampaignState, frozenset[CampaignState]]] = {
    CampaignState.DRAFT: frozenset({CampaignState.OPEN, CampaignState.CLOSED}),
    CampaignState.OPEN: frozenset({CampaignState.PAUSED, CampaignState.CLOSED}),
    CampaignState.PAUSED: frozenset({CampaignState.OPEN, CampaignState.CLOSED}),
    CampaignState.CLOSED: frozenset(),
}
_ACTIONS: Final = {
    CampaignState.OPEN: "campaign open",
    CampaignState.PAUSED: "campaign pause",
    CampaignState.CLOSED: "campaign close",
}


class Bounds(NamedTuple):
    """What a version may not exceed: the return to player, and the value of one prize in the campaign's asset."""

    return_max: float = RETURN_MAX
    prize_value_max: Decimal | None = None


class Published(NamedTuple):
    """A version that is live now. `is_repeat`: it was the live version already, and nothing was changed."""

    odds: Odds
    version: int
    is_repeat: bool = False


def why_not(odds: Odds, bounds: Bounds) -> str | None:
    """Why these odds may not be published, whatever is live; None if they may."""
    chances = figures.effective_chances(odds)
    for pulls in odds.cost:
        share = figures.return_to_player(odds, chances, pulls)
        if share > bounds.return_max:
            return (
                f"{pulls} pull(s) for {odds.cost[pulls]} {odds.asset_code} give back {share:.2%} of the price, more "
                f"than {bounds.return_max:.2%}: allow it with --rtp-max, if that is meant"
            )
    for prize in odds.prizes:
        if bounds.prize_value_max is not None and prize.value > bounds.prize_value_max:
            return f"prize {prize.code!r} is worth {prize.value}, more than {bounds.prize_value_max}"
    return None


def publish(engine: Engine, odds: Odds, *, bounds: Bounds, operator: str, reason: str) -> Published:
    """Make `odds` the live version of their campaign; a new campaign is a draft until it is opened.

    Stock follows the manifest: a new prize gets its units, a known one the difference to what was published before.
    Raises InvalidRequest for odds beyond `bounds`, a closed campaign, another asset than before, a prize with codes
    that had units without (or the other way round), or less stock than is left to take away; ServiceUnavailable or
    ConfigurationError when the database cannot be used.
    """
    why = actions.checked_reason(reason)
    if (refusal := why_not(odds, bounds)) is not None:
        raise InvalidRequest(refusal)

    def act(connection: Connection) -> Published:
        now = clock.now(connection)
        row = _locked(connection, odds.name)
        live = None if row is None or row.live_hash is None else _version(connection, row.live_hash)
        if row is not None and row.state == CampaignState.CLOSED:
            raise InvalidRequest(f"campaign {odds.name} is closed, for good: publish under another name")
        if live is not None and live.asset_code != odds.asset_code:
            raise InvalidRequest(
                f"campaign {odds.name} is paid in {live.asset_code}, and stays so: choose another name"
            )
        known = connection.execute(
            select(campaign_versions.c.version).where(campaign_versions.c.odds_hash == odds.odds_hash)
        ).scalar()
        if live is not None and live.odds_hash == odds.odds_hash:
            return Published(odds, int(known or 0), is_repeat=True)
        version = known or _next_version(connection, odds.name)
        if known is None:
            connection.execute(
                insert(campaign_versions).values(
                    odds_hash=odds.odds_hash,
                    campaign=odds.name,
                    version=version,
                    manifest=odds.canonical.decode(),
                    created_by=operator[:100],
                    created_at=now,
                    published_at=now,
                )
            )
        _write(connection, row, odds.name, now, live_hash=odds.odds_hash)
        stock.refuse_mixed(connection, odds)
        for prize, units in stock_changes(live, odds):
            stock.change(connection, odds.name, prize, units, operator=operator, reason=why, now=now)
        details = {"campaign": odds.name, "version": version, "odds_hash": odds.odds_hash}
        actions.record(connection, operator=operator, action="campaign publish", reason=why, count=1, details=details)
        return Published(odds, version)

    return once(engine, act)


def stock_changes(live: Odds | None, odds: Odds) -> list[tuple[Prize, int]]:
    """By how many units each prize's stock changes when `odds` follow `live`."""
    before = {} if live is None else live.by_code
    changes = []
    for prize in odds.prizes:
        known = before.get(prize.code)
        units = (prize.stock or 0) - (0 if known is None else known.stock or 0)
        if prize.stock is not None and (units or known is None):
            changes.append((prize, units))
    return changes


def move(engine: Engine, name: str, state: CampaignState, *, operator: str, reason: str) -> None:
    """Open, pause or close a campaign. A repeat changes nothing.

    Raises CampaignNotFound; InvalidRequest for a move that is not possible; ServiceUnavailable or ConfigurationError
    when the database cannot be used.
    """
    why = actions.checked_reason(reason)

    def act(connection: Connection) -> None:
        row = _locked(connection, name)
        if row is None:
            raise CampaignNotFound(f"there is no campaign {name!r}")
        if row.state == state:
            return
        if state not in MOVES[CampaignState(row.state)]:
            raise InvalidRequest(f"campaign {name} is {row.state}: it cannot become {state}")
        _write(connection, row, name, clock.now(connection), state=state)
        details = {"campaign": name, "before": row.state, "odds_hash": row.live_hash}
        actions.record(connection, operator=operator, action=_ACTIONS[state], reason=why, count=1, details=details)

    once(engine, act)


def restock(engine: Engine, name: str, code: str, units: int, *, operator: str, reason: str) -> int:
    """Add `units` of a prize, or take some away if negative; return what is left.

    Raises CampaignNotFound; InvalidRequest for a prize without stock, a prize with codes, or when fewer are left than
    are taken away.
    """
    why = actions.checked_reason(reason)
    if not units:
        raise InvalidRequest("say how many units to add, or to take away: not 0")

    def act(connection: Connection) -> int:
        prize = live_locked(connection, name).by_code.get(code)
        if prize is not None and prize.has_codes:
            raise InvalidRequest(
                f"prize {code!r} hands out codes: load more with `tombola campaign codes load {name} {code} FILE`"
            )
        if prize is None or prize.stock is None:
            raise InvalidRequest(f"campaign {name} has no prize {code!r:.80} with stock")
        now = clock.now(connection)
        left = stock.change(connection, name, prize, units, operator=operator, reason=why, now=now)
        details = {"campaign": name, "prize": code, "units": units, "left": left}
        actions.record(
            connection, operator=operator, action="campaign restock", reason=why, count=abs(units), details=details
        )
        return left

    return once(engine, act)


# ---- rows ------------------------------------------------------------------------------------------------------------


def live_locked(connection: Connection, name: str) -> Odds:
    """The live version of a campaign, whose row is locked until the transaction ends. Raises CampaignNotFound."""
    row = _locked(connection, name)
    if row is None or row.live_hash is None:
        raise CampaignNotFound(f"there is no published campaign {name!r}")
    return _version(connection, row.live_hash)


def _locked(connection: Connection, name: str) -> Any:
    if not name.isascii():  # MariaDB compares the column with ASCII alone
        return None
    return connection.execute(select(campaigns).where(campaigns.c.name == name).with_for_update()).first()


def _version(connection: Connection, odds_hash: str) -> Odds:
    text = connection.execute(
        select(campaign_versions.c.manifest).where(campaign_versions.c.odds_hash == odds_hash)
    ).scalar_one()
    return manifest.restore(text.encode())


def _next_version(connection: Connection, name: str) -> int:
    newest = connection.execute(
        select(func.max(campaign_versions.c.version)).where(campaign_versions.c.campaign == name)
    ).scalar()
    return (newest or 0) + 1


def _write(connection: Connection, row: Any, name: str, now: datetime, **changes: Any) -> None:
    """Change a campaign's row, or make it, under the next revision."""
    revision = (connection.execute(select(func.max(campaigns.c.revision))).scalar() or 0) + 1
    values = {**changes, "revision": revision, "updated_at": now}
    if row is None:
        connection.execute(insert(campaigns).values(name=name, **{"state": CampaignState.DRAFT, **values}))
    else:
        connection.execute(update(campaigns).where(campaigns.c.name == name).values(**values))
