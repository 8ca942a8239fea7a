"""Metrics as Prometheus reads them, from processes as operators start them; and what these write in their logs."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pymysql
import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis
from sqlalchemy import insert, text, update

from tests import gateways, processes, servers
from tests.audits import audited
from tests.processes import House, draws, wait_for
from tombola import migrations
from tombola.producers.client import DrawClient
from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.settings import Settings
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import dead_letters, replays
from tombola.producers.telemetry import metrics as state
from tombola.producers.telemetry import pulse
from tombola.worker import metrics
from tombola.worker.audit import audits
from tombola.worker.books import anchors, sealing
from tombola.worker.deliveries import Delivery
from tombola.worker.ledger import post as ledger
from tombola.worker.ledger.accounts import open_account
from tombola.worker.operators import actions
from tombola.worker.relay import lookout as relay_lookout
from tombola.worker.relay.given_up import time_out_once
from tombola.worker.relay.lookout import OperatorsLookout
from tombola.worker.relay.relay import Relay
from tombola.worker.settle import tries
from tombola.worker.settle.rules import Rules
from tombola.worker.settle.watch import Watch

RELAY = [sys.executable, "-m", "tombola.worker", "relay"]
WITHIN_S = 40.0


class Scrape:
    """What one scrape told."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples.get((f"tombola_{name}", tuple(sorted(labels.items()))), 0.0)


def scrape(port: int, path: str = "/metrics") -> Scrape:
    with urllib.request.urlopen(f"http://{servers.HOST}:{port}{path}", timeout=10) as answer:
        return Scrape(answer.read().decode())


def scraped(port: int, holds: Callable[[Scrape], bool], log: Callable[[], str]) -> Scrape:
    """A scrape of which that holds, as soon as there is one."""
    last: list[Scrape] = []

    def looked() -> bool:
        with suppress(OSError):  # it may not listen yet
            last[:] = [scrape(port)]
        return bool(last) and holds(last[0])

    wait_for(looked, within_s=WITHIN_S, what=lambda: f"{last[0].text if last else ''}\n{log()[-3000:]}")
    return last[0]


@pytest.fixture
def port() -> int:
    return servers._free_port()


@pytest.fixture
def house(tmp_path: Path, redis_url: str, port: int) -> Iterator[House]:
    database_url = f"sqlite:///{tmp_path}/ledger.db"
    with House(database_url, redis_url, redis_url, TOMBOLA_METRICS_PORT=str(port)) as house:
        yield house


@pytest.fixture(params=["redis", "rabbitmq"])
def real_house(request: pytest.FixtureRequest, mariadb_url: str, redis_url: str, port: int) -> Iterator[House]:
    broker_url = redis_url if request.param == "redis" else request.getfixturevalue("rabbitmq_url")
    with House(mariadb_url, broker_url, redis_url, TOMBOLA_METRICS_PORT=str(port)) as house:
        yield house


class Always(state.Throttle):
    """Looks at each call: the common one looks less often where a busy machine makes it slow."""

    def is_due(self) -> bool:
        return True


def now(name: str, **labels: str) -> float:
    """A sample of this process."""
    return REGISTRY.get_sample_value(f"tombola_{name}", labels) or 0.0


# ---- the worker ------------------------------------------------------------------------------------------------------


def test_a_worker_tells_what_it_did(real_house: House, port: int) -> None:
    house = real_house
    accounts = house.accounts(5)
    broke = open_account(house.engine, user_id=6, balance=Decimal(0))
    accepted = draws(accounts, 30, prefix="accepted")
    told_no = DrawRequest(account_id=broke, request_key="told_no")
    bare = draws(accounts, 10, prefix="bare")
    with processes.worker(house.env) as worker:
        with DrawClient.from_settings(house.settings) as client:
            assert client.enqueue_many([*accepted, told_no]) == 31
        house.enqueue(bare)
        house.wait_settled(41, within_s=WITHIN_S, log=worker.log)
        house.enqueue(accepted[:3])
        house.publish(b"no json", b'{"v":2}')
        wait_for(lambda: house.dead() == 2, within_s=WITHIN_S, what=worker.log)
        told = scraped(
            port,
            lambda it: (
                it("draws_total", outcome="settled") == 40
                and it("draws_total", outcome="repeat") == 3
                and it("batch_draws_sum") == 46
            ),
            worker.log,
        )
        assert worker.stop() == 0
    assert told("draws_total", outcome="rejected") == 1
    assert told("parked_total", cause=Cause.UNPARSABLE) == 1
    assert told("parked_total", cause=Cause.UNKNOWN_VERSION) == 1
    assert told("batch_seconds_count") == told("batch_draws_count") >= 3
    assert 0 < told("batch_seconds_sum") < WITHIN_S
    # Only what was accepted has a beginning that is known.
    assert told("accept_to_settle_seconds_count") == 31
    assert 0 < told("accept_to_settle_seconds_sum") / 31 < WITHIN_S
    assert told("accept_to_settle_seconds_bucket", le="0.005") < 31
    assert (told("redelivered_total"), told("deferred_total"), told("worker_outages_total")) == (0, 0, 0)
    # No label is a key, a session or an account.
    assert not [draw.request_key for draw in [*accepted, *bare, told_no] if draw.request_key in told.text]


def test_redeliveries_are_counted() -> None:
    watch = Watch()
    before = now("redelivered_total")
    with watch.batch([Delivery(b"", 1), Delivery(b"", 2, 3), Delivery(b"", 3, 2)], began_at=0.0):
        pass
    assert now("redelivered_total") == before + 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (pymysql.OperationalError(1213, "Deadlock found"), "1213"),
        (pymysql.OperationalError(1205, "Lock wait timeout exceeded"), "1205"),
        (pymysql.IntegrityError(1062, "Duplicate entry"), "1062"),
        (pymysql.DataError(1264, "Out of range"), "other"),
        (ValueError("our own mistake"), "other"),
    ],
)
def test_retries_are_counted_by_the_databases_code(
    house: House, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    (account_id,) = house.accounts(1)
    post, failures = ledger.post, [error]

    def fail_once(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        post(*arguments)

    monkeypatch.setattr(ledger, "post", fail_once)
    before = now("transaction_retries_total", code=code)
    tries.settle(house.engine, draws([account_id], 2), Rules(house.wheels, tries_max=3), sleep=lambda _s: None)
    assert now("transaction_retries_total", code=code) == before + 1


def test_an_outage_is_no_retry(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_arguments: Any) -> None:
        raise pymysql.OperationalError(2013, "Lost connection")

    monkeypatch.setattr(ledger, "post", gone)
    before = {code: now("transaction_retries_total", code=code) for code in ("2013", "other")}
    with pytest.raises(Exception, match="does not answer"):
        tries.settle(house.engine, draws(house.accounts(1), 1), Rules(house.wheels, tries_max=3))
    assert {code: now("transaction_retries_total", code=code) for code in ("2013", "other")} == before


def test_a_port_that_is_taken_is_a_warning_and_no_more(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with taken(port):
        state.serve(Settings.from_env({"TOMBOLA_METRICS_PORT": str(port)}))
    assert [(it.levelname, "metrics are not served" in it.message) for it in caplog.records] == [("WARNING", True)]


def test_without_a_port_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    ports: list[int] = []
    monkeypatch.setattr(state, "start_http_server", lambda port, *_options: ports.append(port))
    state.serve(Settings.from_env({}))
    assert ports == []
    state.serve(Settings.from_env({"TOMBOLA_METRICS_PORT": "9090"}))
    assert ports == [9090]


def test_processes_that_share_a_folder_tell_each_others(house: House, port: int, tmp_path: Path) -> None:
    """PROMETHEUS_MULTIPROC_DIR: the first worker has the port, and tells of both."""
    accounts = house.accounts(4)
    folder = tmp_path / "metrics"
    folder.mkdir()
    env = house.env | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    with processes.worker(env) as first:
        house.enqueue(draws(accounts, 10, prefix="first"))
        house.wait_settled(10, within_s=WITHIN_S, log=first.log)
        with processes.worker(env, command=[*processes.CELERY, "--hostname=other@%h"]) as second:
            house.enqueue(draws(accounts, 200, prefix="both"))
            house.wait_settled(210, within_s=WITHIN_S, log=second.log)
            scraped(port, lambda it: it("draws_total", outcome="settled") == 210, second.log)


# ---- the relay -------------------------------------------------------------------------------------------------------


def test_a_relay_tells_the_state_of_everything(real_house: House, port: int) -> None:
    house = real_house
    accounts = house.accounts(2)
    is_stream = house.env["TOMBOLA_BROKER_URL"].startswith("redis")
    asked = draws(accounts, 4)
    with DrawClient.from_settings(house.settings) as client:
        for draw in asked:  # accepted, and left to the relay
            with house.engine.begin() as connection:
                client.enqueue(draw, connection=connection)
    with house.engine.begin() as connection:
        # Its age counts from the accept.
        accepted_at = utc_now() - timedelta(seconds=1000)
        first = requests.c.request_key == asked[0].request_key
        connection.execute(update(requests).where(first).values(accepted_at=accepted_at))
        connection.execute(insert(dead_letters), [dead_letter("a", "parked"), dead_letter("b", "parked")])
    with processes.worker(house.env, command=RELAY, until="relaying") as relay:
        told = scraped(
            port,
            lambda it: (
                it("broker_backlog") == 4 and it("relay_published_total") == 4 and it("members", role="relay") == 1
            ),
            relay.log,
        )
        assert told("accepted_backlog") == 4
        assert 1000 <= told("accepted_oldest_seconds") < 1000 + WITHIN_S
        assert told("dead_letters", state="parked", cause="invalid") == 2
        assert told("members", role="worker") == 0
        assert abs(told("relay_last_pass_timestamp_seconds") - utc_now().timestamp()) < 10
        assert told("relay_failures_total") == 0
        if is_stream:
            assert told("broker_pending") == 0
        # Somebody settles them: the state follows.
        with processes.worker(house.env | {"TOMBOLA_METRICS_PORT": "0"}) as worker:
            house.wait_settled(4, within_s=WITHIN_S, log=worker.log)
            told = scraped(
                port,
                lambda it: it("accepted_backlog") == it("broker_backlog") == 0 and it("members", role="worker") == 1,
                relay.log,
            )
        assert told("accepted_oldest_seconds") == 0


def dead_letter(sha: str, state: str) -> dict[str, Any]:
    moment = utc_now()
    return {
        **{"body_sha256": sha, "state": state, "cause": "invalid", "error": "", "body": b"", "body_bytes": 0},
        **{"queue": "draws", "deliveries": 1, "times_parked": 1},
        **{"first_parked_at": moment, "last_parked_at": moment},
    }


def test_what_is_given_up_is_counted_by_its_reason(house: House) -> None:
    (account_id,) = house.accounts(1)
    with DrawClient.from_settings(house.settings) as client:
        for draw in draws([account_id], 3):
            with house.engine.begin() as connection:
                client.enqueue(draw, connection=connection)
    before = now("relay_given_up_total", reason="TIMED_OUT")
    assert time_out_once(house.engine, timeout_s=0) == 3
    assert now("relay_given_up_total", reason="TIMED_OUT") == before + 3


def test_failed_passes_are_counted_and_the_next_one_is_told(tmp_path: Path, redis_url: str) -> None:
    """Against a database that is not migrated, until it is."""
    url = f"sqlite:///{tmp_path}/ledger.db"
    settings = Settings.from_env({"TOMBOLA_DATABASE_URL": url, "TOMBOLA_BROKER_URL": redis_url})
    relay, stopping = Relay.from_settings(settings), threading.Event()
    failures, passed = now("relay_failures_total"), now("relay_last_pass_timestamp_seconds")
    thread = threading.Thread(target=relay.run, args=[stopping])
    thread.start()
    wait_for(lambda: now("relay_failures_total") >= failures + 2, within_s=WITHIN_S, what=lambda: "no failure")
    assert now("relay_last_pass_timestamp_seconds") == passed
    migrations.upgrade(open_engine(url))
    wait_for(
        lambda: now("relay_last_pass_timestamp_seconds") > passed, within_s=WITHIN_S, what=lambda: "no pass got through"
    )
    stopping.set()
    thread.join()
    relay.close()


def test_a_cause_without_dead_letters_left_is_zero(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/ledger.db")
    migrations.upgrade(engine)
    count = OperatorsLookout(Always())
    with engine.begin() as connection:
        connection.execute(insert(dead_letters), [dead_letter(it, "parked") for it in "abc"])
    count.look(engine)
    assert now("dead_letters", state="parked", cause="invalid") == 3
    with engine.begin() as connection:
        connection.execute(update(dead_letters).values(state="discarded"))
    count.look(engine)
    assert now("dead_letters", state="parked", cause="invalid") == 0
    assert now("dead_letters", state="discarded", cause="invalid") == 3
    engine.dispose()


def test_the_books_are_told(tmp_path: Path) -> None:
    with House(f"sqlite:///{tmp_path}/ledger.db", "redis://none", "redis://none") as house:
        lookout = OperatorsLookout(Always())
        names = ("books_last_block", "books_anchored_timestamp_seconds", "books_lag_seconds")

        def told() -> list[float]:
            lookout.look(house.engine)
            return [now(it) for it in names]

        assert told() == [0, 0, 0]
        open_account(house.engine, user_id=1, balance=Decimal(10))
        with house.engine.begin() as connection:
            connection.execute(text("UPDATE asset_transactions SET created_at = '2026-01-01 00:00:00.000000'"))
        assert told()[2] > 3600
        sealing.seal(house.engine, after_s=0)
        anchors.remember_anchored(house.engine)
        assert told()[0] == 1
        assert told()[2] == 0
        assert abs(told()[1] - utc_now().timestamp()) < 60


def test_the_last_audit_is_told(tmp_path: Path) -> None:
    with House(f"sqlite:///{tmp_path}/ledger.db", "redis://none", "redis://none") as house:
        lookout = OperatorsLookout(Always())
        lookout.look(house.engine)
        assert (now("audit_last_timestamp_seconds"), now("audit_violations")) == (0, 0)
        report = audited(house.engine, house.wheels)
        audits.record(house.engine, report, by="tombola.audit")

        def told() -> tuple[bool, float]:
            lookout.look(house.engine)
            return abs(now("audit_last_timestamp_seconds") - utc_now().timestamp()) < 60, now("audit_violations")

        assert told() == (True, 0)
        assert now("audit_everything_last_timestamp_seconds") == now("audit_last_timestamp_seconds")
        report.counts["I3"] = 2
        report.completed.discard("I12")
        audits.record(house.engine, report, by="shell:root@lot")
        assert told() == (True, 3)


def test_the_last_conformity_reports_are_told(tmp_path: Path) -> None:
    with House(f"sqlite:///{tmp_path}/ledger.db", "redis://none", "redis://none") as house:
        lookout = OperatorsLookout(Always())
        lookout.look(house.engine)
        assert (now("conformity_last_timestamp_seconds"), now("conformity_deviations")) == (0, 0)
        with house.engine.begin() as connection:
            details = {"pulls": {"default": 9}, "deviations": {"default": ["too lucky", "too early"]}}
            actions.record(
                connection, operator="tombola.conformity", action="conformity", reason="", count=2, details=details
            )

        def told() -> tuple[bool, float]:
            lookout.look(house.engine)
            at = now("conformity_last_timestamp_seconds")
            return abs(at - utc_now().timestamp()) < 60, now("conformity_deviations")

        assert told() == (True, 2)


def test_beat_shows_a_pulse(house: House, tmp_path: Path) -> None:
    """Nothing else tells that it is away before a night has gone by without an audit."""
    command = [*processes.CELERY[:-2], "beat", "--loglevel=INFO", f"--schedule={tmp_path}/beat"]
    with (
        processes.worker(house.env, command=command, until="beat: Starting") as beat,
        Redis.from_url(house.settings.need("result_url")) as client,
    ):
        wait_for(lambda: [it.role for it in pulse.members(client)] == ["beat"], within_s=WITHIN_S, what=beat.log)


def test_the_audit_is_made_every_night_however_often_beat_starts(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its schedule file beat begins anew: then `in 24 hours` is never, where it starts once a day."""
    for name, value in house.env.items():
        monkeypatch.setenv(name, value)
    from tombola.worker.celery import make_app

    schedule = make_app(house.settings).conf.beat_schedule["audit"]["schedule"]
    for hour in range(24):
        started_at = datetime(2026, 11, 26, hour, 10, tzinfo=UTC)
        schedule.nowfun = lambda started_at=started_at: started_at
        due_at = started_at + schedule.remaining_estimate(started_at)
        assert (due_at.hour, due_at.minute) == (2, 30), started_at
    weekly = make_app(house.settings).conf.beat_schedule["audit-everything"]
    assert weekly["kwargs"] == {"everything": True}
    weekly["schedule"].nowfun = lambda: started_at
    due_at = started_at + weekly["schedule"].remaining_estimate(started_at)
    assert (due_at.weekday(), due_at.hour, due_at.minute) == (6, 3, 30)
    conformity = make_app(house.settings).conf.beat_schedule["conformity"]
    conformity["schedule"].nowfun = lambda: started_at
    due_at = started_at + conformity["schedule"].remaining_estimate(started_at)
    assert (due_at.hour, due_at.minute) == (4, 30)


def test_what_takes_long_is_looked_up_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(state, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    throttle = state.Throttle(5.0)
    assert throttle.is_due()
    clock[0] += 0.1  # quick: after five seconds again
    throttle.done()
    clock[0] += 4.9
    assert not throttle.is_due()
    clock[0] += 0.2
    assert throttle.is_due()
    clock[0] += 2  # slow: it may take a twentieth of the time
    throttle.done()
    clock[0] += 39
    assert not throttle.is_due()
    clock[0] += 1.1
    assert throttle.is_due()


# ---- the gateway -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("--processes", "2")], ids=["one", "two"])
def test_a_gateway_tells_what_it_was_asked_for(house: House, arguments: tuple[str, ...]) -> None:
    (account_id,) = house.accounts(1)
    with gateways.gateway(house, *arguments, **gateways.OPEN_TO_ALL) as gateway:
        for number in range(4):
            assert gateway.draw({"account_id": account_id}, f"key{number}").status_code == 202
        assert gateway.draw({"account_id": account_id}, "key0").status_code == 202
        assert gateway.draw({"account_id": account_id + 1}, "key0").status_code == 422
        told = Scrape(gateway.metrics())
    assert told("gateway_accepts_total", outcome="accepted") == 4
    assert told("gateway_accepts_total", outcome="replayed") == 1
    assert told("gateway_accepts_total", outcome="conflict") == 1
    assert 4 <= told("gateway_accept_seconds_count") <= 6, "what is remembered is not accepted again"
    assert told("gateway_requests_total", route="/v1/draws", method="POST", status="202") == 5


# ---- the port --------------------------------------------------------------------------------------------------------


def test_the_registry_is_everybodys_where_a_folder_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert state.registry() is REGISTRY
    assert not state.are_wanted(Settings.from_env({}))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert isinstance(state.registry(), CollectorRegistry)
    assert state.registry() is not REGISTRY
    assert state.are_wanted(Settings.from_env({}))


# ---- logs ------------------------------------------------------------------------------------------------------------


def json_lines(log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


def taken(port: int) -> socket.socket:
    """Somebody else on that port."""
    holder = socket.socket()
    holder.bind((servers.HOST, port))
    holder.listen()
    return holder


def test_a_workers_lines_are_json_and_name_their_draw(house: House) -> None:
    (account_id,) = house.accounts(1)
    (draw,) = draws([account_id], 1)
    other = DrawRequest(account_id=account_id + 1, request_key=draw.request_key)  # the same key for somebody else
    with processes.worker(house.env) as worker:
        house.enqueue([draw])
        house.wait_settled(1, within_s=WITHIN_S, log=worker.log)
        house.publish(other.encode(), b'{"v":1,"request_key":"evil\\n{\\"event\\":\\"forged\\"}","account_id":1}')
        wait_for(lambda: house.dead() == 2, within_s=WITHIN_S, what=worker.log)
        assert worker.stop() == 0
        lines = json_lines(worker.log())
    parked = [line for line in lines if line["event"].startswith("parked a dead letter")]
    assert {line["cause"] for line in parked} == {Cause.FINGERPRINT_MISMATCH, Cause.INVALID}
    (mine,) = [line for line in parked if line["cause"] == Cause.FINGERPRINT_MISMATCH]
    assert (mine["request_key"], mine["lottery_session_id"]) == (draw.request_key, other.lottery_session_id)
    assert not [line for line in lines if line["event"] == "forged"]
    assert [line for line in lines if line["event"].startswith("consuming draws")]
    assert all({"timestamp", "level", "logger", "event"} <= set(line) for line in lines)


def test_celerys_loglevel_still_holds(house: House) -> None:
    """At INFO, as in all other tests, a worker says that it is consuming draws."""
    command = [*processes.CELERY[:-1], "--loglevel=WARNING"]
    env = house.env | {"TOMBOLA_LOG_FORMAT": "text"}
    with processes.worker(env, command=command, until="[queues]") as worker:
        (account_id,) = house.accounts(1)
        (draw,) = draws([account_id], 1)
        house.enqueue([draw])
        house.wait_settled(1, within_s=WITHIN_S, log=worker.log)
        assert processes.READY not in worker.log()
        assert json_lines(worker.log()) == []


def test_a_gateway_and_a_relay_write_json(house: House) -> None:
    with gateways.gateway(house, **gateways.OPEN_TO_ALL) as gateway:
        lines = json_lines(gateway.process.log())
    assert {"uvicorn.error"} <= {line["logger"] for line in lines}
    assert [line for line in lines if line["event"].startswith("Application startup complete")]
    with processes.worker(house.env, command=RELAY, until="relaying") as relay:
        (line,) = [line for line in json_lines(relay.log()) if line["event"] == "relaying"]
    assert line["level"] == logging.getLevelName(logging.INFO).lower()


def test_the_outcomes_of_replays_are_counted_from_the_first_look_on(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run in shells, which nobody scrapes: the relay tells of them."""
    monkeypatch.setattr(relay_lookout, "Throttle", lambda: SimpleNamespace(is_due=lambda: True, done=lambda: None))
    row = {"operator": "ann", "reason": "r", "selection": "{}", "options": "{}", "status": "done", "selected": 9}
    times = {"started_at": utc_now(), "seen_at": utc_now()}
    with house.engine.begin() as connection:
        connection.execute(insert(replays).values(**row, **times, settled=5))
    count = OperatorsLookout()
    before = {name: now("replayed_total", outcome=name) for name in metrics.OUTCOMES}
    count.look(house.engine)
    with house.engine.begin() as connection:
        connection.execute(insert(replays).values(**row, **times, settled=2, parked_again=3, refused=4))
    count.look(house.engine)
    count.look(house.engine)
    after = {name: now("replayed_total", outcome=name) for name in metrics.OUTCOMES}
    assert {name: after[name] - before[name] for name in after} == {"settled": 2, "parked_again": 3, "refused": 4}
