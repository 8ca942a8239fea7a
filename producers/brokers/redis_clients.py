"""Every Redis client of ours: it goes on by itself when its address leads to another server after a failover.

A server that has become a replica keeps its connections: it refuses writes, answers reads from what it has, and lets a
subscriber hear what it is told, or nothing. So a connection looks who is at its other end (HELLO, which also says
whether it is a Cluster) when it is made and every LOOK_EVERY_S that it is used, and what says that it is at the wrong
end is an error of the connection: redis-py lets go of it, connects anew, and tries once more.
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

# What a server answers that has become a replica, or has lost its replicas: another one may be behind the address.
_ELSEWHERE: Final = ("READONLY", "UNBLOCKED", "MASTERDOWN", "NOREPLICAS")
_ELSEWHERE_CLASSES: Final = (redis.exceptions.ReadOnlyError, redis.exceptions.MasterDownError)
_IN_SCRIPT: Final = "-READONLY "  # Redis before 7 tells it as an error of the script


class NotPrimary(redis.ConnectionError):
    """What we are connected to is a replica, or a primary no longer."""


class UnsupportedRedis(ConfigurationError, redis.RedisError):
    """A Redis that tombola cannot work with, however long it waits."""


def open_redis(url: str, *, timeout_s: float = 10.0) -> redis.Redis:
    """A client that gives up on a silent server after `timeout_s`, and speaks bytes."""
    return redis.Redis.from_url(
        url,
        connection_class=_CLASSES.get(urlsplit(url).scheme, Connection),
        socket_timeout=timeout_s,
        socket_connect_timeout=5,
        socket_keepalive=True,
        health_check_interval=30,
        retry=Retry(NoBackoff(), 1, supported_errors=(NotPrimary,)),  # nothing was written: the address may have moved
    )


def open_async_pool(url: str, *, timeout_s: float, connections_max: int) -> redis.asyncio.BlockingConnectionPool:
    """Connections of an event loop: a caller that finds all taken waits for one."""
    return redis.asyncio.BlockingConnectionPool.from_url(
        url,
        connection_class=_ASYNC_CLASSES.get(urlsplit(url).scheme, AsyncConnection),
        max_connections=connections_max,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=redis.asyncio.retry.Retry(NoBackoff(), 1, supported_errors=(NotPrimary,)),
    )


def refuse_unsupported(*urls: str) -> None:
    """Raise UnsupportedRedis for a Redis that tombola cannot work with. One that does not answer now is not refused."""
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
    """Raise for a reply to HELLO that is not a lone primary's."""
    if not isinstance(hello, dict):
        hello = dict(zip(hello[::2], hello[1::2], strict=False)) if isinstance(hello, list) else {}
    said = {_text(name): _text(value) for name, value in hello.items()}
    if said.get("mode") == "cluster":
        raise UnsupportedRedis(
            "this is a Redis Cluster, which tombola does not support yet: use a Redis that is not one, with replicas"
        )
    if said.get("mode") == "sentinel":
        raise UnsupportedRedis("this is a Redis Sentinel: use the address of the primary that it watches")
    if said.get("role", "master") not in ("master", "primary"):
        raise NotPrimary("this Redis is a replica: draws and results are written at its primary")


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _leads_elsewhere(error: redis.ResponseError) -> bool:
    said = str(error)
    return isinstance(error, _ELSEWHERE_CLASSES) or said.startswith(_ELSEWHERE) or _IN_SCRIPT in said


class _ToPrimary:
    """A connection of redis-py that leads to a primary."""

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
            pass  # something that is like Redis and does not know it
        except (NotPrimary, UnsupportedRedis):
            self.disconnect()  # type: ignore[attr-defined]
            raise


class _AsyncToPrimary:
    """The same for redis-py's connections in an event loop."""

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


class Connection(_ToPrimary, redis.Connection):
    """For clients that others make: `connection_class=`."""


class TlsConnection(_ToPrimary, redis.SSLConnection):
    """The same over TLS."""


class UnixConnection(_ToPrimary, redis.UnixDomainSocketConnection):
    pass


class AsyncConnection(_AsyncToPrimary, redis.asyncio.Connection):
    pass


class AsyncTlsConnection(_AsyncToPrimary, redis.asyncio.SSLConnection):
    pass


class AsyncUnixConnection(_AsyncToPrimary, redis.asyncio.UnixDomainSocketConnection):
    pass


_CLASSES: Final[dict[str, Any]] = {"rediss": TlsConnection, "unix": UnixConnection}
_ASYNC_CLASSES: Final[dict[str, Any]] = {"rediss": AsyncTlsConnection, "unix": AsyncUnixConnection}
