"""The types of settings that are lists: networks, names of hosts, origins, validities of points."""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator


def _parts(value: object) -> object:
    """The parts of a list that commas separate."""
    return [part for it in value.split(",") if (part := it.strip())] if isinstance(value, str) else value


def _network(text: object) -> object:
    if not isinstance(text, str):
        return text
    try:
        return ip_network(text)
    except ValueError as error:
        raise ValueError(f"{text!r:.80} is not an address or a network: {error}") from None


def _host_name(name: str) -> str:
    if not _is_host_name(name):
        raise ValueError(f"{name!r:.80} is not the name of a host: give it without scheme, port and path")
    return name.lower()


def _origin(text: str) -> str:
    if text != "*" and not _is_origin(text):
        raise ValueError(f"{text!r:.80} is not an origin, such as https://shop.example or http://localhost:3000")
    return text.lower()


def _validities(value: object) -> object:
    """Days by asset, of `POINT=365, COIN=30`."""
    if not isinstance(value, str):
        return value
    found: dict[str, int] = {}
    for part in filter(None, (it.strip() for it in value.split(","))):
        asset, _, days = part.partition("=")
        if not _is_asset_code(asset) or asset in found or not _is_days(days) or int(days) > 36_500:
            raise ValueError(f"{part!r:.80} is not an asset, each once, with 1 to 36,500 days, such as POINT=365")
        found[asset] = int(days)
    return tuple(found.items())


_is_asset_code = re.compile(r"[A-Za-z0-9._-]{1,50}").fullmatch
_is_days = re.compile(r"[1-9][0-9]{0,4}").fullmatch
_is_host_name = re.compile(r"(\*\.)?[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]").fullmatch
_is_origin = re.compile(r"https?://([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?").fullmatch

Network = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]
Networks = Annotated[tuple[Network, ...], BeforeValidator(_parts)]
HostNames = Annotated[tuple[Annotated[str, AfterValidator(_host_name)], ...], BeforeValidator(_parts)]
Validities = Annotated[tuple[tuple[str, int], ...], BeforeValidator(_validities)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(_parts)]
