"""The wire format: the fields of every request, and a draw's request and result, as JSON.

`draw_request.v1.json` is the JSON Schema of v1: one pull. v2 adds `kind` and the fields of that kind, for a draw
`pulls` and `client_nonce` (draw_request.v2.json); producers.domain.operations lists the kinds. A body is UTF-8 JSON of
at most BODY_BYTES_MAX bytes. Unknown fields, other types (no float for an integer), other versions and keys outside
their alphabet are refused. Encoding is canonical: equal requests have equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from tombola.producers.domain import keys
from tombola.producers.domain.errors import DrawError, InvalidRequest, UnknownVersion, Unparsable

VERSION: Final = 1
VERSION_WITH_KIND: Final = 2
TERMS_LENGTH_MAX: Final = 255
BODY_BYTES_MAX: Final = 16 * 1024
ACCOUNT_ID_MAX: Final = 2**63 - 1
CAMPAIGN_DEFAULT: Final = "default"
PULLS_MAX: Final = 100  # in one request
CLIENT_NONCE_LENGTH_MIN: Final = 16
CLIENT_NONCE_LENGTH_MAX: Final = 64

# Why a draw was rejected, or that it was a repeat (ARCHITECTURE, One draw). A rejection is final.
INSUFFICIENT_BALANCE: Final = "INSUFFICIENT_BALANCE"
ACCOUNT_NOT_FOUND: Final = "ACCOUNT_NOT_FOUND"
DUPLICATE_REQUEST_IDEMPOTENT: Final = "DUPLICATE_REQUEST_IDEMPOTENT"

_is_campaign = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch
_is_client_nonce = re.compile(r"[A-Za-z0-9_-]{16,64}").fullmatch


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of every request; a kind adds its own fields (producers.domain.operations).

    An empty `request_key` is replaced by a new key. Keep the key, and send it again when in doubt: a repeat is never
    charged twice. `lottery_session_id` defaults to the request key, as in the owner's service.
    Raises InvalidRequest when a field is out of bounds.
    """

    kind: ClassVar[str]

    account_id: int
    request_key: str = ""
    lottery_session_id: str = ""

    def __post_init__(self) -> None:
        fill = msgspec.structs.force_setattr
        if self.request_key:
            keys.check_request_key(self.request_key)
        else:
            fill(self, "request_key", keys.make_request_key())
        if not self.lottery_session_id:
            fill(self, "lottery_session_id", self.request_key)
        elif self.lottery_session_id != self.request_key:
            keys.check_session_id(self.lottery_session_id)
        # The exact type: True and 6.0 compare like integers, but would travel as `true` and `6.0`.
        if type(self.account_id) is not int or not 1 <= self.account_id <= ACCOUNT_ID_MAX:
            raise InvalidRequest(f"account_id is an integer from 1 to {ACCOUNT_ID_MAX}, not {self.account_id!r:.40}")

    @property
    def terms(self) -> str | None:
        """The fields of its own kind as the request's row stores them: JSON, up to TERMS_LENGTH_MAX ASCII characters.

        None for a draw of contract v1, whose row has the campaign alone.
        """
        own = [getattr(self, name) for name in self.__struct_fields__ if name not in Request.__struct_fields__]
        text = _encode(own).decode()
        return text if text.isascii() else json.dumps(own, separators=(",", ":"))

    @property
    def ledger_key(self) -> str:
        """What the keys of its ledger rows begin with: `{ledger_key}:{type}`.

        For nearly all kinds the request key. What can happen only once to another request, such as its refund, has that
        request's ledger key: then the unique constraint refuses a second time, under whatever request key.
        """
        return self.request_key

    def encode(self) -> bytes:
        """The canonical body: JSON without blanks, fields in the contract's order."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return _encode({"v": VERSION_WITH_KIND, "kind": self.kind} | fields)

    def fingerprint(self) -> str:
        """SHA-256 of the canonical body, 64 hex digits: two requests under one key are the same or a conflict."""
        return hashlib.sha256(self.encode()).hexdigest()


class DrawRequest(Request, frozen=True, kw_only=True):
    """One paid draw that a frontend requests; see Request for the other fields and the errors.

    With `pulls` the request asks for so many pulls for one charge, and has a PullsResult; without, it asks for a single
    pull, and has a DrawResult. `client_nonce` is random text of 16 to 64 characters A-Z a-z 0-9 _ and -, which the
    player's browser makes before it sends anything. The outcome depends on it: who chooses the request key alone does
    not choose the outcome. A request with neither of the two is of contract v1.
    """

    kind = "draw"

    campaign: str = CAMPAIGN_DEFAULT
    pulls: int | None = None
    client_nonce: str = ""

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        if self.campaign != CAMPAIGN_DEFAULT and not _is_campaign(self.campaign):
            raise InvalidRequest(f"campaign is 1 to 64 characters of A-Z a-z 0-9 . _ and -: {self.campaign!r:.80}")
        if self.pulls is not None and (type(self.pulls) is not int or not 1 <= self.pulls <= PULLS_MAX):
            raise InvalidRequest(f"pulls is an integer from 1 to {PULLS_MAX}, not {self.pulls!r:.40}")
        if self.client_nonce and not _is_client_nonce(self.client_nonce):
            raise InvalidRequest(
                f"client_nonce is {CLIENT_NONCE_LENGTH_MIN} to {CLIENT_NONCE_LENGTH_MAX} characters of "
                f"A-Z a-z 0-9 _ and -: {self.client_nonce!r:.80}"
            )

    @property
    def terms(self) -> str | None:
        if self.client_nonce:
            return _encode((self.campaign, self.pulls, self.client_nonce)).decode()
        # A request without a nonce has the terms that it had before there were nonces.
        return None if self.pulls is None else _encode((self.campaign, self.pulls)).decode()

    def encode(self) -> bytes:
        """The canonical body; a field that says nothing is absent. A v1 body is a draw in every future release."""
        if self.pulls is None and not self.client_nonce:
            return _encode(
                _RequestV1(VERSION, self.request_key, self.lottery_session_id, self.account_id, self.campaign)
            )
        named = (self.account_id, self.request_key, self.lottery_session_id, self.campaign)
        own = (UNSET if self.pulls is None else self.pulls, self.client_nonce or UNSET)
        return _encode(_DrawV2(VERSION_WITH_KIND, "draw", *named, *own))


class LedgerRow(msgspec.Struct, frozen=True):
    """One row of `asset_transactions` as results show it; amounts are strings with two decimals."""

    idempotency_key: str
    business_type: str
    asset_code: str
    delta_amount: str
    balance_before: str
    balance_after: str


class Row(Protocol):
    """A row of `asset_transactions`, read or about to be written; amounts have two decimals."""

    @property
    def account_id(self) -> int: ...
    @property
    def idempotency_key(self) -> str: ...
    @property
    def business_type(self) -> str: ...
    @property
    def asset_code(self) -> str: ...
    @property
    def delta(self) -> Decimal: ...
    @property
    def before(self) -> Decimal: ...
    @property
    def after(self) -> Decimal: ...
    @property
    def notes(self) -> str: ...


def shown(row: Row) -> LedgerRow:
    """A row as results show it. Only here do the amounts of a result become text: the result's bytes depend on it."""
    return LedgerRow(
        row.idempotency_key, row.business_type, row.asset_code, str(row.delta), str(row.before), str(row.after)
    )


class DrawResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of a draw. Once visible it never changes, and every repeat of the request gets the same bytes."""

    v: Literal[1] = VERSION
    request_key: str
    lottery_session_id: str
    account_id: int
    campaign: str
    status: Literal["completed", "rejected"]
    reason: str | None
    prize_amount: str
    balance_after: str | None
    transactions: list[LedgerRow]

    @property
    def won(self) -> bool:
        """Whether the draw paid a prize, in any asset."""
        return any(Decimal(row.delta_amount) > 0 for row in self.transactions)

    def encode(self) -> bytes:
        """The result's bytes: JSON without blanks, fields in the contract's order."""
        return _encode(self)


class GrantWon(msgspec.Struct, frozen=True):
    """One grant of a prize as results show it.

    `notify` names a notification, which has no asset and the amount 0.00; `code` is the code that was handed out.
    `idempotency_key` is the key of its ledger row.
    """

    asset_code: str
    amount: str
    notify: str
    code: str
    idempotency_key: str


class PrizeWon(msgspec.Struct, frozen=True):
    """The outcome of pull number `pull`, from 1: the prize's code, and what it handed out."""

    pull: int
    code: str
    grants: list[GrantWon]


class PullsResult(DrawResult, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of a request for pulls (contract v2). A rejected request has no odds hash and no prizes."""

    v: Literal[2] = VERSION_WITH_KIND  # type: ignore[assignment]
    kind: Literal["draw"] = "draw"
    odds_hash: str | None
    prizes: list[PrizeWon]


class MovementResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of a request of any kind but a draw (contract v2).

    `balance_after` is the balance of the request's own account. `reference` is the request's, empty without one.
    """

    v: Literal[2] = VERSION_WITH_KIND
    kind: str
    request_key: str
    lottery_session_id: str
    account_id: int
    status: Literal["completed", "rejected"]
    reason: str | None
    balance_after: str | None
    reference: str = ""
    transactions: list[LedgerRow]

    def encode(self) -> bytes:
        """The result's bytes: JSON without blanks, fields in the contract's order."""
        return _encode(self)


class ResultHead(msgspec.Struct, frozen=True):
    """The fields that results of all kinds have."""

    v: int
    request_key: str
    lottery_session_id: str
    status: Literal["completed", "rejected"]
    reason: str | None
    balance_after: str | None


class _RequestV1(msgspec.Struct, forbid_unknown_fields=True):
    """The body on the wire. A class of its own because `v` and `request_key` are required here."""

    v: Literal[1]
    request_key: Annotated[str, msgspec.Meta(min_length=1)]
    lottery_session_id: str = ""
    account_id: int = 0  # 0 is out of bounds: DrawRequest refuses a missing account
    campaign: str = CAMPAIGN_DEFAULT


class _DrawV2(msgspec.Struct, forbid_unknown_fields=True):
    """The canonical body of a draw of contract v2 on the wire."""

    v: Literal[2]
    kind: Literal["draw"]
    account_id: int
    request_key: Annotated[str, msgspec.Meta(min_length=1)]
    lottery_session_id: str
    campaign: str
    pulls: int | UnsetType = UNSET
    client_nonce: Annotated[str, msgspec.Meta(min_length=1)] | UnsetType = UNSET


_encode = msgspec.json.Encoder().encode
_decode_request = msgspec.json.Decoder(_RequestV1).decode
_decode_draw_v2 = msgspec.json.Decoder(_DrawV2).decode
_decode_result = msgspec.json.Decoder(DrawResult).decode
_decode_pulls_result = msgspec.json.Decoder(PullsResult).decode
_decode_movement_result = msgspec.json.Decoder(MovementResult).decode
_decode_result_head = msgspec.json.Decoder(ResultHead).decode


def parse_request(body: bytes) -> DrawRequest:
    """Parse one message body.

    Raises InvalidRequest, which names the field and the reason; Unparsable for a body that is not a JSON object,
    UnknownVersion for a version that this release does not know.
    """
    if len(body) > BODY_BYTES_MAX:
        raise InvalidRequest(f"a draw request has at most {BODY_BYTES_MAX:,} bytes, this one has {len(body):,}")
    try:
        wire = _decode_request(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        loose = _loosely(body)
        if not isinstance(loose, dict):
            raise Unparsable(f"not a JSON object: {_quoted(error)}") from None
        version = loose.get("v")
        if isinstance(version, int) and not isinstance(version, bool) and version != VERSION:
            raise UnknownVersion(
                f"contract version {version!r:.40} is unknown to this release, or its kind of request: "
                "upgrade the workers, then replay"
            ) from None
        raise InvalidRequest(f"not a draw request: {_quoted(error)}") from None
    return DrawRequest(
        account_id=wire.account_id,
        request_key=wire.request_key,
        lottery_session_id=wire.lottery_session_id,
        campaign=wire.campaign,
    )


def parse_draw_v2(body: bytes) -> DrawRequest | None:
    """The draw of contract v2 in a canonical body; None for any other body, which producers.domain.operations reads.

    One call for what most bodies of v2 are, as it is on the path of each. Raises InvalidRequest as parse_request does.
    """
    try:
        wire = _decode_draw_v2(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if wire.pulls is UNSET and wire.client_nonce is UNSET:
        return None
    return DrawRequest(
        account_id=wire.account_id,
        request_key=wire.request_key,
        lottery_session_id=wire.lottery_session_id,
        campaign=wire.campaign,
        pulls=None if wire.pulls is UNSET else wire.pulls,
        client_nonce="" if wire.client_nonce is UNSET else wire.client_nonce,
    )


def parse_result(body: bytes) -> DrawResult:
    """Parse a stored result of a draw, a PullsResult for contract v2; raises DrawError for other bytes."""
    try:
        return _decode_result(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _decode_pulls_result(body)
        raise DrawError(f"not a draw result: {_quoted(error)}") from None


def parse_movement_result(body: bytes) -> MovementResult:
    """Parse a stored result of a request that is no draw; raises DrawError for other bytes."""
    try:
        return _decode_movement_result(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DrawError(f"not the result of a movement: {_quoted(error)}") from None


def parse_result_head(body: bytes) -> DrawResult | ResultHead:
    """Parse the common fields of a stored result of any kind; raises DrawError for other bytes."""
    try:
        return _decode_result(body)  # nearly all results are results of draws
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            if (head := _decode_result_head(body)).v != VERSION:
                return head
        raise DrawError(f"not a result: {_quoted(error)}") from None


def _quoted(error: Exception) -> str:
    """The parser's message, made printable for a log: it quotes field names, which the sender has chosen."""
    text = str(error)[:200]
    return text if text.isprintable() else repr(text)[1:-1]


def _loosely(body: bytes) -> Any:
    """Decode the JSON of a refused body, whatever it holds; raises Unparsable for other bytes."""
    try:
        return msgspec.json.decode(body)
    except msgspec.ValidationError:
        # A number may be too large for msgspec, and the JSON valid all the same: the json module takes any number.
        with suppress(ValueError, RecursionError):
            return json.loads(body, parse_int=lambda digits: int(digits[:40]), parse_constant=int)
        raise Unparsable("not a JSON object: a number out of range, and what follows it is no JSON") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unparsable(f"not a JSON object: {_quoted(error)}") from None
