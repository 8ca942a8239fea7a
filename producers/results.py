"""Results by lottery session id, in the layout of Celery's Redis backend, with the database behind them.

Key `celery-task-meta-{lottery_session_id}`, Celery's envelope, SETEX and PUBLISH (celery/backends/redis.py): so
`AsyncResult(lottery_session_id).get(timeout=2)` works in any Celery shop. An envelope depends only on the first result
and the time when the request settled: a result that Redis has lost is rebuilt to the same bytes.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec
import redis
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.brokers.redis_clients import UnsupportedRedis, open_redis
from tombola.producers.domain.causes import Status, dead_because
from tombola.producers.domain.contract import DrawResult, Request, parse_result, parse_result_head
from tombola.producers.domain.errors import ConfigurationError, DrawDead, DrawError, ResultNotReady, ServiceUnavailable
from tombola.producers.domain.macs import hmac_sha256
from tombola.producers.settings import Settings
from tombola.producers.storage import requests
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.faults import explain

log = logging.getLogger(__name__)

ASK_DATABASE_AFTER_S: Final = 1.0
LOOK_TIMEOUT_S: Final = 2.0  # for reading: the database has the result as well
SCRIPT_KEYS_MAX: Final = 500  # Redis serves no other client while a script runs
KEY_PREFIX: Final = "celery-task-meta-"

# One command for a whole batch: the client packs each value once, and Redis runs one script. A full Redis cannot store
# a result, but still announces it to clients that wait now.
_PUT: Final = """
local ttl, full = ARGV[#KEYS + 1], nil
for i = 1, #KEYS do
  local reply = redis.pcall('SETEX', KEYS[i], ttl, ARGV[i])
  if reply.err then
    if not string.find(reply.err, 'OOM') then return reply end
    full = reply
  end
  redis.call('PUBLISH', KEYS[i], ARGV[i])
end
return full or #KEYS
"""

# The positions of keys without a result; the other results stay for as long as new ones.
_RENEW: Final = """
local lacking, head, ttl = {}, ARGV[1], ARGV[2]
for i = 1, #KEYS do
  if redis.pcall('GETRANGE', KEYS[i], 0, #head - 1) == head then
    redis.call('EXPIRE', KEYS[i], ttl)
  else
    lacking[#lacking + 1] = i
  end
end
return lacking
"""
_HEAD: Final = b'{"status":"SUCCESS",'

# The envelope of a dead draw, for Celery shops. NX: it never replaces a result that has come meanwhile.
_PUT_DEAD: Final = """
local ttl = ARGV[#KEYS + 1]
for i = 1, #KEYS do
  if redis.call('SET', KEYS[i], ARGV[i], 'EX', ttl, 'NX') then
    redis.call('PUBLISH', KEYS[i], ARGV[i])
  end
end
return #KEYS
"""
_FORGET_DEAD: Final = """
for i = 1, #KEYS do
  local kept = redis.pcall('GETRANGE', KEYS[i], 0, #ARGV[1] - 1)
  if kept == ARGV[1] then
    redis.call('DEL', KEYS[i])
  end
end
return #KEYS
"""
_DEAD_HEAD: Final = b'{"status":"FAILURE",'


class StoredResult(NamedTuple):
    """A result to store: `task_id` is the lottery session id, `body` the bytes of the first result."""

    task_id: str
    body: bytes
    settled_at: datetime

    def envelope(self, secret: bytes = b"") -> bytes:
        """Celery's envelope around the result: the same bytes whichever process makes it, and when.

        With a secret the envelope is sealed by a field `mac`, which Celery ignores.
        """
        return b'%b"result":%b,"traceback":null,"children":[],"date_done":"%b","task_id":"%b"%b}' % (
            _HEAD,
            self.body,
            _date_done(self.settled_at),
            self.task_id.encode(),
            b',"mac":"%b"' % _mac(self.body, secret) if secret else b"",
        )


@lru_cache(maxsize=64)
def _date_done(moment: datetime) -> bytes:
    """The same for all results of a batch."""
    return moment.isoformat(timespec="microseconds").encode()


def _dead_envelope(task_id: str, reason: str, died_at: datetime, secret: bytes) -> bytes:
    """Celery's envelope around a DrawDead, as its JSON backend writes exceptions, so that Celery shops can raise it."""
    error = {
        "exc_type": DrawDead.__qualname__,
        "exc_message": [dead_because(reason), reason],
        "exc_module": DrawDead.__module__,
    }
    body = msgspec.json.encode(error)
    seal = b',"mac":"%b"' % _mac(body + task_id.encode(), secret) if secret else b""
    return _DEAD_HEAD + b'"result":%b,"traceback":null,"children":[],"date_done":"%b","task_id":"%b"%b}' % (
        body,
        _date_done(died_at),
        task_id.encode(),
        seal,
    )


class ResultStore:
    """Stores results in Redis, where frontends read them, and rebuilds them. Safe to share between threads."""

    def __init__(self, client: redis.Redis, *, ttl_s: int, engine: Engine | None = None, secret: bytes = b"") -> None:
        self._client = client
        self._ttl_s = ttl_s
        self._engine = engine
        self._secret = secret
        self._put = client.register_script(_PUT)
        self._renew = client.register_script(_RENEW)
        self._put_dead = client.register_script(_PUT_DEAD)
        self._forget_dead = client.register_script(_FORGET_DEAD)

    @classmethod
    def open(
        cls,
        url: str,
        *,
        ttl_s: int,
        engine: Engine | None = None,
        secret: bytes = b"",
        timeout_s: float = 10.0,
    ) -> ResultStore:
        """The store behind a redis:// URL; it connects at first use. Without `engine` it cannot rebuild results.

        Each answer of Redis may take `timeout_s`.
        """
        return cls(open_redis(url, timeout_s=timeout_s), ttl_s=ttl_s, engine=engine, secret=secret)

    @classmethod
    def from_settings(cls, settings: Settings, *, engine: Engine | None = None, timeout_s: float = 10.0) -> ResultStore:
        """The store of these settings; see `open`."""
        url, secret = settings.need("result_url"), settings.result_secret_bytes
        return cls.open(url, ttl_s=settings.result_ttl_s, engine=engine, secret=secret, timeout_s=timeout_s)

    def put(self, results: Sequence[StoredResult]) -> None:
        """Store and announce `results`.

        Raises ServiceUnavailable when Redis does not store them; a full Redis announces them all the same.
        """
        if not results:
            return
        try:
            self._put(
                keys=[KEY_PREFIX + result.task_id for result in results],
                args=[*[result.envelope(self._secret) for result in results], self._ttl_s],
            )
        except redis.RedisError as error:
            raise ServiceUnavailable(f"the result store does not answer: {error}") from error

    def renew(self, lottery_session_ids: Sequence[str]) -> list[str]:
        """Keep the results of these sessions for as long as new ones; return the sessions without a result.

        For requests that were settled before: whoever waits for one subscribes first and reads then, so a result that
        is stored is not announced again. Raises ServiceUnavailable when Redis does not answer.
        """
        lacking: list[str] = []
        for some in chunks(lottery_session_ids, SCRIPT_KEYS_MAX):
            try:
                positions: Any = self._renew(keys=[KEY_PREFIX + it for it in some], args=[_HEAD, self._ttl_s])
            except redis.RedisError as error:
                raise ServiceUnavailable(f"the result store does not answer: {error}") from error
            lacking += [some[position - 1] for position in positions]
        return lacking

    def put_dead(self, dead: Sequence[Request], reason: str) -> None:
        """Store and announce that these draws are dead, for waiting clients and Celery shops; call it after the commit.

        It is only a hint: the database decides. Raises ServiceUnavailable when Redis does not store it.
        """
        now = utc_now()
        for some in chunks(dead, SCRIPT_KEYS_MAX):
            sessions = [it.lottery_session_id for it in some]
            try:
                self._put_dead(
                    keys=[KEY_PREFIX + it for it in sessions],
                    args=[*[_dead_envelope(it, reason, now, self._secret) for it in sessions], self._ttl_s],
                )
            except redis.RedisError as error:
                raise ServiceUnavailable(
                    f"the result store did not take {len(sessions)} dead draws: {error}"
                ) from error

    def forget_dead(self, revived: Sequence[Request]) -> None:
        """Remove the hints of `put_dead` for these draws, which are accepted again. Failures are only logged."""
        for some in chunks(revived, SCRIPT_KEYS_MAX):
            keys = [KEY_PREFIX + it.lottery_session_id for it in some]
            try:
                self._forget_dead(keys=keys, args=[_DEAD_HEAD])
            except redis.RedisError as error:
                log.warning("the result store still shows %d draws as dead: %s", len(keys), error)

    def get(self, lottery_session_id: str) -> bytes:
        """The first result's bytes, from Redis, or else rebuilt from the database and stored in Redis again.

        Raises ResultNotReady when neither has a result, DrawDead for a dead draw, ServiceUnavailable when neither
        answers.
        """
        body, outage = self._from_redis(lottery_session_id)
        if body is None and self._engine is not None:
            body = self._rebuild(lottery_session_id)
        if body is not None:
            return body
        if outage is not None:
            raise outage
        raise ResultNotReady(f"lottery session {lottery_session_id} has no result yet")

    def peek(self, lottery_session_id: str) -> bytes | None:
        """The first result's bytes if Redis has them; None otherwise, also when Redis does not answer."""
        return self._from_redis(lottery_session_id)[0]

    def peek_many(self, lottery_session_ids: Sequence[str]) -> list[bytes | None]:
        """The first results' bytes as Redis has them, None for each that it does not have. Nothing is rebuilt.

        Raises ServiceUnavailable when Redis does not answer.
        """
        found: list[bytes | None] = []
        for some in chunks(lottery_session_ids):
            try:
                stored: Any = self._client.mget([KEY_PREFIX + it for it in some])
            except UnsupportedRedis:
                raise
            except redis.RedisError as error:
                raise ServiceUnavailable(f"the result store does not answer: {error}") from error
            found += [
                None if value is None else unwrap(value, session_id, self._secret)
                for session_id, value in zip(some, stored, strict=True)
            ]
        return found

    def wait(self, lottery_session_id: str, *, timeout_s: float) -> DrawResult:
        """Wait for a draw's result; raises as `wait_for_body` does."""
        return parse_result(self.wait_for_body(lottery_session_id, timeout_s=timeout_s))

    def wait_for_body(self, lottery_session_id: str, *, timeout_s: float) -> bytes:
        """Wait for the first result's bytes, of a request of any kind.

        Raises ResultNotReady when there is no result after `timeout_s`, DrawDead once the request is dead.

        The call subscribes before it reads, so a result that comes in between is not missed. Redis may have lost an
        earlier result: after ASK_DATABASE_AFTER_S the database is asked as well, once.
        """
        deadline = time.monotonic() + timeout_s
        ask_at = time.monotonic() + ASK_DATABASE_AFTER_S
        try:
            with self._client.pubsub(ignore_subscribe_messages=True) as subscription:
                subscription.subscribe(KEY_PREFIX + lottery_session_id)
                subscription.get_message(timeout=timeout_s)
                body, _ = self._from_redis(lottery_session_id)
                while body is None and (now := time.monotonic()) < deadline:
                    until = deadline if ask_at <= now else min(ask_at, deadline)
                    message = subscription.get_message(timeout=until - now)
                    if message is not None:
                        body = unwrap(message["data"], lottery_session_id, self._secret)
                        is_doubtful = is_dead_envelope(message["data"], lottery_session_id, self._secret)
                    else:
                        is_doubtful = now < ask_at <= time.monotonic() < deadline
                    if is_doubtful:
                        body = self._ask_database(lottery_session_id)
        except UnsupportedRedis:
            raise
        except redis.RedisError:
            body = self._poll_database(lottery_session_id, deadline)
        return self.get(lottery_session_id) if body is None else body

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _from_redis(self, lottery_session_id: str) -> tuple[bytes | None, ServiceUnavailable | None]:
        try:
            stored: Any = self._client.get(KEY_PREFIX + lottery_session_id)
        except redis.ResponseError:  # another program's value is under that key
            return None, None
        except UnsupportedRedis:
            raise
        except redis.RedisError as error:
            return None, ServiceUnavailable(f"the result store does not answer: {error}")
        return (None if stored is None else unwrap(stored, lottery_session_id, self._secret)), None

    def _rebuild(self, lottery_session_id: str) -> bytes | None:
        assert self._engine is not None
        try:
            with self._engine.connect().execution_options(read_only=True) as connection:
                found = requests.state_of_session(connection, lottery_session_id)
        except SQLAlchemyError as error:
            raise explain(error) from error
        if found is not None and found.status == Status.DEAD:
            raise DrawDead(dead_because(found.reason), found.reason)
        if found is None or found.result is None or found.settled_at is None:
            return None
        with suppress(ServiceUnavailable):  # the answer does not need Redis
            self.put([StoredResult(lottery_session_id, found.result, found.settled_at)])
        return found.result

    def _ask_database(self, lottery_session_id: str) -> bytes | None:
        """The result as the database has it; None also while the database does not answer."""
        if self._engine is None:
            return None
        try:
            return self._rebuild(lottery_session_id)
        except (ServiceUnavailable, ConfigurationError):
            return None

    def _poll_database(self, lottery_session_id: str, deadline: float) -> bytes | None:
        while self._engine is not None and time.monotonic() < deadline:
            if (body := self._rebuild(lottery_session_id)) is not None:
                return body
            time.sleep(min(0.25, max(0.0, deadline - time.monotonic())))
        return None


class _Envelope(msgspec.Struct):
    status: str
    result: msgspec.Raw
    mac: str = ""
    task_id: str = ""


def _mac(body: bytes, secret: bytes) -> bytes:
    return hmac_sha256(secret, body).hex().encode()


_decode_envelope = msgspec.json.Decoder(_Envelope).decode


def unwrap(envelope: bytes, lottery_session_id: str, secret: bytes = b"") -> bytes | None:
    """The session's result inside an envelope; None for any other bytes.

    With a secret an envelope without its seal is None as well: write access to Redis is not enough to make a result up.
    """
    try:
        opened = _decode_envelope(envelope)
        body = bytes(opened.result)
        if secret and not hmac.compare_digest(_mac(body, secret), opened.mac.encode()):
            return None
        result = parse_result_head(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, DrawError):
        return None
    return body if result.lottery_session_id == lottery_session_id else None


def is_dead_envelope(envelope: bytes, lottery_session_id: str, secret: bytes = b"") -> bool:
    """Whether an envelope says that this session's draw is dead. Only a hint: ask the database."""
    if not envelope.startswith(_DEAD_HEAD):
        return False
    try:
        opened = _decode_envelope(envelope)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    seal = _mac(bytes(opened.result) + lottery_session_id.encode(), secret) if secret else b""
    is_sealed = not secret or hmac.compare_digest(seal, opened.mac.encode())
    return opened.task_id == lottery_session_id and is_sealed
