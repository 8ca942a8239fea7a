"""Receipts: what was promised to a caller, and what came of it, signed. Pure, no I/O.

    header     {"alg":"EdDSA","kid":"3f9c2a7be1d04c58","typ":"tombola-receipt+jws"}
    payload    {"receipt":"accepted","v":1,"request_key":"…",…,"accepted_at":"2026-11-27T16:00:00.000000Z"}
    receipt    base64url(header) . base64url(payload) . base64url(signature)

A receipt is a JWS in compact form (RFC 7515) with an Ed25519 signature (RFC 8037). It says nothing that the request's
row and its result do not say, and no time of signing: it can be made again at any time, with equal bytes under an equal
key. Header and payload are JSON without blanks, with the fields in the order of the classes below. Any other spelling
is refused: two readers of one receipt must never read different contents, as they may where a member comes twice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec

from tombola.producers.domain.contract import ACCOUNT_ID_MAX, PULLS_MAX, DrawRequest, Request
from tombola.producers.domain.draw import CAMPAIGNS
from tombola.producers.domain.errors import InvalidReceipt
from tombola.producers.domain.receipt_keys import UNREADABLE, Header, ReceiptKey, SigningKey, from_base64

ALGORITHM: Final = "EdDSA"
RECEIPT_BYTES_MAX: Final = 8 * 1024
_NOT_CANONICAL: Final = "is not as tombola writes it: a member comes twice, or there are blanks"

_Hash = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Moment = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$")]


# ---- what a receipt says ---------------------------------------------------------------------------------------------


class Receipt(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="receipt", tag="accepted"
):
    """The promise to settle a request, by the odds and the seed epoch that it was accepted under.

    Null are: `pulls` of a single draw of contract v1, `client_nonce` of a request without one, `campaign` and the
    fields after it of a request that is no draw, `odds_hash` and `seed_epoch` of a draw that was bound when it settled.
    `commitment` is the one that was published of the seed epoch before it opened.
    """

    v: Literal[1] = 1
    request_key: str
    lottery_session_id: str
    account_id: Annotated[int, msgspec.Meta(ge=1, le=ACCOUNT_ID_MAX)]
    kind: str
    campaign: str | None
    pulls: Annotated[int, msgspec.Meta(ge=1, le=PULLS_MAX)] | None
    odds_hash: _Hash | None
    seed_epoch: str | None
    commitment: _Hash | None
    client_nonce: str | None
    accepted_at: _Moment | None

    @property
    def moment(self) -> str:
        """The time of what it says, as text that sorts; empty where the request came by the broker alone."""
        return self.accepted_at or ""


class SettledReceipt(Receipt, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="settled"):
    """The outcome of a request: the SHA-256 of its result's bytes, completed or rejected.

    `accepted_at` is null of a request that came by the broker alone.
    """

    result_sha256: _Hash
    settled_at: _Moment

    @property
    def moment(self) -> str:
        return self.settled_at


class EpochShown(NamedTuple):
    """A seed epoch as receipts show it: its name, such as 1.17, and the commitment to its secret."""

    name: str
    commitment: str


class Facts(NamedTuple):
    """What a receipt takes from the request's row: `odds_hash` as stored, so None for the built-in campaign."""

    accepted_at: datetime | None
    odds_hash: str | None
    epoch: EpochShown | None


class Outcome(NamedTuple):
    """What a receipt takes from a settled request: the bytes of its result, and when it settled."""

    result: bytes
    settled_at: datetime


def receipt_of(request: Request, facts: Facts, outcome: Outcome | None) -> Receipt:
    """The receipt of a request: a SettledReceipt with an `outcome`, else of its acceptance."""
    draw = request if isinstance(request, DrawRequest) else None
    campaign = None if draw is None else draw.campaign
    built_in = CAMPAIGNS.get(campaign or "")
    said: dict[str, Any] = {
        "request_key": request.request_key,
        "lottery_session_id": request.lottery_session_id,
        "account_id": request.account_id,
        "kind": request.kind,
        "campaign": campaign,
        "pulls": None if draw is None else draw.pulls,
        "odds_hash": built_in.odds_hash if built_in else facts.odds_hash,
        "seed_epoch": facts.epoch and facts.epoch.name,
        "commitment": facts.epoch and facts.epoch.commitment,
        "client_nonce": (draw and draw.client_nonce) or None,
        "accepted_at": facts.accepted_at and time_shown(facts.accepted_at),
    }
    if outcome is None:
        return Receipt(**said)
    digest = hashlib.sha256(outcome.result).hexdigest()
    return SettledReceipt(**said, result_sha256=digest, settled_at=time_shown(outcome.settled_at))


def time_shown(moment: datetime) -> str:
    """A moment as receipts say it: UTC with six decimals, so that texts sort as the moments do."""
    return f"{moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


class Signer(NamedTuple):
    """The keys of a process, the newest first, each with the moment from which on it signs, as `time_shown`."""

    keys: tuple[tuple[str, SigningKey], ...]

    def sign(self, receipt: Receipt) -> str:
        """The receipt, signed by the newest key that was valid at its moment; by the oldest key before all of them.

        So a new key changes no receipt of before, for as long as the process holds the old key as well.
        """
        moment = receipt.moment
        key = next((key for since, key in self.keys if since <= moment), self.keys[-1][1])
        return key.sign(_encode(receipt))


# ---- reading a receipt -----------------------------------------------------------------------------------------------


class Parsed(NamedTuple):
    """A receipt as it was written: who is said to have signed it, and what was signed."""

    receipt: Receipt
    kid: str
    signed: bytes
    signature: bytes


def parse(jws: str) -> Parsed:
    """The parts of a receipt, not verified. Raises InvalidReceipt for any text that `Signer.sign` cannot make."""
    if not jws.isascii() or len(jws) > RECEIPT_BYTES_MAX or not _is_compact(jws):
        raise InvalidReceipt(f"not a receipt: {jws!r:.60}")
    head, payload, signature = (from_base64(part) for part in jws.split("."))
    kid = _read_head(head)
    try:
        receipt = _decode_receipt(payload)
    except UNREADABLE as error:
        raise InvalidReceipt(f"not a receipt: {error!s:.120}") from None
    if _encode(receipt) != payload:
        raise InvalidReceipt(f"the payload of this receipt {_NOT_CANONICAL}")
    return Parsed(receipt, kid, jws.rpartition(".")[0].encode(), signature)


def verify(jws: str, keys: Mapping[str, ReceiptKey]) -> Receipt:
    """The receipt, if one of `keys` (by their ids) has signed it; a SettledReceipt or a Receipt.

    Raises InvalidReceipt for a text that is no receipt, for an unknown key, a signature that does not fit, and a key
    that was not valid any more at the receipt's moment.
    """
    parsed = parse(jws)
    key = keys.get(parsed.kid)
    if key is None:
        raise InvalidReceipt(f"this receipt is signed by an unknown key, {parsed.kid}")
    if not key.has_signed(parsed.signed, parsed.signature):
        raise InvalidReceipt("the signature of this receipt is not valid: the receipt was changed")
    if key.valid_until is not None and parsed.receipt.moment >= time_shown(key.valid_until):
        raise InvalidReceipt(f"the key {parsed.kid} was not valid any more at the moment of this receipt")
    return parsed.receipt


def _read_head(head: bytes) -> str:
    """The key's id in a header that is as a signing key writes it; raises InvalidReceipt."""
    try:
        alg = _decode_loosely(head).get("alg")
        if alg != ALGORITHM:
            raise InvalidReceipt(f"receipts are signed with {ALGORITHM}, not {alg!r:.40}")
        header = _decode_header(head)
    except UNREADABLE as error:
        raise InvalidReceipt(f"not the header of a receipt: {error!s:.120}") from None
    if _encode(header) != head:
        raise InvalidReceipt(f"the header of this receipt {_NOT_CANONICAL}")
    return header.kid


_is_compact = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+").fullmatch
_encode: Final = msgspec.json.Encoder().encode
_decode_header: Final = msgspec.json.Decoder(Header).decode
_decode_loosely: Final = msgspec.json.Decoder(dict[str, object]).decode
_decode_receipt: Final = msgspec.json.Decoder(Receipt | SettledReceipt).decode
