"""The errors that tombola raises on purpose.

    DrawError
    ├── ConfigurationError       a setting is wrong, a server is of the wrong kind, a schema is not migrated
    ├── InvalidRequest           the draw cannot be expressed: the caller must change it
    │   ├── InvalidKey           a request key, session id or derived key with a bad form
    │   ├── Unparsable           a message that is not a JSON object
    │   ├── UnknownVersion       a contract version that this release does not know
    │   ├── NotSigned            a message without a signature by a secret of this deployment
    │   ├── UnknownCampaign      no campaign has that name
    │   ├── PullsNotSold         the campaign does not sell so many pulls in one request
    │   └── InvalidManifest      the manifest of a campaign has a mistake
    ├── IdempotencyKeyReused     the key belongs to another request of the same caller
    ├── CampaignPaused           an operator has paused the campaign
    ├── CampaignClosed           the campaign has ended
    ├── CampaignNotOpen          the campaign has not begun
    ├── SessionNotFound          no such lottery session of this caller
    ├── AccountNotFound          no such account (operators' commands; a draw is *rejected* instead)
    ├── MovementRejected         a movement was rejected (operators' acts; elsewhere a rejection is an outcome)
    ├── MovementNotFound         no such movement of this caller
    ├── HoldNotFound             no such hold of this caller
    ├── DrawNotCompleted         the draw has not settled, or charged nothing: there is nothing to refund
    ├── AlreadyRefunded          the draw is refunded: a draw is refunded once
    ├── PrizeSpent               an account does not have a prize of the draw any more
    ├── HoldNotCompleted         the hold has not settled, or was rejected: there is nothing to post or to void
    ├── HoldEnded                the hold was posted or voided: a hold ends once
    ├── HoldExpired              the hold can be voided, and no longer be posted
    ├── CampaignNotFound         no such campaign (operators' commands)
    ├── CheckpointNotFound       no head of the books was signed
    ├── ReceiptNotFound          no key signs receipts here
    ├── ProofNotFound            this request has no proof
    ├── InvalidReceipt           a text that is no receipt, or that no known key has signed
    ├── DeadLetterNotFound       no such dead letter (operators' commands)
    ├── ReplayNotFound           no such replay (operators' commands)
    ├── ResultNotReady           the session has no result yet
    ├── DrawDead                 the draw was given up, nothing was charged
    ├── NotAllowed               no API key, or an unknown, revoked or expired one
    ├── OutOfBounds              the API key is not valid for this account
    ├── MissingScope             the API key does not have the scope of this route
    ├── WrongHost                the Host header is not a name of this server, as in DNS rebinding
    ├── WrongOrigin              a page of another origin sent the request
    ├── TooManyRequests          over a limit: send the request again later
    ├── InternalError            a bug in tombola: another try does not help until it is fixed
    └── ServiceUnavailable       a server did not answer: the draw is not at fault, try again
        ├── RequestBusy          another open transaction holds the request key or its session
        └── PublishFailed        the broker did not confirm: the draw may or may not be queued
            └── BrokerBlocked    the broker says that it takes no messages now: low on memory or on disk

A class's docstring is its default message. Programs tell errors apart by `code`, the class's name in kebab-case; over
HTTP the code is part of the interface.
"""

from __future__ import annotations

import inspect
import re
from typing import Any, ClassVar


class DrawError(Exception):
    """The draw could not be handled."""

    code: ClassVar[str] = "draw-error"

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.code = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or inspect.getdoc(type(self)) or "")


class ConfigurationError(DrawError):
    """Tombola is not set up right."""


class InvalidRequest(DrawError):
    """This is not a valid draw request."""


class InvalidKey(InvalidRequest):
    """A key is 1 to 64 characters of A-Z a-z 0-9 . _ and -."""


class Unparsable(InvalidRequest):
    """This message is not a JSON object."""


class UnknownVersion(InvalidRequest):
    """This message has a contract version that this release does not know."""


class NotSigned(InvalidRequest):
    """This message is not signed by a secret of this deployment. Nothing was charged."""


class UnknownCampaign(InvalidRequest):
    """There is no such campaign. Nothing was written."""


class PullsNotSold(InvalidRequest):
    """The campaign does not sell so many pulls in one request. Nothing was written."""


class InvalidManifest(InvalidRequest):
    """This is not the manifest of a campaign."""


class IdempotencyKeyReused(DrawError):
    """This idempotency key was already used with a different request."""


class CampaignPaused(DrawError):
    """This campaign is paused. Nothing was written: try again when it is open."""


class CampaignClosed(DrawError):
    """This campaign has ended. Nothing was written."""


class CampaignNotOpen(DrawError):
    """This campaign has not begun. Nothing was written."""


class SessionNotFound(DrawError):
    """There is no such lottery session."""


class AccountNotFound(DrawError):
    """There is no such account."""


class MovementRejected(DrawError):
    """This movement was rejected: nothing is changed."""

    def __init__(self, message: str | None = None, reason: str | None = None) -> None:
        """`reason` is that of the result, such as INSUFFICIENT_BALANCE."""
        super().__init__(message)
        self.reason = reason


class MovementNotFound(DrawError):
    """There is no such movement."""


class HoldNotFound(DrawError):
    """There is no such hold."""


class DrawNotCompleted(DrawError):
    """This draw has not settled yet, or it charged nothing: there is nothing to refund. Nothing was written."""


class AlreadyRefunded(DrawError):
    """This draw is refunded already. Nothing was written."""


class PrizeSpent(DrawError):
    """A prize of this draw is spent, and cannot be collected. Nothing was written."""


class HoldNotCompleted(DrawError):
    """This hold has not settled yet, or it was rejected. Nothing was written."""


class HoldEnded(DrawError):
    """This hold has ended: it was posted or voided. Nothing was written."""


class HoldExpired(DrawError):
    """This hold has expired, and cannot be posted any more. Nothing was written."""


class CampaignNotFound(DrawError):
    """There is no such campaign."""


class CheckpointNotFound(DrawError):
    """No checkpoint was signed yet."""


class ReceiptNotFound(DrawError):
    """There are no receipts here: no key signs them."""


class ProofNotFound(DrawError):
    """Only draws have proofs, and this session is none, or a draw that was made before tombola."""


class InvalidReceipt(DrawError):
    """This is not a receipt of this deployment."""


class DeadLetterNotFound(DrawError):
    """There is no such dead letter."""


class ReplayNotFound(DrawError):
    """There is no such replay."""


class ResultNotReady(DrawError):
    """No result is known for this lottery session yet."""


class DrawDead(DrawError):
    """This draw was given up and nothing was charged. An operator can replay it under the same key."""

    def __init__(self, message: str | None = None, reason: str | None = None) -> None:
        """`reason` is that of the request's row: a DeadReason."""
        super().__init__(message)
        self.reason = reason


class NotAllowed(DrawError):
    """An API key is needed: `Authorization: Bearer …`. `tombola api-key add` makes one."""


class OutOfBounds(DrawError):
    """This API key is not for that account. Nothing was written."""


class MissingScope(DrawError):
    """This API key does not have the scope that this request needs. Nothing was written."""


class WrongHost(DrawError):
    """There is nothing under this name: `Host` must be one of TOMBOLA_ALLOWED_HOSTS."""


class WrongOrigin(DrawError):
    """A page of another origin sent this: nothing was done."""


class TooManyRequests(DrawError):
    """Too many requests: come back later. Nothing was written."""


class InternalError(DrawError):
    """This draw met a bug in tombola; the log has it. Sending the draw again does not help until the bug is fixed."""


class ServiceUnavailable(DrawError):
    """A server did not answer. Nothing is wrong with the draw: try again."""


class PublishFailed(ServiceUnavailable):
    """The broker did not confirm the message. Publish it again: a second copy does no harm."""


class RequestBusy(ServiceUnavailable):
    """Another open transaction holds this request key or its lottery session. Try again when it has ended."""


class TransactionOutdated(DrawError):
    """Your transaction began before another one accepted this request, and the database has rolled yours back.

    Roll it back here, too, begin a new one, and do all of it again: the same request then gets the first ticket.
    """


class BrokerBlocked(PublishFailed):
    """The broker takes no messages now, and says so. They are published when it takes messages again."""
