"""Campaigns as players see them: from odds to the bodies of answers. Pure, and slow where odds have guarantees."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Context, Decimal
from fractions import Fraction
from typing import Final

from tombola.producers.domain import draw
from tombola.producers.domain.campaigns import figures
from tombola.producers.domain.campaigns.built_in import DEFAULT_ODDS
from tombola.producers.domain.campaigns.canonical import utc_text
from tombola.producers.domain.campaigns.odds import DRAW_VERSION, Guarantee, Odds, Prize, Tier
from tombola.producers.domain.campaigns.words import guarantee_in_words
from tombola.producers.gateway.messages import (
    CampaignEntry,
    CampaignView,
    Chance,
    Eligibility,
    GrantView,
    GuaranteeView,
    Limits,
    Price,
    PrizeView,
    TierChance,
    TierView,
)
from tombola.producers.storage.campaigns import CampaignState

PERCENT_DIGITS: Final = 6  # significant ones: the smallest chance, 1 in 2**32, is not 0


def entry_of(odds: Odds, state: CampaignState) -> CampaignEntry:
    """A campaign in the list."""
    return CampaignEntry(
        name=odds.name,
        title=odds.title,
        state=state,
        asset_code=odds.asset_code,
        prices=[Price(pulls, str(cost)) for pulls, cost in sorted(odds.cost.items())],
        opens=utc_text(odds.opens),
        closes=utc_text(odds.closes),
        odds_hash=odds.odds_hash,
    )


def view_of(odds: Odds, state: CampaignState) -> CampaignView:
    """A campaign with its odds. Computes exact chances, for each tier apart: seconds where guarantees come late."""
    entry = entry_of(odds, state)
    base, effective = figures.base_chances(odds), figures.effective_chances(odds)
    version = draw.DRAW_VERSION if odds is DEFAULT_ODDS else DRAW_VERSION
    return CampaignView(
        **{name: getattr(entry, name) for name in entry.__struct_fields__},
        limits=Limits(odds.per_day, odds.per_account, odds.day),
        eligibility=Eligibility(has_allow_list=bool(odds.allow), has_deny_list=bool(odds.deny)),
        prizes=[_prize(prize, base, effective) for prize in odds.prizes],
        tiers=[_tier(odds, tier) for tier in odds.tiers],
        guarantees=[_guarantee(odds, guarantee) for guarantee in odds.guarantees],
        draw_version=version.decode(),
    )


def _prize(prize: Prize, base: Mapping[str, Fraction], effective: Mapping[str, float]) -> PrizeView:
    return PrizeView(
        code=prize.code,
        title=prize.title,
        chance=_chance(base[prize.code]),
        effective_percent=percent_text(effective[prize.code]),
        is_limited=prize.is_stocked,
        per_account=prize.per_account,
        instead=prize.instead or None,
        grants=[GrantView(it.asset_code, str(it.amount), it.notify, it.has_code) for it in prize.grants],
    )


def _tier(odds: Odds, tier: Tier) -> TierView:
    base, effective = figures.base_chances(odds, tier.name), figures.effective_chances(odds, tier.name)
    chances = [
        TierChance(prize.code, _chance(base[prize.code]), percent_text(effective[prize.code])) for prize in odds.prizes
    ]
    return TierView(tier.name, str(tier.spent_from), chances)


def _guarantee(odds: Odds, guarantee: Guarantee) -> GuaranteeView:
    return GuaranteeView(
        name=guarantee.name,
        prizes=[prize.code for prize in odds.prizes if prize.code in guarantee.prizes],
        hard_at=guarantee.hard_at,
        soft_from=guarantee.soft_from,
        soft_step=guarantee.soft_step or None,
        words=guarantee_in_words(odds, guarantee),
    )


def _chance(share: Fraction) -> Chance:
    return Chance(share.numerator, share.denominator, percent_text(share))


def percent_text(share: Fraction | float) -> str:
    """A share of one as a percentage of PERCENT_DIGITS significant digits, never in scientific notation."""
    exact = Fraction(share) * 100
    percent = Context(prec=PERCENT_DIGITS).divide(Decimal(exact.numerator), Decimal(exact.denominator))
    return f"{percent.normalize():f}"
