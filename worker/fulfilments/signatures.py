"""Signatures of what is sent to webhooks, as the Standard Webhooks specification says (standardwebhooks.com, 1.0.0).

A secret is `whsec_` and base64 of its bytes. A signature is `v1,` and base64 of HMAC-SHA256, under these bytes, over
`{webhook-id}.{webhook-timestamp}.{body}`. While a secret is rotated there are two signatures, separated by a blank.
"""

from __future__ import annotations

import base64
import hmac
import secrets
from collections.abc import Iterable
from typing import Final

PREFIX: Final = "whsec_"
SECRET_BYTES: Final = 32  # the specification allows 24 to 64


def make_secret() -> str:
    """A new random secret, 50 characters."""
    return PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def signature(secret: str, webhook_id: str, timestamp_s: int, body: bytes) -> str:
    """The signature by one secret. An id has no dot, so that no two messages have the same signed bytes."""
    key = base64.b64decode(secret.removeprefix(PREFIX))
    message = f"{webhook_id}.{timestamp_s}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, message, "sha256")).decode()


def signatures(secrets_: Iterable[str], webhook_id: str, timestamp_s: int, body: bytes) -> str:
    """The value of `Webhook-Signature`: a signature by each secret."""
    return " ".join(signature(secret, webhook_id, timestamp_s, body) for secret in secrets_)
