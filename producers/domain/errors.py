"""Every error that tombola raises on purpose.

    DrawError
    ├── ConfigurationError       a setting is wrong, a server is of the wrong kind, a schema is not migrated
    ├── InvalidRequest           the draw cannot be expressed: the caller must change it
    │   ├── InvalidKey           a request key, session id or derived key that is not safe to use
    │   ├── Unparsable           a message that is no JSON object at all
    │   ├── UnknownVersion       a contract version that this release does not speak
    │   ├── NotSigned            a message that no secret of ours has signed
    │   ├── UnknownCampaign      there are no odds of that name to draw by
    │   └── InvalidManifest      a campaign's manifest with a mistake in it
    ├── IdempotencyKeyReused     the key is known, with another request behind it
    ├── SessionNotFound          no such lottery session, or another caller's
    ├── AccountNotFound          no such account (operators' commands; a draw is *rejected* instead)
    ├── DeadLetterNotFound       no such dead letter (operators' commands)
    ├── ReplayNotFound           no such replay (operators' commands)
    ├── ResultNotReady           nothing is known of that session yet
    ├── DrawDead                 the draw was given up, nothing was charged
    ├── NotAllowed               no API key, or one that is not (or no longer) known
    ├── OutOfBounds              an API key that is not for this account
    ├── WrongHost                a name that is not ours, perhaps a page's that has it lead here
    ├── WrongOrigin              a page of another origin sent this
    ├── TooManyRequests          over a limit: come back later
    ├── InternalError            a mistake of ours met this draw: trying again does not help until it is mended
    └── ServiceUnavailable       a server did not answer: nothing is wrong with the draw, try again
        ├── RequestBusy          another open transaction holds the request key or its session
        └── PublishFailed        the broker did not confirm: the draw may or may not be queued
            └── BrokerBlocked    the broker says that it takes no messages now: low on memory or on disk

A docstring is the default message, so that every one of them says something when it reaches a terminal. Programs know
an error by its `code`, the class's name in kebab-case. Over HTTP the code is part of the interface.
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
    """This message speaks a contract version that this release does not know."""


class NotSigned(InvalidRequest):
    """This message is not signed by a secret that is known here. Nothing was charged."""


class UnknownCampaign(InvalidRequest):
    """There is no such campaign. Nothing was written."""


class InvalidManifest(InvalidRequest):
    """This is not the manifest of a campaign."""


class IdempotencyKeyReused(DrawError):
    """This idempotency key was already used with a different request."""


class SessionNotFound(DrawError):
    """There is no such lottery session."""


class AccountNotFound(DrawError):
    """There is no such account."""


class DeadLetterNotFound(DrawError):
    """There is no such dead letter."""


class ReplayNotFound(DrawError):
    """There is no such replay."""


class ResultNotReady(DrawError):
    """No result is known for this lottery session yet."""


class DrawDead(DrawError):
    """This draw was given up and nothing was charged. An operator can replay it under the same key."""

    def __init__(self, message: str | None = None, reason: str | None = None) -> None:
        """`reason` is the one on record: NEVER_SETTLED, TIMED_OUT or PARKED."""
        super().__init__(message)
        self.reason = reason


class NotAllowed(DrawError):
    """An API key is needed: `Authorization: Bearer …`. `tombola api-key add` makes one."""


class OutOfBounds(DrawError):
    """This API key is not for that account. Nothing was written."""


class WrongHost(DrawError):
    """There is nothing under this name: `Host` must be one of TOMBOLA_ALLOWED_HOSTS."""


class WrongOrigin(DrawError):
    """A page of another origin sent this: nothing was done."""


class TooManyRequests(DrawError):
    """Too many requests: come back later. Nothing was written."""


class InternalError(DrawError):
    """A mistake of ours met this draw; the log says which. Trying again does not help until it is mended."""


class ServiceUnavailable(DrawError):
    """A server did not answer. Nothing is wrong with the draw: try again."""


class PublishFailed(ServiceUnavailable):
    """The broker did not confirm the message. Publish it again: a second copy does no harm."""


class RequestBusy(ServiceUnavailable):
    """Another open transaction holds this request key or its lottery session. Try again when that has ended."""


class BrokerBlocked(PublishFailed):
    """The broker takes no messages at present, and says so. They are published when it takes them again."""
