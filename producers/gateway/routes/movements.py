"""Movements other than draws: open and recharge accounts, transfer, refund, adjust; and what has become of each."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from litestar import Request, Response, get, post
from litestar.params import Parameter

from tombola.producers.domain.causes import Status, dead_because
from tombola.producers.domain.contract import ACCOUNT_ID_MAX, DrawRequest, MovementResult
from tombola.producers.domain.errors import AccountNotFound, MovementNotFound, OutOfBounds, SessionNotFound
from tombola.producers.domain.keys import check_session_id
from tombola.producers.domain.operations.adjust import AdjustRequest
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.operations.refund import RefundRequest
from tombola.producers.domain.operations.transfer import TransferRequest
from tombola.producers.gateway.admission import needs
from tombola.producers.gateway.document import MOVEMENT_PROBLEMS, READ_PROBLEMS, answer
from tombola.producers.gateway.messages import KEY_PATTERN
from tombola.producers.gateway.movement_messages import (
    DeadMovement,
    MovementTicket,
    NewAccount,
    NewAdjustment,
    NewRecharge,
    NewRefund,
    NewTransfer,
    OpenedAccount,
)
from tombola.producers.gateway.routes.accounts import AccountIdText
from tombola.producers.gateway.routes.draws import RETRY_AFTER_S, SessionId, WaitS
from tombola.producers.gateway.routes.moving import HEADERS, Asked, RequestKey, described, movement, read, result_of
from tombola.producers.gateway.service import gateway_of, holder_of
from tombola.producers.openings import Opening
from tombola.producers.storage import accounts
from tombola.producers.storage.requests import SessionState
from tombola.producers.telemetry import tracing

KeyPath = Annotated[str, Parameter(pattern=KEY_PATTERN, min_length=1, max_length=64)]

NOT_YET: Final = answer(MovementTicket, "Accepted, and not settled yet.")
FOUND: Final = answer(OpenedAccount, "The account; its recharge, if any, has settled.")

_decode_account: Final = msgspec.json.Decoder(NewAccount).decode
_encode: Final = msgspec.json.Encoder().encode


def account_of(path: str) -> int:
    """The account that a part of a path names. Raises AccountNotFound for what no account can have as its id."""
    number = int(path) if path.isascii() and path.isdigit() and len(path) < 20 else 0
    if not 1 <= number <= ACCOUNT_ID_MAX or path != str(number):
        raise AccountNotFound(f"there is no account {path!r:.40}")
    return number


@movement(
    "/v1/accounts/{account_id:str}/recharges",
    NewRecharge,
    operation_id="recharge",
    summary="Recharge an account",
    account_id=AccountIdText,
)
async def recharge(asked: Asked[NewRecharge]) -> RechargeRequest:
    return RechargeRequest(
        account_id=account_of(asked.path["account_id"]),
        request_key=asked.key,
        amount=asked.body.amount,
        reference=asked.body.reference,
        channel=asked.body.channel,
    )


@movement(
    "/v1/transfers",
    NewTransfer,
    operation_id="transfer",
    summary="Transfer between two accounts of one asset",
    description="The bounds of the API key hold for the account that pays.",
)
async def transfer(asked: Asked[NewTransfer]) -> TransferRequest:
    return TransferRequest(
        account_id=asked.body.payer,
        request_key=asked.key,
        to=asked.body.to,
        amount=asked.body.amount,
        reference=asked.body.reference,
    )


@movement(
    "/v1/accounts/{account_id:str}/adjustments",
    NewAdjustment,
    operation_id="adjust",
    summary="Correct a balance, for a reason",
    account_id=AccountIdText,
)
async def adjust(asked: Asked[NewAdjustment]) -> AdjustRequest:
    return AdjustRequest(
        account_id=account_of(asked.path["account_id"]),
        request_key=asked.key,
        amount=asked.body.amount,
        reason=asked.body.reason,
        reference=asked.body.reference,
    )


@movement(
    "/v1/draws/{session_id:str}/refund",
    NewRefund,
    operation_id="refundDraw",
    summary="Take a draw back: its cost returns, its prizes are collected",
    description="A draw is refunded once, under whatever key. Its result stays as it is.",
    session_id=SessionId,
)
async def refund(asked: Asked[NewRefund]) -> RefundRequest:
    session_id = check_session_id(asked.path["session_id"])
    draw = (await asked.gateway.state(session_id, asked.holder)).request
    if not isinstance(draw, DrawRequest):
        raise SessionNotFound("there is no draw under this lottery session")
    return RefundRequest(
        account_id=draw.account_id,
        request_key=asked.key,
        draw=draw.request_key,
        campaign=draw.campaign,
        policy=asked.body.policy,
        reason=asked.body.reason,
    )


# ---- accounts --------------------------------------------------------------------------------------------------------


@post("/v1/accounts", opt=needs("money"), status_code=202, include_in_schema=False)
async def open_account(request: Request[Any, Any, Any]) -> Response[Any]:
    asked = await read(request, _decode_account)
    gateway, holder, it = asked.gateway, asked.holder, asked.body
    if not holder.bounds.hold_user(it.user_id):
        account_id = await gateway.read(accounts.find_id, it.user_id, it.asset_code)
        if account_id is None:
            raise OutOfBounds
        await gateway.must_be_within_bounds(holder, account_id)
    opening = Opening(it.user_id, it.asset_code, it.amount, asked.key, it.reference, holder.caller)
    with tracing.serving("POST /v1/accounts", request.scope["headers"]):
        opened = await gateway.open_account(opening)
    answer, ticket, body = opened.recharge, None, None
    location = f"/v1/accounts/{opened.account_id}"
    if answer is not None:
        gateway.remember(answer, holder.caller)
        location = f"/v1/movements/{answer.request.request_key}"
        body = await result_of(gateway, answer)
        if body is None:
            ticket = MovementTicket(answer.request.request_key, answer.request.lottery_session_id)
    told = {"ticket": ticket, "recharge": None if body is None else msgspec.Raw(body)}
    headers = {"Location": location, "Idempotency-Key": asked.key}
    if not opened.is_new:
        headers["Idempotency-Replayed"] = "true"
    return Response(
        _encode({"account_id": opened.account_id, "user_id": it.user_id, "asset_code": it.asset_code} | told),
        status_code=200 if ticket is None else 202,
        media_type="application/json",
        headers=headers if ticket is None else headers | {"Retry-After": RETRY_AFTER_S},
    )


open_account_described: Final = post(
    "/v1/accounts",
    opt=needs("money"),
    status_code=202,
    operation_id="openAccount",
    summary="Open an account, with an amount",
    description="A user has one account of an asset: a repeat finds it, and an account that exists gets no amount.",
    responses={status: spec for status, spec in MOVEMENT_PROBLEMS.items() if status not in (404, 409)} | {200: FOUND},
    response_headers=HEADERS,
)(described(OpenedAccount, data=NewAccount, idempotency_key=RequestKey))


# ---- what has become of them -----------------------------------------------------------------------------------------


@get(
    "/v1/movements/{request_key:str}",
    opt=needs("read"),
    operation_id="getMovement",
    summary="The result of a movement",
    responses=READ_PROBLEMS | {202: NOT_YET},
)
async def show_movement(
    request: Request[Any, Any, Any], request_key: KeyPath, wait_s: WaitS = 0.0
) -> Response[MovementResult | DeadMovement]:
    gateway, holder = gateway_of(request), holder_of(request)
    if wait_s:
        gateway.admission.begin_wait(request.scope)
    state = await gateway.own_request(request_key, holder)
    if state is None or isinstance(state.request, DrawRequest):
        raise MovementNotFound
    body = state.result
    if wait_s and state.status == Status.ACCEPTED:
        body, later = await gateway.result(state.request.lottery_session_id, holder, wait_s)
        state = later or state
    if body is not None:
        return Response(body, media_type="application/json")  # type: ignore[arg-type]
    if state.status == Status.DEAD:
        return Response(_dead(state))
    return not_yet(state)


def not_yet(state: SessionState) -> Response[Any]:
    """The ticket of a request that has not settled."""
    ticket = MovementTicket(state.request.request_key, state.request.lottery_session_id)
    return Response(ticket, status_code=202, headers={"Retry-After": RETRY_AFTER_S})


def _dead(state: SessionState) -> DeadMovement:
    it = state.request
    detail = dead_because(state.reason)
    return DeadMovement(it.kind, it.request_key, it.lottery_session_id, it.account_id, "dead", state.reason, detail)


_MADE: Final = (recharge, transfer, adjust, refund)
ROUTES: Final = (*(served for served, _ in _MADE), open_account, show_movement)
DESCRIBED: Final = (*(shown for _, shown in _MADE), open_account_described, show_movement)
