"""What strangers may do to a console: who share an operator's address, and pages that have their name lead here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_network
from pathlib import Path

import httpx
import pytest

from tests import servers
from tests.consoles import PASSWORD, Console, Visitor
from tests.processes import House, wait_for
from tombola.worker.console.security import login
from tombola.worker.operators import users as operators

pytestmark = pytest.mark.slow

OPERATOR, OTHER = "ann", "ben"
ONE, TWO = {"X_Forwarded_For": "192.0.2.1"}, {"X_Forwarded_For": "6.6.6.6, 192.0.2.2"}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    nowhere = f"redis://{servers.HOST}:1/0"
    with House(f"sqlite:///{tmp_path}/ledger.db", nowhere, nowhere) as house:
        for name in (OPERATOR, OTHER):
            operators.add(house.engine, name, "operator", PASSWORD, by="root")
        yield house


@pytest.fixture
def console(house: House) -> Iterator[Console]:
    more = {"trusted_proxies": (ip_network(servers.HOST),), "allowed_hosts": ("tombola.example",)}
    with Console(house.settings.model_copy(update=more)) as console:
        yield console


def status(console: Console, name: str, password: str, headers: dict[str, str]) -> int:
    with Visitor(console.url) as visitor:
        return visitor.log_in(name, password, **headers).status_code


@pytest.mark.slow
def test_wrong_logins_of_an_address_do_not_lock_its_operators_out(console: Console) -> None:
    """Strangers behind the same proxy, which somebody forgot to name, try one name after the other."""
    told = [status(console, f"user{number}", "guess", ONE) for number in range(21)]
    assert told == [401] * 20 + [429]
    began = time.monotonic()
    assert status(console, OPERATOR, PASSWORD, ONE) == 303
    # A wrong one is answered as for a name that there is not, and as slowly.
    for name in (OPERATOR, "nobody"):
        began = time.monotonic()
        assert status(console, name, "guess", ONE) == 429
        assert time.monotonic() - began >= login.REFUSAL_S
    assert status(console, "user99", "guess", TWO) == 401, "another address behind the proxy"


def test_one_name_has_few_tries_and_the_right_ones_cost_none(console: Console) -> None:
    for _ in range(7):
        assert status(console, OPERATOR, PASSWORD, ONE) == 303
    for _ in range(5):
        assert status(console, OPERATOR, "guess", ONE) == 401
    assert status(console, OPERATOR, PASSWORD, ONE) == 429
    assert status(console, OPERATOR, PASSWORD, TWO) == 303
    assert status(console, OTHER, PASSWORD, ONE) == 303


def test_tries_at_the_same_time_are_not_more_tries(console: Console) -> None:
    with ThreadPoolExecutor(12) as pool:
        told = list(pool.map(lambda _: status(console, OPERATOR, "guess", ONE), range(12)))
    assert sorted(told) == [401] * 5 + [429] * 7


def test_a_page_that_has_its_name_lead_here_is_not_served(console: Console) -> None:
    with httpx.Client(base_url=console.url) as client:
        for path in ("/login", "/", "/live.json", "/static/console.css"):
            assert client.get(path, headers={"Host": "evil.example"}).status_code == 421
            assert client.get(path, headers={"Host": "tombola.example"}).status_code != 421
            assert client.get(path, headers={"Origin": "https://evil.example"}).status_code == 403
        assert client.get("/login").status_code == 200  # on this machine, for health checks
        twice = [("Host", "tombola.example"), ("Authorization", "a"), ("Authorization", "b")]
        assert client.get("/login", headers=twice).status_code == 400


def test_what_strangers_ask_for_is_logged_in_the_time_that_it_takes(console: Console) -> None:
    """`://a:` in an address once held up everybody for seconds. A head's size is bounded as well."""
    began = time.monotonic()
    for _ in range(5):
        told = httpx.get(f"{console.url}/login?{'://a:' * 3000}", headers={"Host": "evil.example"})
        assert told.status_code == 421
    assert time.monotonic() - began < 5
    assert httpx.get(f"{console.url}/login?{'://a:' * 13_000}").status_code == 431


def test_the_scheme_is_the_proxys_to_say(console: Console, house: House) -> None:
    with Visitor(console.url) as visitor:
        answer = visitor.log_in(OPERATOR, X_Forwarded_Proto="https")
        assert all("Secure" in it for it in answer.headers.get_list("set-cookie"))
    elsewhere = house.settings.model_copy(update={"trusted_proxies": (ip_network("10.0.0.0/8"),)})
    with Console(elsewhere) as other, Visitor(other.url) as visitor:
        answer = visitor.log_in(OPERATOR, X_Forwarded_Proto="https")
        assert not any("Secure" in it for it in answer.headers.get_list("set-cookie"))


def test_silent_connections_do_not_pile_up(console: Console) -> None:
    connections = console._server.server_state.connections
    with httpx.Client(base_url=console.url) as client:
        assert client.get("/login").status_code == 200
        assert len(connections) == 1
        assert {type(it).__name__ for it in connections} == {"Connection"}
    wait_for(lambda: not connections, within_s=10, what=lambda: str(connections))
