"""What the routes of all movements share: a body, a key, an accepted request, its ticket or its result.

    @movement("/v1/transfers", NewTransfer, operation_id="transfer", summary="Transfer between accounts")
    async def transfer(asked: Asked[NewTransfer]) -> TransferRequest: ...

makes two handlers: `transfer[0]` is served and reads its body itself, `transfer[1]` describes it in the OpenAPI
document (see draws.make_draw_described).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from inspect import Parameter, Signature
from typing import Annotated, Any, Final, Generic, NamedTuple, TypeVar

import msgspec
from litestar import Request, Response, post
from litestar.datastructures import ResponseHeader
from litestar.params import HeaderParameter

from tombola.producers.domain import contract
from tombola.producers.domain.contract import MovementResult, parse_movement_result
from tombola.producers.domain.errors import DrawError, IdempotencyKeyReused, InvalidRequest
from tombola.producers.domain.keys import check_request_key
from tombola.producers.gateway.admission import needs
from tombola.producers.gateway.bodies import request_key_of, strictly
from tombola.producers.gateway.document import MOVEMENT_PROBLEMS, answer
from tombola.producers.gateway.movement_messages import MovementTicket
from tombola.producers.gateway.receipts import RECEIPT
from tombola.producers.gateway.routes.draws import RECEIPT_HEADER, RETRY_AFTER_S
from tombola.producers.gateway.service import Gateway, gateway_of, holder_of
from tombola.producers.movements import is_result_of
from tombola.producers.storage.api_keys import Holder
from tombola.producers.storage.requests import Acceptance, Submission
from tombola.producers.telemetry import tracing

# Request keys that would make another path of `/v1/movements/{key}`.
KEYS_WITHOUT_PATH: Final = frozenset({".", ".."})

RequestKey = Annotated[
    str,
    HeaderParameter(
        name="Idempotency-Key",
        description="The request key: 1 to 64 characters of A-Z a-z 0-9 . _ -, bare or quoted. Keep it before you send "
        "it, and send it again when in doubt.",
    ),
]
SETTLED: Final = answer(MovementResult, "A repeat that has settled: the first result.")
HEADERS: Final = [
    ResponseHeader(name="Location", description="Where the result will be.", documentation_only=True),
    ResponseHeader(name="Retry-After", description="Seconds.", documentation_only=True),
    ResponseHeader(name="Idempotency-Key", description="The request key.", documentation_only=True),
    ResponseHeader(name="Idempotency-Replayed", description="`true` for a repeat.", documentation_only=True),
    RECEIPT_HEADER,
]

B = TypeVar("B", bound=msgspec.Struct)


class Asked(NamedTuple, Generic[B]):
    """A request for a movement, as it came: `path` are the parts of its path by name."""

    gateway: Gateway
    holder: Holder
    body: B
    key: str
    path: Mapping[str, Any]


Make = Callable[[Asked[B]], Awaitable[contract.Request]]


def movement(
    path: str, body: type[B], *, operation_id: str, summary: str, description: str = "", **parts: Any
) -> Callable[[Make[B]], tuple[Any, Any]]:
    """The handlers of a movement, whose request the decorated function makes. `parts` are the types of the path's."""

    def decorate(make: Make[B]) -> tuple[Any, Any]:
        decode = msgspec.json.Decoder(body).decode

        @post(path, opt=needs("money"), status_code=202, include_in_schema=False)
        async def served(request: Request[Any, Any, Any]) -> Response[Any]:
            asked = await read(request, decode)
            wanted = await make(asked)
            await asked.gateway.must_be_within_bounds(asked.holder, wanted.account_id)
            with tracing.serving(f"POST {path}", request.scope["headers"]):
                answer = await asked.gateway.accept_movement(Submission(wanted, asked.holder.caller))
            return await _answer(asked, answer)

        describe = post(
            path,
            opt=needs("money"),
            status_code=202,
            operation_id=operation_id,
            summary=summary,
            description=f"Accepted means that it will be decided, once. {description}".strip(),
            responses=MOVEMENT_PROBLEMS | {200: SETTLED},
            response_headers=HEADERS,
        )
        return served, describe(described(MovementTicket, data=body, idempotency_key=RequestKey, **parts))

    return decorate


async def read(request: Request[Any, Any, Any], decode: Callable[[bytes], B]) -> Asked[B]:
    """The request's body and key. Raises InvalidRequest, or InvalidKey."""
    body = strictly(decode, await request.body())
    given: bytes | None = request.scope["given"].get(b"idempotency-key")  # type: ignore[typeddict-item]
    key = check_request_key(request_key_of(given, is_required=True))
    if key in KEYS_WITHOUT_PATH:
        raise InvalidRequest(f"{key!r} cannot be a request key here: it is no part of a path")
    return Asked(gateway_of(request), holder_of(request), body, key, request.path_params)


def described(answer: Any, **parameters: Any) -> Callable[..., Any]:
    """A function with these parameters and this answer, for the OpenAPI document; never called."""

    async def never(**_: Any) -> Any:
        raise AssertionError

    never.__annotations__ = {**parameters, "return": answer}
    never.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(name, Parameter.KEYWORD_ONLY, annotation=it) for name, it in parameters.items()],
        return_annotation=answer,
    )
    return never


async def _answer(asked: Asked[Any], answer: Acceptance) -> Response[Any]:
    """The result of a repeat that has settled; for any other request its ticket."""
    if answer.is_conflict:
        raise IdempotencyKeyReused
    accepted = answer.request
    asked.gateway.remember(answer, asked.holder.caller)
    headers = {"Location": f"/v1/movements/{accepted.request_key}", "Idempotency-Key": asked.key}
    if not answer.is_new:
        headers["Idempotency-Replayed"] = "true"
    if (receipt := await asked.gateway.receipts.of_answer(answer)) is not None:
        headers[RECEIPT] = receipt
    if (body := await result_of(asked.gateway, answer)) is not None:
        return Response(body, status_code=200, media_type="application/json", headers=headers)
    ticket = MovementTicket(accepted.request_key, accepted.lottery_session_id)
    return Response(ticket, status_code=202, headers=headers | {"Retry-After": RETRY_AFTER_S})


async def result_of(gateway: Gateway, answer: Acceptance) -> bytes | None:
    """The first result of a repeat that has settled; None for any other answer."""
    if answer.is_new or answer.record is None:
        return None
    request = answer.request
    if answer.record.is_settled:
        return await gateway.readers.run(partial(gateway.entry.first_result, request.lottery_session_id))
    body = await gateway.results.peek(request.lottery_session_id)
    with suppress(DrawError):
        if body is not None and is_result_of(request, parse_movement_result(body)):
            return body
    return None
