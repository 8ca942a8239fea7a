"""Where webhooks may lead: URLs as operators give them, and the addresses that their hosts resolve to.

A webhook makes this network's own machines send requests, so a URL could reach what no stranger should reach: a
database's port, a cloud's metadata service. Only public addresses and https are allowed, unless TOMBOLA_WEBHOOK_PRIVATE
says otherwise. A host is resolved once for each connection, and the connection goes to the address that was checked: a
name that resolves to another address a moment later (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from tombola.producers.domain.errors import InvalidRequest

URL_LENGTH_MAX: Final = 500
ADDRESSES_MAX: Final = 4  # of one host, tried one after the other
_NAT64: Final = IPv6Network("64:ff9b::/96")
# Which of these the module ipaddress knows depends on Python's release: RFC 8215, RFC 3879.
_LOCAL: Final = (IPv6Network("64:ff9b:1::/48"), IPv6Network("fec0::/10"))
_is_host_name = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?"
).fullmatch

Address = IPv4Address | IPv6Address


class Target(NamedTuple):
    """A checked URL: `path` with its query, and the `port` that the scheme implies where the URL names none."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The value of `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def at(self, address: str) -> str:
        """The URL with `address` in place of the host."""
        host = f"[{address}]" if ":" in address else address
        return f"{self.scheme}://{host}:{self.port}{self.path}"


_PORTS: Final = {"https": 443, "http": 80}


def checked_url(url: str, *, is_private_allowed: bool) -> Target:
    """The parts of a webhook's URL. Raises InvalidRequest, which says what is wrong with it."""
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise InvalidRequest("a webhook's URL has printable ASCII characters only, no blank and no backslash")
    if len(url) > URL_LENGTH_MAX:
        raise InvalidRequest(f"a webhook's URL has at most {URL_LENGTH_MAX} characters, this one has {len(url):,}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidRequest(f"this is not a URL: {error!s:.100}") from None
    schemes = ("https", "http") if is_private_allowed else ("https",)
    if parts.scheme not in schemes or not parts.hostname:
        plain = "" if is_private_allowed else " (http only with TOMBOLA_WEBHOOK_PRIVATE)"
        raise InvalidRequest(
            f"a webhook's URL begins with {' or '.join(f'{it}://' for it in schemes)} and a host{plain}"
        )
    if "@" in parts.netloc or "#" in url:
        # The receiver would not see a fragment, and a password in a URL ends up in logs and lists.
        raise InvalidRequest(
            "a webhook's URL has no user, no password and no fragment: the signature proves the sender"
        )
    if port == 0:
        raise InvalidRequest("a port is 1 to 65535")
    host = parts.hostname
    address = _address(host)
    if address is None and not _is_host_name(host):
        raise InvalidRequest(f"{host!r:.100} is not the name of a host")
    if address is not None and not is_private_allowed and not is_public(address):
        raise InvalidRequest(f"{host} is not a public address: allow it with TOMBOLA_WEBHOOK_PRIVATE, if that is meant")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port or _PORTS[parts.scheme], path)


def resolve(target: Target, *, is_private_allowed: bool) -> list[str]:
    """The addresses of the target's host that a connection may go to, ADDRESSES_MAX at most.

    Blocks as long as the system's resolver does. Raises OSError for a host that cannot be resolved, InvalidRequest when
    it resolves to addresses that are not allowed only.
    """
    found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(it[4][0]).partition("%")[0] for it in found))
    allowed = [it for it in addresses if is_private_allowed or is_public(ip_address(it))]
    if not allowed:
        raise InvalidRequest(f"{target.host} resolves to {addresses[0]}, which is not a public address")
    return allowed[:ADDRESSES_MAX]


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, also where it stands for an IPv4 address inside of it."""
    if any(address in network for network in _LOCAL):
        return False
    return all(it.is_global and not it.is_multicast for it in _meant(address))


def _meant(address: Address) -> Iterator[Address]:
    """The address, and the IPv4 addresses that a tunnel or a translator would take it to."""
    yield address
    if isinstance(address, IPv4Address):
        return
    for inner in (address.ipv4_mapped, address.sixtofour, *(address.teredo or ())):
        if inner is not None:
            yield inner
    if address in _NAT64:
        yield IPv4Address(int(address) & 0xFFFFFFFF)


def _address(host: str) -> Address | None:
    """The address that a host is, in any of the notations that a resolver takes for one; None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        pass
    try:
        # `127.1`, `0x7f000001` and `2130706433` are 127.0.0.1 to a resolver.
        return IPv4Address(socket.inet_aton(host)) if re.fullmatch(r"[0-9a-fA-FxX.]+", host) else None
    except (OSError, ValueError):
        return None
