"""Everything before the broker: ask for draws, read their results. Safe in a web process, imports no Celery."""

from producers.client import DrawClient, Ticket
from producers.contract import DrawRequest, DrawResult, LedgerRow
from producers.errors import (
    AccountNotFound,
    ConfigurationError,
    DrawError,
    IdempotencyKeyReused,
    InvalidKey,
    InvalidRequest,
    PublishFailed,
    ResultNotReady,
    ServiceUnavailable,
    UnknownVersion,
)
from producers.settings import Settings

__all__ = [
    "AccountNotFound",
    "ConfigurationError",
    "DrawClient",
    "DrawError",
    "DrawRequest",
    "DrawResult",
    "IdempotencyKeyReused",
    "InvalidKey",
    "InvalidRequest",
    "LedgerRow",
    "PublishFailed",
    "ResultNotReady",
    "ServiceUnavailable",
    "Settings",
    "Ticket",
    "UnknownVersion",
]
