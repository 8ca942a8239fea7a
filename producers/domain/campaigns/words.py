"""A guarantee as a sentence for players."""

from __future__ import annotations

from tombola.producers.domain.campaigns.odds import Guarantee, Odds, Prize


def guarantee_in_words(odds: Odds, guarantee: Guarantee) -> str:
    """What the guarantee promises, as in `One of A phone, 5.00 POINT at the latest at every 90th pull.`"""
    names = [name_of(prize, odds) for prize in odds.prizes if prize.code in guarantee.prizes]
    won = names[0] if len(names) == 1 else f"One of {', '.join(names)}"
    hard = f"{won} at the latest at every {ordinal(guarantee.hard_at)} pull."
    if guarantee.soft_from is None:
        return hard
    return f"{hard} From the {ordinal(guarantee.soft_from)} pull after the last time on, each miss makes it likelier."


def name_of(prize: Prize, odds: Odds) -> str:
    """What a player reads: the prize's title, what it pays in the campaign's asset, or its code."""
    if not prize.title and len(prize.grants) == 1 and prize.grants[0].asset_code == odds.asset_code:
        return f"{prize.grants[0].amount} {odds.asset_code}"
    return prize.title or prize.code


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st, …"""
    teen = 10 <= number % 100 <= 20
    suffix = "th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{suffix}"
