"""Publishing to RabbitMQ when it is short of memory, silent or gone, and from many threads and processes."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import amqp
import kombu
import pytest

from tests import processes, servers
from tests.gateways import OPEN_TO_ALL, gateway
from tests.processes import House, draws, wait_for
from tests.relay.test_outbox import age, statuses
from tombola.producers.brokers.quorum_queues import QueueBroker
from tombola.producers.brokers.rabbitmq import open_amqp
from tombola.producers.brokers.streams import QUEUE
from tombola.producers.client import DrawClient
from tombola.producers.domain.errors import BrokerBlocked, PublishFailed
from tombola.worker.deliveries.queues import QueueDeliveries
from tombola.worker.relay.relay import Relay

TIMEOUT_S = 2.0
MARGIN_S = 1.5
STOPPED_WITHIN_S = 8.0


class Proxy:
    """A way to the broker that can go dead, as one whose middle box has forgotten the connection."""

    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._to = (servers.HOST, urlsplit(url).port)
        self._listener = socket.create_server((servers.HOST, 0))
        port = self._listener.getsockname()[1]
        self.url = urlunsplit(urlsplit(url)._replace(netloc=f"guest:guest@{servers.HOST}:{port}"))
        self._alive: list[threading.Event] = []
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        """Of what is open, nothing comes through any more. New connections are well."""
        for alive in self._alive:
            alive.clear()

    def cut(self) -> None:
        """Everything that is open ends."""
        for it in self._sockets:
            with suppress(OSError):
                it.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._tls is not None:
                    near = self._tls.wrap_socket(near, server_side=True)
                far = socket.create_connection(self._to)
                alive = threading.Event()
                alive.set()
                self._alive.append(alive)
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink, alive), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, alive: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if alive.is_set():
                    sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)


@contextmanager
def quickly(within_s: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    took_s = time.monotonic() - began
    assert took_s < within_s, f"it took {took_s:.1f} s"


@contextmanager
def frozen(server: servers.Server) -> Iterator[None]:
    assert server.pid is not None
    os.killpg(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(server.pid, signal.SIGCONT)


def queued(url: str) -> list[bytes]:
    """Everything in the queue; and out of it."""
    found = []
    with open_amqp(url) as connection:
        channel = connection.channel()
        while (message := channel.basic_get(QUEUE, no_ack=True)) is not None:
            found.append(message.body if isinstance(message.body, bytes) else message.body.encode())
    return found


@pytest.fixture
def proxy(rabbitmq_url: str) -> Iterator[Proxy]:
    with closing(Proxy(rabbitmq_url)) as proxy:
        yield proxy


@pytest.fixture
def house(tmp_path: Path, rabbitmq_url: str, redis_url: str) -> Iterator[House]:
    more = {"TOMBOLA_PUBLISH_TIMEOUT_S": str(TIMEOUT_S), "TOMBOLA_RELAY_AFTER_S": "1"}
    with House(f"sqlite:///{tmp_path}/ledger.db", rabbitmq_url, redis_url, **more) as house:
        yield house


# ---- idle, dead ------------------------------------------------------------------------------------------------------


def test_the_first_use_after_an_idle_time_takes_no_second(proxy: Proxy) -> None:
    """The other side is silently gone: with heartbeats of a second that is known after one."""
    with closing(QueueBroker(proxy.url, publish_timeout_s=10, heartbeat_s=1)) as broker:
        broker.publish([b"before"])
        proxy.freeze()
        time.sleep(1.2)
        with quickly(1.0):
            broker.publish([b"after"])
        assert broker.backlog() == 2


@pytest.mark.parametrize("use", ["publish", "backlog"])
def test_a_connection_that_was_cut_meanwhile_gets_one_more_try(proxy: Proxy, use: str) -> None:
    with closing(QueueBroker(proxy.url, publish_timeout_s=10)) as broker:
        broker.publish([b"before"])
        proxy.cut()
        with quickly(1.0):
            broker.publish([b"after"]) if use == "publish" else broker.backlog()
        assert broker.backlog() == (2 if use == "publish" else 1)


def test_a_connection_that_dies_under_a_message_is_told_in_time(proxy: Proxy) -> None:
    with closing(QueueBroker(proxy.url, publish_timeout_s=1)) as broker:
        broker.publish([b"before"])
        proxy.freeze()
        with quickly(1 + MARGIN_S), pytest.raises(PublishFailed):
            broker.publish([b"lost"])
        with quickly(MARGIN_S):
            broker.publish([b"after"])
    assert queued(proxy.url) == [b"before", b"after"]


def test_a_frozen_rabbitmq_holds_nobody_up(rabbitmq_url: str, rabbitmq_server: servers.RabbitMQ) -> None:
    fresh = QueueBroker(rabbitmq_url, publish_timeout_s=1)
    used = QueueBroker(rabbitmq_url, publish_timeout_s=1)
    used.publish([b"before"])
    consumer = QueueDeliveries(rabbitmq_url, prefetch=10)
    taken = consumer.fetch(1, wait_s=10)
    assert len(taken) == 1
    with frozen(rabbitmq_server):
        for broker in (used, fresh):
            for use in (lambda broker=broker: broker.publish([b"x" * 1_000_000] * 20), broker.backlog):
                with quickly(1 + MARGIN_S), pytest.raises(PublishFailed):
                    use()
        with quickly(MARGIN_S + 1):
            assert consumer.fetch(1, wait_s=1) == []
            consumer.ack(taken)
        with quickly(2 * MARGIN_S):
            used.close()
            fresh.close()
            consumer.close()


def test_all_of_it_over_tls(rabbitmq_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = tmp_path / "certificate.pem"
    subprocess.run(
        [servers._binary("openssl", ("openssl",)), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", f"subjectAltName=IP:{servers.HOST}",
         "-keyout", certificate.with_suffix(".key"), "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    with closing(Proxy(rabbitmq_url, context)) as proxy:
        url = proxy.url.replace("amqp://", "amqps://")
        bodies = [b"small", b"x" * 300_000]
        with closing(QueueBroker(url, publish_timeout_s=3)) as broker:
            broker.publish(bodies)
            with closing(QueueDeliveries(url, prefetch=10)) as consumer:
                fetched = [*consumer.fetch(1, wait_s=5), *consumer.fetch(1, wait_s=5)]
                assert [delivery.body_bytes for delivery in fetched] == [5, 300_000]
                consumer.ack(fetched)
                assert consumer.fetch(1, wait_s=0.2) == []
                proxy.freeze()
                with quickly(3 + MARGIN_S), pytest.raises(PublishFailed):
                    broker.publish([b"lost"])
                with quickly(2 * MARGIN_S):
                    consumer.close()
            broker.publish([b"after"])
            assert broker.backlog() == 1


def test_celerys_own_connections_can_be_of_our_kind(rabbitmq_url: str) -> None:
    """What cannot be decoded is a message without headers: Celery refuses it as one that it does not know."""
    received: list[str] = []
    with kombu.Connection(rabbitmq_url, transport="tombola.producers.brokers.rabbitmq:Transport") as connection:
        queue = connection.SimpleQueue("tombola-celery")
        queue.put({"task": 1})
        channel = connection.default_channel
        channel.basic_publish(amqp.Message(b"odd", content_type=b"\xff\xfe"), routing_key="tombola-celery")
        queue.put({"task": 2})

        def on_message(message: kombu.Message) -> None:
            received.append(bytes(message.body).decode() if message.headers else f"undecodable: {message.properties}")
            message.ack()

        with kombu.Consumer(channel, queue.queue, on_message=on_message, accept=["json"]):
            while len(received) < 3:
                connection.drain_events(timeout=5)
    assert len(received) == 3
    assert "UnicodeDecodeError" in received[1]


# ---- the broker blocks publishers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_an_alarm_is_told_at_once_and_when_it_ends_all_goes_on(
    rabbitmq_url: str, rabbitmq_server: servers.RabbitMQ, what: str
) -> None:
    with closing(QueueBroker(rabbitmq_url, publish_timeout_s=TIMEOUT_S)) as broker:
        broker.publish([b"before"])
        with rabbitmq_server.alarm(what):
            with quickly(TIMEOUT_S + MARGIN_S), pytest.raises(BrokerBlocked, match=f"low on {what}"):
                publish_until_it_raises(broker)
            for _ in range(3):
                with quickly(0.5), pytest.raises(BrokerBlocked, match="has blocked publishers"):
                    broker.publish([b"during"])
                with quickly(0.5), pytest.raises(BrokerBlocked):
                    broker.backlog()
        wait_for(lambda: works(broker), within_s=10, what=lambda: "still blocked")
        assert b"after" in queued(rabbitmq_url)


def publish_until_it_raises(broker: QueueBroker) -> None:
    """It takes a moment until RabbitMQ has told all its connections of the alarm."""
    for _ in range(100):
        broker.publish([b"during"])


def works(broker: QueueBroker) -> bool:
    try:
        broker.publish([b"after"])
    except BrokerBlocked:
        return False
    return True


def test_during_an_alarm_a_blocked_publisher_closes_in_no_time(
    rabbitmq_url: str, rabbitmq_server: servers.RabbitMQ
) -> None:
    broker = QueueBroker(rabbitmq_url, publish_timeout_s=TIMEOUT_S)
    with rabbitmq_server.alarm():
        with pytest.raises(BrokerBlocked):
            broker.publish([b"during"])
        with quickly(0.5):
            broker.close()


def test_a_consumer_fetches_and_acks_during_an_alarm(rabbitmq_url: str, rabbitmq_server: servers.RabbitMQ) -> None:
    with closing(QueueBroker(rabbitmq_url, publish_timeout_s=TIMEOUT_S)) as broker:
        broker.publish([b"one", b"two"])
    with closing(QueueDeliveries(rabbitmq_url, prefetch=10)) as consumer:
        first = consumer.fetch(1, wait_s=5)
        with rabbitmq_server.alarm():
            second = consumer.fetch(1, wait_s=5)
            with quickly(15), pytest.raises(PublishFailed):
                consumer.requeue(first)
            consumer.ack(second)
            # What could not be requeued is still in hand.
            consumer.ack(first)
            consumer.release()
            assert consumer.fetch(1, wait_s=0.5) == []


def test_a_draw_is_accepted_during_an_alarm_and_left_to_the_relay(
    house: House, rabbitmq_server: servers.RabbitMQ
) -> None:
    asked = draws(house.accounts(1), 3)
    with DrawClient.from_settings(house.settings) as client, closing(Relay.from_settings(house.settings)) as relay:
        with rabbitmq_server.alarm():
            for draw in asked:
                with quickly(TIMEOUT_S + MARGIN_S):
                    assert client.enqueue(draw).request_key == draw.request_key
            age(house.engine)
            with quickly(TIMEOUT_S + MARGIN_S), pytest.raises(PublishFailed, match="low on memory"):
                relay.run_once()
            with quickly(2.0):
                client.close()
        assert set(statuses(house.engine).values()) == {"accepted"}
        age(house.engine)
        wait_for(lambda: passes(relay), within_s=10, what=lambda: "the relay is still blocked")
    assert {draw.encode() for draw in asked} <= set(queued(house.settings.need("broker_url")))


def passes(relay: object) -> bool:
    try:
        relay.run_once()  # type: ignore[attr-defined]
    except PublishFailed:
        return False
    return True


def test_gateway_and_relay_end_when_they_are_told_to_during_an_alarm(
    house: House, rabbitmq_server: servers.RabbitMQ
) -> None:
    (account,) = house.accounts(1)
    metrics_port = servers._free_port()
    relay = processes.worker(
        house.env | {"TOMBOLA_METRICS_PORT": str(metrics_port), "TOMBOLA_METRICS_HOST": servers.HOST},
        command=[sys.executable, "-m", "tombola.worker", "relay"],
        until="relaying",
    )
    with gateway(house, **OPEN_TO_ALL) as door, relay as relaying:
        assert door.draw({"account_id": account}).status_code == 202
        assert door.client.get("/readyz").json()["broker"]
        with rabbitmq_server.alarm():
            for _ in range(5):
                assert door.draw({"account_id": account}).status_code == 202
            wait_for(lambda: not door.client.get("/readyz").json()["broker"], within_s=10, what=lambda: "ready")
            assert "tombola_broker_blocked 1.0" in door.metrics()
            queued(house.settings.need("broker_url"))  # while anything waits there, the relay has patience
            age(house.engine)
            wait_for(lambda: "low on memory" in relaying.log(), within_s=20, what=relaying.log)
            with quickly(STOPPED_WITHIN_S):
                assert door.process.stop() in (0, -signal.SIGTERM), door.process.log()
            with quickly(STOPPED_WITHIN_S):
                assert relaying.stop() == 0, relaying.log()


# ---- threads and processes -------------------------------------------------------------------------------------------


def test_threads_may_share_one(rabbitmq_url: str) -> None:
    failures: list[Exception] = []
    with closing(QueueBroker(rabbitmq_url, publish_timeout_s=20)) as broker:

        def publish(thread: int) -> None:
            try:
                for number in range(50):
                    broker.publish([b"%d-%d-%d" % (thread, number, part) for part in range(3)])
                    broker.backlog()
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=publish, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    expected = [b"%d-%d-%d" % (t, n, p) for t in range(8) for n in range(50) for p in range(3)]
    assert sorted(queued(rabbitmq_url)) == sorted(expected)


FORKING = """
import os, sys, threading
from tombola.producers.client import DrawClient
from tombola.producers.domain.contract import DrawRequest

client = DrawClient.from_env()
client.enqueue(DrawRequest(account_id=1))
# Another thread is at it while we fork: what it holds, the child must not wait for.
busy = threading.Thread(target=lambda: [client.enqueue(DrawRequest(account_id=1)) for _ in range(50)])
busy.start()
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        for _ in range(20):
            client.enqueue(DrawRequest(account_id=1))
        client.close()
        os._exit(0)
    children.append(child)
busy.join()
for _ in range(20):
    client.enqueue(DrawRequest(account_id=1))
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def test_a_client_made_before_a_fork_works_on_both_sides(mariadb_url: str, rabbitmq_url: str, redis_url: str) -> None:
    with House(mariadb_url, rabbitmq_url, redis_url) as house:
        house.accounts(1)
        done = subprocess.run(
            [sys.executable, "-c", FORKING],
            cwd=processes.PROJECT,
            env=processes.environment(house.env),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert len(statuses(house.engine)) == 1 + 50 + 3 * 20 + 20
        assert len(set(queued(rabbitmq_url))) == 1 + 50 + 3 * 20 + 20
