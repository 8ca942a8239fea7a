"""producers/examples: what Node and PHP publish arrives as the request it should be, on both brokers."""

import functools
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from tests.producers.test_client import queued
from tombola.producers.brokers.quorum_queues import declare_queues
from tombola.producers.brokers.rabbitmq import open_amqp
from tombola.producers.brokers.streams import QUEUE
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import InvalidKey, InvalidRequest
from tombola.producers.domain.operations import parse_request
from tombola.producers.domain.signatures import Keyring
from tombola.worker.deliveries import open_deliveries

EXAMPLES = Path(__file__).parents[2] / "producers" / "examples"
NODE_PACKAGES = ("nodejs", "npm")
NODE_VERSION_MIN = (18, 19)
NPM_TIMEOUT_S = 300
RUN_TIMEOUT_S = 60
CONFIRMED = "confirmed: the broker has the draw"
# npm says these of our own files; anything else is about the machine, and what it can reach.
OUR_FAULTS = ("EUSAGE", "EINTEGRITY", "EJSONPARSE")

# The first test may have to install Node, and then the packages.
pytestmark = [pytest.mark.process, pytest.mark.timeout(servers.INSTALL_TIMEOUT_S + NPM_TIMEOUT_S)]

# Runs an example with its arguments: run(broker_url, "6", "key").
Run = Callable[..., subprocess.CompletedProcess[str]]


def _run(command: list[str], folder: Path, broker_url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env=os.environ | {"TOMBOLA_BROKER_URL": broker_url},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
    )


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs publish.mjs, from a copy of its folder with the packages that its lock file names."""
    binary, npm = servers._binary("node", NODE_PACKAGES), servers._binary("npm", NODE_PACKAGES)
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < NODE_VERSION_MIN:
        raise servers.Unavailable(f"the Node example needs Node 18.19 or newer, this is {version}")
    folder = tmp_path_factory.mktemp("examples") / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("node_modules", "vendor"))
    quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--no-update-notifier", "--fetch-retries=1"]
    try:
        done = subprocess.run(
            [npm, "ci", *quiet], cwd=folder, capture_output=True, text=True, timeout=NPM_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise servers.Unavailable(f"npm ci took more than {NPM_TIMEOUT_S} s") from None
    if done.returncode != 0:
        assert not any(f" code {fault}\n" in done.stderr for fault in OUR_FAULTS), done.stderr
        said = [line for line in done.stderr.splitlines() if "warn" not in line.lower()]
        raise servers.Unavailable(f"npm ci failed: {' | '.join(said[:4])}")
    return functools.partial(_run, [binary, "publish.mjs"], folder)


@pytest.fixture(scope="session")
def php() -> Run:
    """Runs publish.php where PHP has what it takes. Not a matter of CI: nothing here installs it."""
    binary = shutil.which("php")
    if binary is None:
        pytest.skip("php is not on this machine")
    return functools.partial(_run, [binary, "publish.php"], EXAMPLES)


@pytest.fixture(params=["node", "php"])
def example(request: pytest.FixtureRequest) -> Run:
    run: Run = request.getfixturevalue(request.param)
    if request.param == "php":
        libraries = 'exit(extension_loaded("redis") && stream_resolve_include_path("PhpAmqpLib/autoload.php") ? 0 : 1);'
        if subprocess.run(["php", "-r", libraries], check=False).returncode != 0:
            pytest.skip("this php comes without ext-redis or php-amqplib")
    return run


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest) -> str:
    """A broker as the workers leave it: with an empty queue, or, on Redis, with nothing, as it needs nothing."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    if request.param == "rabbitmq":
        _on_channel(url, _declare_topology)
    return url


@pytest.fixture
def bare_rabbitmq_url(rabbitmq_url: str) -> str:
    """RabbitMQ where no worker has ever been."""
    _on_channel(rabbitmq_url, _forget_topology)
    return rabbitmq_url


def _on_channel(url: str, do: Callable[[Any], object]) -> None:
    connection = open_amqp(url)
    try:
        do(connection.channel())
    finally:
        connection.release()


def _declare_topology(channel: Any) -> None:
    declare_queues(channel)
    channel.queue_purge(QUEUE)  # on a server that TEST_RABBITMQ_URL names, an earlier test may have left something


def _forget_topology(channel: Any) -> None:
    channel.queue_delete(QUEUE)
    channel.exchange_delete(QUEUE)


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that an example ends with when the broker has not confirmed."""
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("not published: ")
    assert CONFIRMED not in done.stdout
    return str(line)


def test_what_is_published_is_the_request(example: Run, broker_url: str) -> None:
    request = DrawRequest(account_id=2**53 - 1)
    done = example(broker_url, str(request.account_id), request.request_key)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [request.request_key, CONFIRMED]
    assert queued(broker_url, 1) == [request]


def test_what_is_published_has_its_nonce(example: Run, broker_url: str) -> None:
    request = DrawRequest(account_id=6, client_nonce="nonce-of-a-browser_0")
    assert example(broker_url, "6", request.request_key, request.client_nonce).returncode == 0
    source = open_deliveries(broker_url, claim_after_s=3600, prefetch=10)
    try:
        (delivery,) = source.fetch(10, wait_s=5)
    finally:
        source.close()
    assert delivery.body == request.encode()  # the canonical bytes, which are what is signed


def test_a_new_request_key_is_made_and_shown(example: Run, broker_url: str) -> None:
    keys = []
    for _ in range(2):
        key, confirmed = example(broker_url, "6").stdout.splitlines()
        assert re.fullmatch(r"lottery_req_\d{13}_[0-9a-f]{8}_\d{3}", key)
        assert confirmed == CONFIRMED
        keys.append(key)
    assert sorted(set(keys)) == keys  # later ones are greater
    assert queued(broker_url, 2) == [DrawRequest(account_id=6, request_key=key) for key in keys]


def test_with_a_secret_it_signs(example: Run, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The canonical body, with the first of several secrets."""
    first, second = "0a" * 32, "0b" * 32
    monkeypatch.setenv("TOMBOLA_MESSAGE_SECRET", f"{first}, {second}")
    request = DrawRequest(account_id=6)
    assert example(broker_url, "6", request.request_key).returncode == 0
    source = open_deliveries(broker_url, claim_after_s=3600, prefetch=10)
    try:
        (delivery,) = source.fetch(10, wait_s=10)
    finally:
        source.close()
    assert delivery.body == request.encode()
    Keyring((bytes.fromhex(first),)).check(delivery.request(), delivery.headers.get("signature"))


def test_on_rabbitmq_it_survives_a_restart_and_says_what_it_is(example: Run, rabbitmq_url: str) -> None:
    _on_channel(rabbitmq_url, _declare_topology)
    assert example(rabbitmq_url, "6").returncode == 0

    def look(channel: Any) -> None:
        properties = channel.basic_get(QUEUE, no_ack=True).properties
        assert properties["delivery_mode"] == 2
        assert properties["content_type"] == "application/json"
        assert properties["content_encoding"] == "utf-8"

    _on_channel(rabbitmq_url, look)


@pytest.mark.parametrize("scheme", ["redis://:secret@{}/0", "amqp://guest:secret@{}//"])
def test_nobody_at_the_port_is_one_line_after_the_key(example: Run, scheme: str) -> None:
    with socket.socket() as holder:
        holder.bind((servers.HOST, 0))  # bound, and nobody listens
        done = example(scheme.format(f"{servers.HOST}:{holder.getsockname()[1]}"), "6")
    assert "refused" in failure(done).lower()
    assert "secret" not in done.stderr
    # The key was out before anything was sent: with it, the same draw can be sent again.
    assert re.fullmatch(r"lottery_req_\w+\n", done.stdout)


def test_without_the_exchange_it_says_so(example: Run, bare_rabbitmq_url: str) -> None:
    assert "no queue `draws`" in failure(example(bare_rabbitmq_url, "6"))


def test_what_finds_no_queue_is_not_taken_for_published(example: Run, bare_rabbitmq_url: str) -> None:
    _on_channel(bare_rabbitmq_url, lambda channel: channel.exchange_declare(QUEUE, "direct", auto_delete=False))
    try:
        assert "no queue `draws`" in failure(example(bare_rabbitmq_url, "6"))
    finally:
        _on_channel(bare_rabbitmq_url, _forget_topology)


def test_what_the_queue_refuses_is_not_taken_for_published(example: Run, bare_rabbitmq_url: str) -> None:
    def declare_full(channel: Any) -> None:
        channel.exchange_declare(QUEUE, "direct", auto_delete=False)
        arguments = {"x-max-length": 0, "x-overflow": "reject-publish"}
        channel.queue_declare(QUEUE, durable=True, auto_delete=False, arguments=arguments)
        channel.queue_bind(QUEUE, QUEUE, QUEUE)

    _on_channel(bare_rabbitmq_url, declare_full)
    try:
        failure(example(bare_rabbitmq_url, "6"))
    finally:
        _on_channel(bare_rabbitmq_url, _forget_topology)


@pytest.mark.parametrize(
    "arguments",
    [
        *[("0",), ("-6",), ("6.5",), ("six",), ("9223372036854775808",), ("6", "a:consume"), ("6", "k\n"), ()],
        *[("6", "k", nonce) for nonce in ("", "short", "n" * 65, "n" * 16 + "\n", "n" * 16 + ".")],
        ("6", "k", "n" * 16, "more"),
    ],
)
def test_what_the_contract_refuses_is_not_sent(example: Run, redis_url: str, arguments: tuple[str, ...]) -> None:
    done = example(redis_url, *arguments)
    failure(done)
    assert done.stdout == ""
    assert queued(redis_url, 0) == []


def test_node_does_not_round_an_account_id(node: Run, redis_url: str) -> None:
    assert "account id" in failure(node(redis_url, str(2**53 + 1)))
    assert queued(redis_url, 0) == []


def test_php_prints_the_body_it_would_send(php: Run) -> None:
    request = DrawRequest(account_id=2**63 - 1)
    done = php("", "--print", str(request.account_id), request.request_key)
    assert (done.returncode, done.stderr) == (0, "")
    assert parse_request(done.stdout.encode()) == request


def test_the_node_example_agrees_with_the_contract_on_keys(node: Run, redis_url: str) -> None:
    for key in ["k" * 64, "k" * 65, "A.b_c-9", "", "ü"]:
        try:
            DrawRequest(account_id=1, request_key=key)
            expected = bool(key)  # an empty key is one to be made here, but not on the wire
        except (InvalidKey, InvalidRequest):
            expected = False
        assert (node(redis_url, "1", key).returncode == 0) is expected, key


def test_the_files_name_no_registry() -> None:
    packages = json.loads((EXAMPLES / "package-lock.json").read_text())["packages"]
    assert all("resolved" not in package for package in packages.values())
    assert all("integrity" in package for name, package in packages.items() if name)
