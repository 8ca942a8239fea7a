"""Errors as problem+json: one message that says what to do, without internals."""

from __future__ import annotations

import inspect
import logging
from typing import Any, Final

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from tombola.producers.domain.errors import (
    AccountNotFound,
    AlreadyRefunded,
    CampaignClosed,
    CampaignNotFound,
    CampaignNotOpen,
    CampaignPaused,
    CheckpointNotFound,
    ConfigurationError,
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
    MissingScope,
    MovementNotFound,
    NotAllowed,
    OutOfBounds,
    PrizeSpent,
    ProofNotFound,
    PullsNotSold,
    ReceiptNotFound,
    RequestBusy,
    ServiceUnavailable,
    SessionNotFound,
    TooManyRequests,
    UnknownCampaign,
    WrongHost,
    WrongOrigin,
)
from tombola.producers.web.problems import (
    BEFORE_ANY_APPLICATION,
    BODY_TOO_LARGE,
    PROBLEM_TYPE,
    Kind,
    Problem,
)

log = logging.getLogger(__name__)


def _kind(error: type[DrawError], status: int, remedy: str) -> Kind:
    return Kind(error.code, status, inspect.getdoc(error) or "", remedy)


_AGAIN: Final = "Send the same request again, after `Retry-After`."
_NOT_AGAIN: Final = "Do not repeat it: the gateway's log says what to mend."

_INVALID: Final = _kind(InvalidRequest, 400, "Change the request: `detail` names the field or the header.")
_INTERNAL: Final = _kind(InternalError, 500, _NOT_AGAIN)
_UNAVAILABLE: Final = _kind(ServiceUnavailable, 503, _AGAIN)

# The first type that fits counts; any other DrawError is a mistake of ours.
_KINDS: Final[dict[type[DrawError], Kind]] = {
    UnknownCampaign: _kind(UnknownCampaign, 422, "Ask for one of the campaigns that `detail` names."),
    PullsNotSold: _kind(PullsNotSold, 422, "Ask for as many pulls as `detail` says that the campaign sells."),
    InvalidKey: _kind(InvalidKey, 400, "Make a key of those characters."),
    InvalidRequest: _INVALID,
    NotAllowed: _kind(NotAllowed, 401, "Send a valid API key, then the same request again."),
    OutOfBounds: _kind(OutOfBounds, 403, "Use an API key that is for this account."),
    MissingScope: _kind(MissingScope, 403, "Use an API key with the scope that `detail` names."),
    WrongHost: _kind(WrongHost, 421, "Ask under a name that the gateway serves."),
    WrongOrigin: _kind(WrongOrigin, 403, "Add the page's origin to `TOMBOLA_CORS_ORIGINS`."),
    SessionNotFound: _kind(
        SessionNotFound, 404, "Check the session's name, and that its draw was made under your API key's caller."
    ),
    AccountNotFound: _kind(AccountNotFound, 404, "Check the account's id."),
    MovementNotFound: _kind(
        MovementNotFound, 404, "Check the key, and that it was sent under your API key's caller; a draw has a session."
    ),
    HoldNotFound: _kind(HoldNotFound, 404, "Check the hold's key, and that it was sent under your API key's caller."),
    DrawNotCompleted: _kind(DrawNotCompleted, 409, "Wait for the draw's result; refund it if `status` is `completed`."),
    AlreadyRefunded: _kind(AlreadyRefunded, 409, "See `GET /v1/draws/{session}/transactions`."),
    PrizeSpent: _kind(PrizeSpent, 409, "Choose another `policy`, or leave the draw as it is."),
    HoldNotCompleted: _kind(HoldNotCompleted, 409, "Wait for the hold's result; end it if `status` is `completed`."),
    HoldEnded: _kind(HoldEnded, 409, "See `GET /v1/holds/{key}`."),
    HoldExpired: _kind(HoldExpired, 409, "Ask for a new hold, with a new key."),
    CampaignNotFound: _kind(
        CampaignNotFound, 404, "See the campaigns in `GET /v1/campaigns`; an odds hash has 64 hex digits."
    ),
    CheckpointNotFound: _kind(
        CheckpointNotFound, 404, "Ask again later: the operator signs checkpoints where `TOMBOLA_BOOKS_KEY` is set."
    ),
    ReceiptNotFound: _kind(
        ReceiptNotFound, 404, "Ask the operator, who signs receipts where `TOMBOLA_RECEIPT_KEY` is set."
    ),
    ProofNotFound: _kind(ProofNotFound, 404, "Ask for the proof of a draw; draws of before tombola have none."),
    CampaignPaused: _kind(CampaignPaused, 409, "Ask again, with a new key, when the campaign's `state` is `open`."),
    CampaignClosed: _kind(CampaignClosed, 409, "Choose another campaign: see `GET /v1/campaigns`."),
    CampaignNotOpen: _kind(CampaignNotOpen, 409, "Ask again, with a new key, when the campaign opens: see `detail`."),
    IdempotencyKeyReused: _kind(IdempotencyKeyReused, 422, "Use a new key for a new draw; repeat only what you sent."),
    TooManyRequests: _kind(TooManyRequests, 429, _AGAIN),
    RequestBusy: _kind(RequestBusy, 503, _AGAIN),
    ServiceUnavailable: _UNAVAILABLE,
    # A caller cannot change the gateway's settings: the log says what is wrong with them.
    ConfigurationError: _UNAVAILABLE,
}
# Errors of the framework.
_NOT_FOUND: Final = Kind("not-found", 404, "There is nothing at this path.", "See the routes in `/openapi.json`.")
_METHOD: Final = Kind("method-not-allowed", 405, "This path does not take this method.", "See the header `Allow`.")
_OF_FRAMEWORK: Final = {404: _NOT_FOUND, 405: _METHOD, 413: BODY_TOO_LARGE}

KINDS: Final = tuple(
    sorted(
        {*_KINDS.values(), *_OF_FRAMEWORK.values(), _INTERNAL, *BEFORE_ANY_APPLICATION},
        key=lambda it: (it.status, it.code),
    )
)

_HEADERS: Final = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
_INSIDE: Final = {
    500: "An error inside the gateway; its log has the details. The same request fails again until it is repaired.",
    503: "The service is not available now. Send the same request again.",
}


def problem_of(error: DrawError) -> Problem:
    """The problem for an error of ours."""
    kind = next((kind for error_type, kind in _KINDS.items() if isinstance(error, error_type)), _INTERNAL)
    # Details of an outage are for the log, not for callers.
    is_for_caller = kind.status not in _INSIDE or isinstance(error, RequestBusy)
    return Problem.of(kind, str(error) if is_for_caller else _INSIDE[kind.status])


def codes_of(status: int) -> str:
    """The kinds of problem with this status, for the OpenAPI document."""
    return " ".join(f"`{it.code}`: {it.means}" for it in KINDS if it.status == status)


def _problem_and_headers(error: Exception) -> tuple[Problem, dict[str, str]]:
    """The problem for any error, and its headers. Logs the errors whose details callers do not get."""
    if isinstance(error, DrawError):
        problem = problem_of(error)
        if problem.status >= 500:
            log.error("%s", error)
        return problem, _HEADERS.get(problem.status, {})
    if isinstance(error, HTTPException) and error.status_code < 500:
        kind = _OF_FRAMEWORK.get(error.status_code, _INVALID)
        return Problem.of(kind, _detail(error)), {**_HEADERS.get(kind.status, {}), **(error.headers or {})}
    log.exception("unexpected error in the gateway", exc_info=error)
    return Problem.of(_INTERNAL, _INSIDE[500]), {}


def _detail(error: HTTPException) -> str:
    if isinstance(error, ValidationException) and isinstance(error.extra, list):
        parts = [f"{it.get('key', 'body')}: {it.get('message', '')}" for it in error.extra if isinstance(it, dict)]
        return "; ".join(parts) or error.detail
    return error.detail


def _handle(_request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    problem, headers = _problem_and_headers(error)
    return Response(
        msgspec.json.encode(problem), status_code=problem.status, media_type=PROBLEM_TYPE, headers=headers or None
    )


def problem_handlers() -> Any:
    """Litestar's exception handlers: every error becomes problem+json."""
    return {DrawError: _handle, HTTPException: _handle, Exception: _handle}


async def send_problem(send: Any, error: Exception) -> None:
    """Answer with the problem for an error, in plain ASGI."""
    problem, more = _problem_and_headers(error)
    body = msgspec.json.encode(problem)
    headers = [(b"content-type", PROBLEM_TYPE.encode()), (b"content-length", b"%d" % len(body))]
    headers += [(name.lower().encode(), value.encode()) for name, value in more.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
