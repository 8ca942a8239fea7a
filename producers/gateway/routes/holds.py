"""Holds: an amount set aside for a trade, until it is posted or voided. A hold's name is its request key."""

from __future__ import annotations

from typing import Any, Final

from litestar import Request, Response, get

from tombola.producers.domain.causes import Status
from tombola.producers.domain.errors import HoldNotFound
from tombola.producers.domain.keys import check_request_key
from tombola.producers.domain.operations.hold import HoldRequest
from tombola.producers.domain.operations.post import PostRequest
from tombola.producers.domain.operations.void import VoidRequest
from tombola.producers.gateway.admission import needs
from tombola.producers.gateway.document import READ_PROBLEMS
from tombola.producers.gateway.movement_messages import HoldView, NewHold, NewPost, NewVoid
from tombola.producers.gateway.routes.accounts import AccountIdText
from tombola.producers.gateway.routes.movements import NOT_YET, KeyPath, account_of, not_yet
from tombola.producers.gateway.routes.moving import Asked, movement
from tombola.producers.gateway.service import Gateway, gateway_of, holder_of
from tombola.producers.storage import ledger
from tombola.producers.storage.api_keys import Holder
from tombola.producers.storage.requests import SessionState


@movement(
    "/v1/accounts/{account_id:str}/holds",
    NewHold,
    operation_id="hold",
    summary="Set an amount aside",
    description="It leaves the balance until the hold is posted or voided, or expires.",
    account_id=AccountIdText,
)
async def hold(asked: Asked[NewHold]) -> HoldRequest:
    return HoldRequest(
        account_id=account_of(asked.path["account_id"]),
        request_key=asked.key,
        amount=asked.body.amount,
        valid_s=asked.body.valid_s,
        reference=asked.body.reference,
    )


@movement(
    "/v1/holds/{hold_key:str}/post",
    NewPost,
    operation_id="postHold",
    summary="End a hold with a payment",
    description="Of all of it or a part, to another account or to the house; the rest returns.",
    hold_key=KeyPath,
)
async def post_hold(asked: Asked[NewPost]) -> PostRequest:
    held = (await _hold(asked.gateway, asked.path["hold_key"], asked.holder)).request
    return PostRequest(
        account_id=held.account_id,
        request_key=asked.key,
        hold=held.request_key,
        amount=asked.body.amount or "",
        to=asked.body.to,
        reference=asked.body.reference,
    )


@movement(
    "/v1/holds/{hold_key:str}/void",
    NewVoid,
    operation_id="voidHold",
    summary="End a hold without a payment",
    hold_key=KeyPath,
)
async def void_hold(asked: Asked[NewVoid]) -> VoidRequest:
    held = (await _hold(asked.gateway, asked.path["hold_key"], asked.holder)).request
    return VoidRequest(
        account_id=held.account_id, request_key=asked.key, hold=held.request_key, reason=asked.body.reason
    )


@get(
    "/v1/holds/{hold_key:str}",
    opt=needs("read"),
    operation_id="getHold",
    summary="A hold: its amount, its state, its end",
    responses=READ_PROBLEMS | {202: NOT_YET},
)
async def show_hold(request: Request[Any, Any, Any], hold_key: KeyPath) -> Response[HoldView]:
    gateway = gateway_of(request)
    state = await _hold(gateway, hold_key, holder_of(request))
    key = state.request.request_key
    row = await gateway.read(ledger.find_hold, key)
    if row is None and state.status == Status.ACCEPTED:
        return not_yet(state)
    if row is None:
        raise HoldNotFound(f"this hold never was: its request is {state.status} ({state.reason})")
    times = [row[name].isoformat() for name in ("expires_at", "created_at", "updated_at")]
    return Response(HoldView(key, row["account_id"], row["asset_code"], f"{row['amount']:.2f}", row["state"], *times))


async def _hold(gateway: Gateway, hold_key: str, holder: Holder) -> SessionState:
    """The request of the caller's hold. Raises HoldNotFound, InvalidKey, or OutOfBounds for its account."""
    state = await gateway.own_request(check_request_key(hold_key), holder)
    if state is None or not isinstance(state.request, HoldRequest):
        raise HoldNotFound
    return state


_MADE: Final = (hold, post_hold, void_hold)
ROUTES: Final = (*(served for served, _ in _MADE), show_hold)
DESCRIBED: Final = (*(shown for _, shown in _MADE), show_hold)
