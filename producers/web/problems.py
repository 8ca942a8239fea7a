"""Errors over HTTP as problem+json (RFC 9457), and the kinds that arise before a request reaches an application.

Programs distinguish kinds by `code`, which is stable; `type` links to the kind on the gateway's page of all kinds.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Final, NamedTuple

import msgspec

PROBLEM_TYPE: Final = "application/problem+json"
KINDS_PATH: Final = "/docs/errors"


class Kind(NamedTuple):
    """A kind of problem: its code, the answer's status, its meaning, and what a client does about it."""

    code: str
    status: int
    means: str
    remedy: str

    @property
    def type(self) -> str:
        """The URI reference that names this kind."""
        return f"{KINDS_PATH}#{self.code}"


class Problem(msgspec.Struct, frozen=True):
    """What went wrong: `detail` says what to do about it, `code` tells programs which kind it is."""

    title: str
    status: int
    detail: str
    code: Annotated[str, msgspec.Meta(description="Stable: one of those in the page that `type` leads to.")]
    type: Annotated[str, msgspec.Meta(description="The code as a link, relative to the gateway.")]

    @classmethod
    def of(cls, kind: Kind, detail: str = "") -> Problem:
        """A problem of this kind; without `detail`, the kind's meaning is the detail."""
        return cls(HTTPStatus(kind.status).phrase, kind.status, detail or kind.means, kind.code, kind.type)


MALFORMED_HTTP: Final = Kind("malformed-http", 400, "This is not HTTP/1.1.", "Mend the client or the proxy.")
REQUEST_TIMEOUT: Final = Kind(
    "request-timeout", 408, "The request was not whole in time.", "Send the same request again."
)
BODY_TOO_LARGE: Final = Kind(
    "body-too-large", 413, "The body is larger than it may be.", "Send less: a batch in several requests."
)
HEAD_TOO_LARGE: Final = Kind(
    "head-too-large", 431, "The request's head is larger than it may be.", "Send fewer or shorter headers."
)
TOO_MANY_CONNECTIONS: Final = Kind(
    "too-many-connections",
    503,
    "Too many connections are open here.",
    "Send the same request again after `Retry-After`; share connections.",
)

BEFORE_ANY_APPLICATION: Final = (MALFORMED_HTTP, REQUEST_TIMEOUT, BODY_TOO_LARGE, HEAD_TOO_LARGE, TOO_MANY_CONNECTIONS)
