"""The draw: odds, a secret seed and a request in, a prize out. Pure and deterministic, no I/O.

A crash before the commit, a redelivery or a replay draws the same prize again: nobody can re-roll by crashing us.
The construction (ARCHITECTURE, Fairness): HMAC-SHA256 under the seed over length-prefixed fields; the first 64 bits,
rejected and drawn again with a higher counter where they would favour some outcomes; cumulative integer weights.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from types import MappingProxyType
from typing import Final

DRAW_VERSION: Final = b"tombola-draw-1"
NOTES_PREFIX: Final = "odds="  # of what workers note in each ledger row of a draw
WEIGHT_SUM_MAX: Final = 2**32  # far below 2**64, so that drawing again stays the rare exception


def _cents(amount: Decimal) -> Decimal:
    cents = amount.quantize(Decimal("0.01"))
    if cents != amount:
        raise ValueError(f"an amount has at most two decimals: {amount}")
    return cents


@dataclass(frozen=True, slots=True)
class Prize:
    """One possible outcome; `amount` 0 is no prize. Its chance is `weight` in the sum of all weights."""

    weight: int
    amount: Decimal


@dataclass(frozen=True)
class Campaign:
    """Odds with a name: immutable once used, which is why ledger rows name their hash.

    Cost and prizes are amounts of `asset_code`. Raises ValueError for odds that nothing can be drawn from.
    """

    name: str
    asset_code: str
    cost: Decimal
    prizes: tuple[Prize, ...]
    odds_hash: str = field(init=False)
    weight_sum: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.prizes or any(prize.weight < 1 or prize.amount < 0 for prize in self.prizes) or self.cost <= 0:
            raise ValueError(
                f"campaign {self.name}: a draw costs more than 0, every prize needs a weight of at least 1, "
                "no amount is negative"
            )
        # An amount in the ledger's own digits: `5` in a result would read `5.00` when it is rebuilt from the ledger.
        object.__setattr__(self, "cost", _cents(self.cost))
        object.__setattr__(self, "prizes", tuple(Prize(prize.weight, _cents(prize.amount)) for prize in self.prizes))
        odds = [f"{prize.weight}x{prize.amount:.2f}" for prize in self.prizes]
        text = ",".join([self.name, self.asset_code, f"{self.cost:.2f}", *odds])
        object.__setattr__(self, "odds_hash", hashlib.sha256(text.encode()).hexdigest())
        object.__setattr__(self, "weight_sum", sum(prize.weight for prize in self.prizes))
        if self.weight_sum > WEIGHT_SUM_MAX:
            raise ValueError(f"campaign {self.name}: the weights add up to more than {WEIGHT_SUM_MAX}")


# The owner's default: 1 POINT buys a 30 % chance of 5 POINT.
DEFAULT_CAMPAIGN: Final = Campaign(
    name="default",
    asset_code="POINT",
    cost=Decimal("1.00"),
    prizes=(Prize(30, Decimal("5.00")), Prize(70, Decimal("0.00"))),
)

# Every campaign that this release knows, by name.
CAMPAIGNS: Final[Mapping[str, Campaign]] = MappingProxyType({it.name: it for it in (DEFAULT_CAMPAIGN,)})


@dataclass(frozen=True)
class Wheel:
    """A campaign under a seed: what actually draws."""

    campaign: Campaign
    seed: bytes = field(repr=False)
    notes: str = field(init=False)
    _prefix: bytes = field(init=False, repr=False)
    _limit: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        campaign = self.campaign
        prefix = _field(DRAW_VERSION) + _field(campaign.name.encode()) + _field(bytes.fromhex(campaign.odds_hash))
        object.__setattr__(self, "_prefix", prefix)
        # Values from here on would give the first outcomes one chance more: they are drawn again.
        object.__setattr__(self, "_limit", (2**64 // campaign.weight_sum) * campaign.weight_sum)
        object.__setattr__(self, "notes", f"{NOTES_PREFIX}{campaign.odds_hash} seed={self.commitment[:16]}")

    @property
    def commitment(self) -> str:
        """SHA-256 of the seed, to be published before the campaign; the seed is revealed after it."""
        return hashlib.sha256(self.seed).hexdigest()

    def draw(self, account_id: int, request_key: str, client_nonce: bytes = b"") -> Prize:
        """The prize of this request: always the same one."""
        message = self._prefix + _field(str(account_id).encode()) + _field(request_key.encode()) + _field(client_nonce)
        counter = 0
        while True:
            digest = hmac.digest(self.seed, message + _field(counter.to_bytes(8, "big")), "sha256")
            value = int.from_bytes(digest[:8], "big")
            if value < self._limit:
                return self.pick(value % self.campaign.weight_sum)
            counter += 1

    def pick(self, ticket: int) -> Prize:
        """The prize of ticket 0 <= `ticket` < weight_sum, by cumulative weight."""
        for prize in self.campaign.prizes:
            if ticket < prize.weight:
                return prize
            ticket -= prize.weight
        raise ValueError("a ticket is below the sum of the weights")


class BlindWheel(Wheel):
    """A campaign whose seed is not known here: it says what a draw costs, and nobody wins."""

    def draw(self, account_id: int, request_key: str, client_nonce: bytes = b"") -> Prize:
        return Prize(1, Decimal("0.00"))


# The campaigns that are known here, by name.
Wheels = Mapping[str, Wheel]


def blind_wheels() -> dict[str, Wheel]:
    """Every campaign this release knows, without a seed."""
    return {name: BlindWheel(campaign, b"") for name, campaign in CAMPAIGNS.items()}


def wheels(seed: bytes) -> dict[str, Wheel]:
    """Every campaign this release knows, under the deployment's seed, by name."""
    return {name: Wheel(campaign, seed) for name, campaign in CAMPAIGNS.items()}


def _field(value: bytes) -> bytes:
    """Length-prefixed, so that no two lists of fields run together to the same message."""
    return len(value).to_bytes(4, "big") + value
