"""Request keys, session ids and the derived keys that make redelivery harmless. Pure: no I/O.

The formats are the owner's (ARCHITECTURE, Identifiers):

    request key      lottery_req_{timestamp ms}_{8 hex}_{3-digit seq}
    session id       lottery_tx_{timestamp ms}_{6 hex}_{3-digit seq}
    derived key      {request_key}:{type}
    standalone key   {business_type}_{account_id}_{timestamp ms}_{6 hex}
    alias            alias_{40 hex}: tombola's own, see `alias`

The keys of one process sort in the order in which it made them: time-ordered keys go to the end of a unique index, and
random keys all over it, which costs three quarters of the speed on a ledger of millions of rows.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
import time
from typing import Final

from tombola.producers.domain.errors import InvalidKey, InvalidRequest

REQUEST_KEY_LENGTH_MAX: Final = 64
SESSION_ID_LENGTH_MAX: Final = 100
DERIVED_KEY_LENGTH_MAX: Final = 100
# Begins the request keys by which holds and points expire: a caller who could take such a key would keep its points.
EXPIRY_PREFIX: Final = "expiry-"
_RESERVED: Final = frozenset({"alias_", EXPIRY_PREFIX[:6]})

# No colon: it separates a request key from the type of a derived key, so `a:consume` must never be a request key.
_is_request_key = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch
_is_session_id = re.compile(r"[A-Za-z0-9._-]{1,100}").fullmatch
_is_type = re.compile(r"[a-z][a-z0-9_]{0,34}").fullmatch
_is_caller = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch
_is_alias = re.compile(r"alias_[0-9a-f]{40}").fullmatch


def check_request_key(key: str) -> str:
    """Return `key` if it can be a request key, else raise InvalidKey with the reason."""
    if not _is_request_key(key):
        raise InvalidKey(_why_not("request key", key, REQUEST_KEY_LENGTH_MAX))
    return key


def check_session_id(session_id: str) -> str:
    """Return `session_id` if it can be a lottery session id, else raise InvalidKey with the reason."""
    if not _is_session_id(session_id):
        raise InvalidKey(_why_not("lottery session id", session_id, SESSION_ID_LENGTH_MAX))
    return session_id


def check_caller(caller: str) -> str:
    """Return `caller` if it can be a caller's name, else raise InvalidRequest."""
    if not _is_caller(caller):
        raise InvalidRequest(f"a caller's name is 1 to 64 characters of A-Z a-z 0-9 . _ and -: {caller!r:.80}")
    return caller


def alias(caller: str, name: str) -> str:
    """The alias of `caller` for a request key or session id that another caller holds: always the same, 46 characters.

    Names of this form are refused in requests (`is_alias`), so no caller can take the alias of another one.
    """
    digest = hashlib.sha256(f"{caller}:{name}".encode())  # neither has a colon
    return f"alias_{digest.hexdigest()[:40]}"


def is_alias(name: str) -> bool:
    """Whether a request key or session id has the form of an alias."""
    return name[:6] == "alias_" and _is_alias(name) is not None


def is_reserved(name: str) -> bool:
    """Whether only tombola itself gives a request key or session id of this form: an alias, or an expiry's name."""
    return name[:6] in _RESERVED and (name[:7] == EXPIRY_PREFIX or is_alias(name))


def reserved_for(name: str) -> str:
    """What a reserved name is, in words."""
    return "an expiry's key" if name.startswith(EXPIRY_PREFIX) else "an alias"


def derive(request_key: str, entry_type: str) -> str:
    """Return the idempotency key of one ledger row: `{request_key}:{entry_type}`.

    Raises InvalidKey when the result would be ambiguous or too long for its column.
    """
    check_request_key(request_key)
    if not _is_type(entry_type):
        raise InvalidKey(
            f"a ledger entry type is 1 to 35 characters of a-z 0-9 and _, and begins with a letter: {entry_type!r:.60}"
        )
    return f"{request_key}:{entry_type}"


def make_request_key() -> str:
    """Make a new request key, 37 characters."""
    timestamp_ms, entropy, sequence = _request_clock.tick()
    return f"lottery_req_{timestamp_ms}_{entropy:08x}_{sequence:03d}"


def make_session_id() -> str:
    """Make a new lottery session id, 34 characters."""
    timestamp_ms, entropy, sequence = _session_clock.tick()
    return f"lottery_tx_{timestamp_ms}_{entropy:06x}_{sequence:03d}"


def make_standalone_key(business_type: str, account_id: int) -> str:
    """Make the idempotency key of a ledger row that belongs to no request (recharge, transfer, refund).

    Raises InvalidKey for a business type that is not an identifier, or an account id below 1.
    """
    if not _is_type(business_type):
        raise InvalidKey(f"a business type is 1 to 35 characters of a-z 0-9 and _: {business_type!r:.60}")
    if account_id < 1:
        raise InvalidKey(f"an account id is a positive integer: {account_id}")
    timestamp_ms, entropy, _ = _standalone_clock.tick()
    return f"{business_type}_{account_id}_{timestamp_ms}_{entropy:06x}"


def make_act_key(act: str) -> str:
    """Make the key of one operator action: `{act}_{timestamp ms}_{6 hex}`, a valid request key."""
    timestamp_ms, entropy, _ = _standalone_clock.tick()
    return check_request_key(f"{act}_{timestamp_ms}_{entropy:06x}")


def _why_not(what: str, key: str, length_max: int) -> str:
    if not key:
        return f"a {what} must not be empty"
    if len(key) > length_max:
        return f"a {what} has at most {length_max} characters, this one has {len(key)}"
    bad = sorted({character for character in key if not re.fullmatch(r"[A-Za-z0-9._-]", character)})
    return f"a {what} holds only A-Z a-z 0-9 . _ and -, this one holds {', '.join(map(repr, bad[:5]))}"


class _Clock:
    """Ticks (timestamp ms, entropy, sequence), in ascending order, and different in each process.

    Within a millisecond the entropy climbs in random steps from a random start. When the entropy would overflow, or the
    wall clock goes back, the timestamp is raised by 1 ms. The sequence counts every tick, modulo 1,000.
    """

    def __init__(self, entropy_bits: int) -> None:
        self._entropy_max = (1 << entropy_bits) - 1
        self._start_bits = entropy_bits - 1  # the upper half is room to climb
        self._step_bits = entropy_bits // 2
        self._forget()
        # A forked child must not continue its parent's state, nor inherit a lock that another thread holds.
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._timestamp_ms = 0
        self._entropy = 0
        self._sequence = secrets.randbelow(1000)

    def tick(self) -> tuple[int, int, int]:
        with self._lock:
            now_ms = time.time_ns() // 1_000_000
            self._sequence = (self._sequence + 1) % 1000
            entropy = self._entropy + 1 + secrets.randbits(self._step_bits)
            if now_ms > self._timestamp_ms or entropy > self._entropy_max:
                self._timestamp_ms = max(now_ms, self._timestamp_ms + 1)
                entropy = secrets.randbits(self._start_bits)
            self._entropy = entropy
            return self._timestamp_ms, entropy, self._sequence


_request_clock = _Clock(entropy_bits=32)
_session_clock = _Clock(entropy_bits=24)
_standalone_clock = _Clock(entropy_bits=24)
