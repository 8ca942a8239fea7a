"""Errors as problem+json (RFC 9457): one clear message that says what to do, and never a trace of what is inside."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any, Final

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from tombola.producers.domain.errors import (
    AccountNotFound,
    ConfigurationError,
    DrawError,
    IdempotencyKeyReused,
    InvalidRequest,
    NotAllowed,
    OutOfBounds,
    RequestBusy,
    ServiceUnavailable,
    TooManyRequests,
    UnknownCampaign,
    WrongHost,
    WrongOrigin,
)

log = logging.getLogger(__name__)

PROBLEM_TYPE: Final = "application/problem+json"

# The first that fits; whatever else has a name is our own mistake.
_STATUS: Final = (
    (UnknownCampaign, 422),
    (InvalidRequest, 400),
    (NotAllowed, 401),
    (OutOfBounds, 403),
    (WrongHost, 421),
    (WrongOrigin, 403),
    (AccountNotFound, 404),
    (IdempotencyKeyReused, 422),
    (TooManyRequests, 429),
    (ServiceUnavailable, 503),
    (ConfigurationError, 503),
)
_HEADERS: Final = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}

_INSIDE: Final = {
    500: "This is our mistake; it is in the log. Sending the same request again does not help until it is mended.",
    503: "The service is not available now. Send the same request again.",
}


class Problem(msgspec.Struct, frozen=True):
    """What went wrong: `detail` says what to do about it."""

    title: str
    status: int
    detail: str
    type: str = "about:blank"

    @classmethod
    def of(cls, error: DrawError) -> Problem:
        """The problem that an error of ours is."""
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
        # What keeps the database from answering is for the log, not for a caller.
        detail = _INSIDE.get(status, str(error)) if not isinstance(error, RequestBusy) else str(error)
        return cls(HTTPStatus(status).phrase, status, detail)


def _told(error: Exception) -> tuple[Problem, dict[str, str]]:
    """The problem that an error is, and the headers that go with it. What is not the caller's to know is logged."""
    if isinstance(error, DrawError):
        problem = Problem.of(error)
        if problem.status >= 500:
            log.error("%s", error)
        return problem, _HEADERS.get(problem.status, {})
    if isinstance(error, HTTPException):
        status = error.status_code
        problem = Problem(HTTPStatus(status).phrase, status, _detail(error))
        return problem, {**_HEADERS.get(status, {}), **(error.headers or {})}
    log.exception("unexpected error in the gateway", exc_info=error)
    return Problem(HTTPStatus(500).phrase, 500, _INSIDE[500]), {}


def _detail(error: HTTPException) -> str:
    if error.status_code >= 500:
        return HTTPStatus(error.status_code).phrase
    if isinstance(error, ValidationException) and isinstance(error.extra, list):
        said = [f"{it.get('key', 'body')}: {it.get('message', '')}" for it in error.extra if isinstance(it, dict)]
        return "; ".join(said) or error.detail
    return error.detail


def _handle(_request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    problem, headers = _told(error)
    return Response(
        msgspec.json.encode(problem), status_code=problem.status, media_type=PROBLEM_TYPE, headers=headers or None
    )


def problem_handlers() -> Any:
    """Litestar's exception handlers: every error leaves as problem+json."""
    return {DrawError: _handle, HTTPException: _handle, Exception: _handle}


async def send_problem(send: Any, error: Exception) -> None:
    """The same in plain ASGI."""
    problem, more = _told(error)
    body = msgspec.json.encode(problem)
    headers = [(b"content-type", PROBLEM_TYPE.encode()), (b"content-length", b"%d" % len(body))]
    headers += [(name.lower().encode(), value.encode()) for name, value in more.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
