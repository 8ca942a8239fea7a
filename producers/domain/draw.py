"""The draw: from odds, a secret seed and a request to a prize. Pure and deterministic, no I/O.

A crash before the commit, a redelivery or a replay draws the same prize again: crashing a worker is no re-roll.
The construction (ARCHITECTURE, Fairness): HMAC-SHA256 under the seed over length-prefixed fields; the first 64 bits,
rejected and drawn again with a higher counter where they would favour some outcomes; cumulative integer weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from types import MappingProxyType
from typing import Final, NamedTuple

from tombola.producers.domain.macs import hmac_sha256
from tombola.producers.domain.seeds import EpochName, draw_key

DRAW_VERSION: Final = b"tombola-draw-1"
NOTES_PREFIX: Final = "odds="  # begins the notes in each ledger row of a draw
WEIGHT_SUM_MAX: Final = 2**32  # far below 2**64, so that a number is rarely drawn again


def _cents(amount: Decimal) -> Decimal:
    cents = amount.quantize(Decimal("0.01"))
    if cents != amount:
        raise ValueError(f"an amount has at most two decimals: {amount}")
    return cents


@dataclass(frozen=True, slots=True)
class Prize:
    """One possible outcome; `amount` 0 is no prize. Its probability is `weight` / the sum of all weights."""

    weight: int
    amount: Decimal


@dataclass(frozen=True)
class Campaign:
    """Odds with a name: immutable once used, so ledger rows name their hash.

    Cost and prizes are amounts of `asset_code`. `canonical` is the text that is hashed, as in
    default,POINT,1.00,30x5.00,70x0.00. Raises ValueError for invalid odds.
    """

    name: str
    asset_code: str
    cost: Decimal
    prizes: tuple[Prize, ...]
    canonical: bytes = field(init=False, repr=False)
    odds_hash: str = field(init=False)
    weight_sum: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.prizes or any(prize.weight < 1 or prize.amount < 0 for prize in self.prizes) or self.cost <= 0:
            raise ValueError(
                f"campaign {self.name}: a draw costs more than 0, every prize needs a weight of at least 1, "
                "no amount is negative"
            )
        # Amounts have the ledger's two decimals: `5` in a result would be rebuilt from the ledger as `5.00`.
        object.__setattr__(self, "cost", _cents(self.cost))
        object.__setattr__(self, "prizes", tuple(Prize(prize.weight, _cents(prize.amount)) for prize in self.prizes))
        odds = [f"{prize.weight}x{prize.amount:.2f}" for prize in self.prizes]
        canonical = ",".join([self.name, self.asset_code, f"{self.cost:.2f}", *odds]).encode()
        object.__setattr__(self, "canonical", canonical)
        object.__setattr__(self, "odds_hash", hashlib.sha256(canonical).hexdigest())
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

# All campaigns of this release, by name.
CAMPAIGNS: Final[Mapping[str, Campaign]] = MappingProxyType({it.name: it for it in (DEFAULT_CAMPAIGN,)})


@dataclass(frozen=True)
class Wheel:
    """A campaign with the key that its draws are drawn under: draws prizes.

    `seed_name` is what ledger notes call the key; by default the name of a master seed.
    """

    campaign: Campaign
    seed: bytes = field(repr=False)
    seed_name: str = ""
    notes: str = field(init=False)
    _prefix: bytes = field(init=False, repr=False)
    _limit: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        campaign = self.campaign
        prefix = _field(DRAW_VERSION) + _field(campaign.name.encode()) + _field(bytes.fromhex(campaign.odds_hash))
        object.__setattr__(self, "_prefix", prefix)
        # Values from here on would favour the first outcomes: such a number is drawn again.
        object.__setattr__(self, "_limit", (2**64 // campaign.weight_sum) * campaign.weight_sum)
        seed_name = self.seed_name or seed_id_of(self.seed)
        object.__setattr__(self, "notes", f"{NOTES_PREFIX}{campaign.odds_hash} seed={seed_name}")

    @property
    def commitment(self) -> str:
        """SHA-256 of the seed: publish it before the campaign, and the seed after it."""
        return hashlib.sha256(self.seed).hexdigest()

    def draw(self, account_id: int, request_key: str, client_nonce: bytes = b"") -> Prize:
        """The prize of this request: always the same one."""
        nonce = _field(client_nonce) if client_nonce else _EMPTY
        message = self._prefix + _field(b"%d" % account_id) + _field(request_key.encode()) + nonce
        counter = 0
        while True:
            digest = hmac_sha256(self.seed, message + (_field(counter.to_bytes(8, "big")) if counter else _FIRST))
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
    """A campaign without its seed: the cost of a draw is known, and every draw has no prize."""

    def draw(self, account_id: int, request_key: str, client_nonce: bytes = b"") -> Prize:
        return Prize(1, Decimal("0.00"))


# Wheels by the name of their campaign.
Wheels = Mapping[str, Wheel]


def blind_wheels() -> dict[str, Wheel]:
    """All campaigns of this release without a seed, by name."""
    return {name: BlindWheel(campaign, b"") for name, campaign in CAMPAIGNS.items()}


def wheels(seed: bytes) -> dict[str, Wheel]:
    """All campaigns of this release with the deployment's seed, by name."""
    return {name: Wheel(campaign, seed) for name, campaign in CAMPAIGNS.items()}


@lru_cache(maxsize=16)
def seed_id_of(seed: bytes) -> str:
    """The seed's name in ledger notes: the first 16 hex digits of its commitment."""
    return hashlib.sha256(seed).hexdigest()[:16]


def seed_of(wheels: Wheels) -> bytes | None:
    """The seed of these wheels; None for blind ones."""
    wheel = wheels.get(DEFAULT_CAMPAIGN.name)
    return None if wheel is None or isinstance(wheel, BlindWheel) else wheel.seed


class DrawKey(NamedTuple):
    """The key that a draw is drawn under, and what ledger notes call it."""

    key: bytes
    seed_name: str


class Seed:
    """What draws are drawn under: the secret of an epoch, or a master seed, for draws of before the epochs.

    `name` is what ledger notes call it: `1.17`, or the master seed's id. `wheels` are the campaigns of this release,
    blind ones where the secret is not known (`is_known`).
    """

    __slots__ = ("_is_master", "_keys", "_secret", "is_known", "name", "wheels")

    def __init__(self, name: str, secret: bytes | None, *, is_master: bool = False) -> None:
        self.name = name
        self.is_known = secret is not None
        self._secret = secret or b""
        self._is_master = is_master
        self._keys: dict[str, DrawKey] = {}
        self.wheels: Wheels = {
            it: Wheel(campaign, self.key_of(it).key, name) if self.is_known else BlindWheel(campaign, b"", name)
            for it, campaign in CAMPAIGNS.items()
        }

    @classmethod
    def of_epoch(cls, name: EpochName, secret: bytes | None) -> Seed:
        """The seed of an epoch; without its secret nothing can be drawn."""
        return cls(str(name), secret)

    @classmethod
    def of_master(cls, master: bytes) -> Seed:
        """The seed of draws of before the epochs: the same key for all campaigns."""
        return cls(seed_id_of(master), master, is_master=True)

    def key_of(self, campaign: str) -> DrawKey:
        """The key of the draws of a campaign."""
        found = self._keys.get(campaign)
        if found is None:
            key = self._secret if self._is_master else draw_key(self._secret, campaign)
            found = self._keys[campaign] = DrawKey(key, self.name)
        return found


class Seeds(NamedTuple):
    """The seeds of the draws of a batch: of those in `others`, by request key; and `of_now` of all other draws.

    None: they are drawn by the wheels as they are.
    """

    of_now: Seed | None = None
    others: Mapping[str, Seed] = MappingProxyType({})


NO_SEEDS: Final = Seeds()


def _field(value: bytes) -> bytes:
    """`value` after its length, so that different lists of fields never make the same message."""
    return len(value).to_bytes(4, "big") + value


_EMPTY: Final = _field(b"")
_FIRST: Final = _field(bytes(8))  # the counter, which hardly ever gets further
