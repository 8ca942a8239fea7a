"""Deliveries from a Redis Stream through a consumer group.

An entry that a consumer has read stays in the group's pending list until it is acked. When a consumer gives no sign of
life for `claim_after_s`, another consumer claims what it held: XPENDING says how often each entry was delivered, XCLAIM
takes it. (XAUTOCLAIM does both in one call, but does not return the count.)

XREADGROUP and XCLAIM count entries, not bytes, and both Redis and the worker would hold the whole reply. So while the
Stream holds more than a worker may take in, a script in Redis reads it in small slices and stops in time.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import redis

from tombola.producers.brokers.redis_clients import open_redis
from tombola.producers.brokers.streams import BODY_FIELD, GROUP, QUEUE, declare_group, stream_error_text
from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.domain.signatures import SIGNATURE, SIGNATURE_LENGTH
from tombola.worker.deliveries import HELD_BYTES_MAX, NO_HEADERS, Delivery, received

READ_TIMEOUT_S: Final = 10.0
NO_BLOCK_PAUSE_S: Final = 0.01  # with a server that cannot BLOCK (fakeredis): do not spin
CLAIM_LOOKS_PER_TERM: Final = 5  # how often within claim_after_s a busy consumer looks for entries to claim
CLAIM_LOOK_EVERY_S_MAX: Final = 5.0
HEADERS_KEPT_BYTES_MAX: Final = 16 * 1024  # of an entry's fields beside the body; a dead letter keeps less
TAGS_PER_COMMAND: Final = 1000
SIGNATURE_FIELD: Final = SIGNATURE.encode()
# How long a measured size of the Stream is believed; entries added in between are read unmeasured.
SMALL_FOR_S: Final = 0.1
LARGE_FOR_S: Final = 1.0

# Bytes in the Stream, or -1 if it is too long to be measured: a walk takes a microsecond for some 20 small draws.
_SIZE: Final = """
if redis.call('XLEN', KEYS[1]) > 100000 then return -1 end
local bytes = redis.pcall('MEMORY', 'USAGE', KEYS[1], 'SAMPLES', 0)
return type(bytes) == 'number' and bytes or -1
"""

_SLICED: Final = """
local SLICE = 4
local function weight(fields)
  local bytes = 0
  for i = 1, #fields do bytes = bytes + #fields[i] end
  return bytes
end
"""

# XREADGROUP without BLOCK, until there are enough entries or bytes.
_READ: Final = (
    _SLICED
    + """
local found, left, room = {}, tonumber(ARGV[3]), tonumber(ARGV[4])
while left > 0 and room > 0 do
  local asked = math.min(SLICE, left)
  local reply = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', asked, 'STREAMS', KEYS[1], '>')
  if not reply then break end
  for _, entry in ipairs(reply[1][2]) do
    found[#found + 1] = entry
    room = room - weight(entry[2])
  end
  left = left - asked
end
return found
"""
)

# Claim what has been idle for too long, with its counts, until there are enough entries or bytes.
_CLAIM: Final = (
    _SLICED
    + """
local found, room = {}, tonumber(ARGV[5])
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[3], '-', '+', ARGV[4])
for first = 1, #pending, SLICE do
  if room <= 0 then break end
  local gone, counts, tags = {}, {}, {}
  for i = first, math.min(first + SLICE - 1, #pending) do
    local tag = pending[i][1]
    gone[tag], counts[tag], tags[#tags + 1] = true, pending[i][4] + 1, tag
  end
  for _, entry in ipairs(redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], unpack(tags))) do
    if entry and entry[2] then
      gone[entry[1]] = nil
      found[#found + 1] = {entry[1], entry[2], counts[entry[1]]}
      room = room - weight(entry[2])
    end
  end
  -- Deleted entries: Redis before 7 would keep them pending for ever.
  for tag in pairs(gone) do redis.call('XACK', KEYS[1], ARGV[1], tag) end
end
return found
"""
)

# Only entries that are still ours: otherwise a claim would take back what another consumer has claimed since. The tags
# are in order.
_KEEP: Final = """
local mine, command = {}, {'XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0}
for _, entry in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[#ARGV], 1000000, ARGV[2])) do
  mine[entry[1]] = true
end
for i = 3, #ARGV do
  if mine[ARGV[i]] then command[#command + 1] = ARGV[i] end
end
local kept = #command - 5
command[#command + 1] = 'JUSTID'
if kept > 0 then redis.call(unpack(command)) end
return kept
"""

# Idempotent: an entry that was requeued is no longer there.
_REQUEUE: Final = """
for i = 2, #ARGV do
  local entry = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
  if entry then
    redis.call('XADD', KEYS[1], '*', unpack(entry[2]))
    redis.call('XDEL', KEYS[1], ARGV[i])
  end
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[i])
end
"""

# A consumer that holds entries must not be deleted: its pending list would be deleted with it.
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
        # Raw replies: redis-py's own parsing takes longer than reading them.
        for command in ("XREADGROUP", "XPENDING", "XCLAIM"):
            self._client.set_response_callback(command, _as_it_is)
        self._read_script = self._client.register_script(_READ)
        self._claim_script = self._client.register_script(_CLAIM)
        self._keep_script = self._client.register_script(_KEEP)
        self._requeue_script = self._client.register_script(_REQUEUE)
        self._claim_after_ms = int(claim_after_s * 1000)
        self._claim_every_s = min(CLAIM_LOOK_EVERY_S_MAX, claim_after_s / CLAIM_LOOKS_PER_TERM)
        self._next_claim = 0.0
        self._is_large = False
        self._next_look_at_size = 0.0
        self._declared = False
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"

    def fetch(self, count_max: int, *, wait_s: float) -> list[Delivery]:
        try:
            if not self._declared:
                declare_group(self._client)
                self._declared = True
            if time.monotonic() < self._next_claim:
                fetched = self._read(count_max, min(wait_s, self._claim_every_s))
            else:
                fetched = self._share(count_max, min(wait_s, self._claim_every_s))
            if not fetched:
                self._next_claim = 0.0  # idle: there is time to look for entries to claim
            return fetched
        except redis.RedisError as error:
            self._declared = False  # FLUSHALL deletes the group as well
            raise ServiceUnavailable(f"the Stream cannot be read: {stream_error_text(error)}") from error

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        if not deliveries:
            return
        tags = [delivery.tag for delivery in deliveries]
        # Delete what is acked: a Stream keeps its entries, and Redis is memory. Delete first: an entry that is deleted
        # and pending is acked by the next claim. Not in MULTI: a full Redis refuses all of it.
        with _outages("acked"), self._client.pipeline(transaction=False) as pipeline:
            pipeline.execute_command("XDEL", QUEUE, *tags)
            pipeline.execute_command("XACK", QUEUE, GROUP, *tags)
            if is_look_due := self._is_look_at_size_due():  # in this pipeline it needs no round trip of its own
                pipeline.eval(_SIZE, 1, QUEUE)
            replies = pipeline.execute()
            if is_look_due:
                self._learn_size(replies[-1])

    def keep(self, deliveries: Sequence[Delivery]) -> None:
        tags = sorted((delivery.tag for delivery in deliveries), key=_place)
        with _outages("kept"):
            for some in _chunks(tags):
                try:
                    self._keep_script(keys=[QUEUE], args=[GROUP, self.consumer, *some])
                except redis.ResponseError as error:
                    if "NOGROUP" not in str(error):  # the Stream is gone: the next fetch declares the group again
                        raise

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        with _outages("requeued"):
            for some in _chunks([delivery.tag for delivery in deliveries]):
                self._requeue_script(keys=[QUEUE], args=[GROUP, *some])

    def release(self) -> None:
        with suppress(redis.RedisError):
            self._release()

    def fetch_dead(self, count_max: int) -> list[Delivery]:
        return []  # a Stream gives up on no message

    def ack_dead(self, deliveries: Sequence[Delivery]) -> None:
        return

    def close(self) -> None:
        self.release()
        with suppress(redis.RedisError):
            forget_consumers(self._client, name=self.consumer)
        with suppress(redis.RedisError):
            self._client.close()

    def _release(self) -> None:
        """Mark what this consumer holds as long idle, so that other consumers can claim it at once."""
        first: Any = "-"
        while True:
            pending: Any = self._client.execute_command(
                "XPENDING", QUEUE, GROUP, first, "+", TAGS_PER_COMMAND, self.consumer, parse_detail=True
            )
            if not pending:
                return
            tags = [entry[0] for entry in pending]
            self._client.execute_command(
                "XCLAIM", QUEUE, GROUP, self.consumer, 0, *tags, "IDLE", self._claim_after_ms, "JUSTID"
            )
            first = b"(" + tags[-1]

    def _share(self, count_max: int, wait_s: float) -> list[Delivery]:
        """A batch of which at most half is claimed from other consumers, so that new entries go on meanwhile."""
        claimed = self._claim((count_max + 1) // 2)
        if not claimed:
            self._next_claim = time.monotonic() + self._claim_every_s  # otherwise there may be more to claim
        if len(claimed) == count_max:
            return claimed
        return claimed + self._read(count_max - len(claimed), 0 if claimed else wait_s)

    def _read(self, count_max: int, wait_s: float) -> list[Delivery]:
        if self._look_at_size():
            entries: Any = self._read_script(keys=[QUEUE], args=[GROUP, self.consumer, count_max, HELD_BYTES_MAX])
            if entries or wait_s <= 0:
                return [_delivery(tag, fields) for tag, fields in entries]
            count_max = 1
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
        return [_delivery(tag, fields) for tag, fields in entries]

    def _look_at_size(self) -> bool:
        """Whether the Stream holds more bytes than one fetch may take in; measured if it is time."""
        if self._is_look_at_size_due():
            self._learn_size(self._client.eval(_SIZE, 1, QUEUE))
        return self._is_large

    def _is_look_at_size_due(self) -> bool:
        return time.monotonic() >= self._next_look_at_size

    def _learn_size(self, size: Any) -> None:
        self._is_large = not 0 <= int(size) <= HELD_BYTES_MAX
        self._next_look_at_size = time.monotonic() + (LARGE_FOR_S if self._is_large else SMALL_FOR_S)

    def _claim(self, count_max: int) -> list[Delivery]:
        claimed: Any = self._claim_script(
            keys=[QUEUE], args=[GROUP, self.consumer, self._claim_after_ms, count_max, HELD_BYTES_MAX // 2]
        )
        return [_delivery(tag, fields, int(count)) for tag, fields, count in claimed]


def forget_consumers(client: redis.Redis, *, name: str = "", idle_s: float = 3600) -> int:
    """Delete the consumer `name`, or all idle for `idle_s`, except those that hold entries; return how many.

    Consumers are named after their processes, so without this the group would remember every process for ever.
    """
    try:
        return int(client.eval(_FORGET, 1, QUEUE, GROUP, name, int(idle_s * 1000)))
    except redis.ResponseError as error:
        if "NOGROUP" in str(error) or "no such key" in str(error).lower():
            return 0
        raise


@contextmanager
def _outages(done: str) -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise ServiceUnavailable(f"the Stream's entries cannot be {done}: {stream_error_text(error)}") from error


def _as_it_is(reply: Any, **_options: Any) -> Any:
    return reply


def _place(tag: bytes | int) -> tuple[int, ...]:
    """The position of an entry in the Stream, for sorting."""
    return tuple(map(int, str(tag, "ascii").split("-"))) if isinstance(tag, bytes) else (tag,)


def _chunks(tags: Sequence[bytes | int]) -> Iterator[Sequence[bytes | int]]:
    return (tags[first : first + TAGS_PER_COMMAND] for first in range(0, len(tags), TAGS_PER_COMMAND))


def _delivery(tag: bytes, fields: Any, count: int = 1) -> Delivery:
    """An entry as a delivery. `fields` is a flat list of names and values, or a mapping."""
    if not isinstance(fields, dict) and fields[:1] == [BODY_FIELD]:  # ours
        if len(fields) == 2:
            return received(fields[1], tag, count)
        if len(fields) == 4 and fields[2] == SIGNATURE_FIELD and len(fields[3]) == SIGNATURE_LENGTH:
            return received(fields[1], tag, count, {SIGNATURE: fields[3].decode(errors="backslashreplace")})
    pairs = list(fields.items()) if isinstance(fields, dict) else list(zip(fields[::2], fields[1::2], strict=False))
    bodies = [value for name, value in pairs if name == BODY_FIELD]
    headers = _headers((name, value) for name, value in pairs if name != BODY_FIELD)
    if len(bodies) == 1:
        return received(bodies[0], tag, count, headers)
    # The body of the delivery is the whole entry, because a dead letter is found by its body: a hundred draws with a
    # misspelt field must not become one dead letter.
    body = b"\n".join(b"%b: %b" % pair for pair in pairs)
    problem = f"an entry of the Stream has one field `body`, this one has {len(bodies)}"
    return received(body, tag, count, headers, problem=problem)


def _headers(pairs: Iterable[tuple[bytes, bytes]]) -> Mapping[str, Any]:
    """The other fields of an entry, as text, up to HEADERS_KEPT_BYTES_MAX."""
    kept: dict[str, Any] = {}
    room = HEADERS_KEPT_BYTES_MAX
    for name, value in pairs:
        room -= len(name) + len(value)
        if room < 0:
            kept["…"] = "too long: the rest was left out"
            break
        kept[name.decode(errors="backslashreplace")] = value.decode(errors="backslashreplace")
    return kept or NO_HEADERS
