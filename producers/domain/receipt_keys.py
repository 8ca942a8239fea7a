"""The keys of receipts: signing keys of a process, and the public keys that it lists for everybody. Pure, no I/O.

secret     PRIVATE+KEY+KID+base64(32 bytes)               TOMBOLA_RECEIPT_KEY, made by `tombola receipt-key make`
public     {"kid":"…","kty":"OKP","crv":"Ed25519",…}      a JWK (RFC 7517, RFC 8037)
KID        SHA-256(public key), the first 16 hex digits
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, Literal, NamedTuple

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tombola.producers.domain.errors import InvalidReceipt, InvalidRequest

RECEIPT_TYPE: Final = "tombola-receipt+jws"
KEY_BYTES: Final = 32
KID_LENGTH: Final = 16
PRIVATE: Final = "PRIVATE+KEY+"
UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError)


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The protected header of a receipt; nothing but the key's id differs from receipt to receipt."""

    alg: Literal["EdDSA"] = "EdDSA"
    kid: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")] = ""
    typ: Literal["tombola-receipt+jws"] = RECEIPT_TYPE


class ReceiptKey(NamedTuple):
    """A key that verifies receipts, 32 bytes. What it signs is from before `valid_until`; None: it still signs.

    A receipt may be of a request from before `valid_from`: a key that has left the settings cannot sign it again.
    """

    raw: bytes
    valid_from: datetime
    valid_until: datetime | None = None

    @property
    def kid(self) -> str:
        """The key's id, 16 hex digits."""
        return _kid(self.raw)

    def has_signed(self, signed: bytes, signature: bytes) -> bool:
        """Whether this key has made that signature of these bytes."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, signed)
        except InvalidSignature:
            return False
        return True


class SigningKey:
    """A key that signs receipts. A repr never shows it."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._signer = Ed25519PrivateKey.from_private_bytes(raw)
        self.public_raw: Final = self._signer.public_key().public_bytes_raw()
        self.kid: Final = _kid(self.public_raw)
        self._head = to_base64(_encode(Header(kid=self.kid)))

    def __repr__(self) -> str:
        return f"SigningKey({self.kid})"

    @property
    def text(self) -> str:
        """The key as text, a secret."""
        return f"{PRIVATE}{self.kid}+{base64.b64encode(self._raw).decode()}"

    @classmethod
    def make(cls) -> SigningKey:
        """A new key."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def read(cls, text: str) -> SigningKey:
        """The key of such a text; raises InvalidRequest, whose message does not show the key."""
        is_private = text.startswith(PRIVATE)
        kid, _, encoded = text.removeprefix(PRIVATE).partition("+")
        try:
            raw = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if not is_private or len(raw) != KEY_BYTES:
            raise InvalidRequest(f"a key for receipts begins with {PRIVATE}: make one with `tombola receipt-key make`")
        key = cls(raw)
        if key.kid != kid:
            raise InvalidRequest(f"this key for receipts does not match its id {kid!r:.40}: a character is wrong")
        return key

    def sign(self, payload: bytes) -> str:
        """The payload as a JWS in compact form: equal bytes for an equal payload."""
        signed = b"%b.%b" % (self._head, to_base64(payload))
        return (b"%b.%b" % (signed, to_base64(self._signer.sign(signed)))).decode()


def signing_keys(text: str) -> tuple[SigningKey, ...]:
    """The keys in a setting, the newest first, with commas; none for an empty text. Raises InvalidRequest."""
    keys = tuple(SigningKey.read(it.strip()) for it in text.split(",")) if text.strip() else ()
    if len({it.kid for it in keys}) != len(keys):
        raise InvalidRequest("a key for receipts is there twice")
    return keys


class Jwk(msgspec.Struct, frozen=True):
    """A public key as JSON. `nbf` and `exp` are its validity, in seconds of Unix time; without `exp` it still signs."""

    kid: str
    kty: Literal["OKP"]
    crv: Literal["Ed25519"]
    x: str
    use: Literal["sig"]
    alg: Literal["EdDSA"]
    nbf: int
    exp: int | msgspec.UnsetType = msgspec.UNSET


class JwkSet(msgspec.Struct, frozen=True):
    """The public keys of receipts, the newest first."""

    keys: list[Jwk]


def jwk_set(keys: Sequence[ReceiptKey]) -> bytes:
    """The keys as a JWK Set, in their order."""
    return _encode(JwkSet([_jwk(key) for key in keys]))


def _jwk(key: ReceiptKey) -> Jwk:
    exp = msgspec.UNSET if key.valid_until is None else math.ceil(key.valid_until.timestamp())
    x = to_base64(key.raw).decode()
    return Jwk(key.kid, "OKP", "Ed25519", x, "sig", "EdDSA", math.floor(key.valid_from.timestamp()), exp)


def read_jwk_set(body: bytes) -> dict[str, ReceiptKey]:
    """The keys of a JWK Set by their ids. Raises InvalidReceipt for other bytes, and for a key under a wrong id."""
    keys: dict[str, ReceiptKey] = {}
    try:
        for it in _decode_jwk_set(body).keys:
            until = None if it.exp is msgspec.UNSET else _EPOCH + timedelta(seconds=it.exp)
            key = ReceiptKey(from_base64(it.x), _EPOCH + timedelta(seconds=it.nbf), until)
            if len(key.raw) != KEY_BYTES or key.kid != it.kid:
                raise InvalidReceipt(f"the key {it.kid!r:.40} is not the one that its id says")
            keys[key.kid] = key
    except UNREADABLE as error:
        raise InvalidReceipt(f"not a JWK Set of keys for receipts: {error!s:.120}") from None
    return keys


def to_base64(raw: bytes) -> bytes:
    """base64url without padding (RFC 7515, appendix C)."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def from_base64(text: str) -> bytes:
    """The bytes of base64url; raises InvalidReceipt for a text that `to_base64` cannot make: other bits at its end."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if to_base64(raw).decode() != text:
        raise InvalidReceipt(f"not base64url: {text!r:.40}")
    return raw


def _kid(public_raw: bytes) -> str:
    return hashlib.sha256(public_raw).hexdigest()[:KID_LENGTH]


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_encode: Final = msgspec.json.Encoder().encode
_decode_jwk_set: Final = msgspec.json.Decoder(JwkSet).decode
