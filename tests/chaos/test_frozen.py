"""A frozen server takes connections and says nothing: everybody says so within seconds, and goes on afterwards."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from typer.testing import CliRunner

from tests import servers
from tests.consoles import PASSWORD, Console, Visitor
from tests.gateways import OPEN_TO_ALL, Gateway, gateway, settle
from tests.processes import House, wait_for
from tombola.producers import DrawClient, DrawError, DrawRequest, ServiceUnavailable
from tombola.producers.storage import api_keys
from tombola.producers.storage.faults import explain
from tombola.worker.cli import app
from tombola.worker.operators import users as operators

pytestmark = [pytest.mark.chaos, pytest.mark.process]

SAID_WITHIN_S = 10.0  # 8 s, and some for a machine that others use
NO_DATABASE = "the database does not answer"
Said = tuple[str, float]


@contextmanager
def frozen(server: servers.Server) -> Iterator[None]:
    assert server.pid is not None
    os.killpg(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(server.pid, signal.SIGCONT)


def timed(ask: Callable[[], str]) -> Said:
    began = time.monotonic()
    said = ask()
    return said, time.monotonic() - began


def together(asked: dict[str, Callable[[], str]]) -> dict[str, Said]:
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = {name: pool.submit(timed, ask) for name, ask in asked.items()}
        return {name: answer.result() for name, answer in answers.items()}


def command(*arguments: str) -> Callable[[], str]:
    """A command in this process: how long it takes to start says nothing."""

    def run() -> str:
        ended = CliRunner().invoke(app, arguments)
        error = ended.exception
        return f"{ended.output} {explain(error) if isinstance(error, SQLAlchemyError) else error}"

    return run


def page(visitor: Visitor, path: str) -> Callable[[], str]:
    def get() -> str:
        answer = visitor.get(path)
        return f"{answer.status_code} {answer.text}"

    return get


def http(started: Gateway, path: str, key: str, json: object = None) -> Callable[[], str]:
    def ask() -> str:
        headers = {"Authorization": f"Bearer {key}"}
        method = "GET" if json is None else "POST"
        answer = httpx.request(method, f"{started.url}{path}", json=json, headers=headers, timeout=120, verify=False)
        return f"{answer.status_code} {answer.text}"

    return ask


def client_enqueues(client: DrawClient, account: int) -> Callable[[], str]:
    def enqueue() -> str:
        try:
            client.enqueue(DrawRequest(account_id=account))
        except ServiceUnavailable as error:
            return f"unavailable {error}"
        return "accepted"

    return enqueue


def test_a_frozen_database_is_told_within_seconds(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(servers.mariadb(private=True))
        with create_engine(server.url, isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text("CREATE DATABASE ledger"))
        house = stack.enter_context(House(server.url + "ledger", redis_url, redis_url))
        for setting, value in house.env.items():
            monkeypatch.setenv(setting, value)
        (account,) = house.accounts(1)
        operators.add(house.engine, "ann", "operator", PASSWORD, by="root")
        known, unknown = (api_keys.add(house.engine, "shop") for _ in range(2))
        started = stack.enter_context(gateway(house))
        console = stack.enter_context(Console(house.settings))
        ann, guest = (stack.enter_context(Visitor(console.url)) for _ in range(2))
        ann.log_in("ann")
        guest_form = {"csrftoken": guest.token("/login"), "username": "ann", "password": PASSWORD}
        client = stack.enter_context(DrawClient.from_settings(house.settings))
        draw = {"account_id": account}
        asked = {
            "client": client_enqueues(client, account),
            "accept": http(started, "/v1/draws", known, draw),
            "account": http(started, f"/v1/accounts/{account}", known),
            "a key": http(started, "/v1/accounts/1", unknown),
            "readyz": http(started, "/readyz", known),
            "overview": page(ann, "/"),
            "letters": page(ann, "/dead-letters"),
            "live": page(ann, "/live.json"),
            **{f"read {number}": http(started, f"/v1/draws/no-{number}", known) for number in range(20)},
        }
        well = together(asked)
        assert all(said[:3] in ("200", "202", "404", "acc") for said, _ in well.values()), well
        with frozen(server):
            time.sleep(6)  # a caller's key is forgotten by then
            said = together(asked | {"login": lambda: guest.post("/login", data=guest_form).text})
            for words in (f"account show {account}", "dead-letters list", "dead-letters groups", "result nobody"):
                said[words] = timed(command(*words.split()))
            for name, (words, took_s) in said.items():
                assert took_s < SAID_WITHIN_S, (name, took_s, words)
                if name == "readyz":
                    assert words.startswith("503")
                    assert '"missing":["database"]' in words
                elif name in ("accept", "account", "a key") or name.startswith("read"):
                    assert words.startswith("503"), (name, words)
                else:
                    assert NO_DATABASE in words, (name, words)
            # And again, when every connection is known to be useless.
            for name, (words, took_s) in together(asked).items():
                assert took_s < SAID_WITHIN_S, (name, took_s, words)

        def is_well() -> bool:
            return all(said[:3] in ("200", "202", "404", "acc") for said, _ in together(asked).values())

        wait_for(is_well, within_s=30, what=lambda: str(together(asked)) + started.process.log()[-3000:])
        assert guest.post("/login", data=guest_form).status_code == 303


def test_a_frozen_redis_is_told_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(servers.redis(private=True))
        house = stack.enter_context(House(f"sqlite:///{tmp_path}/ledger.db", server.url, server.url))
        for setting, value in house.env.items():
            monkeypatch.setenv(setting, value)
        (account,) = house.accounts(1)
        operators.add(house.engine, "ann", "operator", PASSWORD, by="root")
        started = stack.enter_context(gateway(house, **OPEN_TO_ALL))
        console = stack.enter_context(Console(house.settings))
        ann = stack.enter_context(Visitor(console.url))
        ann.log_in("ann")
        client = stack.enter_context(DrawClient.from_settings(house.settings))
        ticket = client.enqueue(DrawRequest(account_id=account))

        def wait() -> str:
            try:
                return str(client.wait(ticket.lottery_session_id, timeout_s=2))
            except DrawError as error:
                return str(error)

        assert ann.get("/live.json").json()["members"] is not None
        with frozen(server):
            time.sleep(1.5)  # the overview's figures are kept for a second
            said = together(
                {
                    "wait": wait,
                    "readyz": http(started, "/readyz", "none"),
                    "live": page(ann, "/live.json"),
                    "accept": http(started, "/v1/draws", "none", {"account_id": account}),
                }
            )
            for words in (f"result {ticket.lottery_session_id}", "doctor"):
                said[words] = timed(command(*words.split()))
            for name, (words, took_s) in said.items():
                assert took_s < SAID_WITHIN_S, (name, took_s, words)
            assert '"missing":["broker","results"]' in said["readyz"][0]
            assert said["accept"][0].startswith("202")
            assert "Redis does not answer" in said["live"][0]
            for name in ("wait", f"result {ticket.lottery_session_id}", "doctor"):
                assert "the result store does not answer" in said[name][0], said
        wait_for(
            lambda: http(started, "/readyz", "none")().endswith('"missing":[]}'), within_s=30, what=started.process.log
        )
        assert settle(house, DrawRequest(account_id=account, request_key=ticket.request_key))
        assert client.wait(ticket.lottery_session_id, timeout_s=10).account_id == account
