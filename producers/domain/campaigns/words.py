"""A guarantee as a sentence for players."""

from __future__ import annotations

from tombola.producers.domain.campaigns.odds import Guarantee, Odds


def guarantee_in_words(odds: Odds, guarantee: Guarantee) -> str:
    """What the guarantee promises, as in `One of Phone, 5 POINT at the latest at every 90th pull.`"""
    names = [prize.title or prize.code for prize in odds.prizes if prize.code in guarantee.prizes]
    won = names[0] if len(names) == 1 else f"One of {', '.join(names)}"
    hard = f"{won} at the latest at every {ordinal(guarantee.hard_at)} pull."
    if guarantee.soft_from is None:
        return hard
    return f"{hard} From the {ordinal(guarantee.soft_from)} pull after the last time on, each miss makes it likelier."


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st, …"""
    teen = 10 <= number % 100 <= 20
    suffix = "th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{suffix}"
