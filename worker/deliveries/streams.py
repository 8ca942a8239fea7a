"""Deliveries from a Redis Stream through a consumer group.

What a consumer has read stays in the group's pending list until it is acked. A consumer that gives no sign of life for
`claim_after_s` loses what it held to whoever looks next: XPENDING says how often each was delivered, XCLAIM takes it.
(XAUTOCLAIM does both in one call, but keeps the count to itself.)
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import redis

from producers.broker import BODY_FIELD, GROUP, QUEUE, declare_group, open_redis
from producers.errors import ServiceUnavailable
from worker.deliveries import NO_HEADERS, Delivery, received

READ_TIMEOUT_S: Final = 10.0
NO_BLOCK_PAUSE_S: Final = 0.01  # for a server that does not know how to BLOCK (fakeredis): do not spin
CLAIM_LOOKS_PER_TERM: Final = 5  # how often within claim_after_s a consumer looks for what others left behind

# A consumer that still holds messages must not be deleted: its pending list would go with it.
_FORGET: Final = """
local forgotten = 0
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local field = {}
  for i = 1, #consumer, 2 do field[consumer[i]] = consumer[i + 1] end
  if field.pending == 0 and (field.name == ARGV[2] or (ARGV[2] == '' and field.idle >= tonumber(ARGV[3]))) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], field.name)
    forgotten = forgotten + 1
  end
end
return forgotten
"""


class StreamDeliveries:
    """See worker.deliveries.Deliveries."""

    def __init__(self, url: str, *, claim_after_s: float) -> None:
        self._client = open_redis(url, timeout_s=READ_TIMEOUT_S)
        # The reply as it comes: redis-py's own shaping takes longer than reading it.
        for command in ("XREADGROUP", "XPENDING", "XCLAIM"):
            self._client.set_response_callback(command, _as_it_is)
        self._claim_after_ms = int(claim_after_s * 1000)
        self._claim_every_s = claim_after_s / CLAIM_LOOKS_PER_TERM
        self._next_claim = 0.0
        self._declared = False
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"

    def fetch(self, count_max: int, *, wait_s: float) -> list[Delivery]:
        try:
            if not self._declared:
                declare_group(self._client)
                self._declared = True
            now = time.monotonic()
            if now >= self._next_claim:
                claimed = self._claim(count_max)
                if len(claimed) < count_max:  # else there may be more of them
                    self._next_claim = now + self._claim_every_s
                if claimed:
                    return claimed
            return self._read(count_max, min(wait_s, self._claim_every_s))
        except redis.RedisError as error:
            self._declared = False  # FLUSHALL takes the group along
            raise ServiceUnavailable(f"the Stream cannot be read: {error}") from error

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        if not deliveries:
            return
        tags = [delivery.tag for delivery in deliveries]
        try:
            # Acked and gone: a Stream keeps what it is not told to forget, and Redis is memory.
            with self._client.pipeline(transaction=True) as pipeline:
                pipeline.execute_command("XACK", QUEUE, GROUP, *tags)
                pipeline.execute_command("XDEL", QUEUE, *tags)
                pipeline.execute()
        except redis.RedisError as error:
            raise ServiceUnavailable(f"the Stream cannot be acked: {error}") from error

    def give_back(self, deliveries: Sequence[Delivery]) -> None:
        # They stay pending; whoever looks for what was left behind takes them after claim_after_s.
        return

    def fetch_dead(self, count_max: int) -> list[Delivery]:
        return []  # a Stream gives nothing up

    def ack_dead(self, deliveries: Sequence[Delivery]) -> None:
        return

    def close(self) -> None:
        with suppress(redis.RedisError):
            self._release()
            forget_consumers(self._client, name=self.consumer)
        with suppress(redis.RedisError):
            self._client.close()

    def _release(self) -> None:
        """Make what this consumer still holds look long idle, so that the others need not wait for it."""
        pending: Any = self._client.execute_command(
            "XPENDING", QUEUE, GROUP, "-", "+", 10_000, self.consumer, parse_detail=True
        )
        tags = [entry[0] for entry in pending]
        if tags:
            self._client.execute_command(
                "XCLAIM", QUEUE, GROUP, self.consumer, 0, *tags, "IDLE", self._claim_after_ms, "JUSTID"
            )

    def _read(self, count_max: int, wait_s: float) -> list[Delivery]:
        block = ("BLOCK", max(1, int(wait_s * 1000))) if wait_s > 0 else ()
        asked_at = time.monotonic()
        reply: Any = self._client.execute_command(
            "XREADGROUP", "GROUP", GROUP, self.consumer, "COUNT", count_max, *block, "STREAMS", QUEUE, ">"
        )
        if not reply:
            if time.monotonic() - asked_at < wait_s / 2:
                time.sleep(NO_BLOCK_PAUSE_S)
            return []
        entries = next(iter(reply.values())) if isinstance(reply, dict) else reply[0][1]
        return [received(_body(fields), tag, 1, _headers(fields)) for tag, fields in entries]

    def _claim(self, count_max: int) -> list[Delivery]:
        pending: Any = self._client.execute_command(
            "XPENDING", QUEUE, GROUP, "IDLE", self._claim_after_ms, "-", "+", count_max, parse_detail=True
        )
        if not pending:
            return []
        counts = {entry[0]: int(entry[3]) for entry in pending}
        # Again with the idle time: another consumer may have been quicker.
        claimed: Any = self._client.execute_command(
            "XCLAIM", QUEUE, GROUP, self.consumer, self._claim_after_ms, *counts
        )
        return [
            received(_body(entry[1]), entry[0], counts[entry[0]] + 1, _headers(entry[1]))
            for entry in claimed
            if entry and entry[1]
        ]


def forget_consumers(client: redis.Redis, *, name: str = "", idle_s: float = 3600) -> int:
    """Delete the consumer `name`, or all that have been idle for `idle_s`, unless they hold messages; return how many.

    Consumers are named after their process, so without this the group would remember every process there ever was.
    """
    try:
        return int(client.eval(_FORGET, 1, QUEUE, GROUP, name, int(idle_s * 1000)))
    except redis.ResponseError as error:
        if "NOGROUP" in str(error) or "no such key" in str(error).lower():
            return 0
        raise


def _as_it_is(reply: Any, **_options: Any) -> Any:
    return reply


def _body(fields: Any) -> bytes:
    """The field `body` of an entry: a flat list, or a mapping. Empty, and so refused, where there is none."""
    if isinstance(fields, dict):
        return bytes(fields.get(BODY_FIELD, b""))
    for name, value in zip(fields[::2], fields[1::2], strict=False):
        if name == BODY_FIELD:
            return bytes(value)
    return b""


def _headers(fields: Any) -> Mapping[str, Any]:
    """The other fields of an entry, as text; ours have none."""
    if len(fields) <= (1 if isinstance(fields, dict) else 2):
        return NO_HEADERS
    pairs = fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2], strict=False)
    return {
        name.decode(errors="backslashreplace"): value.decode(errors="backslashreplace")
        for name, value in pairs
        if name != BODY_FIELD
    }
