"""The names that the server answers to (TOMBOLA_ALLOWED_HOSTS), against DNS rebinding.

A page of evil.example can change that name's address to 127.0.0.1 after it was loaded: for the browser, the server
there has the page's origin then. The name gives the page away: browsers send it as `Host`, and as `Origin`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Final

from tombola.producers.domain.errors import WrongHost, WrongOrigin

# Always allowed: no page of another machine has these names, and health checks inside a container use them.
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Hosts:
    """The allowed names; every name if `allowed` is empty. `*.example.com` allows every name below example.com."""

    def __init__(self, allowed: Iterable[str]) -> None:
        names = [name.lower() for name in allowed]
        self._names = LOOPBACK | {name for name in names if not name.startswith("*.")} if names else frozenset()
        self._ends = tuple(name[1:] for name in names if name.startswith("*."))

    def __bool__(self) -> bool:
        return bool(self._names)

    def check(self, host: bytes | None, origin: bytes | None, *, origins: Container[str] = ()) -> None:
        """Raise WrongHost for another or no host, and WrongOrigin for another origin that is not one of `origins`."""
        if not self._names:
            return
        if not self._has(_name_of((host or b"").decode("latin-1"))):
            raise WrongHost
        if origin is None:
            return
        text = origin.decode("latin-1")
        if text not in origins and not self._has(_name_of(text.partition("://")[2])):
            raise WrongOrigin

    def _has(self, name: str) -> bool:
        return name in self._names or (bool(self._ends) and name.endswith(self._ends))


def _name_of(host: str) -> str:
    """The name in `name:port`, without the port and the trailing dot of a fully qualified name."""
    name, colon, port = host.rpartition(":")
    if not colon or not (port.isdigit() or not port) or (host.startswith("[") and not name.endswith("]")):
        name = host
    return name.lower().removesuffix(".")
