"""The receipt of a draw, and the keys that verify receipts."""

from __future__ import annotations

from typing import Any, Final

from litestar import Request, Response, get

from tombola.producers.domain.errors import ReceiptNotFound, ServiceUnavailable
from tombola.producers.domain.receipt_keys import JwkSet
from tombola.producers.gateway.admission import needs
from tombola.producers.gateway.document import OPEN_PROBLEMS, READ_PROBLEMS, answer
from tombola.producers.gateway.routes.draws import SessionId
from tombola.producers.gateway.service import gateway_of, holder_of

RECEIPT_TYPE: Final = "application/jose"
KEY_SET_TYPE: Final = "application/jwk-set+json"


@get(
    "/v1/draws/{session_id:str}/receipt",
    opt=needs("read"),
    operation_id="getReceipt",
    summary="The signed receipt of a draw",
    description="A JWS in compact form: of its acceptance, and once it has settled of its result.",
    responses={200: answer(str, "The receipt.", media_type=RECEIPT_TYPE)} | READ_PROBLEMS,
)
async def show_receipt(request: Request[Any, Any, Any], session_id: SessionId) -> Response[str]:
    gateway = gateway_of(request)
    if not gateway.receipts.is_on:
        raise ReceiptNotFound
    receipt = await gateway.receipts.of_state(await gateway.state(session_id, holder_of(request)))
    if receipt is None:
        raise ServiceUnavailable("the keys of receipts cannot be listed now")
    return Response(receipt, media_type=RECEIPT_TYPE)


@get(
    "/.well-known/tombola-keys.json",
    operation_id="listReceiptKeys",
    summary="The public keys of receipts, as a JWK Set",
    description="`nbf` and `exp` say from when until when a key signed; without `exp` it still signs.",
    security=[{}],
    responses={200: answer(JwkSet, "All keys that ever signed.", media_type=KEY_SET_TYPE)}
    | {status: spec for status, spec in OPEN_PROBLEMS.items() if status in (429, 503)},
)
async def show_receipt_keys(request: Request[Any, Any, Any]) -> Response[JwkSet]:
    body: Any = await gateway_of(request).receipts.key_set()
    return Response(body, media_type=KEY_SET_TYPE, headers={"Cache-Control": "no-cache"})


ROUTES: Final = (show_receipt, show_receipt_keys)
