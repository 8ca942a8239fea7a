"""Draws: make one or many, and read results and ledger rows by lottery session."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

import msgspec
from litestar import Request, Response, asgi, get, post
from litestar.datastructures import ResponseHeader
from litestar.exceptions import MethodNotAllowedException
from litestar.params import HeaderParameter, Parameter, QueryParameter
from litestar.response import ServerSentEvent, ServerSentEventMessage
from litestar.types import Receive, Scope, Send

from tombola.producers.domain.causes import Status, dead_because
from tombola.producers.domain.contract import DrawRequest, DrawResult, PullsResult, shown
from tombola.producers.domain.errors import DrawError, IdempotencyKeyReused, InvalidRequest, OutOfBounds
from tombola.producers.domain.keys import make_request_key
from tombola.producers.domain.operations.refund import REFUND_TYPE
from tombola.producers.gateway.admission import needs
from tombola.producers.gateway.bodies import read_body, request_key_of, strictly
from tombola.producers.gateway.document import READ_PROBLEMS, WRITE_PROBLEMS, answer
from tombola.producers.gateway.messages import (
    KEY_PATTERN,
    BatchAnswer,
    BatchAnswers,
    DeadDraw,
    DrawTicket,
    NewDraw,
    NewDraws,
    SessionRow,
)
from tombola.producers.gateway.problems import problem_of
from tombola.producers.gateway.receipts import RECEIPT
from tombola.producers.gateway.service import Gateway, gateway_of, holder_of
from tombola.producers.storage import ledger
from tombola.producers.storage.api_keys import Holder
from tombola.producers.storage.requests import SessionState, Submission
from tombola.producers.telemetry import tracing
from tombola.producers.web.whole import Whole, send_in_parts

WAIT_S_MAX: Final = 60.0
KEEP_ALIVE_S: Final = 15.0
RETRY_AFTER_S: Final = "1"

# Session ids that would make a URL path of another resource.
SESSIONS_WITHOUT_PATH: Final = frozenset({".", "..", "batch"})

NOT_YET: Final = answer(DrawTicket, "Accepted, and not settled yet.")
RECEIPT_HEADER: Final = ResponseHeader(
    name=RECEIPT, description="The draw's signed receipt, if receipts are signed here.", documentation_only=True
)

IdempotencyKey = Annotated[
    str | None,
    HeaderParameter(
        name="Idempotency-Key",
        required=False,
        description="The request key: 1 to 64 characters of A-Z a-z 0-9 . _ -, bare or quoted. Keep it before you send "
        "it, and send it again when in doubt. Without one it is made here and returned.",
    ),
]
WaitS = Annotated[
    float,
    QueryParameter(name="wait", ge=0, le=WAIT_S_MAX, description="Seconds to wait for the result.", required=False),
]
SessionId = Annotated[str, Parameter(pattern=KEY_PATTERN, min_length=1, max_length=100)]

_encode: Final = msgspec.json.Encoder().encode
_decode_draw: Final = msgspec.json.Decoder(NewDraw).decode
_decode_draws: Final = msgspec.json.Decoder(NewDraws).decode


async def make_draw(gateway: Gateway, scope: Any, receive: Any) -> Whole:
    """POST /v1/draws, in plain ASGI: the framework would take twice as long as everything else in a request."""
    holder: Holder = scope["holder"]
    given: bytes | None = scope["given"].get(b"idempotency-key")
    data = strictly(_decode_draw, await read_body(receive))
    draw = DrawRequest(
        account_id=data.account_id,
        request_key=request_key_of(given, is_required=gateway.settings.idempotency_key_required),
        lottery_session_id=data.lottery_session_id or "",
        campaign=data.campaign,
        pulls=data.pulls,
        client_nonce=data.client_nonce or "",
    )
    asked = _asked(draw, holder.caller)
    await gateway.must_be_within_bounds(holder, draw.account_id)
    with tracing.serving("POST /v1/draws", scope["headers"]):
        answer = await gateway.intake.accept(asked)
    if answer.is_conflict:
        raise IdempotencyKeyReused
    gateway.remember(answer, holder.caller)
    named = answer.request
    body = _encode(DrawTicket(named.request_key, named.lottery_session_id))
    headers = [
        (b"content-type", b"application/json"),
        (b"location", b"/v1/draws/" + named.lottery_session_id.encode()),
        (b"retry-after", RETRY_AFTER_S.encode()),
        (b"idempotency-key", draw.request_key.encode()),
    ]
    if not answer.is_new:
        headers.append((b"idempotency-replayed", b"true"))
    if gateway.receipts.is_on and (receipt := await gateway.receipts.of_answer(answer)) is not None:
        headers.append((RECEIPT.lower().encode(), receipt.encode()))
    return Whole(202, headers, body)


@asgi("/v1/draws", copy_scope=False, opt=needs("draw"))
async def other_than_draws(scope: Scope, receive: Receive, send: Send) -> None:
    """Requests that the front does not answer itself: other methods, and `//v1/draws/`."""
    if scope["method"] == "POST":  # type: ignore[typeddict-item]
        await send_in_parts(send, await make_draw(scope["litestar_app"].state.gateway, scope, receive))
        return
    if scope["method"] != "OPTIONS":  # type: ignore[typeddict-item]
        raise MethodNotAllowedException(headers={"Allow": "OPTIONS, POST"})
    await send({"type": "http.response.start", "status": 204, "headers": [(b"allow", b"OPTIONS, POST")]})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@post(
    "/v1/draws",
    opt=needs("draw"),
    status_code=202,
    operation_id="makeDraw",
    summary="Make a draw",
    description="Accepted means that it will happen. A repeat of the key gets the same answer, and is never charged.",
    responses=WRITE_PROBLEMS,
    response_headers=[
        ResponseHeader(name="Location", description="Where the result will be.", documentation_only=True),
        ResponseHeader(name="Retry-After", description="Seconds.", documentation_only=True),
        ResponseHeader(name="Idempotency-Key", description="The request key.", documentation_only=True),
        ResponseHeader(name="Idempotency-Replayed", description="`true` for a repeat.", documentation_only=True),
        RECEIPT_HEADER,
    ],
)
async def make_draw_described(data: NewDraw, idempotency_key: IdempotencyKey = None) -> DrawTicket:
    """Describes `make_draw`, which the framework does not see, in the OpenAPI document; never called."""
    raise AssertionError


@post("/v1/draws/batch", opt=needs("draw"), status_code=207, include_in_schema=False)
async def make_draws(request: Request[Any, Any, Any]) -> BatchAnswers:
    gateway, holder = gateway_of(request), holder_of(request)
    data = strictly(_decode_draws, await request.body())
    gateway.admission.count_more(request.scope, len(data.draws) - 1)
    asked = [
        _asked(
            DrawRequest(
                account_id=it.account_id,
                request_key=it.request_key or make_request_key(),
                lottery_session_id=it.lottery_session_id or "",
                campaign=it.campaign,
                pulls=it.pulls,
                client_nonce=it.client_nonce or "",
            ),
            holder.caller,
        )
        for it in data.draws
    ]
    outside = await gateway.outside_bounds(holder, [it.request.account_id for it in asked])
    answers = []
    with tracing.serving("POST /v1/draws/batch", request.scope["headers"]):
        accepted = iter(await gateway.intake.accept_many([it for it in asked if it.request.account_id not in outside]))
    for it in asked:
        answer = OutOfBounds() if it.request.account_id in outside else next(accepted)
        if isinstance(answer, DrawError) or answer.is_conflict:
            problem = problem_of(answer if isinstance(answer, DrawError) else IdempotencyKeyReused())
            answers.append(BatchAnswer(problem.status, replayed=False, ticket=None, problem=problem))
        else:
            gateway.remember(answer, holder.caller)
            ticket = DrawTicket(answer.request.request_key, answer.request.lottery_session_id)
            receipt = await gateway.receipts.of_answer(answer) or msgspec.UNSET
            is_repeat = not answer.is_new
            answers.append(BatchAnswer(202, replayed=is_repeat, ticket=ticket, problem=None, receipt=receipt))
    return BatchAnswers(answers)


@post(
    "/v1/draws/batch",
    opt=needs("draw"),
    status_code=207,
    operation_id="makeDraws",
    summary="Make up to 100 draws",
    description="Each for itself, with an answer each: one that is refused does not keep the others from happening.",
    responses={status: spec for status, spec in WRITE_PROBLEMS.items() if status not in (409, 422)},
)
async def make_draws_described(data: NewDraws) -> BatchAnswers:
    """Describes `make_draws`, which decodes its body itself, in the OpenAPI document; never called."""
    raise AssertionError


@get(
    "/v1/draws/{session_id:str}",
    opt=needs("read"),
    operation_id="getDraw",
    summary="The result of a draw",
    responses=READ_PROBLEMS | {202: NOT_YET},
    response_headers=[RECEIPT_HEADER],
)
async def show_draw(
    request: Request[Any, Any, Any], session_id: SessionId, wait_s: WaitS = 0.0
) -> Response[DrawResult | PullsResult | DeadDraw]:
    gateway = gateway_of(request)
    if wait_s:
        gateway.admission.begin_wait(request.scope)
    body, state, receipt = await gateway.result_and_receipt(session_id, holder_of(request), wait_s)
    headers = {} if receipt is None else {RECEIPT: receipt}
    if body is not None:
        return Response(body, media_type="application/json", headers=headers)  # type: ignore[arg-type]
    assert state is not None
    if state.status == Status.DEAD:
        return Response(_dead(state), headers=headers)
    ticket = DrawTicket(state.request.request_key, session_id)
    headers["Retry-After"] = RETRY_AFTER_S
    return Response(ticket, status_code=202, headers=headers)  # type: ignore[arg-type]


@get(
    "/v1/draws/{session_id:str}/events",
    opt=needs("read"),
    operation_id="watchDraw",
    summary="The result of a draw, as server-sent events",
    description="`accepted` at once if it has not settled, then `result` (or `dead`), then the stream ends.",
    responses=READ_PROBLEMS,
    media_type="text/event-stream",
)
async def watch_draw(request: Request[Any, Any, Any], session_id: SessionId) -> ServerSentEvent:
    gateway, holder = gateway_of(request), holder_of(request)
    gateway.admission.begin_wait(request.scope)
    body, state = await gateway.result(session_id, holder, 0.0)  # before the stream: it may raise

    async def events() -> AsyncIterator[ServerSentEventMessage]:
        nonlocal body, state
        is_first = True
        while body is None and state is not None and state.status != Status.DEAD:
            if is_first:
                ticket = DrawTicket(state.request.request_key, session_id)
                yield ServerSentEventMessage(event="accepted", data=msgspec.json.encode(ticket).decode())
                is_first = False
            else:
                yield ServerSentEventMessage(comment="still waiting")
            body, state = await gateway.result(session_id, holder, KEEP_ALIVE_S)
            if body is None and gateway.results.is_stopping:
                return  # the client reconnects, to a process that is not ending
        if body is not None:
            yield ServerSentEventMessage(event="result", data=body.decode())
        elif state is not None:
            yield ServerSentEventMessage(event="dead", data=msgspec.json.encode(_dead(state)).decode())

    return ServerSentEvent(events())


@get(
    "/v1/draws/{session_id:str}/transactions",
    opt=needs("read"),
    operation_id="listTransactions",
    summary="The ledger rows of a draw, and of its refund",
    responses=READ_PROBLEMS,
)
async def list_transactions(request: Request[Any, Any, Any], session_id: SessionId) -> list[SessionRow]:
    gateway = gateway_of(request)
    state = await gateway.state(session_id, holder_of(request))
    rows = await gateway.read(ledger.session_rows, session_id)
    if isinstance(state.request, DrawRequest):
        rows += await gateway.read(ledger.rows_under, state.request.ledger_key, REFUND_TYPE)
    return [
        SessionRow(
            **msgspec.structs.asdict(shown(ledger.posting_of(row))),
            transaction_id=row["transaction_id"],
            account_id=row["account_id"],
            created_at=row["created_at"].isoformat(),
        )
        for row in rows
    ]


def _asked(draw: DrawRequest, caller: str) -> Submission:
    """The draw as accepted for `caller`; raises InvalidRequest for a session that could not be read over HTTP."""
    if draw.lottery_session_id in SESSIONS_WITHOUT_PATH:
        raise InvalidRequest(f"{draw.lottery_session_id!r} cannot be a lottery session here: it is no part of a path")
    return Submission(draw, caller)


def _dead(state: SessionState) -> DeadDraw:
    it = state.request
    detail = dead_because(state.reason)
    campaign = it.campaign if isinstance(it, DrawRequest) else ""
    return DeadDraw(it.request_key, it.lottery_session_id, it.account_id, campaign, "dead", state.reason, detail)


ROUTES: Final = (other_than_draws, make_draws, show_draw, watch_draw, list_transactions)
DESCRIBED: Final = (make_draw_described, make_draws_described, show_draw, watch_draw, list_transactions)
