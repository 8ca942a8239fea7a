"""`celery -A tombola.worker worker` as operators start it: real processes, real servers, good draws and bad input."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from tests import processes, servers
from tests.processes import House, draws, wait_for
from tombola.producers.domain.contract import DrawRequest, DrawResult, parse_result
from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.results import KEY_PREFIX, ResultStore
from tombola.producers.settings import Settings

SETTLED_WITHIN_S = 60.0
COMBINATIONS = ["mariadb-redis", "mariadb-rabbitmq", "sqlite-redis"]


@pytest.fixture(params=COMBINATIONS)
def house(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str) -> Iterator[House]:
    database, broker = request.param.split("-")
    database_url = (
        request.getfixturevalue("mariadb_url") if database == "mariadb" else f"sqlite:///{tmp_path}/ledger.db"
    )
    broker_url = redis_url if broker == "redis" else request.getfixturevalue("rabbitmq_url")
    with House(database_url, broker_url, redis_url) as house:
        yield house


on_mariadb = pytest.mark.parametrize("house", ["mariadb-redis", "mariadb-rabbitmq"], indirect=True)


@pytest.fixture
def results(redis_url: str) -> Iterator[ResultStore]:
    store = ResultStore.open(redis_url, ttl_s=600)  # no engine: what it finds was put there by a worker
    yield store
    store.close()


def bad_bodies(taken: DrawRequest, known_key: str) -> dict[bytes, str]:
    """What must be parked, with its cause. `taken` is an account's draw under `known_key`."""

    def body(**fields: Any) -> bytes:
        good = {"v": 1, "request_key": "k", "lottery_session_id": "s", "account_id": taken.account_id, "campaign": "c"}
        return json.dumps(good | fields).encode()

    good_until_here = b'{"v":1,"request_key":"bad_number","account_id":1e999}'
    return {
        b"\x00\xff\xfe\x80 garbage": "unparsable",
        b"": "unparsable",
        b"[" * 5_000: "unparsable",
        body(request_key="with\0nul"): "invalid",
        good_until_here: "invalid",
        body(account_id=-1): "invalid",
        body(account_id=2**63): "invalid",
        body(account_id="1"): "invalid",
        body(account_id=True): "invalid",
        body(request_key="a:consume"): "invalid",
        body(request_key="k" * 65): "invalid",
        body(unknown="field"): "invalid",
        b'{"v":1,"request_key":"huge","account_id":1,"campaign":"' + b"x" * 10_000_000 + b'"}': "invalid",
        body(v=2, request_key="future"): "unknown version",
        body(request_key="elsewhere", lottery_session_id="elsewhere", campaign="unknown"): "unknown campaign",
        DrawRequest(account_id=taken.account_id + 1, request_key=known_key).encode(): "fingerprint mismatch",
    }


def test_draws_settle_and_are_answered_around_bad_input(house: House, results: ResultStore) -> None:
    accounts = house.accounts(5)
    good = draws(accounts, 60)
    bad = bad_bodies(good[0], good[0].request_key)
    with processes.worker(house.env) as worker:
        house.enqueue(good[:1])
        house.wait_settled(1, within_s=SETTLED_WITHIN_S, log=worker.log)
        mixed = [draw.encode() for draw in good[1:]]
        for place, body in enumerate(bad):
            mixed.insert(3 * place, body)
        house.publish(*mixed)
        house.wait_settled(len(good), within_s=SETTLED_WITHIN_S, log=worker.log)
        wait_for(lambda: house.dead() >= len(bad), within_s=SETTLED_WITHIN_S, what=lambda: str(house.causes()))
        for draw in good:
            answer = results.wait(draw.lottery_session_id, timeout_s=20)
            assert (answer.request_key, answer.account_id) == (draw.request_key, draw.account_id)
        assert house.causes() == sorted(bad.values())

        # The same request again: the same bytes, in the database and in Redis, and nothing is charged.
        first = house.results()
        with Redis.from_url(house.env["TOMBOLA_RESULT_URL"]) as client:
            before: Any = client.get(KEY_PREFIX + good[3].lottery_session_id)
            client.delete(KEY_PREFIX + good[3].lottery_session_id)
            house.enqueue([good[3], good[3]])
            wait_for(
                lambda: client.exists(KEY_PREFIX + good[3].lottery_session_id) == 1,
                within_s=20,
                what=lambda: "the repeat was not answered",
            )
            assert client.get(KEY_PREFIX + good[3].lottery_session_id) == before
        assert house.results() == first
        assert worker.is_alive
        assert worker.stop() == 0
    assert house.settled() == len(good)
    assert house.causes() == sorted(bad.values())
    assert house.violations() == []


@on_mariadb
def test_send_task_draws_too(house: House, redis_url: str, results: ResultStore) -> None:
    """A shop that has Celery and nothing of ours; a draw that comes as a message and as a task is one draw."""
    (account_id,) = house.accounts(1, balance=2)
    shop = Celery("shop", broker=house.env["TOMBOLA_BROKER_URL"], backend=redis_url, set_as_current=False)
    fields = {"account_id": account_id, "request_key": "from_a_shop", "lottery_session_id": "shop_session"}
    with processes.worker(house.env, until="ready."):
        sent = shop.send_task("tombola.draw", kwargs=fields, queue="tombola", task_id="shop_session")
        first: Any = sent.get(timeout=30)
        assert parse_result(json.dumps(first).encode()).request_key == "from_a_shop"
        again: Any = shop.send_task("tombola.draw", kwargs=fields, queue="tombola").get(timeout=30)
        assert again == first
        refused = shop.send_task("tombola.draw", kwargs={**fields, "account_id": -1}, queue="tombola")
        assert isinstance(refused.get(timeout=30, propagate=False), Exception)

        draw = DrawRequest(account_id=account_id, request_key="both_ways")
        house.enqueue([draw])
        by_message: DrawResult = results.wait(draw.lottery_session_id, timeout_s=20)
        fields = {"account_id": account_id, "request_key": "both_ways"}
        by_task: Any = shop.send_task("tombola.draw", kwargs=fields, queue="tombola").get(timeout=30)
        assert parse_result(json.dumps(by_task).encode()) == by_message
    shop.close()
    assert house.settled() == 2
    assert house.violations() == []


@on_mariadb
def test_a_warm_shutdown_in_full_swing_loses_nothing(house: House) -> None:
    accounts = house.accounts(50)
    total = 5000
    queued = draws(accounts, total)
    house.enqueue(queued)
    house.env["TOMBOLA_BATCH_SIZE_MAX"] = "5"  # many batches, so that the signal falls between two
    with processes.worker(house.env) as worker:
        house.wait_settled(100, within_s=SETTLED_WITHIN_S, log=worker.log)
        assert worker.stop() == 0
        assert "Traceback" not in worker.log()
    done = house.results()
    assert 0 < len(done) < total, "it stopped before it began, or after all was done: nothing was tested"
    del house.env["TOMBOLA_BATCH_SIZE_MAX"]
    with processes.worker(house.env) as worker:
        house.wait_settled(total, within_s=SETTLED_WITHIN_S, log=worker.log)
        assert worker.stop() == 0
    after = house.results()
    assert {key: after[key] for key in done} == done
    assert house.dead() == 0
    assert house.violations() == []


def test_in_a_checkout_the_folders_name_is_enough(tmp_path: Path, redis_url: str) -> None:
    """`celery -A worker`, as the owner types it: the same app, and nothing is loaded twice under two names."""
    with House(f"sqlite:///{tmp_path}/ledger.db", redis_url, redis_url) as house:
        command = ["worker" if word == "tombola.worker" else word for word in processes.CELERY]
        assert command.count("worker") == 2
        house.enqueue(draws(house.accounts(1), 1))
        with processes.worker(house.env, command=command) as worker:
            house.wait_settled(1, within_s=SETTLED_WITHIN_S, log=worker.log)
            assert worker.stop() == 0
        script = (
            "import sys, worker\nworker.app\nprint([it for it in sys.modules if it.split('.')[0] in "
            "('worker', 'producers', 'migrations')], worker.app is sys.modules['tombola.worker.celery'].app)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=processes.environment(house.env), cwd=processes.PROJECT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert done.stdout == "['worker'] True\n"


class TestRefusesToStart:
    """Exit code 1 and one line that says what to do, not a traceback, and not a worker that consumes nothing.

    A worker checks its settings when it loads the app, and its servers in DrawsStep. Processes show the exit code and
    the line, for either place; the messages of further cases need no process.
    """

    @pytest.fixture
    def env(self, tmp_path: Path, redis_url: str) -> dict[str, str]:
        with House(f"sqlite:///{tmp_path}/ledger.db", redis_url, redis_url) as house:
            return house.env

    @pytest.fixture
    def closed_port(self) -> Iterator[int]:
        with socket.socket() as holder:
            holder.bind((servers.HOST, 0))
            yield holder.getsockname()[1]

    def refusal(self, env: dict[str, str]) -> str:
        """The line that a worker process ends with."""
        done = processes.failed_start(env)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, done.stderr
        return lines[0]

    def reason(self, env: dict[str, str]) -> str:
        """The message of the error that a worker under `env` raises when it starts."""
        with pytest.MonkeyPatch.context() as patch:
            # The module makes an app from this process's environment.
            for name, value in {**env, "TOMBOLA_SEED": processes.SEED, "TOMBOLA_CLAIM_AFTER_S": "60"}.items():
                patch.setenv(name, value)
            from tombola.worker import celery
        with pytest.raises(ConfigurationError) as raised:
            celery.DrawsStep(SimpleNamespace(app=celery.make_app(Settings.from_env(env))))
        return str(raised.value)

    def test_an_unmigrated_database(self, env: dict[str, str], tmp_path: Path) -> None:
        env["TOMBOLA_DATABASE_URL"] = f"sqlite:///{tmp_path}/empty.db"
        assert "tombola migrate" in self.refusal(env)

    def test_an_unmigrated_mariadb(self, env: dict[str, str], mariadb_url: str) -> None:
        env["TOMBOLA_DATABASE_URL"] = mariadb_url
        assert "tombola migrate" in self.reason(env)

    def test_a_database_that_is_not_there(self, env: dict[str, str], closed_port: int) -> None:
        """Its password is not repeated."""
        env["TOMBOLA_DATABASE_URL"] = f"mysql+pymysql://root:hunter2@{servers.HOST}:{closed_port}/ledger"
        said = self.refusal(env)
        assert "answer" in said
        assert "hunter2" not in said

    @pytest.mark.parametrize(
        ("name", "url"),
        [
            ("TOMBOLA_BROKER_URL", "amqp://guest:guest@{}//"),
            ("TOMBOLA_BROKER_URL", "redis://{}/0"),
            ("TOMBOLA_RESULT_URL", "redis://{}/0"),
        ],
    )
    def test_a_server_that_is_not_there(self, env: dict[str, str], closed_port: int, name: str, url: str) -> None:
        env[name] = url.format(f"{servers.HOST}:{closed_port}")
        said = self.reason(env)
        assert "answer" in said
        assert url.startswith("amqp") or name in said

    def test_an_unknown_name(self, env: dict[str, str]) -> None:
        line = self.refusal(env | {"TOMBOLA_BATCH_SIZE": "10"})
        assert "TOMBOLA_BATCH_SIZE" in line
        assert "did you mean TOMBOLA_BATCH_SIZE_MAX?" in line

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"TOMBOLA_CLAIM_AFTER_S": "2"}, "TOMBOLA_CLAIM_AFTER_S (2)"),
            ({"TOMBOLA_SEED": ""}, "TOMBOLA_SEED is not set"),
        ],
        ids=["a claim that comes too early", "no seed"],
    )
    def test_settings_that_cannot_work(self, env: dict[str, str], wrong: dict[str, str], message: str) -> None:
        assert message in self.reason(env | wrong)
