"""The wire: what every request has, and contract v1, a draw request and its result, as JSON.

`draw_request.v1.json` says of v1 the same as JSON Schema. v2 adds `kind` and the fields of that kind; which kinds there
are says producers.domain.operations. A body is UTF-8 JSON of at most BODY_BYTES_MAX bytes. Unknown fields, other types
(no float for an integer), other versions and keys outside their alphabet are refused. Encoding is canonical: equal
requests have equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol

import msgspec

from tombola.producers.domain import keys
from tombola.producers.domain.errors import DrawError, InvalidRequest, UnknownVersion, Unparsable

VERSION: Final = 1
VERSION_WITH_KIND: Final = 2
TERMS_LENGTH_MAX: Final = 64
BODY_BYTES_MAX: Final = 16 * 1024
ACCOUNT_ID_MAX: Final = 2**63 - 1
CAMPAIGN_DEFAULT: Final = "default"

# Why a draw was rejected, or what a repeat is told (ARCHITECTURE, One draw). A rejection is final.
INSUFFICIENT_BALANCE: Final = "INSUFFICIENT_BALANCE"
ACCOUNT_NOT_FOUND: Final = "ACCOUNT_NOT_FOUND"
DUPLICATE_REQUEST_IDEMPOTENT: Final = "DUPLICATE_REQUEST_IDEMPOTENT"

_is_campaign = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What every request has, of whatever kind; a kind adds its own fields (producers.domain.operations).

    `request_key` is made here when the caller has none; keep it, and send it again when in doubt: a repeat is never
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
    def terms(self) -> str:
        """What the request's row keeps beside the fields that all kinds share, up to TERMS_LENGTH_MAX characters.

        It stands where a draw has its campaign. No campaign has a colon, so that no draw is taken for another kind.
        """
        own = [getattr(self, name) for name in self.__struct_fields__ if name not in Request.__struct_fields__]
        return f"{self.kind}:{_encode(own).decode()}"

    def encode(self) -> bytes:
        """The canonical body: JSON without blanks, fields in the contract's order."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return _encode({"v": VERSION_WITH_KIND, "kind": self.kind} | fields)

    def fingerprint(self) -> str:
        """SHA-256 of the canonical body, 64 hex digits: two requests under one key are the same or a conflict."""
        return hashlib.sha256(self.encode()).hexdigest()


class DrawRequest(Request, frozen=True, kw_only=True):
    """One paid draw, asked for by a frontend; see Request for its fields, and what it raises."""

    kind = "draw"

    campaign: str = CAMPAIGN_DEFAULT

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        if self.campaign != CAMPAIGN_DEFAULT and not _is_campaign(self.campaign):
            raise InvalidRequest(f"campaign is 1 to 64 characters of A-Z a-z 0-9 . _ and -: {self.campaign!r:.80}")

    @property
    def terms(self) -> str:
        """The campaign."""
        return self.campaign

    def encode(self) -> bytes:
        """The canonical body of contract v1, which stays a draw for ever."""
        return _encode(_RequestV1(VERSION, self.request_key, self.lottery_session_id, self.account_id, self.campaign))


class LedgerRow(msgspec.Struct, frozen=True):
    """One row of `asset_transactions` as a result shows it; amounts are strings with two decimals."""

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
    """A row as results show it. This is the one place where a result's amounts become text: its bytes hang on it."""
    return LedgerRow(
        row.idempotency_key, row.business_type, row.asset_code, str(row.delta), str(row.before), str(row.after)
    )


class DrawResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of a draw. Once visible it never changes, and every repeat of the request gets these bytes."""

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
        """Whether the draw handed out a prize, of whatever asset."""
        return any(Decimal(row.delta_amount) > 0 for row in self.transactions)

    def encode(self) -> bytes:
        """The result's bytes: JSON without blanks, fields in the contract's order."""
        return _encode(self)


class ResultHead(msgspec.Struct, frozen=True):
    """What the results of all kinds say."""

    v: int
    request_key: str
    lottery_session_id: str
    status: Literal["completed", "rejected"]
    reason: str | None
    balance_after: str | None


class _RequestV1(msgspec.Struct, forbid_unknown_fields=True):
    """The body as it travels. Apart from DrawRequest because here `v` and `request_key` must be said."""

    v: Literal[1]
    request_key: Annotated[str, msgspec.Meta(min_length=1)]
    lottery_session_id: str = ""
    account_id: int = 0  # 0 is out of bounds: an absent account is refused by DrawRequest
    campaign: str = CAMPAIGN_DEFAULT


_encode = msgspec.json.Encoder().encode
_decode_request = msgspec.json.Decoder(_RequestV1).decode
_decode_result = msgspec.json.Decoder(DrawResult).decode
_decode_result_head = msgspec.json.Decoder(ResultHead).decode


def parse_request(body: bytes) -> DrawRequest:
    """Parse one message body.

    Raises InvalidRequest with what is wrong and where: Unparsable for what is no JSON object, UnknownVersion for a
    version that this release does not speak.
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
                f"contract version {version!r:.40} is not known here, only {VERSION}: upgrade the workers, then replay"
            ) from None
        raise InvalidRequest(f"not a draw request: {_quoted(error)}") from None
    return DrawRequest(
        account_id=wire.account_id,
        request_key=wire.request_key,
        lottery_session_id=wire.lottery_session_id,
        campaign=wire.campaign,
    )


def parse_result(body: bytes) -> DrawResult:
    """Parse a stored result; raises DrawError if it is none."""
    try:
        return _decode_result(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DrawError(f"not a draw result: {_quoted(error)}") from None


def parse_result_head(body: bytes) -> DrawResult | ResultHead:
    """Parse a stored result of any kind for what they all say; raises DrawError if it is none."""
    try:
        return _decode_result(body)  # nearly all are draws
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            if (head := _decode_result_head(body)).v != VERSION:
                return head
        raise DrawError(f"not a result: {_quoted(error)}") from None


def _quoted(error: Exception) -> str:
    """What the parser says, fit for a line of a log: it quotes names of fields, which are the sender's own words."""
    text = str(error)[:200]
    return text if text.isprintable() else repr(text)[1:-1]


def _loosely(body: bytes) -> Any:
    """Whatever JSON a refused body is; raises Unparsable if it is none."""
    try:
        return msgspec.json.decode(body)
    except msgspec.ValidationError:
        # A number too large for this parser is a fault of its field, not of the JSON: another one takes any.
        with suppress(ValueError, RecursionError):
            return json.loads(body, parse_int=lambda digits: int(digits[:40]), parse_constant=int)
        raise Unparsable("not a JSON object: a number out of range, and what follows it is no JSON") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unparsable(f"not a JSON object: {_quoted(error)}") from None
