"""What changes when one version of a campaign follows another, said to the operator who is about to publish it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from tombola.producers.domain.campaigns import figures
from tombola.producers.domain.campaigns.odds import Odds

_OF_CAMPAIGN: Final = ("title", "opens", "closes", "day", "per_day", "per_account", "deny", "allow")
_OF_PRIZE: Final = ("title", "stock", "per_account", "value", "instead")


def differences(live: Odds | None, odds: Odds) -> Iterator[str]:
    """What changes when `odds` follow `live`, a line each; nothing if both say the same."""
    if live is None:
        yield f"{odds.name} is new"
        return
    for what in _OF_CAMPAIGN:
        yield from _changed(what, getattr(live, what), getattr(odds, what))
    for pulls in sorted({*live.cost, *odds.cost}):
        yield from _changed(f"price of {pulls} pull(s)", live.cost.get(pulls), odds.cost.get(pulls))
    yield from _of_prizes(live, odds)
    yield from _of_tiers(live, odds)
    yield from _of_guarantees(live, odds)


def _of_prizes(live: Odds, odds: Odds) -> Iterator[str]:
    before, after = figures.effective_chances(live), figures.effective_chances(odds)
    for code in dict.fromkeys([*before, *after]):
        if code not in before:
            yield f"prize {code}: new, {after[code]:.4%}"
        elif code not in after:
            yield f"prize {code}: gone, was {before[code]:.4%}"
        else:
            one, two = live.by_code[code], odds.by_code[code]
            yield from _changed(f"prize {code}, chance", f"{before[code]:.4%}", f"{after[code]:.4%}")
            for what in _OF_PRIZE:
                yield from _changed(f"prize {code}, {what}", getattr(one, what), getattr(two, what))
            if one.grants != two.grants:
                yield f"prize {code}: other grants"


def _of_tiers(live: Odds, odds: Odds) -> Iterator[str]:
    before, after = ({tier.name: tier for tier in it.tiers} for it in (live, odds))
    for name in dict.fromkeys([*before, *after]):
        one, two = before.get(name), after.get(name)
        yield from _changed(f"tier {name}, spent_from", one and one.spent_from, two and two.spent_from)
        if one is not None and two is not None and _by_code(live, one.weights) != _by_code(odds, two.weights):
            yield f"tier {name}: other weights"


def _of_guarantees(live: Odds, odds: Odds) -> Iterator[str]:
    before, after = ({guarantee.name: guarantee for guarantee in it.guarantees} for it in (live, odds))
    for name in dict.fromkeys([*before, *after]):
        one, two = before.get(name), after.get(name)
        for what in ("hard_at", "soft_from", "soft_step"):
            yield from _changed(f"guarantee {name}, {what}", one and getattr(one, what), two and getattr(two, what))
        if one is not None and two is not None and one.prizes != two.prizes:
            yield f"guarantee {name}: other prizes"


def _by_code(odds: Odds, weights: tuple[int, ...]) -> dict[str, int]:
    return dict(zip((prize.code for prize in odds.prizes), weights, strict=True))


def _changed(what: str, before: Any, after: Any) -> Iterator[str]:
    if before != after:
        yield f"{what}: {_shown(before)} -> {_shown(after)}"


def _shown(value: Any) -> str:
    return "none" if value in (None, "") else str(value)
