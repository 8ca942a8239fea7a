"""The canonical form of odds: the bytes that are hashed, published and kept."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from tombola.producers.domain.campaigns.odds import Odds


def canonical_form(odds: Odds) -> bytes:
    """JSON with sorted keys and without blanks; what is not used is absent."""
    form = {
        "name": odds.name,
        "title": odds.title,
        "asset": odds.asset_code,
        "cost": {str(pulls): str(amount) for pulls, amount in odds.cost.items()},
        "opens": utc_text(odds.opens),
        "closes": utc_text(odds.closes),
        "day": odds.day if odds.day != "UTC" else "",
        "limits": {"per_day": odds.per_day, "per_account": odds.per_account},
        "eligibility": {"deny": odds.deny, "allow": odds.allow},
        "prize": [
            {
                "code": it.code,
                "weight": it.weight,
                "title": it.title,
                "stock": it.stock,
                "per_account": it.per_account,
                "value": str(it.value) if it.value else "",
                "instead": it.instead,
                "grants": [
                    {"notify": grant.notify}
                    if grant.notify
                    else {"asset": grant.asset_code, "amount": str(grant.amount), "codes": grant.has_code or None}
                    for grant in it.grants
                ],
            }
            for it in odds.prizes
        ],
        "tier": [
            {
                "name": it.name,
                "spent_from": str(it.spent_from),
                "weights": {prize.code: weight for prize, weight in zip(odds.prizes, it.weights, strict=True)},
            }
            for it in odds.tiers
        ],
        "guarantee": [
            {
                "name": it.name,
                "prizes": sorted(it.prizes),
                "hard_at": it.hard_at,
                "soft_from": it.soft_from,
                "soft_step": it.soft_step or None,
            }
            for it in odds.guarantees
        ],
    }
    return json.dumps(_used(form), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _used(value: Any) -> Any:
    """`value` without the fields that say nothing."""
    if isinstance(value, dict):
        used = {key: _used(it) for key, it in value.items()}
        return {key: it for key, it in used.items() if it is not None and it not in ("", [], {})}
    return [_used(it) for it in value] if isinstance(value, list) else value


def utc_text(moment: datetime | None) -> str | None:
    """A UTC time as in 2026-12-01T00:00:00Z; None for none."""
    return None if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")
