"""What gateway and console share at their doors: budgets, proxies, names."""

from __future__ import annotations

import time
from ipaddress import ip_network
from typing import Any

import pytest

from tombola.producers.domain.errors import InvalidRequest, WrongHost, WrongOrigin
from tombola.producers.web import budget
from tombola.producers.web.budget import Budget
from tombola.producers.web.headers import once
from tombola.producers.web.hosts import Hosts
from tombola.producers.web.proxies import Proxies, subscriber

pytestmark = pytest.mark.slow

# ---- budgets ---------------------------------------------------------------------------------------------------------


class Clock:
    """Stands still until it is told."""

    s = 0.0

    def __call__(self) -> float:
        return self.s


def test_a_budget_is_saved_up_for_a_second() -> None:
    clock = Clock()
    one = Budget(10, now=clock)
    assert [one.take("a") for _ in range(12)] == [True] * 10 + [False] * 2
    assert one.take("b"), "another's is another's"
    clock.s += 0.25
    assert [one.take("a") for _ in range(3)] == [True, True, False]
    clock.s += 100
    assert [one.take("a") for _ in range(12)].count(True) == 10


def test_what_turns_out_to_be_more_counts_as_much() -> None:
    clock = Clock()
    one = Budget(150, now=clock)
    assert one.take("a")
    assert one.take_more("a", 99)
    assert one.take("a")
    assert not one.take_more("a", 99)
    assert one.take_more("a", 49)
    assert not one.take("a")
    # What is more than there can ever be is let through to whoever is fresh, and owed.
    small = Budget(30, now=clock)
    assert small.take("a")
    assert small.take_more("a", 99)
    clock.s += 2.0
    assert not small.take("a")
    clock.s += 1.5
    assert small.take("a")
    least = Budget(1, now=clock)
    assert least.take("a")
    assert least.take_more("a", 1)


def test_a_budget_does_not_remember_everybody() -> None:
    one = Budget(1)
    for number in range(budget.REMEMBERED_MAX + 100):
        assert one.take(str(number))
    assert len(one._left) == budget.REMEMBERED_MAX


# ---- proxies ---------------------------------------------------------------------------------------------------------

TRUSTED = Proxies([ip_network(it) for it in ("10.0.0.0/8", "2001:db8::/64", "192.0.2.1/32")])


def seen(peer: str, *headers: tuple[str, str], proxies: Proxies = TRUSTED) -> str:
    scope: dict[str, Any] = {"client": (peer, 4711), "scheme": "http"}
    scope["headers"] = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    proxies.apply(scope)
    return str(scope["client"][0])


@pytest.mark.parametrize(
    ("peer", "said", "meant"),
    [
        ("198.51.100.9", "1.2.3.4", "198.51.100.9"),  # no proxy of ours: whatever it says
        ("10.0.0.1", "1.2.3.4", "1.2.3.4"),
        ("10.0.0.1", "6.6.6.6, 1.2.3.4", "1.2.3.4"),  # what stands before was there when the proxy was called
        ("10.0.0.1", "6.6.6.6, 1.2.3.4, 10.9.9.9", "1.2.3.4"),
        ("10.0.0.1", "10.1.1.1, 10.2.2.2", "10.1.1.1"),
        ("10.0.0.1", "1.2.3.4:5678", "1.2.3.4"),
        ("10.0.0.1", "2001:DB8:1::7", "2001:db8:1::7"),
        ("10.0.0.1", "[2001:db8:1::7]:443", "2001:db8:1::7"),
        ("2001:db8::5", "1.2.3.4", "1.2.3.4"),
        ("::ffff:10.0.0.1", "1.2.3.4", "1.2.3.4"),
        ("10.0.0.1", "1.2.3.4, unknown, 10.2.2.2", "10.2.2.2"),  # known up to there
        ("10.0.0.1", "1.2.3.4, ", "10.0.0.1"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "x" * 10_000, "10.0.0.1"),
        ("10.0.0.1", ",".join(["10.0.0.2"] * 5000), "10.0.0.2"),
    ],
)
def test_the_address_is_the_first_from_the_right_that_is_no_proxy_of_ours(peer: str, said: str, meant: str) -> None:
    assert seen(peer, ("x-forwarded-for", said)) == meant
    standard = ",".join(f'for="{hop.strip()}";proto=https;by=x' for hop in said.split(",")) if said else ""
    assert seen(peer, ("forwarded", standard)) == meant
    assert seen(peer, ("forwarded", standard), ("x-forwarded-for", said)) == meant


def test_a_header_that_comes_twice_is_one_list() -> None:
    assert seen("10.0.0.1", ("x-forwarded-for", "6.6.6.6"), ("x-forwarded-for", "1.2.3.4")) == "1.2.3.4"


def test_a_header_that_the_proxy_does_not_know_cannot_say_another_address() -> None:
    assert seen("10.0.0.1", ("forwarded", "for=6.6.6.6"), ("x-forwarded-for", "1.2.3.4")) == "10.0.0.1"


def test_without_proxies_nothing_is_believed() -> None:
    assert seen("10.0.0.1", ("x-forwarded-for", "1.2.3.4"), proxies=Proxies([])) == "10.0.0.1"


@pytest.mark.parametrize(
    ("peer", "headers", "scheme"),
    [
        ("10.0.0.1", [("x-forwarded-proto", "https")], "https"),
        ("10.0.0.1", [("x-forwarded-proto", "https,http")], "http"),
        ("10.0.0.1", [("forwarded", "for=1.2.3.4;proto=HTTPS")], "https"),
        ("10.0.0.1", [("forwarded", "proto=https"), ("x-forwarded-proto", "http")], "http"),
        ("10.0.0.1", [("x-forwarded-proto", "gopher")], "http"),
        ("6.6.6.6", [("x-forwarded-proto", "https")], "http"),
    ],
)
def test_the_scheme_is_the_nearest_proxys(peer: str, headers: list[tuple[str, str]], scheme: str) -> None:
    scope: dict[str, Any] = {"client": (peer, 1), "scheme": "http"}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers]
    TRUSTED.apply(scope)
    assert scope["scheme"] == scheme


@pytest.mark.parametrize("text", ["a", "a=", "=", ";", '"', ",", "for=", "[", ":", "for=[::1]:1,"])
def test_what_strangers_forward_costs_no_more_than_its_length(text: str) -> None:
    began = time.process_time()
    for name in ("x-forwarded-for", "forwarded", "x-forwarded-proto"):
        seen("10.0.0.1", (name, text * (1_000_000 // len(text))))
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("address", "who"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:9::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("", ""),
        (":::", ":::"),
    ],
)
def test_a_subscriber_of_ipv6_is_one_however_many_addresses(address: str, who: str) -> None:
    assert subscriber(address) == who


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "shop.example",
        "SHOP.example:8000",
        "shop.example.",
        "a.b.shop.example",
        "localhost:1",
        "127.0.0.1",
        "[::1]:8000",
    ],
)
def test_ours_are_the_names_that_are_allowed(host: str) -> None:
    hosts = Hosts(["shop.example", "*.shop.example"])
    hosts.check(host.encode(), None)
    hosts.check(host.encode(), b"http://" + host.encode())
    with pytest.raises(WrongOrigin):
        hosts.check(host.encode(), b"https://evil.example")
    with pytest.raises(WrongOrigin):
        hosts.check(host.encode(), b"null")
    hosts.check(host.encode(), b"https://evil.example", origins={"https://evil.example"})


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example",
        b"shop.example.evil.example",
        b"evilshop.example",
        b"",
        None,
        b"[::1",
        b"shop.example:x",
        b"\xff",
    ],
)
def test_no_other_name_is(host: bytes | None) -> None:
    with pytest.raises(WrongHost):
        Hosts(["shop.example", "*.shop.example"]).check(host, None)
    Hosts([]).check(host, b"https://anywhere.example")


# ---- headers ---------------------------------------------------------------------------------------------------------


def test_a_header_that_may_come_once_does() -> None:
    headers = [(b"host", b"h"), (b"accept", b"a"), (b"accept", b"b"), (b"origin", b"o")]
    assert once(headers) == {b"host": b"h", b"origin": b"o"}
    for name in (b"authorization", b"content-type", b"host", b"idempotency-key", b"origin"):
        with pytest.raises(InvalidRequest, match="(?i)" + name.decode()):
            once([(name, b"a"), (b"x", b"y"), (name, b"a")])
