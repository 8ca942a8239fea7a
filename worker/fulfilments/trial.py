"""One signed message to a webhook, outside of any draw: does the receiver answer, and does the signature fit?"""

from __future__ import annotations

import secrets

import msgspec

from tombola.producers.storage.clock import utc_now
from tombola.worker.fulfilments.events import WEBHOOK_TEST
from tombola.worker.fulfilments.sending import Message, Outcome, certificates, client, find_place, send
from tombola.worker.fulfilments.webhooks import Signer


async def post_trial(signer: Signer, *, is_private_allowed: bool, timeout_s: float) -> Outcome:
    """Post an event `webhook.test` once; what came of it."""
    place = await find_place(signer.webhook.url, is_private_allowed=is_private_allowed, timeout_s=timeout_s)
    if isinstance(place, Outcome):
        return place
    name = f"test_{secrets.token_hex(8)}"
    at = utc_now().replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    body = msgspec.json.encode({"event": WEBHOOK_TEST, "idempotency_key": name, "at": at})
    async with client(certificates(), calls_max=1) as through:
        return await send(through, place, signer.secrets, Message(name, name, body), timeout_s=timeout_s)
