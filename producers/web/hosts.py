"""Which names we answer to (TOMBOLA_ALLOWED_HOSTS): a page must not reach us under a name of its own.

A page of evil.example can have that name lead to 127.0.0.1 after it was loaded, and is of the same origin as the server
there then (DNS rebinding). What gives it away is the name: browsers send it as `Host`, and the page's as `Origin`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Final

from tombola.producers.domain.errors import WrongHost, WrongOrigin

# Not another page's names, wherever they are said: health checks inside a container use them.
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Hosts:
    """The names that are allowed; all of them when there are none. `*.example.com` stands for every name below that."""

    def __init__(self, allowed: Iterable[str]) -> None:
        names = [name.lower() for name in allowed]
        self._names = LOOPBACK | {name for name in names if not name.startswith("*.")} if names else frozenset()
        self._ends = tuple(name[1:] for name in names if name.startswith("*."))

    def __bool__(self) -> bool:
        return bool(self._names)

    def check(self, host: bytes | None, origin: bytes | None, *, origins: Container[str] = ()) -> None:
        """Raises WrongHost, or WrongOrigin unless the origin is one of `origins`. Without a Host nothing is reached."""
        if not self._names:
            return
        if not self._has(_name_of((host or b"").decode("latin-1"))):
            raise WrongHost
        if origin is None:
            return
        said = origin.decode("latin-1")
        if said not in origins and not self._has(_name_of(said.partition("://")[2])):
            raise WrongOrigin

    def _has(self, name: str) -> bool:
        return name in self._names or (bool(self._ends) and name.endswith(self._ends))


def _name_of(host: str) -> str:
    """The name in `name:port`, without the port and the dot at the end of a full name."""
    name, colon, port = host.rpartition(":")
    if not colon or not (port.isdigit() or not port) or (host.startswith("[") and not name.endswith("]")):
        name = host
    return name.lower().removesuffix(".")
