"""Odds: one version of a campaign, immutable, named by the hash of its canonical form.

The canonical form is JSON with sorted keys and no blanks: weights are integers, amounts are strings with two decimals,
times are UTC, and what is not used is absent. Its SHA-256 is the odds hash. Ledger rows name the hash, so a row is
verified against the odds that it was drawn by, however many versions follow.

A prize is drawn in this order (see `draw`): the tier's weights; a guarantee that is due; then the `instead` chain, for
a prize that is sold out or that the account has won as often as it may.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import cached_property
from itertools import accumulate
from typing import Final, Literal
from zoneinfo import ZoneInfo

DRAW_VERSION: Final = b"tombola-draw-2"
PRIZES_MAX: Final = 1_000
GRANTS_MAX: Final = 10  # of one prize
WEIGHT_SUM_MAX: Final = 2**32  # far below 2**64, so that a second ticket stays the rare exception
SHARDED_FROM: Final = 1_000  # units of stock above which a prize's stock stands in SHARDS rows
SHARDS: Final = 8

Entry = Literal["reward", "item", "coupon", "notice"]


@dataclass(frozen=True, slots=True)
class Grant:
    """What a prize hands out, once: `amount` of an asset, or a notification (`notify`, no asset).

    With `has_code`, each unit carries a code from the prize's pool.
    """

    asset_code: str
    amount: Decimal
    notify: str = ""
    has_code: bool = False

    @property
    def entry(self) -> Entry:
        """What its ledger row is called in the row's derived key."""
        if self.notify:
            return "notice"
        kind, is_kind, _ = self.asset_code.partition(".")
        if is_kind and kind == "ITEM":
            return "item"
        return "coupon" if is_kind and kind == "COUPON" else "reward"


@dataclass(frozen=True)
class Prize:
    """One possible outcome. Its chance is `weight` in the sum of all weights.

    `stock` is how many units were published with this version, None for no limit; `per_account` how often one account
    can win it. `value` is what one unit costs the operator, in the campaign's asset.
    """

    code: str
    weight: int
    grants: tuple[Grant, ...] = ()
    title: str = ""
    stock: int | None = None
    per_account: int | None = None
    value: Decimal = Decimal("0.00")
    instead: str = ""

    @cached_property
    def has_codes(self) -> bool:
        """Whether each unit carries a code. The codes in the prize's pool are its stock."""
        return any(grant.has_code for grant in self.grants)

    @cached_property
    def is_stocked(self) -> bool:
        """Whether it can be sold out."""
        return self.stock is not None or self.has_codes

    @cached_property
    def is_limited(self) -> bool:
        """Whether it may be unavailable when it is drawn: sold out, or won by the account as often as it may."""
        return self.is_stocked or self.per_account is not None

    @property
    def shards(self) -> int:
        """In how many rows its stock stands: more rows let more workers take units at the same time.

        The stock of a prize with codes is its pool, which is no part of the odds and grows: it always stands in SHARDS.
        """
        return SHARDS if self.has_codes or (self.stock or 0) > SHARDED_FROM else 1


@dataclass(frozen=True, slots=True)
class Tier:
    """Other weights, in the order of the prizes, for accounts that have spent `spent_from` in this campaign."""

    name: str
    spent_from: Decimal
    weights: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Guarantee:
    """One of `prizes` at the latest at every `hard_at`-th pull.

    From pull `soft_from` after the last hit on, each further pull adds `soft_step` tickets that stand for one of the
    guarantee's prizes, by their weights among each other. None: no tickets are added.
    """

    name: str
    prizes: frozenset[str]
    hard_at: int
    soft_from: int | None = None
    soft_step: int = 0

    def tickets(self, since_hit: int) -> int:
        """How many tickets are added at the pull after `since_hit` pulls without a hit."""
        if self.soft_from is None:
            return 0
        return max(0, since_hit + 2 - self.soft_from) * self.soft_step

    def is_due(self, since_hit: int) -> bool:
        """Whether the pull after `since_hit` pulls without a hit must be a hit."""
        return since_hit + 1 >= self.hard_at


@dataclass(frozen=True)
class Odds:
    """One version of a campaign. `cost` is the price in `asset_code`, by the number of pulls in one request.

    The window is open from `opens` until before `closes`, None for no bound. A day of `per_day` begins at midnight in
    `day`. `canonical` is the form that is hashed. `guarantees` stand from the narrowest to the widest: the prizes of
    each are also prizes of the next one, so that a hit of the first is a hit of all.
    """

    name: str
    asset_code: str
    cost: Mapping[int, Decimal]
    prizes: tuple[Prize, ...]
    canonical: bytes = field(repr=False)
    title: str = ""
    opens: datetime | None = None
    closes: datetime | None = None
    day: str = "UTC"
    per_day: int | None = None
    per_account: int | None = None
    deny: str = ""
    allow: str = ""
    tiers: tuple[Tier, ...] = ()
    guarantees: tuple[Guarantee, ...] = ()

    @cached_property
    def odds_hash(self) -> str:
        """SHA-256 of the canonical form, 64 hex digits."""
        return hashlib.sha256(self.canonical).hexdigest()

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """The weights of an account without a tier, in the order of the prizes."""
        return tuple(prize.weight for prize in self.prizes)

    @cached_property
    def by_code(self) -> Mapping[str, Prize]:
        """The prizes by their codes."""
        return {prize.code: prize for prize in self.prizes}

    @cached_property
    def has_counters(self) -> bool:
        """Whether a draw depends on what the account did before, so that its counters are read and written."""
        return bool(
            self.tiers
            or self.guarantees
            or self.per_day is not None
            or self.per_account is not None
            or any(prize.per_account is not None for prize in self.prizes)
        )

    def __hash__(self) -> int:
        return hash(self.odds_hash)

    @cached_property
    def has_terms(self) -> bool:
        """Whether a draw may be rejected for other reasons than its price: a window, a list, a limit."""
        return bool(self.opens or self.closes or self.deny or self.allow or self.per_day or self.per_account)

    @cached_property
    def has_stock(self) -> bool:
        """Whether a prize can be sold out."""
        return any(prize.is_stocked for prize in self.prizes)

    @cached_property
    def has_codes(self) -> bool:
        """Whether a prize hands out codes."""
        return any(prize.has_codes for prize in self.prizes)

    @cached_property
    def cumulative(self) -> Mapping[str, tuple[int, ...]]:
        """By the tier's name (empty: none), the sum of the weights up to each prize, in the order of the prizes."""
        return {name: tuple(accumulate(self.weights_of(name))) for name in ("", *(tier.name for tier in self.tiers))}

    @cached_property
    def drawing_prefix(self) -> bytes:
        """For producers.domain.campaigns.drawing: the fields of a draw that name its odds, encoded once."""
        fields = (DRAW_VERSION, self.name.encode(), bytes.fromhex(self.odds_hash))
        return b"".join(map(length_prefixed, fields))

    @cached_property
    def asset_codes(self) -> tuple[str, ...]:
        """The assets other than the campaign's own that its prizes hand out, sorted."""
        codes = {grant.asset_code for prize in self.prizes for grant in prize.grants if grant.asset_code}
        return tuple(sorted(codes - {self.asset_code}))

    def weights_of(self, tier: str) -> tuple[int, ...]:
        """The weights of a tier by its name; of no tier for an empty one. Raises KeyError for an unknown tier."""
        if not tier:
            return self.weights
        return {it.name: it.weights for it in self.tiers}[tier]

    def tier_of(self, spent: Decimal) -> str:
        """The name of the highest tier that an account has reached, empty for none."""
        reached = ""
        for tier in self.tiers:  # in rising order of spent_from
            if spent >= tier.spent_from:
                reached = tier.name
        return reached

    def is_open_at(self, moment: datetime) -> bool:
        """Whether the window is open at `moment`."""
        return (self.opens is None or self.opens <= moment) and (self.closes is None or moment < self.closes)

    def day_of(self, moment: datetime) -> str:
        """The campaign's day at `moment`, as YYYY-MM-DD."""
        zone = UTC if self.day == "UTC" else ZoneInfo(self.day)
        return moment.astimezone(zone).date().isoformat()


def length_prefixed(value: bytes) -> bytes:
    """`value` after its length, so that no two lists of fields run together to the same message."""
    return len(value).to_bytes(4, "big") + value
