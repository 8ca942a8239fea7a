"""A TCP address that moves from one server to another, as a database's address does at a failover.

with proxies.Forwarder(server.port) as address:
    client = connect(address.port)
    address.move(other.port)     # for new connections; open connections stay
"""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any, Self

from redis import Redis

from tests import servers
from tests.processes import wait_for

HOST = "127.0.0.1"
CHUNK_BYTES = 65_536


class Forwarder:
    """Forwards TCP connections to a port of this machine, which can change."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server((HOST, 0))
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    @property
    def port(self) -> int:
        """The port that clients connect to."""
        return int(self._listener.getsockname()[1])

    def move(self, port: int) -> None:
        """Forward new connections to another port."""
        self._target = port

    def cut(self) -> None:
        """Break every open connection."""
        with self._lock:
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection((HOST, self._target), timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                sink.sendall(chunk)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._open.discard(source)
        source.close()


class RedisPair:
    """A primary and its replica."""

    def __init__(self, first: servers.Server, second: servers.Server) -> None:
        self.primary, self.replica = first, second
        self._command(second, "REPLICAOF", HOST, str(first.port))
        self._in_step()

    def fail_over(self, address: Forwarder, *, is_linked: bool = True) -> None:
        """Promote the replica and move the address; the old primary replicates it, or if not `is_linked`, no server."""
        self._in_step()
        old, new = self.primary, self.replica
        self._command(new, "REPLICAOF", "NO", "ONE")
        self._command(old, "REPLICAOF", HOST, str(new.port if is_linked else 1))
        address.move(new.port)
        self.primary, self.replica = new, old

    def relink(self) -> None:
        self._command(self.replica, "REPLICAOF", HOST, str(self.primary.port))
        self._in_step()

    def reset(self) -> None:
        self._command(self.primary, "FLUSHALL")
        self._in_step()

    def _in_step(self) -> None:
        with Redis.from_url(self.replica.url) as client, Redis.from_url(self.primary.url) as primary:
            wait_for(lambda: _is_in_step(client), within_s=20, what=lambda: str(client.info("replication")))
            primary.wait(1, 5000)

    @staticmethod
    def _command(server: servers.Server, *command: str) -> None:
        with Redis.from_url(server.url) as client:
            client.execute_command(*command)


def _is_in_step(replica: Redis) -> bool:
    told: Any = replica.info("replication")
    return bool(told.get("master_link_status") == "up")


@contextlib.contextmanager
def redis_pair() -> Iterator[RedisPair]:
    """Two private servers, the second a replica of the first."""
    quick = ("--repl-diskless-sync-delay", "0")
    with servers.redis(private=True, options=quick) as first, servers.redis(private=True, options=quick) as second:
        yield RedisPair(first, second)
