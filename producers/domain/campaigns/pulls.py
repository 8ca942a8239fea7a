"""All pulls of one request: may the account draw, what does it win, and what is to be written. Pure, no I/O.

The account's Standing is what it has done in the campaign so far. It is read under the account's lock, so a request
is decided on exactly what the requests before it left. Units of stock are taken from what the caller has locked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from types import MappingProxyType
from typing import Final, NamedTuple

import msgspec

from tombola.producers.domain.campaigns.drawing import Drawing
from tombola.producers.domain.campaigns.odds import Entry, Grant, Odds, Prize

# Why the rules of a campaign reject a draw. A rejection is final.
LIMIT_REACHED: Final = "LIMIT_REACHED"
NOT_ELIGIBLE: Final = "NOT_ELIGIBLE"
CAMPAIGN_CLOSED: Final = "CAMPAIGN_CLOSED"

CONSUME: Final = "lottery_consume"
BUSINESS_TYPES: Final[Mapping[Entry, str]] = {
    "reward": "lottery_reward",
    "item": "lottery_item",
    "coupon": "lottery_coupon",
    "notice": "lottery_notice",
}


class Standing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an account has done in a campaign, over all of its versions.

    `day` is the campaign's day of the last pull, `pulls_today` the pulls on that day; `since_hit` are the pulls since
    the last hit, by guarantee; `won` how often a prize with a limit per account was won, by its code.
    """

    pulls: int = 0
    spent: Decimal = Decimal("0.00")
    day: str = ""
    pulls_today: int = 0
    since_hit: dict[str, int] = {}
    won: dict[str, int] = {}

    def counters(self, odds: Odds) -> tuple[int, ...]:
        """The pulls since the last hit of each guarantee, in the order of the odds; a new guarantee begins at 0."""
        return tuple(self.since_hit.get(guarantee.name, 0) for guarantee in odds.guarantees)

    def pulls_on(self, day: str) -> int:
        """The pulls on `day`. A request accepted on a day before the last one counts on the last one."""
        return self.pulls_today if day <= self.day else 0


NEW: Final = Standing()


def why_rejected(
    odds: Odds, pulls: int, standing: Standing, moment: datetime, is_listed: Callable[[str], bool]
) -> str | None:
    """Why a request for `pulls` pulls, accepted at `moment`, is rejected; None if the account may draw.

    `is_listed` says whether the account is on the list of that name.
    """
    if not odds.is_open_at(moment):
        return CAMPAIGN_CLOSED
    if (odds.deny and is_listed(odds.deny)) or (odds.allow and not is_listed(odds.allow)):
        return NOT_ELIGIBLE
    if odds.per_account is not None and standing.pulls + pulls > odds.per_account:
        return LIMIT_REACHED
    if odds.per_day is not None and standing.pulls_on(odds.day_of(moment)) + pulls > odds.per_day:
        return LIMIT_REACHED
    return None


class Won(NamedTuple):
    """A grant of one pull: a ledger row to write. `entry` names the row in its derived key."""

    pull: int
    prize: Prize
    grant: Grant
    entry: str

    @property
    def business_type(self) -> str:
        """The row's business type."""
        return BUSINESS_TYPES[self.grant.entry]


class Pulled(NamedTuple):
    """What a request's pulls came to. `gone` are prizes that were drawn and unavailable, with the pull's number.

    `taken` are the units taken of each stocked prize; `after` is where the account stands now, if the odds have
    counters.
    """

    prizes: tuple[Prize, ...]
    tier: str
    gone: tuple[tuple[int, str], ...]
    taken: Mapping[str, int]
    after: Standing

    def grants(self) -> Iterator[Won]:
        """The grants in the order of their rows."""
        is_single = len(self.prizes) == 1
        for pull, prize in enumerate(self.prizes, 1):
            if prize.grants:
                yield from _grants_of(prize, pull, is_single)


def _grants_of(prize: Prize, pull: int, is_single: bool) -> Iterator[Won]:
    seen: dict[Entry, int] = {}
    for grant in prize.grants:
        kind = grant.entry
        number = seen[kind] = seen.get(kind, 0) + 1
        yield Won(pull, prize, grant, entry_name(kind, pull, number, is_single=is_single))


def entry_name(kind: Entry, pull: int, number: int, *, is_single: bool) -> str:
    """`reward` for the first one of a single pull, `reward_3` for that of pull 3, `reward_3_2` for pull 3's second."""
    if number > 1:
        return f"{kind}_{pull}_{number}"
    return kind if is_single else f"{kind}_{pull}"


@lru_cache(maxsize=4096)
def plainly_pulled(prize: Prize) -> Pulled:
    """A single pull that won `prize`, of odds without counters."""
    return Pulled((prize,), "", (), {prize.code: 1} if prize.is_stocked else NOTHING_TAKEN, NEW)


NOTHING_TAKEN: Final[Mapping[str, int]] = MappingProxyType({})


def pull_all(
    odds: Odds, drawing: Drawing, pulls: int, standing: Standing, moment: datetime, units: Callable[[str], int]
) -> Pulled:
    """Draw all pulls of a request that may draw. `units` are what is left of a stocked prize, before this request."""
    if pulls == 1 and not odds.has_counters:  # most draws: nothing but the weights and the stock decides
        prize, unavailable, _ = drawing.pull(1, "", (), lambda it: units(it.code) > 0)
        gone_once = tuple((1, code) for code in unavailable) if unavailable else ()
        return Pulled((prize,), "", gone_once, {prize.code: 1} if prize.is_stocked else NOTHING_TAKEN, standing)
    tier = odds.tier_of(standing.spent) if odds.tiers else ""
    counters = standing.counters(odds) if odds.guarantees else ()
    taken: dict[str, int] = {}
    won = dict(standing.won)
    prizes: list[Prize] = []
    gone: list[tuple[int, str]] = []

    def is_available(prize: Prize) -> bool:
        if prize.per_account is not None and won.get(prize.code, 0) >= prize.per_account:
            return False
        return not prize.is_stocked or units(prize.code) - taken.get(prize.code, 0) > 0

    for pull in range(1, pulls + 1):
        prize, unavailable, counters = drawing.pull(pull, tier, counters, is_available)
        if unavailable:
            gone += ((pull, code) for code in unavailable)
        prizes.append(prize)
        if prize.is_limited:
            if prize.is_stocked:
                taken[prize.code] = taken.get(prize.code, 0) + 1
            if prize.per_account is not None:
                won[prize.code] = won.get(prize.code, 0) + 1
    after = _after(odds, pulls, standing, moment, counters, won) if odds.has_counters else standing
    return Pulled(tuple(prizes), tier, tuple(gone), taken, after)


def _after(
    odds: Odds, pulls: int, standing: Standing, moment: datetime, counters: tuple[int, ...], won: Mapping[str, int]
) -> Standing:
    day = max(standing.day, odds.day_of(moment))
    since_hit = standing.since_hit | {
        guarantee.name: count for guarantee, count in zip(odds.guarantees, counters, strict=True)
    }
    return Standing(
        pulls=standing.pulls + pulls,
        spent=standing.spent + odds.cost[pulls],
        day=day,
        pulls_today=standing.pulls_on(day) + pulls,
        since_hit=since_hit,
        won=dict(won),
    )
