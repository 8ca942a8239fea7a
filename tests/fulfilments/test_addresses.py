"""Where a webhook may lead: https and public addresses, whatever notation, name or tunnel they hide behind."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import Any

import pytest

from tombola.producers.domain.errors import InvalidRequest
from tombola.worker.fulfilments.addresses import ADDRESSES_MAX, checked_url, is_public, resolve

PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8", "2002:808:808::1"]
PRIVATE = [
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "192.0.2.1"),
    *("169.254.169.254", "224.0.0.1", "239.1.1.1", "255.255.255.255", "198.18.0.1", "240.0.0.1"),
    *("::1", "::", "fe80::1", "fc00::1", "fd12:3456::1", "ff02::1", "2001:db8::1", "64:ff9b:1::1", "fec0::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a00:1", "64:ff9b::7f00:1"),
    *("2002:7f00:1::", "2002:a00:1::1"),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_allowed(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", PRIVATE)
def test_no_other_address_is(address: str) -> None:
    assert not is_public(ip_address(address))
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(InvalidRequest, match="not a public address"):
        checked_url(f"https://{host}/hook", is_private_allowed=False)
    assert checked_url(f"http://{host}/hook", is_private_allowed=True).host == address


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f000001", "0x7f.1", "017700000001", "10.1", "0"])
def test_other_notations_of_an_address_are_known(host: str) -> None:
    with pytest.raises(InvalidRequest, match="not a public address"):
        checked_url(f"https://{host}/", is_private_allowed=False)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://shop.example/", "begins with https://"),
        ("ftp://shop.example/", "begins with https://"),
        ("https:///path", "and a host"),
        ("https://", "and a host"),
        ("shop.example/hook", "begins with https://"),
        ("", "begins with https://"),
        ("https://ann:secret@shop.example/", "no user, no password"),
        ("https://shop.example/#part", "no user, no password and no fragment"),
        ("https://shop.example/ hook", "no blank"),
        ("https://shop.example/\r\nHost: other", "printable ASCII"),
        ("https://shop.example\\@10.0.0.1/", "no backslash"),
        ("https://shöp.example/", "printable ASCII"),
        ("https://shop.example:99999/", "not a URL"),
        ("https://shop.example:x/", "not a URL"),
        ("https://shop.example:0/", "a port is"),
        ("https://[::1/", "not a URL"),
        ("https://-shop.example/", "not the name of a host"),
        ("https://sh*p.example/", "not the name of a host"),
        ("https://shop..example/", "not the name of a host"),
        ("https://shop.example/" + "x" * 500, "at most 500 characters"),
    ],
)
def test_what_is_no_url_for_a_webhook_is_said(url: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        checked_url(url, is_private_allowed=False)


def test_the_parts_of_a_url() -> None:
    plain = checked_url("https://shop.example", is_private_allowed=False)
    assert (plain.host, plain.port, plain.path, plain.authority) == ("shop.example", 443, "/", "shop.example")
    assert plain.at("93.184.216.34") == "https://93.184.216.34:443/"
    full = checked_url("http://[::1]:8080/a/b?c=d", is_private_allowed=True)
    assert (full.authority, full.at("::1")) == ("[::1]:8080", "http://[::1]:8080/a/b?c=d")


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """A resolver that gives each answer once, in turn; the list is what it was asked for."""
    asked: list[str] = []
    left = list(answers)

    def getaddrinfo(host: str, port: int, **_options: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (it, port)) for it in left.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_only_public_addresses_of_a_host_are_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    target = checked_url("https://shop.example/", is_private_allowed=False)
    resolving(
        monkeypatch,
        ["10.0.0.1", "8.8.8.8", "8.8.8.8", "127.0.0.1"],
        ["10.0.0.1"],
        ["fe80::1%eth0"],
        ["10.0.0.1"],
        [f"8.8.8.{number}" for number in range(20)],
    )
    assert resolve(target, is_private_allowed=False) == ["8.8.8.8"]
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=r"shop.example resolves to \S+, which is not a public address"):
            resolve(target, is_private_allowed=False)
    assert resolve(target, is_private_allowed=True) == ["10.0.0.1"]
    assert len(resolve(target, is_private_allowed=False)) == ADDRESSES_MAX
