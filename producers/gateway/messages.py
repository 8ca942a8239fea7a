"""What travels over HTTP: the bodies of requests and of answers. The OpenAPI document is made of these."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from tombola.producers.domain.contract import ACCOUNT_ID_MAX, CAMPAIGN_DEFAULT, LedgerRow
from tombola.producers.web.problems import Problem

BATCH_SIZE_MAX: Final = 100
KEY_PATTERN: Final = "^[A-Za-z0-9._-]+$"
IdText = Annotated[str, msgspec.Meta(pattern=KEY_PATTERN, min_length=1, max_length=100)]
KeyText = Annotated[str, msgspec.Meta(pattern=KEY_PATTERN, min_length=1, max_length=64)]
AccountId = Annotated[int, msgspec.Meta(ge=1, le=ACCOUNT_ID_MAX)]


class NewDraw(msgspec.Struct, forbid_unknown_fields=True):
    """A draw to be made; its request key is the header `Idempotency-Key`."""

    account_id: AccountId
    campaign: KeyText = CAMPAIGN_DEFAULT
    lottery_session_id: IdText | None = None


class NewDrawInBatch(msgspec.Struct, forbid_unknown_fields=True):
    """A draw to be made, with its request key: one is made here for those that have none."""

    account_id: AccountId
    request_key: KeyText | None = None
    campaign: KeyText = CAMPAIGN_DEFAULT
    lottery_session_id: IdText | None = None


class NewDraws(msgspec.Struct, forbid_unknown_fields=True):
    """Draws to be made, each for itself."""

    draws: Annotated[list[NewDrawInBatch], msgspec.Meta(min_length=1, max_length=BATCH_SIZE_MAX)]


class DrawTicket(msgspec.Struct, frozen=True):
    """The receipt of an accepted draw. The same one for every repeat."""

    request_key: str
    lottery_session_id: str
    status: Literal["accepted"] = "accepted"


class BatchAnswer(msgspec.Struct, frozen=True):
    """What one draw of a batch was answered: a ticket, or a problem."""

    status: int
    replayed: bool
    ticket: DrawTicket | None
    problem: Problem | None


class BatchAnswers(msgspec.Struct, frozen=True):
    """An answer for each draw, in their order."""

    answers: list[BatchAnswer]


class DeadDraw(msgspec.Struct, frozen=True):
    """A draw that was given up: nothing was charged. `detail` says why, and what can be done."""

    request_key: str
    lottery_session_id: str
    account_id: int
    campaign: str
    status: Literal["dead"]
    reason: str | None
    detail: str


class SessionRow(LedgerRow, frozen=True):
    """One ledger row of a session."""

    transaction_id: int
    account_id: int
    created_at: str


class AccountView(msgspec.Struct, frozen=True):
    """An account as it stands; `balance` has two decimals."""

    account_id: int
    user_id: int
    asset_code: str
    balance: str


class Readiness(msgspec.Struct, frozen=True):
    """What this gateway needs, and what of it is missing. Without a broker or results it goes on accepting."""

    database: bool
    broker: bool
    results: bool
    missing: list[str]
