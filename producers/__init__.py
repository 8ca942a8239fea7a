"""Everything before the broker: ask for draws, read their results. Safe in a web process, imports no Celery."""

from producers.client import DrawClient, Ticket
from producers.contract import DrawRequest, DrawResult, LedgerRow
from producers.errors import (
    AccountNotFound,
    ConfigurationError,
    DrawDead,
    DrawError,
    IdempotencyKeyReused,
    InternalError,
    InvalidKey,
    InvalidRequest,
    PublishFailed,
    RequestBusy,
    ResultNotReady,
    ServiceUnavailable,
    UnknownCampaign,
    UnknownVersion,
)
from producers.settings import Settings

__all__ = [
    "AccountNotFound",
    "ConfigurationError",
    "DrawClient",
    "DrawDead",
    "DrawError",
    "DrawRequest",
    "DrawResult",
    "IdempotencyKeyReused",
    "InternalError",
    "InvalidKey",
    "InvalidRequest",
    "LedgerRow",
    "PublishFailed",
    "RequestBusy",
    "ResultNotReady",
    "ServiceUnavailable",
    "Settings",
    "Ticket",
    "UnknownCampaign",
    "UnknownVersion",
]
