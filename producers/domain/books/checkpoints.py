"""The head of the chain of blocks, signed: a checkpoint in the format of C2SP (tlog-checkpoint, signed-note).

    tombola.example/books                                    origin, the name of the key
    20852                                                    size: the number of blocks
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=             root of the RFC 6962 tree over the blocks' hashes, base64

    — tombola.example/books Az3grlgtzPICa5OS8npVmf1Myq/5…    base64 of the key's id (4 bytes) and the signature

The signature is Ed25519 (RFC 8032) over the text up to and with the newline before the empty line. Programs made for
transparency logs read and countersign these files. Keys have the text of Go's sumdb/note, which those programs take:

    public    NAME+ID+base64(0x01 ‖ 32 bytes)                ID: 8 hex digits
    private   PRIVATE+KEY+NAME+ID+base64(0x01 ‖ 32 bytes)
    ID        SHA-256(NAME ‖ 0x0A ‖ 0x01 ‖ public key)[:4]
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tombola.producers.domain.errors import InvalidRequest

ED25519: Final = b"\x01"
KEY_BYTES: Final = 32
ID_BYTES: Final = 4
PRIVATE: Final = "PRIVATE+KEY+"
DASH: Final = "\N{EM DASH}"
NOTE_BYTES_MAX: Final = 64 * 1024

_is_name = re.compile(r"[^\s+\x00-\x1f]{1,200}").fullmatch
_is_size = re.compile(r"0|[1-9]\d{0,18}", re.ASCII).fullmatch


class Head(NamedTuple):
    """The head of the chain after `size` blocks: the root of the tree over their hashes, 32 bytes."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """What is signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


class PublicKey(NamedTuple):
    """A key that verifies checkpoints."""

    name: str
    raw: bytes

    @property
    def id(self) -> bytes:
        """The key's id, 4 bytes."""
        return hashlib.sha256(self.name.encode() + b"\n" + ED25519 + self.raw).digest()[:ID_BYTES]

    @property
    def text(self) -> str:
        """The key as text, to be shown to everybody."""
        return f"{self.name}+{self.id.hex()}+{_encoded(self.raw)}"

    @classmethod
    def read(cls, text: str) -> PublicKey:
        """The key of such a text; raises InvalidRequest."""
        name, key_id, raw = _parts(text)
        key = cls(name, raw)
        if key.id.hex() != key_id:
            raise InvalidRequest(f"this public key does not match its id {key_id}: a character is wrong")
        return key


class PrivateKey(NamedTuple):
    """A key that signs checkpoints. A repr never shows it."""

    name: str
    raw: bytes

    def __repr__(self) -> str:
        return f"PrivateKey({self.name})"

    @property
    def public(self) -> PublicKey:
        """The key that verifies what this one signs."""
        return PublicKey(self.name, self._signer.public_key().public_bytes_raw())

    @property
    def text(self) -> str:
        """The key as text, a secret."""
        return f"{PRIVATE}{self.name}+{self.public.id.hex()}+{_encoded(self.raw)}"

    @classmethod
    def read(cls, text: str) -> PrivateKey:
        """The key of such a text; raises InvalidRequest, whose message does not show the key."""
        if not text.startswith(PRIVATE):
            raise InvalidRequest(f"a private key begins with {PRIVATE}: make one with `tombola books key`")
        name, key_id, raw = _parts(text.removeprefix(PRIVATE))
        key = cls(name, raw)
        if key.public.id.hex() != key_id:
            raise InvalidRequest(f"this private key does not match its id {key_id}: a character is wrong")
        return key

    @classmethod
    def make(cls, name: str) -> PrivateKey:
        """A new key; raises InvalidRequest for a name that cannot be an origin."""
        if not _is_name(name):
            raise InvalidRequest(f"a key's name has 1 to 200 characters, without blanks and `+`: {name!r:.80}")
        return cls(name, Ed25519PrivateKey.generate().private_bytes_raw())

    def sign(self, size: int, root: bytes) -> str:
        """The checkpoint of `size` blocks with this root: equal bytes for an equal head."""
        head = Head(self.name, size, root)
        signature = self._signer.sign(head.text.encode())
        return f"{head.text}\n{DASH} {self.name} {base64.b64encode(self.public.id + signature).decode()}\n"

    @property
    def _signer(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.raw)


class WrongKey(InvalidRequest):
    """The checkpoint has no signature of this key."""


def read(note: str, key: PublicKey) -> Head:
    """The head that a checkpoint says, verified.

    Signatures of other keys are ignored, as witnesses add theirs. Raises WrongKey for a checkpoint without a valid
    signature of `key`; InvalidRequest for a text that is no checkpoint.
    """
    head = read_unverified(note)
    text, _, signatures = note.rpartition("\n\n")
    for line in signatures.splitlines():
        dash, _, rest = line.partition(" ")
        name, _, encoded = rest.partition(" ")
        signature = _decoded(encoded)
        if dash != DASH or name != key.name or signature[:ID_BYTES] != key.id:
            continue
        try:
            Ed25519PublicKey.from_public_bytes(key.raw).verify(signature[ID_BYTES:], f"{text}\n".encode())
        except InvalidSignature:
            raise WrongKey(f"the signature of {key.name} is not valid: the checkpoint was changed") from None
        if head.origin != key.name:
            raise WrongKey(f"{key.name} has signed a checkpoint of another origin, {head.origin!r:.80}")
        return head
    raise WrongKey(f"this checkpoint has no signature of the key {key.name}+{key.id.hex()}")


def read_unverified(note: str) -> Head:
    """The head that a checkpoint says, whoever has signed it; raises InvalidRequest for a text that is none."""
    text, is_signed, signatures = note.rpartition("\n\n")
    lines = text.split("\n")
    if len(note) > NOTE_BYTES_MAX or not is_signed or not signatures.endswith("\n") or len(lines) < 3:
        raise InvalidRequest(f"not a checkpoint: {note!r:.80}")
    origin, size, root = lines[0], lines[1], _decoded(lines[2])
    if not origin or not _is_size(size) or len(root) != hashlib.sha256().digest_size:
        raise InvalidRequest(f"not a checkpoint: {note!r:.80}")
    return Head(origin, int(size), root)


def _encoded(raw: bytes) -> str:
    return base64.b64encode(ED25519 + raw).decode()


def _parts(text: str) -> tuple[str, str, bytes]:
    """Name, id and raw key in the text of a key. Base64 may hold a `+`, a name and an id never do."""
    name, _, rest = text.strip().partition("+")
    key_id, _, encoded = rest.partition("+")
    raw = _decoded(encoded)
    if not _is_name(name) or raw[:1] != ED25519 or len(raw) != 1 + KEY_BYTES:
        raise InvalidRequest("not an Ed25519 key: it has a name, an id and base64, joined by `+`")
    return name, key_id, raw[1:]


def _decoded(text: str) -> bytes:
    """The bytes of base64, empty for any other text."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
