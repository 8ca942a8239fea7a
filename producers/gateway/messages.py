"""The bodies of HTTP requests and answers. The OpenAPI document takes its schemas from these types."""

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
    """The body of POST /v1/draws; the draw's request key is the header `Idempotency-Key`."""

    account_id: AccountId
    campaign: KeyText = CAMPAIGN_DEFAULT
    lottery_session_id: IdText | None = None


class NewDrawInBatch(msgspec.Struct, forbid_unknown_fields=True):
    """A draw in a batch, with its request key; the gateway makes a key for a draw without one."""

    account_id: AccountId
    request_key: KeyText | None = None
    campaign: KeyText = CAMPAIGN_DEFAULT
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
    """The answer to one draw of a batch: a ticket or a problem."""

    status: int
    replayed: bool
    ticket: DrawTicket | None
    problem: Problem | None


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
    """An account; `balance` has two decimals."""

    account_id: int
    user_id: int
    asset_code: str
    balance: str


class Readiness(msgspec.Struct, frozen=True):
    """Whether each server answers; `missing` names those that do not. Accepting needs only the database."""

    database: bool
    broker: bool
    results: bool
    missing: list[str]
