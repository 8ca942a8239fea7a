"""Redis clients that reconnect by themselves when their address leads to another server after a failover.

A server that has become a replica keeps its connections: it refuses writes, serves reads from old data, and a
subscriber may hear nothing. So a connection sends HELLO when it is opened, and every LOOK_EVERY_S while it is used: the
reply has the server's role, and whether it is a Cluster. A wrong role is raised as an error of the connection: redis-py
closes the connection, opens a new one, and tries once more.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any, Final
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from tombola.producers.brokers.registry import REDIS, find_kind
from tombola.producers.domain.errors import ConfigurationError

LOOK_EVERY_S: Final = 2.0
START_TIMEOUT_S: Final = 3.0

# Errors of a server that has become a replica, or has lost its replicas: the address may lead to another server.
_ELSEWHERE: Final = ("READONLY", "UNBLOCKED", "MASTERDOWN", "NOREPLICAS")
_ELSEWHERE_CLASSES: Final = (redis.exceptions.ReadOnlyError, redis.exceptions.MasterDownError)
_IN_SCRIPT: Final = "-READONLY "  # in Redis before 7, part of the script's error


class NotPrimary(redis.ConnectionError):
    """The server is a replica, or is no longer a primary."""


class UnsupportedRedis(ConfigurationError, redis.RedisError):
    """A kind of Redis that tombola does not support: waiting does not help."""


def open_redis(url: str, *, timeout_s: float = 10.0) -> redis.Redis:
    """A client that returns bytes, and gives a silent server up after `timeout_s`."""
    return redis.Redis.from_url(
        url,
        connection_class=_CLASSES.get(urlsplit(url).scheme, PrimaryConnection),
        socket_timeout=timeout_s,
        socket_connect_timeout=5,
        socket_keepalive=True,
        health_check_interval=30,
        retry=Retry(
            NoBackoff(), 1, supported_errors=(NotPrimary,)
        ),  # nothing was written: the address may lead to the primary now
    )


def open_async_pool(url: str, *, timeout_s: float, connections_max: int) -> redis.asyncio.BlockingConnectionPool:
    """The connections of an event loop: while all are in use, a caller waits for a free one."""
    return redis.asyncio.BlockingConnectionPool.from_url(
        url,
        connection_class=_ASYNC_CLASSES.get(urlsplit(url).scheme, AsyncPrimaryConnection),
        max_connections=connections_max,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=redis.asyncio.retry.Retry(NoBackoff(), 1, supported_errors=(NotPrimary,)),
    )


def refuse_unsupported(*urls: str) -> None:
    """Raise UnsupportedRedis for a kind of Redis that tombola does not support; a server that is away is accepted."""
    for url in urls:
        if find_kind(url) is not REDIS:
            continue
        with closing(open_redis(url, timeout_s=START_TIMEOUT_S)) as client:
            client.set_retry(Retry(NoBackoff(), 0))
            try:
                client.ping()
            except UnsupportedRedis:
                raise
            except redis.RedisError:
                continue


def _check(hello: Any) -> None:
    """Raise unless `hello` is the reply of a primary that is not part of a Cluster."""
    if not isinstance(hello, dict):
        hello = dict(zip(hello[::2], hello[1::2], strict=False)) if isinstance(hello, list) else {}
    fields = {_text(name): _text(value) for name, value in hello.items()}
    if fields.get("mode") == "cluster":
        raise UnsupportedRedis(
            "this is a Redis Cluster, which tombola does not support yet: use a single primary with replicas"
        )
    if fields.get("mode") == "sentinel":
        raise UnsupportedRedis("this is a Redis Sentinel: use the address of the primary that it watches")
    if fields.get("role", "master") not in ("master", "primary"):
        raise NotPrimary("this Redis is a replica: draws and results are written at its primary")


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _leads_elsewhere(error: redis.ResponseError) -> bool:
    text = str(error)
    return isinstance(error, _ELSEWHERE_CLASSES) or text.startswith(_ELSEWHERE) or _IN_SCRIPT in text


class _ToPrimary:
    """A connection of redis-py that accepts only a primary."""

    _next_look = 0.0

    def on_connect_check_health(self, check_health: bool = True) -> None:
        super().on_connect_check_health(check_health=check_health)  # type: ignore[misc]
        self._look()

    def check_health(self) -> None:
        super().check_health()  # type: ignore[misc]
        if time.monotonic() >= self._next_look:
            self._look()

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)  # type: ignore[misc]
        except redis.ResponseError as error:
            if not _leads_elsewhere(error):
                raise
            self.disconnect()  # type: ignore[attr-defined]
            raise NotPrimary(f"this Redis takes no writes: {error}") from error

    def _look(self) -> None:
        self._next_look = time.monotonic() + LOOK_EVERY_S
        try:
            self.send_command("HELLO", check_health=False)  # type: ignore[attr-defined]
            _check(self.read_response())
        except redis.ResponseError:
            pass  # a server like Redis that does not know HELLO
        except (NotPrimary, UnsupportedRedis):
            self.disconnect()  # type: ignore[attr-defined]
            raise


class _AsyncToPrimary:
    """_ToPrimary for redis-py's connections in an event loop."""

    _next_look = 0.0

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        await super().on_connect_check_health(check_health=check_health)  # type: ignore[misc]
        await self._look()

    async def check_health(self) -> None:
        await super().check_health()  # type: ignore[misc]
        if time.monotonic() >= self._next_look:
            await self._look()

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)  # type: ignore[misc]
        except redis.ResponseError as error:
            if not _leads_elsewhere(error):
                raise
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise NotPrimary(f"this Redis takes no writes: {error}") from error

    async def _look(self) -> None:
        self._next_look = time.monotonic() + LOOK_EVERY_S
        try:
            await self.send_command("HELLO", check_health=False)  # type: ignore[attr-defined]
            _check(await self.read_response())
        except redis.ResponseError:
            pass
        except (NotPrimary, UnsupportedRedis):
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise


class PrimaryConnection(_ToPrimary, redis.Connection):
    """A connection for clients that other libraries make: `connection_class=`."""


class TlsPrimaryConnection(_ToPrimary, redis.SSLConnection):
    """PrimaryConnection over TLS."""


class UnixPrimaryConnection(_ToPrimary, redis.UnixDomainSocketConnection):
    pass


class AsyncPrimaryConnection(_AsyncToPrimary, redis.asyncio.Connection):
    pass


class AsyncTlsPrimaryConnection(_AsyncToPrimary, redis.asyncio.SSLConnection):
    pass


class AsyncUnixPrimaryConnection(_AsyncToPrimary, redis.asyncio.UnixDomainSocketConnection):
    pass


_CLASSES: Final[dict[str, Any]] = {"rediss": TlsPrimaryConnection, "unix": UnixPrimaryConnection}
_ASYNC_CLASSES: Final[dict[str, Any]] = {"rediss": AsyncTlsPrimaryConnection, "unix": AsyncUnixPrimaryConnection}
