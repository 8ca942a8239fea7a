"""The bodies of HTTP requests and answers. The OpenAPI document takes its schemas from these types."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from tombola.producers.domain.contract import (
    ACCOUNT_ID_MAX,
    CAMPAIGN_DEFAULT,
    CLIENT_NONCE_LENGTH_MAX,
    CLIENT_NONCE_LENGTH_MIN,
    PULLS_MAX,
    LedgerRow,
)
from tombola.producers.storage.campaigns import CampaignState
from tombola.producers.web.problems import Problem

BATCH_SIZE_MAX: Final = 100
KEY_PATTERN: Final = "^[A-Za-z0-9._-]+$"
IdText = Annotated[str, msgspec.Meta(pattern=KEY_PATTERN, min_length=1, max_length=100)]
KeyText = Annotated[str, msgspec.Meta(pattern=KEY_PATTERN, min_length=1, max_length=64)]
AccountId = Annotated[int, msgspec.Meta(ge=1, le=ACCOUNT_ID_MAX)]
Pulls = Annotated[
    int,
    msgspec.Meta(
        ge=1,
        le=PULLS_MAX,
        description="So many pulls for one price; absent for the campaign `default`, which sells single draws alone.",
    ),
]

ClientNonce = Annotated[
    str,
    msgspec.Meta(
        pattern="^[A-Za-z0-9_-]+$",
        min_length=CLIENT_NONCE_LENGTH_MIN,
        max_length=CLIENT_NONCE_LENGTH_MAX,
        description="Random text that the player's browser makes with the key, before it sends anything. The outcome "
        "depends on it. The same key with another nonce is refused.",
    ),
]


class NewDraw(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /v1/draws; the draw's request key is the header `Idempotency-Key`."""

    account_id: AccountId
    campaign: KeyText = CAMPAIGN_DEFAULT
    pulls: Pulls | None = None
    client_nonce: ClientNonce | None = None
    lottery_session_id: IdText | None = None


class NewDrawInBatch(msgspec.Struct, forbid_unknown_fields=True):
    """A draw in a batch, with its request key; the gateway makes a key for a draw without one."""

    account_id: AccountId
    request_key: KeyText | None = None
    campaign: KeyText = CAMPAIGN_DEFAULT
    pulls: Pulls | None = None
    client_nonce: ClientNonce | None = None
    lottery_session_id: IdText | None = None


class NewDraws(msgspec.Struct, forbid_unknown_fields=True):
    """The body of POST /v1/draws/batch: draws that are accepted or refused independently."""

    draws: Annotated[list[NewDrawInBatch], msgspec.Meta(min_length=1, max_length=BATCH_SIZE_MAX)]


class DrawTicket(msgspec.Struct, frozen=True):
    """The ticket of an accepted draw; repeats get the same ticket."""

    request_key: str
    lottery_session_id: str
    status: Literal["accepted"] = "accepted"


class BatchAnswer(msgspec.Struct, frozen=True):
    """The answer to one draw of a batch: a ticket, with a receipt where receipts are signed; or a problem."""

    status: int
    replayed: bool
    ticket: DrawTicket | None
    problem: Problem | None
    receipt: str | msgspec.UnsetType = msgspec.UNSET


class BatchAnswers(msgspec.Struct, frozen=True):
    """An answer for each draw of a batch, in the order of the draws."""

    answers: list[BatchAnswer]


class DeadDraw(msgspec.Struct, frozen=True):
    """A dead draw: nothing was charged. `detail` says why, and what can be done."""

    request_key: str
    lottery_session_id: str
    account_id: int
    campaign: str
    status: Literal["dead"]
    reason: str | None
    detail: str


class SessionRow(LedgerRow, frozen=True):
    """A ledger row of a lottery session."""

    transaction_id: int
    account_id: int
    created_at: str


class AccountView(msgspec.Struct, frozen=True):
    """An account. `balance` is what can be spent; `held` is what open holds took from it. Both have two decimals."""

    account_id: int
    user_id: int
    asset_code: str
    balance: str
    held: str


class AccountList(msgspec.Struct, frozen=True):
    """A page of a user's accounts, by id; `next_after` is the next page's `after`, null on the last page."""

    accounts: list[AccountView]
    next_after: int | None


class AccountRow(SessionRow, frozen=True):
    """A ledger row of an account."""

    lottery_session_id: str


class AccountRows(msgspec.Struct, frozen=True):
    """A page of an account's ledger rows, as they were posted; `next_after` as in AccountList."""

    transactions: list[AccountRow]
    next_after: int | None


class StatementView(msgspec.Struct, frozen=True, kw_only=True):
    """A page of an account's statement: the opening balance and all rows of the period make the closing balance.

    `until` null is now. Once `is_final`, no row can join the period, and its statement never changes.
    """

    account_id: int
    user_id: int
    asset_code: str
    from_: str = msgspec.field(name="from")
    until: str | None
    opening_balance: str
    closing_balance: str
    is_final: bool
    transactions: list[AccountRow]
    next_after: int | None


class Readiness(msgspec.Struct, frozen=True):
    """Whether each server answers; `missing` names those that do not. Accepting needs only the database."""

    database: bool
    broker: bool
    results: bool
    missing: list[str]


# ---- campaigns -------------------------------------------------------------------------------------------------------

PercentText = Annotated[
    str, msgspec.Meta(description="A percentage in decimal digits, six of them significant.", examples=["0.01"])
]
TimeText = Annotated[str, msgspec.Meta(description="UTC, as in 2026-12-01T00:00:00Z.")]


class Price(msgspec.Struct, frozen=True):
    """What so many pulls in one request cost, in the campaign's asset."""

    pulls: int
    cost: str


class CampaignEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A campaign in the list. It accepts draws while it is open and its window is: from `opens` until before `closes`.

    A bound of the window that is null does not exist.
    """

    name: str
    title: str
    state: CampaignState
    asset_code: str
    prices: list[Price]
    opens: TimeText | None
    closes: TimeText | None
    odds_hash: str


class CampaignList(msgspec.Struct, frozen=True):
    """The campaigns that are open or paused; the first one is the built-in campaign."""

    campaigns: list[CampaignEntry]


class Chance(msgspec.Struct, frozen=True):
    """The chance of a prize at one pull: exactly, as a fraction in lowest terms, and as a percentage."""

    numerator: int
    denominator: int
    percent: PercentText


class GrantView(msgspec.Struct, frozen=True):
    """What a prize hands out, once: an amount of an asset, or a notification (then there is no asset).

    With `has_code`, the result of the draw has a code.
    """

    asset_code: str
    amount: str
    notify: str
    has_code: bool


class PrizeView(msgspec.Struct, frozen=True, kw_only=True):
    """A possible outcome of a pull. `effective_percent` is its share in the long run, guarantees included.

    A limited prize can be sold out. `per_account` is how often one account can win it. `instead` is the code of the
    prize that is drawn in place of one that is sold out, or won often enough. All chances are those while every prize
    is available.
    """

    code: str
    title: str
    chance: Chance
    effective_percent: PercentText
    is_limited: bool
    per_account: int | None
    instead: str | None
    grants: list[GrantView]


class TierChance(msgspec.Struct, frozen=True):
    """The chance of a prize for accounts in a tier."""

    code: str
    chance: Chance
    effective_percent: PercentText


class TierView(msgspec.Struct, frozen=True):
    """Other chances, for accounts that have spent `spent_from` in this campaign."""

    name: str
    spent_from: str
    chances: list[TierChance]


class GuaranteeView(msgspec.Struct, frozen=True, kw_only=True):
    """A promise: one of `prizes` at the latest at every `hard_at`-th pull of an account. `words` say it to a player.

    From pull `soft_from` after the last hit on, each further pull adds `soft_step` tickets for these prizes.
    """

    name: str
    prizes: list[str]
    hard_at: int
    soft_from: int | None
    soft_step: int | None
    words: str


class Limits(msgspec.Struct, frozen=True):
    """How many pulls one account has; null is no limit. A day begins at midnight in the time zone `day`."""

    per_day: int | None
    per_account: int | None
    day: str


class Eligibility(msgspec.Struct, frozen=True):
    """Whether accounts are listed: those that alone may draw, and those that may not."""

    has_allow_list: bool
    has_deny_list: bool


class CampaignView(CampaignEntry, frozen=True, kw_only=True):
    """A campaign with all that a player must know before paying."""

    limits: Limits
    eligibility: Eligibility
    prizes: list[PrizeView]
    tiers: list[TierView]
    guarantees: list[GuaranteeView]
    draw_version: Annotated[str, msgspec.Meta(description="How a ticket is drawn from the seed.")]
