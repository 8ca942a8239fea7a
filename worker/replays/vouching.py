"""Who vouches for a dead letter, before a replay signs and accepts what it asks for.

A message with a good signature vouches for itself, and so does a request that is on record with the same content. For
the rest somebody has to: a replay leaves it parked, unless the operator says that he vouches for what he has selected.
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
    """What has to be vouched for: nothing, where messages are neither signed nor have to be accepted."""

    keyring: Keyring = NO_KEYS
    accepted_only: bool = False
    by_operator: bool = False

    @classmethod
    def of(cls, settings: Settings, *, by_operator: bool = False) -> Vouching:
        """What these settings ask for. `by_operator`: the operator vouches for all of it."""
        return cls(settings.keyring, settings.accepted_only, by_operator)

    def why_not(self, request: Request, headers: str | None) -> str:
        """Why nobody vouches for a request that is not on record; empty if somebody does.

        `headers` is what came beside the message, as its dead letter keeps it.
        """
        if is_alias(request.request_key) or is_alias(request.lottery_session_id):
            return "its key or session is an alias, which only an accepted request has"
        if self.by_operator:
            return ""
        try:
            self.keyring.check(request, _told(headers).get(SIGNATURE))
        except NotSigned:
            return f"{Cause.NOT_SIGNED}, and not on record"
        return f"{Cause.NOT_ACCEPTED}: not on record" if self.accepted_only else ""


NOTHING_ASKED: Final = Vouching()


def _told(headers: str | None) -> Mapping[str, Any]:
    with suppress(msgspec.DecodeError):
        told = msgspec.json.decode(headers or "{}")
        return told if isinstance(told, dict) else {}
    return {}
