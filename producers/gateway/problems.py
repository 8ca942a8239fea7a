"""Errors as problem+json (RFC 9457): one clear message that says what to do, and never a trace of what is inside."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any, Final

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from producers.errors import (
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
)

log = logging.getLogger(__name__)

PROBLEM_TYPE: Final = "application/problem+json"

# The first that fits; whatever else has a name is our own mistake.
_STATUS: Final = (
    (UnknownCampaign, 422),
    (InvalidRequest, 400),
    (NotAllowed, 401),
    (OutOfBounds, 403),
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


def _answer(problem: Problem) -> Response[bytes]:
    return Response(
        msgspec.json.encode(problem),
        status_code=problem.status,
        media_type=PROBLEM_TYPE,
        headers=_HEADERS.get(problem.status),
    )


def _draw_error(_request: Request[Any, Any, Any], error: DrawError) -> Response[bytes]:
    problem = Problem.of(error)
    if problem.status >= 500:
        log.error("%s", error)
    return _answer(problem)


def _http_error(_request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    status = error.status_code
    detail = error.detail
    if isinstance(error, ValidationException) and isinstance(error.extra, list):
        said = "; ".join(
            f"{it.get('key', 'body')}: {it.get('message', '')}" for it in error.extra if isinstance(it, dict)
        )
        detail = said or detail
    if status >= 500:
        detail = HTTPStatus(status).phrase
    answer = _answer(Problem(HTTPStatus(status).phrase, status, detail))
    for name, value in (error.headers or {}).items():
        answer.headers[name] = value
    return answer


def _other_error(_request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    log.exception("unexpected error in the gateway", exc_info=error)
    return _answer(Problem(HTTPStatus(500).phrase, 500, _INSIDE[500]))


def problem_handlers() -> Any:
    """Litestar's exception handlers: every error leaves as problem+json."""
    return {DrawError: _draw_error, HTTPException: _http_error, Exception: _other_error}
