"""The operations, by kind: a file each. To add an operation, write its file and name it in OPERATIONS.

Batch, forecast, result store, gateway and audit know an operation only through its four functions (operation.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, Final

import msgspec

from tombola.producers.domain import contract
from tombola.producers.domain.contract import BODY_BYTES_MAX, TERMS_LENGTH_MAX, DrawRequest, Request
from tombola.producers.domain.errors import InvalidRequest, UnknownVersion
from tombola.producers.domain.operations import adjust, draw, expire, hold, post, recharge, refund, transfer, void
from tombola.producers.domain.operations.operation import Operation

OPERATIONS: Final[dict[str, Operation[Any]]] = {
    it.FIELDS.kind: it for it in (draw, recharge, transfer, refund, adjust, hold, post, void, expire)
}


def operation_of(request: Request) -> Operation[Any]:
    """The operation of `request`."""
    return OPERATIONS[request.kind]


def proof_key(request: Request) -> str:
    """The key of the ledger row that proves that the request has completed."""
    return f"{request.ledger_key}:{next(iter(OPERATIONS[request.kind].TYPES))}"


def ledger_keys(request: Request) -> Sequence[str]:
    """The keys of all ledger rows that the request may write."""
    return [f"{request.ledger_key}:{entry_type}" for entry_type in OPERATIONS[request.kind].TYPES]


def business_types() -> Set[str]:
    """The business types that only requests write to the ledger.

    Recharges are not among them: opening an account writes one as well, and older releases wrote them without requests.
    """
    return house_accounts().keys() - {recharge.RECHARGE}


def house_accounts() -> Mapping[str, str]:
    """The other side of ledger rows: every known business type with its house account (see Operation.HOUSE)."""
    return {name: account for operation in OPERATIONS.values() for name, account in operation.HOUSE.items()}


# ---- on the wire -----------------------------------------------------------------------------------------------------


_DRAW_V2: Final = b'{"v":2,"kind":"draw",'


class _Head(msgspec.Struct):
    v: int
    kind: str


def parse_request(body: bytes) -> Request:
    """Parse one message body of any version and kind; raises as contract.parse_request does."""
    if body.startswith(_DRAW_V2) and len(body) <= BODY_BYTES_MAX and (draw := contract.parse_draw_v2(body)) is not None:
        return draw
    try:
        return contract.parse_request(body)
    except UnknownVersion:
        fields = _fields_of_kind(body)
        if fields is None:
            raise
    return _made(*fields)


def _fields_of_kind(body: bytes) -> tuple[type[Request], Any] | None:
    """The class and the fields of a body of a known kind; None for any other body."""
    try:
        head = msgspec.json.decode(body, type=_Head)
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    operation = OPERATIONS.get(head.kind)
    if head.v != contract.VERSION_WITH_KIND or operation is None:
        return None
    del fields["v"], fields["kind"]
    return operation.FIELDS, fields


def _made(kind: type[Request], fields: Any) -> Request:
    unknown = fields.keys() - set(kind.__struct_fields__)
    if unknown or not fields.get("request_key"):
        wrong = f"unknown fields: {', '.join(sorted(unknown))!r:.200}" if unknown else "it has no request_key"
        raise InvalidRequest(f"not a {kind.kind} request: {wrong}")
    try:
        made = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"not a {kind.kind} request: {error!s:.200}") from None
    terms = made.terms
    if terms is None:
        raise InvalidRequest(
            "a draw request of version 2 names its number of pulls, or a client_nonce; a draw of version 1 has no kind"
        )
    if kind is DrawRequest and (fields.get("pulls", 1) is None or not fields.get("client_nonce", "none")):
        raise InvalidRequest("a draw request leaves out `pulls` and `client_nonce` where it has none")
    if len(terms) > TERMS_LENGTH_MAX or not terms.isascii():
        raise InvalidRequest(
            f"the terms of a request of kind {kind.kind} have at most {TERMS_LENGTH_MAX} ASCII characters"
        )
    return made


# ---- in its row ------------------------------------------------------------------------------------------------------


def restore(
    request_key: str, lottery_session_id: str, account_id: int, campaign: str, kind: str | None, terms: str | None
) -> Request:
    """The request of a row with these values; `terms` are Request.terms, `kind` and `terms` None for a v1 draw.

    Raises InvalidRequest, or InvalidKey, for values that make no request; UnknownVersion for an unknown kind.
    """
    common: dict[str, Any] = {
        "account_id": account_id,
        "request_key": request_key,
        "lottery_session_id": lottery_session_id,
    }
    if kind is None:
        return DrawRequest(**common, campaign=campaign)
    if kind not in OPERATIONS:
        raise UnknownVersion(f"this release does not know requests of kind {kind!r:.40}: upgrade")
    fields = OPERATIONS[kind].FIELDS
    names = [name for name in fields.__struct_fields__ if name not in Request.__struct_fields__]
    try:
        own = msgspec.json.decode(terms or "")
        # Terms may be shorter than all names: a field that joined its kind later stands last, and may be absent.
        made = msgspec.convert(common | dict(zip(names[: len(own)], own, strict=True)), fields)
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise InvalidRequest(f"not the terms of a {kind} request: {terms!r:.100}") from error
    if made.terms != terms:
        raise InvalidRequest(f"not the terms that a {kind} request has: {terms!r:.100}")
    return made
