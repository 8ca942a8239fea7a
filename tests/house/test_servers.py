"""The servers of the tests themselves: they start, answer, survive a SIGKILL with their data, and leave."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kombu.connection import Connection
from redis import Redis
from sqlalchemy import NullPool, create_engine, text

from tests import servers

pytestmark = pytest.mark.process

PROJECT = Path(__file__).parents[2]
PROCESS_END_TIMEOUT_S = 10.0

# kombu has no types.
amqp: Callable[..., Any] = Connection

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks in /proc")


def write_row(url: str) -> None:
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.execute(text("CREATE DATABASE IF NOT EXISTS kept"))
        connection.execute(text("CREATE TABLE kept.rows (word TEXT CHARACTER SET utf8mb4)"))
        connection.execute(text("INSERT INTO kept.rows VALUES ('drawn 🎲')"))


def read_row(url: str) -> object:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return connection.execute(text("SELECT word FROM kept.rows")).scalar_one()


def write_key(url: str) -> None:
    with Redis.from_url(url) as client:
        client.set("kept", "drawn 🎲")


def read_key(url: str) -> object:
    with Redis.from_url(url, decode_responses=True) as client:
        return client.get("kept")


def write_message(url: str) -> None:
    with amqp(url, transport_options={"confirm_publish": True}) as connection:
        connection.SimpleQueue("kept").put("drawn 🎲")  # both durable by default


def read_message(url: str) -> object:
    with amqp(url) as connection:
        return connection.SimpleQueue("kept").get(timeout=5).payload


@dataclass
class Kind:
    start: Callable[[], AbstractContextManager[servers.Server]]
    write: Callable[[str], None]
    read: Callable[[str], object]


KINDS = {
    "mariadb": Kind(lambda: servers.mariadb(private=True), write_row, read_row),
    "redis": Kind(
        lambda: servers.redis(private=True, appendonly=True, appendfsync="always", password="secret"),
        write_key,
        read_key,
    ),
    "rabbitmq": Kind(lambda: servers.rabbitmq(private=True), write_message, read_message),
}


def processes_of(folder: Path) -> list[str]:
    """What lives in the folder: the server, its children, and whatever these left behind. By HOME, as a
    daemon leaves the folder it was started in; or by that folder, as Redis writes its title over HOME."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            at_home = os.fsencode(f"HOME={folder}\0") in (process / "environ").read_bytes()
            if at_home or os.readlink(process / "cwd").startswith(str(folder)):
                found.append((process / "cmdline").read_text(errors="replace").replace("\0", " ")[:200])
        except OSError:
            continue  # ended meanwhile, or another user's
    return found


def await_no_process_of(folder: Path) -> None:
    deadline_s = time.monotonic() + PROCESS_END_TIMEOUT_S
    while processes_of(folder) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert processes_of(folder) == []


@needs_proc
@pytest.mark.parametrize("name", KINDS)
def test_a_killed_server_comes_back_with_its_data_and_leaves_nothing_at_the_end(name: str) -> None:
    kind = KINDS[name]
    with kind.start() as server:
        first_pid, folder, url = server.pid, server.folder, server.url
        assert processes_of(folder)
        kind.write(url)
        server.kill()
        assert server.pid is None
        await_no_process_of(folder)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((servers.HOST, server.port), 1)
        server.restart()
        assert server.pid != first_pid
        assert server.url == url
        assert kind.read(url) == "drawn 🎲"
    await_no_process_of(folder)
    assert not folder.exists()


STARTS_ALL_AND_WAITS = """
import contextlib, time
from tests import servers
with contextlib.ExitStack() as stack:
    for start in (servers.mariadb, servers.redis, servers.rabbitmq):
        print(stack.enter_context(start(private=True)).folder, flush=True)
    time.sleep(600)
"""


@needs_proc
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_servers_end_with_a_run_that_is_killed() -> None:
    with ExitStack() as cleanup:
        run = subprocess.Popen(
            [sys.executable, "-c", STARTS_ALL_AND_WAITS], cwd=PROJECT, stdout=subprocess.PIPE, text=True
        )
        cleanup.callback(run.wait)
        cleanup.callback(run.kill)
        assert run.stdout is not None
        folders = [Path(run.stdout.readline().strip()) for _ in KINDS]
        for folder in folders:
            cleanup.callback(shutil.rmtree, folder)
        assert all(processes_of(folder) for folder in folders)
        run.send_signal(signal.SIGKILL)
        for folder in folders:
            await_no_process_of(folder)


def test_a_server_outlives_the_thread_that_started_it() -> None:
    with ExitStack() as stack:
        started: list[servers.Server] = []
        starter = threading.Thread(target=lambda: started.append(stack.enter_context(servers.redis(private=True))))
        starter.start()
        starter.join()
        time.sleep(0.1)
        write_key(started[0].url)


def test_a_stopped_server_starts_again_and_so_does_a_running_one() -> None:
    with servers.redis(private=True, appendonly=True) as server:
        write_key(server.url)
        server.stop()
        server.restart()
        server.restart()
        assert read_key(server.url) == "drawn 🎲"


def test_a_server_named_in_the_environment_is_used_but_not_ended(
    redis_server: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_REDIS_URL", redis_server.url)
    with servers.redis() as server:
        assert (server.url, server.pid) == (redis_server.url, None)
        for operation in (server.kill, server.stop, server.restart):
            with pytest.raises(servers.Unavailable, match="named in the environment"):
                operation()
    with servers.redis(private=True) as other:
        assert other.url != redis_server.url


def test_a_server_that_does_not_come_up_shows_the_end_of_its_log() -> None:
    problem = r"redis: ended with status 1 before it answered; its log ends:(.|\n)*no-such-option"
    broken = servers.redis(private=True, options=["--no-such-option", "1"])
    with pytest.raises(servers.Unavailable, match=problem), broken:
        pass


def test_what_is_neither_here_nor_installable_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "SEARCH_PATH", "")
    monkeypatch.setattr(servers, "_apt_install", lambda packages: f"no {packages[0]} today")
    for start in (servers.mariadb, servers.redis, servers.rabbitmq):
        problem = r"is not on this machine; no .* today"
        with pytest.raises(servers.Unavailable, match=problem), start(private=True):
            pass


def test_each_test_has_a_database_of_its_own(mariadb_url: str) -> None:
    with create_engine(mariadb_url, poolclass=NullPool).connect() as connection:
        assert connection.execute(text("SHOW TABLES")).all() == []
        assert connection.execute(text("SELECT @@character_set_database")).scalar_one() == "latin1"


held_open: list[object] = []


def test_a_transaction_left_open_does_not_delay_the_drop(mariadb_url: str) -> None:
    connection = create_engine(mariadb_url, poolclass=NullPool).connect()
    connection.execute(text("CREATE TABLE held (id INT) ENGINE=InnoDB"))
    connection.execute(text("SELECT * FROM held"))
    held_open.append(connection)  # or it would be closed before the fixture drops the database


def test_each_test_has_a_key_space_of_its_own(redis_url: str) -> None:
    assert read_key(redis_url) is None
    write_key(redis_url)


def test_each_test_has_a_virtual_host_of_its_own(rabbitmq_url: str) -> None:
    write_message(rabbitmq_url)
    assert read_message(rabbitmq_url) == "drawn 🎲"


def test_no_setting_of_the_shell_reaches_a_test() -> None:
    assert [name for name in os.environ if name.startswith("TOMBOLA_")] == []
