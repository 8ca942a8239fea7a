"""The house's side of ledger rows: which account of the house a row's amount comes from, or goes to.

A ledger row says the user's side. Its other side follows from its business type (operations.house_accounts), the
campaign of its request and, for a recharge, the channel in its notes. What a user gets, the house gives: the house's
delta is the negative of the row's. The house's accounts have names, and no rows: their sums are stored per block.

| account | of |
| --- | --- |
| `house/{campaign}/sales`, `house/{campaign}/prizes` | draws, and refunds of draws |
| `house/issued`, `house/issued/{channel}` | recharges |
| `house/unknown` | rows of a business type that tombola does not know (I13) |
| `house/legacy` | rows of such a type that old code has written |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Final, NamedTuple

from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.operations.movements import check_channel

CAMPAIGN: Final = "{campaign}"
CHANNEL: Final = "{channel}"
CHANNEL_PREFIX: Final = "channel="
CHANNEL_LENGTH_MAX: Final = 64  # read so much of a word at most
UNKNOWN: Final = "house/unknown"
LEGACY: Final = "house/legacy"
CENT: Final = Decimal("0.01")

Rules = Mapping[str, str]  # operations.house_accounts(): the account by business type, "" for rows without one
HouseAccount = tuple[str, str]  # its name, and an asset


class Group(NamedTuple):
    """The sum of ledger rows that are alike in all that their house account depends on.

    `campaign` is that of their requests, empty where they have none. `channel` is the word after `channel=` in their
    notes, empty for rows without. `is_old` says that old code has written them (`tombola legacy`). `rows` is their
    number.
    """

    business_type: str
    asset_code: str
    campaign: str
    channel: str
    is_old: bool
    delta: Decimal
    rows: int = 1


def campaign_types(rules: Rules) -> list[str]:
    """The business types whose house account depends on the campaign."""
    return sorted(name for name, account in rules.items() if CAMPAIGN in account)


def channel_types(rules: Rules) -> list[str]:
    """The business types whose house account depends on the channel."""
    return sorted(name for name, account in rules.items() if CHANNEL in account)


def channel_of(notes: str | None) -> str:
    """The word after `channel=` at the beginning of a row's notes; empty where they do not begin so."""
    if notes is None or not notes.startswith(CHANNEL_PREFIX):
        return ""
    return notes[len(CHANNEL_PREFIX) :].partition(" ")[0]


def account_of(group: Group, rules: Rules, default_campaign: str) -> str:
    """The house account of these rows; empty for rows whose other side is another user's account, or nothing.

    Draws of old code have no request, and belong to `default_campaign`. A channel that is no name is left out.
    """
    template = rules.get(group.business_type)
    if template is None:
        return LEGACY if group.is_old else UNKNOWN
    channel = f"/{group.channel}" if _is_channel(group.channel) else ""
    return template.replace(CAMPAIGN, group.campaign or default_campaign).replace(f"/{CHANNEL}", channel)


def _is_channel(text: str) -> bool:
    try:
        check_channel(text)
    except InvalidRequest:
        return False
    return bool(text)


def sums(groups: Iterable[Group], rules: Rules, default_campaign: str) -> dict[HouseAccount, Decimal]:
    """What each house account moved, by account and asset, in their order; accounts that moved nothing are left out."""
    moved: dict[HouseAccount, Decimal] = {}
    for group in groups:
        if account := account_of(group, rules, default_campaign):
            key = account, group.asset_code
            moved[key] = moved.get(key, Decimal(0)) - group.delta
    return {key: moved[key].quantize(CENT) for key in sorted(moved) if moved[key]}
