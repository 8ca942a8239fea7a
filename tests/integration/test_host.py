"""What is wrong with Celery's own queues, names and connections never keeps draws from settling."""

import base64
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import amqp
import pytest
from celery import Celery
from redis import Redis

from producers.broker import open_amqp
from producers.contract import parse_result
from tests import processes
from tests.processes import House, Worker, draws, wait_for
from worker.task_queues import DEAD, SHOPS, TASKS

WITHIN_S = 60.0


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


# Wrong in its form: no worker can make a task of it.
NO_TASKS: dict[str, bytes] = {
    "rubbish": b"rubbish",
    "nothing": b"",
    "no text": b"\x00\xff\xfe\x80",
    "deep": b"[" * 50_000,
    **{f"json {text}": text.encode() for text in ("5", "null", "[]", "{}", '"x"', "true", "1e999")},
    **{
        name: json.dumps(envelope(**changes)).encode()
        for name, changes in {
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
        }.items()
    },
}  # fmt: skip

# What only a list's envelope can say.
ONLY_IN_LISTS = ("properties 5", "properties null", "codec", "codec list", "charset 5")

# Odd, and perhaps a task all the same: none of it may do any harm, on either side of the pool.
ODD = [
    json.dumps(envelope(**changes)).encode()
    for changes in (
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
]


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
    with plain_shop(house) as shop, processes.worker(house.env, until="ready.") as worker:
        assert drawn(shop, account_id=accounts[0], request_key="before").status == "completed"
        garbage = [it for name, it in NO_TASKS.items() if is_redis(house) or name not in ONLY_IN_LISTS]
        send_raw(house, SHOPS, garbage)
        send_raw(house, TASKS, garbage)
        settle_some(house, worker, accounts, prefix="during")
        wait_for(
            lambda: count_set_aside(house) >= 2 * len(garbage),
            within_s=WITHIN_S,
            what=lambda: f"{count_set_aside(house)} of {2 * len(garbage)} set aside\n{worker.log()[-6000:]}",
        )
        assert count_set_aside(house) == 2 * len(garbage)
        send_raw(house, SHOPS, ODD)
        send_raw(house, TASKS, ODD)
        for queue in (SHOPS, TASKS):
            assert drawn(shop, queue=queue, account_id=accounts[0], request_key=f"after.{queue}").won is not None
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
