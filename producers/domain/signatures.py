"""Signatures of messages: where a secret is set, write access to the broker is not enough to make a draw.

    signature = lower-case hex of HMAC-SHA256(secret, canonical body)

The canonical body is the value of Request.encode() (examples: tests/domain/golden/signatures.json). The signature
travels beside the body, under the name `signature`: a field of a Stream's entry, a header of an AMQP message, a keyword
of the task `tombola.draw`. Several secrets may be valid at once, so that a secret can be replaced without downtime: the
first secret signs, and all of them verify.
"""

from __future__ import annotations

import hmac
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import NotSigned
from tombola.producers.domain.macs import hmac_sha256

SIGNATURE: Final = "signature"
SIGNATURE_LENGTH: Final = 64

# The headers of each body: its signature, and its trace context (producers.telemetry.tracing).
Headers = Sequence[Mapping[str, str]]


class Keyring(NamedTuple):
    """The secrets of a deployment; without secrets no signature is needed."""

    secrets: tuple[bytes, ...] = ()

    def __repr__(self) -> str:
        return f"Keyring({len(self.secrets)} secrets)"

    def sign(self, canonical_body: bytes) -> str:
        """The signature of a body, 64 hex digits."""
        return hmac_sha256(self.secrets[0], canonical_body).hex()

    def check(self, request: Request, signature: Any) -> None:
        """Raise NotSigned unless one of the secrets has signed this request; `signature` is untrusted input."""
        if not self.secrets:
            return
        if not isinstance(signature, str) or not signature.isascii():
            raise NotSigned("this message is not signed: it has no `signature` beside its body")
        body = request.encode()
        for secret in self.secrets:
            if hmac.compare_digest(hmac_sha256(secret, body).hex(), signature):
                return
        raise NotSigned("the signature of this message is not by a secret of this deployment")

    def beside(self, bodies: Sequence[bytes], headers: Headers | None) -> Headers | None:
        """The headers to send with these canonical bodies: `headers`, and a signature for each body."""
        if not self.secrets:
            return headers
        others: Iterable[Mapping[str, str]] = itertools.repeat({}) if headers is None else headers
        return [{**it, SIGNATURE: self.sign(body)} for body, it in zip(bodies, others, strict=headers is not None)]


NO_KEYS: Final = Keyring()
