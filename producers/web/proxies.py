"""The client's address behind trusted proxies (TOMBOLA_TRUSTED_PROXIES).

A proxy appends the address of its peer to `X-Forwarded-For`, or to `Forwarded` (RFC 7239); earlier entries may be
forged. So both headers are read from the right, as long as the entries are trusted proxies. A header that the proxies
do not know may be forged as a whole: if both headers are present and disagree, both are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, Final

Network = IPv4Network | IPv6Network
Headers = Iterable[tuple[bytes, bytes]]

HOPS_MAX: Final = 20
_IPV6_SUBSCRIBER_BITS: Final = 64  # the prefix of one subscriber, or longer than it


class Proxies:
    """The trusted proxies."""

    def __init__(self, trusted: Sequence[Network]) -> None:
        self._trusted = tuple(trusted)

    def __bool__(self) -> bool:
        return bool(self._trusted)

    def apply(self, scope: Any) -> None:
        """Put the client's address and scheme into an ASGI scope, if the connection comes from a trusted proxy."""
        client = scope.get("client")
        if not self._trusted or not client or not self._is_trusted(client[0]):
            return
        scope["client"] = (self._caller(client[0], scope["headers"]), 0)
        scheme = _scheme(scope["headers"])
        if scheme:
            scope["scheme"] = scheme

    def _caller(self, peer: str, headers: Headers) -> str:
        plain, standard = _plain(headers), _standard(headers)
        found = {self._walk(peer, hops) for hops in (plain, standard) if hops}
        return found.pop() if len(found) == 1 else peer

    def _walk(self, peer: str, hops: Sequence[str]) -> str:
        """The first address from the right that is not a trusted proxy's; else the last one before an invalid entry."""
        known = peer
        for hop in reversed(hops[-HOPS_MAX:]):
            address = _address(hop)
            if address is None:
                return known
            known = address
            if not self._is_trusted(address):
                return known
        return known

    def _is_trusted(self, address: str) -> bool:
        try:
            parsed = ip_address(address)
        except ValueError:
            return False
        if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped:
            parsed = parsed.ipv4_mapped
        return any(parsed in network for network in self._trusted)


def subscriber(address: str) -> str:
    """The name of an address for limits: the /64 network of an IPv6 address, as one subscriber has 2**64 addresses."""
    if ":" not in address:
        return address
    try:
        parsed = IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(IPv6Network((parsed, _IPV6_SUBSCRIBER_BITS), strict=False))


def _values(headers: Headers, name: bytes) -> str:
    return ",".join(value.decode("latin-1") for key, value in headers if key == name)


def _plain(headers: Headers) -> list[str]:
    value = _values(headers, b"x-forwarded-for")
    return [hop.strip() for hop in value.split(",")] if value else []


def _standard(headers: Headers) -> list[str]:
    value = _values(headers, b"forwarded")
    return [_pairs(hop).get("for", "") for hop in value.split(",")] if value else []


def _pairs(hop: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in hop.split(";")]
    return {name.strip().lower(): value.strip().strip('"') for name, _, value in pairs}


def _address(hop: str) -> str | None:
    """The address in `192.0.2.7`, `192.0.2.7:8080`, `2001:db8::7` or `[2001:db8::7]:8080`; None for anything else."""
    if hop.startswith("["):
        hop = hop[1:].partition("]")[0]
    elif hop.count(":") == 1:
        hop = hop.partition(":")[0]
    try:
        return str(ip_address(hop))
    except ValueError:
        return None


def _scheme(headers: Headers) -> str | None:
    """The client's scheme, from the last entry, which the nearest proxy added; None if the headers disagree."""
    plain = _values(headers, b"x-forwarded-proto").rpartition(",")[2].strip().lower()
    standard = _pairs(_values(headers, b"forwarded").rpartition(",")[2]).get("proto", "").lower()
    schemes = {it for it in (plain, standard) if it}
    scheme = schemes.pop() if len(schemes) == 1 else ""
    return scheme if scheme in ("http", "https") else None
