"""Vouching for a dead letter, before a replay signs and accepts its request.

A valid signature vouches for a message, and so does a request on record with the same content. Any other message needs
an operator: a replay leaves it parked, unless the operator vouches for all selected messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple

import msgspec

from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import NotSigned
from tombola.producers.domain.keys import is_alias
from tombola.producers.domain.signatures import NO_KEYS, SIGNATURE, Keyring
from tombola.producers.settings import Settings


class Vouching(NamedTuple):
    """What the settings ask of a message: by default neither a signature nor an accepted request.

    `by_operator`: the operator vouches for all messages.
    """

    keyring: Keyring = NO_KEYS
    accepted_only: bool = False
    by_operator: bool = False

    @classmethod
    def of(cls, settings: Settings, *, by_operator: bool = False) -> Vouching:
        """What `settings` ask of a message."""
        return cls(settings.keyring, settings.accepted_only, by_operator)

    def why_not(self, request: Request, headers: str | None) -> str:
        """Why a request that is not on record stays parked; empty if its signature or the operator vouches for it.

        `headers` are the message's headers as its dead letter keeps them: a JSON object, or None.
        """
        if is_alias(request.request_key) or is_alias(request.lottery_session_id):
            return "its key or session is an alias, which only an accepted request has"
        if self.by_operator:
            return ""
        try:
            self.keyring.check(request, _decoded(headers).get(SIGNATURE))
        except NotSigned:
            return f"{Cause.NOT_SIGNED}, and not on record"
        return f"{Cause.NOT_ACCEPTED}: not on record" if self.accepted_only else ""


NOTHING_ASKED: Final = Vouching()


def _decoded(headers: str | None) -> Mapping[str, Any]:
    with suppress(msgspec.DecodeError):
        told = msgspec.json.decode(headers or "{}")
        return told if isinstance(told, dict) else {}
    return {}
