"""Everything before the broker: enqueue draws, read their results. Safe in a web process, imports no Celery."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tombola.producers.client import DrawClient, Ticket
    from tombola.producers.domain.contract import (
        DrawRequest,
        DrawResult,
        GrantWon,
        LedgerRow,
        MovementResult,
        PrizeWon,
        PullsResult,
    )
    from tombola.producers.domain.errors import (
        AccountNotFound,
        AlreadyRefunded,
        CampaignClosed,
        CampaignNotOpen,
        CampaignPaused,
        ConfigurationError,
        DrawDead,
        DrawError,
        DrawNotCompleted,
        HoldEnded,
        HoldExpired,
        HoldNotCompleted,
        HoldNotFound,
        IdempotencyKeyReused,
        InternalError,
        InvalidKey,
        InvalidRequest,
        PrizeSpent,
        PublishFailed,
        PullsNotSold,
        RequestBusy,
        ResultNotReady,
        ServiceUnavailable,
        SessionNotFound,
        TransactionOutdated,
        UnknownCampaign,
        UnknownVersion,
    )
    from tombola.producers.movements import MovementTicket, OpenedAccount
    from tombola.producers.settings import Settings

__all__ = [
    "AccountNotFound",
    "AlreadyRefunded",
    "CampaignClosed",
    "CampaignNotOpen",
    "CampaignPaused",
    "ConfigurationError",
    "DrawClient",
    "DrawDead",
    "DrawError",
    "DrawNotCompleted",
    "DrawRequest",
    "DrawResult",
    "GrantWon",
    "HoldEnded",
    "HoldExpired",
    "HoldNotCompleted",
    "HoldNotFound",
    "IdempotencyKeyReused",
    "InternalError",
    "InvalidKey",
    "InvalidRequest",
    "LedgerRow",
    "MovementResult",
    "MovementTicket",
    "OpenedAccount",
    "PrizeSpent",
    "PrizeWon",
    "PublishFailed",
    "PullsNotSold",
    "PullsResult",
    "RequestBusy",
    "ResultNotReady",
    "ServiceUnavailable",
    "SessionNotFound",
    "Settings",
    "Ticket",
    "TransactionOutdated",
    "UnknownCampaign",
    "UnknownVersion",
]


def __getattr__(name: str) -> Any:
    """Import on first use: importing everything takes a second."""
    home: Any
    if name in ("DrawClient", "Ticket"):
        from tombola.producers import client as home
    elif name in ("MovementTicket", "OpenedAccount"):
        from tombola.producers import movements as home
    elif name in ("DrawRequest", "DrawResult", "GrantWon", "LedgerRow", "MovementResult", "PrizeWon", "PullsResult"):
        from tombola.producers.domain import contract as home
    elif name == "Settings":
        from tombola.producers import settings as home
    elif name in __all__:
        from tombola.producers.domain import errors as home
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(home, name)
