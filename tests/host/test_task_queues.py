"""What is wrong with Celery's own queues, names and connections never keeps draws from settling."""

import base64
import itertools
import json
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import amqp
import pytest
from celery import Celery
from redis import Redis

from tests import processes, servers
from tests.processes import House, Worker, draws, wait_for
from tombola.producers.brokers.rabbitmq import open_amqp
from tombola.producers.domain.contract import parse_result
from tombola.producers.domain.errors import InvalidRequest, ServiceUnavailable
from tombola.producers.results import ResultStore
from tombola.worker.host import tasks
from tombola.worker.host.task_queues import DEAD, SHOPS, TASKS
from tombola.worker.settle import tries

WITHIN_S = 60.0
QUORUM = {
    "task_create_missing_queue_type": "quorum"
}  # what producers/docs/celery.md tells shops to set for tombola.tasks


@pytest.fixture(params=["redis", "rabbitmq"])
def house(request: pytest.FixtureRequest, mariadb_url: str, redis_url: str) -> Iterator[House]:
    broker_url = redis_url if request.param == "redis" else request.getfixturevalue("rabbitmq_url")
    with House(mariadb_url, broker_url, redis_url) as house:
        yield house


@contextmanager
def plain_shop(house: House, **conf: Any) -> Iterator[Celery]:
    """A shop's own Celery app, which knows nothing of ours."""
    env = house.env
    shop = Celery("shop", broker=env["TOMBOLA_BROKER_URL"], backend=env["TOMBOLA_RESULT_URL"], set_as_current=False)
    shop.conf.update(conf)
    yield shop
    shop.close()


def drawn(shop: Celery, *, queue: str = SHOPS, **fields: Any) -> Any:
    """The result of `tombola.draw` with `fields`."""
    answer: Any = shop.send_task("tombola.draw", kwargs=fields, queue=queue).get(timeout=WITHIN_S)
    return parse_result(json.dumps(answer).encode())


def app_of(house: House) -> Any:
    """Our own app, as beat has it. Importing it reads this process's environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in house.env.items():
            patch.setenv(name, value)
        from tombola.worker.celery import make_app
    return make_app(house.settings)


def is_redis(house: House) -> bool:
    return house.env["TOMBOLA_BROKER_URL"].startswith("redis")


def settle_some(house: House, worker: Worker, accounts: list[int], *, prefix: str) -> None:
    before = house.settled()
    house.enqueue(draws(accounts, 5, prefix=prefix))
    house.wait_settled(before + 5, within_s=WITHIN_S, log=worker.log)


def count_set_aside(house: House) -> int:
    url = house.env["TOMBOLA_BROKER_URL"]
    if is_redis(house):
        with Redis.from_url(url) as client:
            return int(client.llen(DEAD))
    with open_amqp(url) as connection, suppress(amqp.NotFound):
        return int(connection.channel().queue_declare(DEAD, passive=True).message_count)
    return 0


# ---- garbage on Celery's own queue -----------------------------------------------------------------------------------


def envelope(**changes: Any) -> dict[str, Any]:
    """A good task as kombu puts it into a list, with changes to its top level, headers (h_) and properties (p_)."""
    good: dict[str, Any] = {
        "body": base64.b64encode(
            b'[[], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
        ).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": "tombola.archive", "id": str(uuid.uuid4()), "timelimit": [None, None]},
        "properties": {
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": "tombola"},
            "body_encoding": "base64",
            "priority": 0,
        },
    }
    for name, value in changes.items():
        place, name = {
            "h_": (good["headers"], name[2:]),
            "p_": (good["properties"], name[2:]),
        }.get(name[:2], (good, name.replace("_", "-")))
        place[name] = value
    return good


def encoded(body: Any) -> str:
    return base64.b64encode(json.dumps(body).encode()).decode()


WRONG: dict[str, dict[str, Any]] = {
    "body 5": {"body": 5},
    "body null": {"body": None},
    "body list": {"body": []},
    "base64": {"body": "x"},
    "base64 text": {"body": "ä"},
    "decoded 5": {"body": encoded(5)},
    "decoded null": {"body": encoded(None)},
    "decoded pair": {"body": encoded([[], {}])},
    "decoded deep": {"body": base64.b64encode(b"[" * 20_000).decode()},
    "not json": {"body": base64.b64encode(b"\xff{").decode()},
    "headers 5": {"headers": 5},
    "headers list": {"headers": []},
    "no headers": {"headers": {}},
    "null headers": {"headers": None},
    "properties 5": {"properties": 5},
    "properties null": {"properties": None},
    "codec": {"p_body_encoding": "rot13"},
    "codec list": {"p_body_encoding": []},
    "pickle": {"content_type": "application/x-python-serialize", "body": "gAROLg=="},
    "unknown type": {"content_type": "application/unheard-of"},
    "type list": {"content_type": []},
    "charset 5": {"content_encoding": 5},
    "no such task": {"h_task": "shop.unheard-of"},
    "task null": {"h_task": None},
    "task list": {"h_task": []},
    "id list": {"h_id": []},
    "id object": {"h_id": {}},
    "eta 5": {"h_eta": 5},
    "eta text": {"h_eta": "soon"},
    "expires list": {"h_expires": ["x"]},
    "timelimit": {"h_timelimit": 5},
    "timelimit long": {"h_timelimit": [1, 2, 3]},
    "zip bomb": {"h_compression": "zlib"},
    "compression 5": {"h_compression": 5},
}

# Wrong in its form: no worker can make a task of it.
NO_TASKS: dict[str, bytes] = {
    "rubbish": b"rubbish",
    "nothing": b"",
    "no text": b"\x00\xff\xfe\x80",
    "deep": b"[" * 50_000,
    **{f"json {text}": text.encode() for text in ("5", "null", "[]", "{}", '"x"', "true", "1e999")},
    **{name: json.dumps(envelope(**changes)).encode() for name, changes in WRONG.items()},
}  # fmt: skip

# What only a list's envelope can say.
ONLY_IN_LISTS = ("properties 5", "properties null", "codec", "codec list", "charset 5")

# Odd, and perhaps a task all the same: none of it may do any harm, on either side of the pool.
ODD_CHANGES: tuple[dict[str, Any], ...] = (
    {"p_delivery_tag": 5},
    {"p_delivery_tag": []},
    {"p_delivery_tag": "the same"},
    {"p_delivery_tag": "the same"},
    {"p_delivery_info": {"exchange": "x", "routing_key": "y"}},
    {"p_delivery_info": {"exchange": "", "routing_key": "draws"}},
    {"p_delivery_info": 5},
    {"p_priority": "high"},
    {"p_priority": {}},
    {"content_encoding": "unheard-of"},
    {"h_id": 5},
    {"h_id": None},
    {"h_timelimit": ["x", "y"]},
    {"h_retries": "many"},
    {"h_root_id": []},
    {"h_shadow": []},
    {"h_argsrepr": {}},
    {"h_group": {}},
    {"h_stamped_headers": 5},
    {"h_stamps": 5},
    {"h_ignore_result": "perhaps"},
    {"h_replaced_task_nesting": "x"},
    {"body": encoded([5, {}, {}])},
    {"body": encoded([[], 5, {}])},
    {"body": encoded([[], {}, 5])},
    {"body": encoded("abc")},
    {"body": encoded([[1, 2, 3], {"x": 1}, {}])},
    {"body": encoded([[], {}, {"callbacks": 5, "errbacks": "x", "chain": {}, "chord": 1}])},
)
ODD = [json.dumps(envelope(**changes)).encode() for changes in ODD_CHANGES]


def send_raw(house: House, queue: str, elements: list[bytes]) -> None:
    """Put each element, an envelope or not, on `queue`: as it is on Redis, as a message of its parts on RabbitMQ."""
    url = house.env["TOMBOLA_BROKER_URL"]
    if is_redis(house):
        with Redis.from_url(url) as client:
            for element in elements:
                client.lpush(queue, element)
        return
    with open_amqp(url) as connection:
        channel = connection.channel()
        channel.confirm_select()
        for element in elements:
            channel.basic_publish(_as_message(element), exchange="", routing_key=queue)


def _as_message(element: bytes) -> amqp.Message:
    try:
        parts = json.loads(element)
        body = base64.b64decode(parts["body"])
        headers = dict(parts["headers"].items())
    except Exception:
        return amqp.Message(element)
    properties = {
        name.replace("-", "_"): value
        for name, value in parts.items()
        if name.startswith("content") and isinstance(value, str)
    }
    return amqp.Message(body, application_headers=headers, **properties)


def test_garbage_on_celerys_own_queues_stops_neither_draws_nor_tasks(house: House) -> None:
    accounts = house.accounts(3)
    with (
        plain_shop(house) as shop,
        plain_shop(house, **QUORUM) as careful_shop,
        processes.worker(house.env, until="ready.") as worker,
    ):
        assert drawn(shop, account_id=accounts[0], request_key="before").status == "completed"
        # The sender of a task that no worker knows gets an answer.
        answer = shop.send_task("tombola.unheard-of", queue=SHOPS).get(timeout=WITHIN_S, propagate=False)
        assert "NotRegistered" in repr(type(answer))
        garbage = [it for name, it in NO_TASKS.items() if is_redis(house) or name not in ONLY_IN_LISTS]
        send_raw(house, SHOPS, garbage)
        send_raw(house, TASKS, garbage)
        settle_some(house, worker, accounts, prefix="during")
        wait_for(
            lambda: count_set_aside(house) >= 1 + 2 * len(garbage),
            within_s=WITHIN_S,
            what=lambda: f"{count_set_aside(house)} of {1 + 2 * len(garbage)} set aside\n{worker.log()[-6000:]}",
        )
        assert count_set_aside(house) == 1 + 2 * len(garbage)
        send_raw(house, SHOPS, ODD)
        send_raw(house, TASKS, ODD)
        for sender, queue in ((shop, SHOPS), (careful_shop, TASKS)):
            assert (
                drawn(sender, queue=queue, account_id=accounts[0], request_key=f"after.{queue}").status == "completed"
            )
        settle_some(house, worker, accounts, prefix="after")
        assert worker.is_alive
        assert "begins anew" not in worker.log(), worker.log()
        assert worker.stop() == 0, worker.log()
        told = worker.log()
    if is_redis(house):
        with Redis.from_url(house.env["TOMBOLA_BROKER_URL"]) as client:
            kept: Any = client.lrange(DEAD, 0, -1)
            assert kept.count(b"rubbish") == 2  # as it came
    assert told.count("a task is set aside") == count_set_aside(house)
    assert house.settled() == 3 + 10
    assert house.violations() == []


def test_properties_that_cannot_be_decoded_on_celerys_own_queues(
    rabbitmq_url: str, redis_url: str, mariadb_url: str
) -> None:
    """py-amqp breaks the connection over each of these, with every task that was fetched ahead."""
    with (
        House(mariadb_url, rabbitmq_url, redis_url) as house,
        plain_shop(house) as shop,
        processes.worker(house.env, until="ready.") as worker,
        open_amqp(rabbitmq_url) as connection,
    ):
        accounts = house.accounts(3)
        channel = connection.channel()
        for queue in (SHOPS, TASKS):
            for properties in (
                {"content_type": b"\xff\xfe"},
                {"correlation_id": b"\xff"},
                {"reply_to": b"\xff"},
                {"type": b"\x80"},
            ):
                channel.basic_publish(amqp.Message(b"[[], {}, {}]", **properties), exchange="", routing_key=queue)
        wait_for(lambda: count_set_aside(house) == 8, within_s=WITHIN_S, what=lambda: worker.log()[-6000:])
        assert drawn(shop, account_id=accounts[0], request_key="after").status == "completed"
        settle_some(house, worker, accounts, prefix="after")
        assert "Connection to broker lost" not in worker.log()
        assert worker.stop() == 0, worker.log()


def test_what_an_older_worker_had_in_hand_comes_back_around_garbage(tmp_path: Path, redis_url: str) -> None:
    """On Redis it lies in a hash: kombu's look at it ends at the first entry that it cannot give back."""
    with House(f"sqlite:///{tmp_path}/ledger.db", redis_url, redis_url) as house, Redis.from_url(redis_url) as client:
        garbage = [b"rubbish", b"5", b"[]", b"[5, 6, 7]", b'[{}, "", "x"]', b'[null, "tombola", "tombola"]']
        client.rpush("a list", "x")
        client.xadd("a stream", {"x": "y"})
        garbage.append(json.dumps([envelope(), "", "a stream"]).encode())
        (account_id,) = house.accounts(1)
        kwargs = {"account_id": account_id, "request_key": "was_in_hand"}
        good = envelope(h_task="tombola.draw", body=encoded([[], kwargs, {}]))
        for number, entry in enumerate([*garbage, json.dumps([good, "", "tombola"]).encode()]):
            client.hset("unacked", str(number), entry)
            client.zadd("unacked_index", {str(number): 1000.0 - number})
        with processes.worker(house.env, until="ready.") as worker:
            house.wait_settled(1, within_s=WITHIN_S, log=worker.log)
            wait_for(lambda: client.hlen("unacked") == 0, within_s=WITHIN_S, what=worker.log)
            assert worker.stop() == 0
        assert set(garbage) <= set(client.lrange(DEAD, 0, -1))


def test_garbage_in_remote_control_is_passed_over(tmp_path: Path, redis_url: str) -> None:
    with House(f"sqlite:///{tmp_path}/ledger.db", redis_url, redis_url) as house, Redis.from_url(redis_url) as client:
        number = urlsplit(redis_url).path.strip("/")
        with plain_shop(house) as shop, processes.worker(house.env, until="ready.") as worker:
            wait_for(lambda: bool(shop.control.ping(timeout=1)), within_s=WITHIN_S, what=worker.log)
            for said in ("5", "{}", "rubbish", json.dumps(envelope(body=5)), json.dumps(envelope(headers=[]))):
                assert client.publish(f"/{number}.celery.pidbox", said) >= 1
            wait_for(lambda: bool(shop.control.ping(timeout=1)), within_s=WITHIN_S, what=worker.log)
            assert worker.is_alive
            assert "begins anew" not in worker.log(), worker.log()


# ---- one draw, however often its task comes --------------------------------------------------------------------------


@pytest.fixture
def draw_task(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[House, Any]]:
    """`tombola.draw`, here in this process, with no time to lose."""
    with House(f"sqlite:///{tmp_path}/ledger.db", redis_url, redis_url) as house:
        monkeypatch.setattr(tasks, "SETTLE_PAUSES_S", (0.0,) * len(tasks.SETTLE_PAUSES_S))
        yield house, app_of(house).tasks["tombola.draw"]


def test_without_a_key_the_tasks_id_is_the_key(draw_task: tuple[House, Any]) -> None:
    house, task = draw_task
    (account_id,) = house.accounts(1)
    for _ in range(3):
        task.apply(kwargs={"account_id": account_id}, task_id="task-1").get()
        task.apply(kwargs={"account_id": account_id, "request_key": ""}, task_id="task-1").get()
        task.apply(kwargs={"account_id": account_id, "request_key": "mine"}, task_id="no key, that").get()
    assert house.results().keys() == {"task-1", "mine"}
    assert house.violations() == []


@pytest.mark.parametrize("task_id", [None, "", "a:b", "with blank", "k" * 65, 5, ["x"], {"a": 1}])
def test_without_a_key_and_an_id_that_is_none_nothing_is_charged(draw_task: tuple[House, Any], task_id: Any) -> None:
    house, task = draw_task
    (account_id,) = house.accounts(1)
    called = SimpleNamespace(app=task.app, request=SimpleNamespace(id=task_id))
    with pytest.raises(InvalidRequest, match="request_key"):
        tasks.draw(called, account_id=account_id)
    assert house.settled() == 0


def lost_replies(count: int) -> Callable[..., Any]:
    """tries.settle whose first `count` answers are lost after the COMMIT."""
    settle, calls = tries.settle, itertools.count(1)

    def settle_and_lose(*args: Any, **options: Any) -> Any:
        answers = settle(*args, **options)
        if next(calls) <= count:
            raise ServiceUnavailable("the connection was lost at COMMIT")
        return answers

    return settle_and_lose


def test_a_commit_whose_reply_is_lost_charges_once(
    draw_task: tuple[House, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    house, task = draw_task
    (account_id,) = house.accounts(1)
    monkeypatch.setattr(tries, "settle", lost_replies(3))
    task.apply(kwargs={"account_id": account_id}, task_id="task-1").get()
    assert house.results().keys() == {"task-1"}
    assert house.violations() == []


def test_retries_end_with_an_error_and_the_same_task_again_finds_out(
    draw_task: tuple[House, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    house, task = draw_task
    (account_id,) = house.accounts(1)
    monkeypatch.setattr(tries, "settle", lost_replies(1 + len(tasks.SETTLE_PAUSES_S)))
    with pytest.raises(ServiceUnavailable):
        task.apply(kwargs={"account_id": account_id}, task_id="task-1").get()
    task.apply(kwargs={"account_id": account_id}, task_id="task-1").get()
    assert house.results().keys() == {"task-1"}


def test_with_the_result_store_down_there_is_one_charge(mariadb_url: str, rabbitmq_url: str) -> None:
    with servers.redis(private=True) as store, House(mariadb_url, rabbitmq_url, store.url) as house:
        (account_id,) = house.accounts(1)
        shop = Celery("shop", broker=rabbitmq_url, set_as_current=False)
        with processes.worker(house.env, until="ready.") as worker:
            store.kill()
            for task_id in ("first", "first", "second"):
                shop.send_task("tombola.draw", kwargs={"account_id": account_id}, queue=SHOPS, task_id=task_id)
            wait_for(lambda: worker.log().count("rebuilt at the next request") == 3, within_s=WITHIN_S, what=worker.log)
            house.wait_settled(2, within_s=WITHIN_S, log=worker.log)
            store.restart()
            assert worker.stop() == 0, worker.log()
        shop.close()
        assert house.results().keys() == {"first", "second"}
        with closing(ResultStore.open(store.url, ttl_s=600, engine=house.engine)) as results:
            assert parse_result(results.get("first")).request_key == "first"
        assert house.violations() == []


def test_a_pool_process_that_is_killed_after_the_commit_charges_once(house: House) -> None:
    (account_id,) = house.accounts(1)
    dying = [sys.executable, "-m", "tests.chaos.dying_worker"]
    env = house.env | {"DIE_AT": "in_task", "DIE_ON": "1"}
    with plain_shop(house) as shop, processes.worker(env, command=dying, until="ready.") as worker:
        sent = shop.send_task("tombola.draw", kwargs={"account_id": account_id}, queue=SHOPS)
        answer: Any = sent.get(timeout=WITHIN_S)
        assert answer["request_key"] == sent.id
        assert "SIGKILL" in worker.log(), "it did not die: nothing was tested"
    assert house.results().keys() == {sent.id}
    assert house.violations() == []


# ---- names, connections and queues -----------------------------------------------------------------------------------


def test_two_workers_on_one_host(house: House) -> None:
    """As the documents say it, with remote control as well, which once cost one of them its life on RabbitMQ."""
    accounts = house.accounts(3)
    env = house.env | {"TOMBOLA_REMOTE_CONTROL": "true"}
    with (
        plain_shop(house) as shop,
        processes.worker(env, until="ready.") as first,
        processes.worker(env, until="ready.") as second,
    ):
        assert drawn(shop, account_id=accounts[0], request_key="by_task").status == "completed"
        settle_some(house, first, accounts, prefix="two")
        wait_for(lambda: len(shop.control.ping(timeout=1)) == 2, within_s=WITHIN_S, what=lambda: first.log())
        for worker in (first, second):
            assert "begins anew" not in worker.log(), worker.log()
            assert worker.stop() == 0, worker.log()
    assert house.violations() == []


def test_remote_control_is_off_with_rabbitmq_unless_it_is_asked_for(
    rabbitmq_url: str, redis_url: str, tmp_path: Path
) -> None:
    with (
        House(f"sqlite:///{tmp_path}/ledger.db", rabbitmq_url, redis_url) as house,
        plain_shop(house) as shop,
        processes.worker(house.env, until="ready."),
        open_amqp(rabbitmq_url) as connection,
    ):
        assert not shop.control.ping(timeout=2)
        for name in ("celery_delayed_0", "celery_delayed_27"):
            with pytest.raises(amqp.NotFound):
                connection.channel().queue_declare(name, passive=True)


class Forwarder:
    """A TCP forwarder that can cut its clients off while the server goes on believing in them."""

    def __init__(self, port: int) -> None:
        self._target = (servers.HOST, port)
        self._listener = socket.create_server((servers.HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._clients: list[socket.socket] = []
        self._upstream: list[socket.socket] = []
        self._cut: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        clients, self._clients = self._clients, []
        self._cut, self._upstream = self._upstream, []
        for client in clients:
            client.shutdown(socket.SHUT_RDWR)

    def end_what_was_cut(self) -> None:
        for server in self._cut:
            server.close()

    def close(self) -> None:
        self._listener.close()
        for end in (*self._clients, *self._upstream):
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._clients.append(client)
                self._upstream.append(server)
                threading.Thread(target=self._copy, args=(client, server), daemon=True).start()
                threading.Thread(target=self._copy, args=(server, client), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)


@pytest.mark.parametrize("remote_control", ["default", pytest.param("true", marks=pytest.mark.chaos)])
def test_a_connection_that_is_cut_on_our_side_only(
    rabbitmq_url: str, redis_url: str, mariadb_url: str, remote_control: str
) -> None:
    parts = urlsplit(rabbitmq_url)
    assert parts.port is not None
    with closing(Forwarder(parts.port)) as forwarder:
        through = urlunsplit(parts._replace(netloc=parts.netloc.replace(str(parts.port), str(forwarder.port))))
        env = {} if remote_control == "default" else {"TOMBOLA_REMOTE_CONTROL": remote_control}
        with House(mariadb_url, through, redis_url, **env) as house:
            accounts = house.accounts(3)
            with processes.worker(house.env, until="ready.") as worker:
                forwarder.cut()
                wait_for(lambda: worker.log().count("Connected to amqp") >= 2, within_s=WITHIN_S, what=worker.log)
                if remote_control == "true":  # its queue belongs to the connection that RabbitMQ still believes in
                    wait_for(lambda: "begins anew" in worker.log(), within_s=WITHIN_S, what=worker.log)
                forwarder.end_what_was_cut()  # else what RabbitMQ gives to that one waits there for a minute
                settle_some(house, worker, accounts, prefix="after")
                with plain_shop(house) as shop:
                    assert drawn(shop, account_id=accounts[0], request_key="by_task").status == "completed"
                assert worker.is_alive
                assert worker.stop() == 0, worker.log()


def test_queues_that_are_deleted_under_the_worker_come_back(
    rabbitmq_url: str, redis_url: str, mariadb_url: str
) -> None:
    with House(mariadb_url, rabbitmq_url, redis_url) as house, ExitStack() as stack:
        accounts = house.accounts(3)
        worker = stack.enter_context(processes.worker(house.env, until="ready."))
        for round_, names in enumerate([(SHOPS,), (TASKS,), (SHOPS, TASKS)]):
            with open_amqp(rabbitmq_url) as connection:
                for name in names:
                    connection.channel().queue_delete(name)
            settle_some(house, worker, accounts, prefix=f"deleted.{round_}")
            # A shop declares a queue once for each connection, and is not told of messages that no queue takes.
            wait_for(lambda: all(has_queue(rabbitmq_url, it) for it in names), within_s=WITHIN_S, what=worker.log)  # noqa: B023
            with plain_shop(house) as shop, plain_shop(house, **QUORUM) as careful_shop:
                key = f"{round_}.shops"
                assert drawn(shop, account_id=accounts[0], request_key=key).request_key == key
                key = f"{round_}.tasks"
                assert drawn(careful_shop, queue=TASKS, account_id=accounts[0], request_key=key).request_key == key
        assert worker.stop() == 0, worker.log()
        assert house.violations() == []


@pytest.mark.parametrize("name", [pytest.param(SHOPS, marks=pytest.mark.chaos), TASKS])
def test_a_queue_that_cannot_be_had(rabbitmq_url: str, redis_url: str, mariadb_url: str, name: str) -> None:
    """Somebody else's exclusive queue of that name: 405 at each try, as a lost node's classic queue is a 404."""
    with House(mariadb_url, rabbitmq_url, redis_url) as house, ExitStack() as stack:
        accounts = house.accounts(3)
        with open_amqp(rabbitmq_url) as stranger:
            stranger.channel().queue_declare(name, exclusive=True)
            worker = stack.enter_context(processes.worker(house.env))
            settle_some(house, worker, accounts, prefix="without")
            if name == SHOPS:
                with plain_shop(house, **QUORUM) as shop:
                    meanwhile = drawn(shop, queue=TASKS, account_id=accounts[0], request_key="meanwhile")
                    assert meanwhile.status == "completed"
        with plain_shop(house, **(QUORUM if name == TASKS else {})) as shop:
            wait_for(lambda: has_queue(rabbitmq_url, name), within_s=WITHIN_S, what=worker.log)
            assert drawn(shop, queue=name, account_id=accounts[0], request_key="again").status == "completed"
        assert worker.stop() == 0, worker.log()


def has_queue(url: str, name: str) -> bool:
    with open_amqp(url) as connection, suppress(amqp.NotFound, amqp.ResourceLocked):
        return int(connection.channel().queue_declare(name, passive=True).consumer_count) > 0
    return False


def test_a_redis_that_becomes_a_replica_and_one_that_dies(redis_url: str, tmp_path: Path) -> None:
    """UNBLOCKED and READONLY are answers, no lost connections: to Celery a reason to end."""
    with (
        servers.redis(private=True) as broker,
        House(f"sqlite:///{tmp_path}/ledger.db", broker.url, redis_url) as house,
        plain_shop(house) as shop,
        processes.worker(house.env, until="ready.") as worker,
    ):
        (account_id,) = house.accounts(1)
        with Redis.from_url(broker.url) as client:
            client.replicaof(servers.HOST, "1")
            wait_for(lambda: worker.log().count("this Redis is a replica") >= 2, within_s=WITHIN_S, what=worker.log)
            client.replicaof("NO", "ONE")
        assert drawn(shop, account_id=account_id, request_key="after").status == "completed"
        broker.kill()
        assert worker.stop() == 0, worker.log()


def test_what_an_older_release_left_on_its_classic_queue_is_done(
    rabbitmq_url: str, redis_url: str, mariadb_url: str
) -> None:
    """Its workers and its beat may still run beside this one, and declare the queue their way at each start."""
    older = Celery("tombola", broker=rabbitmq_url, backend=redis_url, set_as_current=False)
    older.conf.update(task_default_queue="tombola")
    with House(mariadb_url, rabbitmq_url, redis_url) as house:
        (account_id,) = house.accounts(1)
        left = [older.send_task("tombola.draw", kwargs={"account_id": account_id}) for _ in range(5)]
        with processes.worker(house.env, until="ready."):
            for sent in left:
                assert sent.get(timeout=WITHIN_S)["request_key"] == sent.id
            assert older.send_task("tombola.archive").get(timeout=WITHIN_S) == 0  # as its beat does
            assert app_of(house).send_task("tombola.archive").get(timeout=WITHIN_S) == 0  # and ours
        older.close()
        assert house.settled() == 5


@pytest.mark.parametrize("kind", ["quorum", pytest.param("classic", marks=pytest.mark.chaos)])
def test_the_shops_queue_may_be_of_either_kind(rabbitmq_url: str, redis_url: str, tmp_path: Path, kind: str) -> None:
    with House(f"sqlite:///{tmp_path}/ledger.db", rabbitmq_url, redis_url) as house:
        (account_id,) = house.accounts(1)
        with plain_shop(house, task_create_missing_queue_type=kind) as shop:
            sent = shop.send_task("tombola.draw", kwargs={"account_id": account_id}, queue=SHOPS)
            with processes.worker(house.env, until="ready.") as worker:
                assert sent.get(timeout=WITHIN_S)["request_key"] == sent.id
                assert worker.stop() == 0


def test_a_task_for_later_is_refused_where_it_would_hold_up_the_others(
    rabbitmq_url: str, redis_url: str, tmp_path: Path
) -> None:
    with House(f"sqlite:///{tmp_path}/ledger.db", rabbitmq_url, redis_url) as house:
        (account_id,) = house.accounts(1)
        with plain_shop(house) as shop, processes.worker(house.env, until="ready.") as worker:
            for _ in range(3):
                shop.send_task("tombola.draw", kwargs={"account_id": account_id}, queue=SHOPS, countdown=3600)
            assert drawn(shop, account_id=account_id, request_key="now").status == "completed"
            assert worker.log().count("send it when it is due") == 3
        assert count_set_aside(house) == 3
        assert house.settled() == 1
