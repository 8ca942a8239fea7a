"""The doctor on real servers: everything in order, then each thing wrong in turn; and it leaves no trace."""

import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import kombu
import msgspec
import pytest
from redis import Redis
from sqlalchemy import Engine, create_engine, insert, text, update
from sqlalchemy.exc import DBAPIError

import tombola.producers.storage.engines
import tombola.producers.telemetry.pulse
import tombola.worker.doctor.checks
import tombola.worker.doctor.database
from tests import servers
from tests.audits import audited
from tests.gateways import settle
from tests.processes import House
from tombola import migrations
from tombola.producers.brokers.streams import DEAD_QUEUE, GROUP, QUEUE, declare_group
from tombola.producers.domain.books.checkpoints import PrivateKey
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.receipt_keys import SigningKey
from tombola.producers.settings import Settings
from tombola.producers.storage import requests
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.receipt_keys import open_signer
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.schema import (
    account_asset_balances,
    api_idempotency_requests,
    asset_transactions,
    dead_letters,
    operator_actions,
)
from tombola.producers.storage.transactions import transaction
from tombola.producers.telemetry.pulse import MEMBER_PREFIX, MEMBERS_KEY, Member, Pulse
from tombola.worker.audit import audits
from tombola.worker.books import anchors, sealing
from tombola.worker.conformity import nightly
from tombola.worker.deliveries import open_deliveries
from tombola.worker.doctor import Check, examine
from tombola.worker.doctor.checks import Facts
from tombola.worker.doctor.streams import examine_consumers, examine_stream
from tombola.worker.ledger.accounts import open_account
from tombola.worker.operators import actions
from tombola.worker.seeds import chains
from tombola.worker.seeds.masters import Masters

SECRET = "5ec2e7" * 12
SEALED = {
    "TOMBOLA_RESULT_SECRET": SECRET,
    "TOMBOLA_MESSAGE_SECRET": SECRET,
    "TOMBOLA_REMOTE_CONTROL": "false",
}

OF_THE_DATABASE = [
    *("isolation level", "strict mode", "durability", "binary log", "tables", "key columns", "privileges"),
    "clock of the database",
]
OF_THE_DRAWS = ["seed of the ledger", "backlog", "oldest accepted", "relay", "dead letters", "fulfilments", "balances"]


def look(house: House, **env: str) -> dict[str, Check]:
    """Every check by its name."""
    settings = Settings.from_env(house.env | env)
    checks = list(examine(settings))
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert check.found, check
        assert bool(check.cure) == (check.status in ("warn", "fail")), check
    told = str(checks)
    assert SECRET[:16] not in told
    assert house.settings.need("seed")[:16] not in told
    return {check.name: check for check in checks}


def statuses(checks: dict[str, Check], *names: str) -> list[str]:
    return [checks[name].status for name in names]


@pytest.fixture
def house(mariadb_url: str, redis_url: str) -> Iterator[House]:
    with House(mariadb_url, redis_url, redis_url, **SEALED) as house:
        yield house


@pytest.fixture
def lean(tmp_path: Path, redis_url: str) -> Iterator[House]:
    """On SQLite, for what is the same on every database."""
    with House(f"sqlite:///{tmp_path}/x.db", redis_url, redis_url, **SEALED) as house:
        yield house


@pytest.fixture
def rabbit_house(tmp_path: Path, rabbitmq_url: str, redis_url: str) -> Iterator[House]:
    with House(f"sqlite:///{tmp_path}/x.db", rabbitmq_url, redis_url, **SEALED) as house:
        yield house


@contextmanager
def consuming(house: House) -> Iterator[None]:
    """What a worker that has nothing to do looks like to the broker and to the result store."""
    deliveries = open_deliveries(house.settings.need("broker_url"), claim_after_s=15, prefetch=10)
    deliveries.fetch(1, wait_s=0.01)
    pulse = Pulse(Redis.from_url(house.settings.need("result_url")), "worker", "w1")
    pulse.beat_once()
    yield
    deliveries.close()
    pulse.stop()


def accept(engine: Engine, *draws: DrawRequest, ago_s: float = 0, is_published: bool = True) -> None:
    then = utc_now() - timedelta(seconds=ago_s)
    with transaction(engine) as open_transaction:
        requests.accept(
            open_transaction, [Submission(draw) for draw in draws], then, publish_at=then, is_published=is_published
        )


# ---- all is well -----------------------------------------------------------------------------------------------------


def test_a_deployment_in_order(mariadb_url: str) -> None:
    with (
        servers.redis(private=True, appendonly=True) as redis,
        House(mariadb_url, redis.url, redis.url, **SEALED) as house,
        consuming(house),
        Redis.from_url(redis.url) as client,
    ):
        chains.begin_first(house.engine, Masters(house.settings.seeds))
        settle(house, DrawRequest(account_id=house.accounts(1)[0]), store=False)
        audits.record(house.engine, audited(house.engine, house.wheels), by="tombola.audit")
        nightly.record(house.engine, [], by="tombola.conformity")
        sealing.seal(house.engine, after_s=0)
        anchors.sign_once(house.engine, PrivateKey.make("shop.example/books"), every_s=0)
        anchors.remember_anchored(house.engine)
        for role in ("relay", "beat"):
            Pulse(client, role).beat_once()
        key = SigningKey.make()
        open_signer(house.engine, [key])
        checks = look(house, TOMBOLA_RECEIPT_KEY=key.text)
    not_ok = {name: check for name, check in checks.items() if check.status != "ok"}
    # Tests are root on their servers; tests/system/test_grants.py has users of their own.
    assert not_ok.pop("privileges").found.startswith("this process's database user may UPDATE asset_transactions, DEL")
    assert not_ok == {"result store": Check("result store", "skip", "skipped: it is the broker")}
    assert {*OF_THE_DATABASE, *OF_THE_DRAWS, "release", "seed", "broker persistence", "stream", "members"} <= {*checks}
    assert re.match(r"(MariaDB|MySQL) \d+\.", checks["database"].found)
    assert checks["migrations"].found == f"at {migrations.head_revision()}, the newest"
    assert checks["workers"].found == "1 at work"
    assert checks["members"].found == "beat: 1, relay: 1, worker: 1"
    assert checks["audit"].found.endswith("UTC, by tombola.audit: the books balance")


def test_a_deployment_in_order_on_rabbitmq(rabbit_house: House) -> None:
    with consuming(rabbit_house):
        checks = look(rabbit_house)
        assert statuses(checks, "broker", "queue", "dead-letter queue", "workers", "relay") == ["ok"] * 5
        assert checks["queue"].found == "0 waiting, 1 consumers"
        assert statuses(checks, "result store", "result eviction", "result memory") == ["ok"] * 3


def test_on_sqlite_what_makes_no_sense_is_skipped(lean: House) -> None:
    checks = look(lean)
    assert statuses(checks, *OF_THE_DATABASE) == ["skip"] * len(OF_THE_DATABASE)
    assert {checks[name].found for name in OF_THE_DATABASE} == {"skipped: SQLite"}
    assert statuses(checks, "database", "migrations", *OF_THE_DRAWS) == ["ok"] * 9


# ---- it changes nothing ----------------------------------------------------------------------------------------------


def test_an_empty_broker_stays_empty(lean: House, rabbit_house: House, redis_url: str) -> None:
    checks = look(lean)
    assert statuses(checks, "stream", "consumer group", "workers", "members") == ["warn", "skip", "fail", "warn"]
    with Redis.from_url(redis_url) as client:
        assert client.keys("*") == []
    checks = look(rabbit_house)
    assert statuses(checks, "queue", "dead-letter queue", "workers") == ["warn", "warn", "fail"]
    assert "no worker consumes" in checks["workers"].found
    with kombu.Connection(rabbit_house.settings.need("broker_url")) as connection:
        for name in (QUEUE, DEAD_QUEUE):
            with pytest.raises(connection.channel_errors, match="NOT_FOUND"):
                connection.channel().queue_declare(name, passive=True)
            with pytest.raises(connection.channel_errors, match="NOT_FOUND"):
                connection.channel().exchange_declare(name, "direct", passive=True)


def test_a_busy_broker_keeps_what_it_has(house: House, redis_url: str) -> None:
    house.enqueue([DrawRequest(account_id=1)] * 3)
    with Redis.from_url(redis_url) as client, consuming(house):
        before = client.xinfo_stream(QUEUE, full=True)
        look(house)
        after = client.xinfo_stream(QUEUE, full=True)
    for told in (before, after):
        told["groups"] = str(told["groups"])
    assert after == before


def test_whoever_may_only_read_can_ask_the_doctor(house: House, mariadb_url: str) -> None:
    name = f"eye_{secrets.token_hex(4)}"
    with house.engine.begin() as connection:
        database = connection.execute(text("SELECT DATABASE()")).scalar_one()
        connection.execute(text(f"CREATE USER {name}@'%' IDENTIFIED BY 'eye'"))
        connection.execute(text(f"GRANT SELECT ON {database}.* TO {name}@'%'"))
    with consuming(house):
        as_root = look(house)
        as_eye = look(house, TOMBOLA_DATABASE_URL=mariadb_url.replace("root@", f"{name}:eye@"))
        assert statuses(as_eye, "database", "migrations", *OF_THE_DATABASE, *OF_THE_DRAWS) == ["ok"] * 17
        assert statuses_of(as_eye) == statuses_of(as_root) | {"privileges": "ok"}
        # Without the requests it still tells of all the rest.
        with house.engine.begin() as connection:
            connection.execute(text(f"REVOKE SELECT ON {database}.* FROM {name}@'%'"))
            for table in ("tombola_version", "account_asset_balances"):
                connection.execute(text(f"GRANT SELECT ON {table} TO {name}@'%'"))
        as_eye = look(house, TOMBOLA_DATABASE_URL=mariadb_url.replace("root@", f"{name}:eye@"))
        assert statuses(as_eye, "migrations", "relay", "dead letters", "balances") == ["ok", "skip", "skip", "ok"]
        assert as_eye["relay"].found.startswith("not allowed to look")
    with house.engine.begin() as connection:
        connection.execute(text(f"DROP USER {name}@'%'"))


def statuses_of(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.status for name, check in checks.items()}


def test_its_sessions_cannot_write(house: House, lean: House) -> None:
    for url in (house.settings.need("database_url"), lean.settings.need("database_url")):
        with (
            tombola.worker.doctor.database.reading(url) as engine,
            engine.connect() as connection,
            pytest.raises(DBAPIError, match=r"(?i)read.?only"),
        ):
            connection.execute(text("DELETE FROM dead_letters"))


def test_a_sqlite_file_is_neither_made_nor_touched(lean: House, tmp_path: Path) -> None:
    lean.engine.dispose()
    before = (tmp_path / "x.db").read_bytes()
    look(lean)
    assert (tmp_path / "x.db").read_bytes() == before
    checks = look(lean, TOMBOLA_DATABASE_URL=f"sqlite:///{tmp_path}/none.db")
    assert statuses(checks, "database", "migrations", "relay") == ["fail", "skip", "skip"]
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "text.db").write_text("this is no database, " * 200)
    assert look(lean, TOMBOLA_DATABASE_URL=f"sqlite:///{tmp_path}/text.db")["database"].status == "fail"


def test_books_that_are_not_sealed_and_not_signed(lean: House) -> None:
    checks = look(lean)
    assert statuses(checks, "sealing", "anchors") == ["ok", "warn"]
    assert "tombola books key" in checks["anchors"].cure
    open_account(lean.engine, user_id=1, balance=Decimal(10))
    assert look(lean)["sealing"].found == "0 blocks, the oldest row that is not sealed is 0 s old"
    with lean.engine.begin() as connection:
        connection.execute(text("UPDATE asset_transactions SET created_at = '2026-01-01 00:00:00.000000'"))
    found = look(lean)["sealing"]
    assert (found.status, "tombola books seal" in found.cure) == ("fail", True)
    sealing.seal(lean.engine, after_s=0)
    assert look(lean)["sealing"].found == "1 blocks, the oldest row that is not sealed is 0 s old"
    key = PrivateKey.make("shop.example/books")
    anchors.sign_once(lean.engine, key, every_s=0)
    assert look(lean)["anchors"].found == "no checkpoint was written outside"
    anchors.remember_anchored(lean.engine)
    assert look(lean)["anchors"].found.startswith(
        "1 blocks are signed, the last checkpoint was written outside 0 s ago"
    )
    with lean.engine.begin() as connection:
        connection.execute(text("UPDATE books_head SET anchored_at = '2026-01-01 00:00:00.000000'"))
    assert look(lean)["anchors"].status == "ok"  # nothing was sealed since
    open_account(lean.engine, user_id=2, balance=Decimal(10))
    sealing.seal(lean.engine, after_s=0)
    assert look(lean)["anchors"].status == "warn"


def test_keys_of_receipts_that_disagree(lean: House) -> None:
    old, new = SigningKey.make(), SigningKey.make()

    def told(key: str = "") -> Check:
        return look(lean, TOMBOLA_RECEIPT_KEY=key)["receipt keys"]

    assert (told().status, "tombola receipt-key make" in told().cure) == ("warn", True)
    assert told(old.text).found == f"the key {old.kid} is set here and not listed: nothing was signed with it yet"
    open_signer(lean.engine, [old])
    assert told(old.text).status == "ok"
    assert told(old.text).found.endswith("; 1 listed")
    missing = told()
    assert missing.found == f"TOMBOLA_RECEIPT_KEY is not set here, and the key {old.kid} signs receipts"
    assert f"tombola receipt-key end {old.kid}" in missing.cure
    open_signer(lean.engine, [new, old])
    assert told(f"{new.text},{old.text}").status == "ok"
    assert told(old.text).found == f"the key {new.kid} is newer than those that are set here"
    assert told(new.text).found == f"the key {old.kid} is not set here any more, and still signs"
    open_signer(lean.engine, [new])
    assert told(new.text).found.endswith("; 2 listed")
    assert told(old.text).found.startswith(f"the key {old.kid} is set here, and ended at ")
    assert told("secret").status == "fail"
    assert told("secret").found.startswith("TOMBOLA_RECEIPT_KEY: ")


# ---- the database ----------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_careless_mariadb() -> None:
    options = ["--log-bin=bin", "--sync-binlog=0", "--sql-mode=", "--character-set-server=latin1"]
    with servers.mariadb(private=True, flush_log_at_trx_commit=2, options=options) as server:
        with create_engine(server.url).begin() as connection:
            connection.execute(text("CREATE DATABASE careless"))
        with House(f"{server.url}careless", "redis://127.0.0.1:1", "") as house:
            with house.engine.begin() as connection:
                for change in (
                    "api_idempotency_requests MODIFY campaign VARCHAR(64) CHARACTER SET latin1 NOT NULL",
                    "asset_transactions MODIFY idempotency_key VARCHAR(100) "
                    "CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci NOT NULL",
                    "operators DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci",
                ):
                    connection.execute(text(f"ALTER TABLE {change}"))
            checks = look(house)
            assert statuses(checks, *OF_THE_DATABASE) == ["ok", "warn", "fail", "warn", "warn", "fail", "warn", "ok"]
            assert checks["durability"].found == "innodb_flush_log_at_trx_commit = 2"
            assert checks["tables"].found == "operators is utf8mb4_general_ci"
            assert checks["key columns"].found == (
                "api_idempotency_requests.campaign is latin1_swedish_ci, "
                "asset_transactions.idempotency_key is utf8mb4_general_ci"
            )
            with house.engine.begin() as connection:
                connection.execute(text("ALTER TABLE operators ENGINE=Aria"))
                connection.execute(text("SET GLOBAL sync_binlog = 1"))
            checks = look(house)
            assert statuses(checks, "tables", "binary log") == ["fail", "ok"]
            assert checks["tables"].found == "operators is Aria"


def test_sessions_that_are_not_as_we_ask(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    assert statuses(look(house), "isolation level", "strict mode") == ["ok", "ok"]

    def meddling(url: str) -> Engine:
        """As behind a proxy that sets sessions back."""
        return open_engine(url).execution_options(isolation_level="REPEATABLE READ")

    monkeypatch.setattr(tombola.worker.doctor.database, "open_engine", meddling)
    monkeypatch.setattr(tombola.producers.storage.engines, "SQL_MODE", "NO_ENGINE_SUBSTITUTION")
    checks = look(house)
    assert statuses(checks, "isolation level", "strict mode") == ["fail", "fail"]
    assert "REPEATABLE READ" in checks["isolation level"].found


def test_revisions_behind_ahead_and_none_at_all(mariadb_url: str, tmp_path: Path) -> None:
    for url in (mariadb_url, f"sqlite:///{tmp_path}/x.db"):
        house = House(url, "redis://127.0.0.1:1", "")
        with house.engine.connect():  # SQLite makes its file
            pass
        checks = look(house)
        assert statuses(checks, "database", "migrations", *OF_THE_DRAWS) == ["ok", "fail", *["skip"] * 7]
        assert "tombola migrate" in checks["migrations"].cure
        migrations.upgrade(house.engine, "0002")
        checks = look(house)
        assert statuses(checks, "migrations", "dead letters", "balances") == ["fail", "skip", "ok"]
        assert "this release needs" in checks["migrations"].found
        migrations.upgrade(house.engine)
        with house.engine.begin() as connection:
            connection.execute(text("UPDATE tombola_version SET version_num = '9999'"))
        assert statuses(look(house), "migrations") == ["warn"]
        with house.engine.begin() as connection:
            connection.execute(text("UPDATE tombola_version SET version_num = '0004'"))
            connection.execute(text("ALTER TABLE tombola_version RENAME TO alembic_version"))
        by_an_earlier_release = look(house)["migrations"]
        assert by_an_earlier_release.status == "fail"
        assert "at 0004 by alembic_version" in by_an_earlier_release.found
        assert "tombola migrate" in by_an_earlier_release.cure
        house.engine.dispose()


def test_a_database_that_refuses_us(house: House, mariadb_url: str) -> None:
    for url in (mariadb_url.replace("root@", "nobody:hidden@"), mariadb_url + "x"):
        checks = look(house, TOMBOLA_DATABASE_URL=url)
        assert statuses(checks, "database", "migrations", "durability", "relay") == ["fail", "skip", "skip", "skip"]
        assert "refuses this login" in checks["database"].found
        assert "hidden" not in str(checks)


# ---- Redis -----------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_careless_redis(tmp_path: Path) -> None:
    options = ["--maxmemory-policy", "allkeys-lru"]
    with servers.redis(private=True, options=options) as server, Redis.from_url(server.url) as client:
        results_url = server.url.removesuffix("/0") + "/1"
        with House(f"sqlite:///{tmp_path}/x.db", server.url, results_url, **SEALED) as house:
            client.lpush(QUEUE, "a job of another program")
            checks = look(house)
            assert statuses(checks, "broker persistence", "broker eviction", "broker memory", "stream") == [
                *("fail", "fail", "ok", "fail")
            ]
            assert "is a list" in checks["stream"].found
            assert statuses(checks, "consumer group", "consumers", "workers") == ["skip", "skip", "skip"]
            assert statuses(checks, "result store", "result eviction", "result memory") == ["ok", "warn", "ok"]

            client.delete(QUEUE)
            client.xadd(QUEUE, {"body": b"{}"})
            client.config_set("save", "3600 1")
            client.config_set("maxmemory-policy", "volatile-lru")
            client.config_set("maxmemory", int(client.info("memory")["used_memory"] / 0.9))
            checks = look(house)
            assert statuses(checks, "broker persistence", "broker eviction", "broker memory", "stream") == [
                *("warn", "fail", "warn", "ok")
            ]
            assert statuses(checks, "consumer group", "consumers", "result eviction") == ["fail", "skip", "ok"]

            client.config_set("maxmemory", int(client.info("memory")["used_memory"] / 0.97))
            assert statuses(look(house), "broker memory", "result memory") == ["fail", "fail"]
            client.config_set("maxmemory", 0)
            client.config_set("appendfsync", "no")
            client.config_set("appendonly", "yes")
            assert statuses(look(house), "broker persistence", "broker memory") == ["warn", "ok"]


@pytest.mark.process
def test_a_redis_that_does_not_let_us_look(tmp_path: Path) -> None:
    with servers.redis(private=True, appendonly=True) as server, Redis.from_url(server.url) as client:
        declare_group(client)
        client.execute_command("ACL", "SETUSER", "eye", "on", ">eye", "~*", "+@read", "+@connection", "+time")
        url = server.url.replace("redis://", "redis://eye:eye@")
        with House(f"sqlite:///{tmp_path}/x.db", url, url, **SEALED) as house:
            checks = look(house)
            assert statuses(checks, "broker", "broker persistence", "broker eviction", "broker memory") == ["skip"] * 4
            assert "not allowed to look" in checks["broker eviction"].found
            assert statuses(checks, "stream", "consumer group", "clock of the broker") == ["ok"] * 3
            client.execute_command("ACL", "SETUSER", "eye", "+info", "-xinfo|groups")
            checks = look(house)
            assert statuses(checks, "broker", "broker persistence", "broker eviction", "consumer group") == [
                *("ok", "ok", "ok", "skip")
            ]
            # It keeps nothing in a file, and whether it keeps snapshots is not for us to know.
            client.config_set("appendonly", "no")
            assert statuses(look(house), "broker persistence") == ["skip"]
            client.execute_command("ACL", "SETUSER", "eye", "off")
            checks = look(house)
            assert statuses(checks, "broker", "stream", "members") == ["fail", "skip", "skip"]


def test_consumers_that_hold_draws_and_are_silent(house: House, redis_url: str) -> None:
    house.enqueue([DrawRequest(account_id=1) for _ in range(3)])
    dead = open_deliveries(redis_url, claim_after_s=15, prefetch=10)
    assert len(dead.fetch(2, wait_s=0)) == 2

    def of_consumers(*, workers: int) -> Check:
        found = Facts(workers=workers)
        checks = {it.name: it for it in examine_stream(redis_url, found)}
        assert checks["consumer group"].found.startswith("1 waiting, 2 in hand")
        (check,) = examine_consumers(redis_url, found, claim_after_s=0.2)
        return check

    assert of_consumers(workers=0).status == "ok"
    time.sleep(0.5)
    check = of_consumers(workers=0)
    assert (check.status, "holds 2, silent for" in check.found) == ("fail", True)
    with Redis.from_url(redis_url) as client:
        client.xgroup_createconsumer(QUEUE, GROUP, "idler")
        assert of_consumers(workers=0).status == "warn"
        client.xgroup_delconsumer(QUEUE, GROUP, "idler")
    assert of_consumers(workers=1).status == "warn"


# ---- RabbitMQ --------------------------------------------------------------------------------------------------------


def test_queues_that_are_not_ours(rabbit_house: House) -> None:
    with kombu.Connection(rabbit_house.settings.need("broker_url")) as connection:
        channel = connection.channel()
        for name in (QUEUE, DEAD_QUEUE):
            channel.queue_declare(name, durable=True, auto_delete=False, arguments={"x-queue-type": "classic"})
        checks = look(rabbit_house)
        assert statuses(checks, "broker", "queue", "dead-letter queue", "workers") == ["ok", "fail", "fail", "skip"]
        assert checks["queue"].found.startswith("inequivalent arg 'x-")
        assert "x-queue-type" in checks["dead-letter queue"].found
        # One argument that differs is enough.
        channel.queue_delete(QUEUE)
        channel.queue_declare(QUEUE, durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
        checks = look(rabbit_house)
        assert checks["queue"].status == "fail"
        assert checks["queue"].found.startswith("inequivalent arg 'x-")


def test_what_rabbitmq_gave_up_on_is_told(rabbit_house: House) -> None:
    rabbit_house.enqueue([DrawRequest(account_id=1)])
    checks = look(rabbit_house)
    assert statuses(checks, "queue", "dead-letter queue", "workers") == ["ok", "ok", "fail"]
    assert checks["workers"].found == "no worker consumes, and 1 draws wait"
    with kombu.Connection(rabbit_house.settings.need("broker_url")) as connection:
        connection.Producer().publish(b"{}", exchange="", routing_key=DEAD_QUEUE)
        deadline = time.monotonic() + 10
        while look(rabbit_house)["dead-letter queue"].status != "warn":
            assert time.monotonic() < deadline
        assert "1 messages" in look(rabbit_house)["dead-letter queue"].found


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_a_rabbitmq_that_blocks_publishers(rabbit_house: House, rabbitmq_server: servers.RabbitMQ, what: str) -> None:
    rabbit_house.enqueue([DrawRequest(account_id=1)])
    with rabbitmq_server.alarm(what):
        checks = look(rabbit_house)
        assert statuses(checks, "broker", "queue", "publishing") == ["ok", "ok", "fail"]
        assert checks["publishing"].found == f"RabbitMQ has blocked publishers: low on {what}"
    checks = look(rabbit_house)
    assert statuses(checks, "broker", "queue", "publishing") == ["ok", "ok", "ok"]
    assert checks["queue"].found.startswith("1 waiting")  # nothing of the looks is in the queue


def test_a_rabbitmq_that_refuses_us(rabbit_house: House) -> None:
    url = rabbit_house.settings.need("broker_url")
    for other in (url.replace("guest:guest", "guest:hidden"), f"{url}x"):
        checks = look(rabbit_house, TOMBOLA_BROKER_URL=other)
        assert statuses(checks, "broker", "queue", "dead-letter queue") == ["fail", "skip", "skip"]
        assert "hidden" not in str(checks)


# ---- the draws -------------------------------------------------------------------------------------------------------


def test_draws_that_nobody_publishes_again(database_url: str, redis_url: str) -> None:
    with House(database_url, redis_url, redis_url, **SEALED) as house:
        accept(house.engine, DrawRequest(account_id=1), ago_s=30)
        assert statuses(look(house), "relay", "oldest accepted", "backlog") == ["ok"] * 3
        accept(house.engine, DrawRequest(account_id=1), DrawRequest(account_id=2), ago_s=90)
        checks = look(house)
        assert statuses(checks, "relay", "oldest accepted") == ["fail", "warn"]
        assert checks["relay"] == Check(
            "relay", "fail", "2 draws overdue for longer than 60 s", "start `tombola relay`"
        )
        # With a queue they may just wait their turn, until others have overtaken them.
        house.enqueue([DrawRequest(account_id=1)])
        assert statuses(look(house), "relay", "oldest accepted") == ["ok", "warn"]
        accept(house.engine, quick := DrawRequest(account_id=1), ago_s=20)
        settle(house, quick, store=False)
        assert statuses(look(house), "relay") == ["fail"]
        # Never published at all: in no queue.
        with house.engine.begin() as connection:
            connection.execute(api_idempotency_requests.delete())
        accept(house.engine, DrawRequest(account_id=1), ago_s=90, is_published=False)
        assert statuses(look(house), "relay") == ["fail"]
        # Without a broker nobody could publish: that is told elsewhere.
        assert statuses(look(house, TOMBOLA_BROKER_URL="redis://127.0.0.1:1"), "broker", "relay") == ["fail", "skip"]


@pytest.mark.parametrize(("most", "status"), [(1, "fail"), (2, "warn"), (3, "ok")])
def test_more_under_way_than_the_gateway_takes(lean: House, most: int, status: str) -> None:
    accept(lean.engine, DrawRequest(account_id=1), DrawRequest(account_id=2))
    assert look(lean, TOMBOLA_BACKLOG_MAX=str(most))["backlog"].status == status


def test_dead_letters_are_told_by_cause(lean: House) -> None:
    now = utc_now()
    values: dict[str, Any] = {"error": "e", "body": b"{}", "body_bytes": 2, "queue": QUEUE, "deliveries": 1}
    values |= {"times_parked": 1, "first_parked_at": now, "last_parked_at": now}
    states = [("invalid", "parked"), ("invalid", "parked again"), ("failed alone", "parked"), ("invalid", "discarded")]
    with lean.engine.begin() as connection:
        for number, (cause, state) in enumerate(states):
            connection.execute(
                insert(dead_letters).values(body_sha256=f"{number:064}", cause=cause, state=state, **values)
            )
    check = look(lean)["dead letters"]
    assert (check.status, check.found) == ("warn", "3 parked (invalid: 2, failed alone: 1)")
    assert "tombola dead-letters groups" in check.cure
    with lean.engine.begin() as connection:
        connection.execute(update(dead_letters).values(state="settled"))
    assert look(lean)["dead letters"].status == "ok"


def test_a_balance_below_zero(lean: House) -> None:
    account_id = open_account(lean.engine, user_id=1)
    with lean.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA ignore_check_constraints=ON")
        connection.execute(update(account_asset_balances).values(balance=Decimal("-0.01")))
        connection.commit()
        connection.exec_driver_sql("PRAGMA ignore_check_constraints=OFF")
    check = look(lean)["balances"]
    assert (check.status, check.found) == ("fail", f"account {account_id} holds -0.01")


def test_another_seed_than_the_ledgers(database_url: str, redis_url: str) -> None:
    with House(database_url, redis_url, redis_url, **SEALED) as house:
        settle(house, DrawRequest(account_id=house.accounts(1)[0]), store=False)
        assert look(house)["seed of the ledger"].status == "ok"
        check = look(house, TOMBOLA_SEED="07e2" * 16)["seed of the ledger"]
        assert (check.status, "was made with seed" in check.found) == ("fail", True)
        wheel = house.wheels["default"]
        other_odds = wheel.notes.replace(wheel.campaign.odds_hash, "0" * 64)
        with house.engine.begin() as connection:
            connection.execute(update(asset_transactions).values(notes=other_odds))
        check = look(house)["seed of the ledger"]
        assert (check.status, "other odds" in check.found) == ("fail", True)
        with house.engine.begin() as connection:
            connection.execute(update(api_idempotency_requests).values(campaign="next year"))
        assert look(house)["seed of the ledger"].status == "warn"


# ---- clocks and members ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("off_s", "status"), [(0, "ok"), (2, "warn"), (-2, "warn"), (60, "fail")])
def test_clocks_that_differ(house: House, monkeypatch: pytest.MonkeyPatch, off_s: int, status: str) -> None:
    monkeypatch.setattr(tombola.worker.doctor.checks, "utc_now", lambda: utc_now() + timedelta(seconds=off_s))
    checks = look(house)
    assert statuses(checks, "clock of the database", "clock of the broker") == [status, status]


@pytest.mark.parametrize(
    ("version", "clock_offset_ms", "expected"),
    [(None, 3.0, ["ok", "ok"]), ("0.0.1", -900.0, ["warn", "warn"]), ("0.0.1", 60_000.0, ["warn", "fail"])],
)
def test_members_of_other_releases_and_clocks(
    lean: House, redis_url: str, version: str | None, clock_offset_ms: float, expected: list[str]
) -> None:
    with Redis.from_url(redis_url) as client:
        pulse = Pulse(client, "relay", "r1")
        pulse.beat_once()
        key = f"{MEMBER_PREFIX}gateway:g1"
        (own,) = tombola.producers.telemetry.pulse.members(client)
        other = Member("gateway", "g1", "h", 1, version or own.version, utc_now(), clock_offset_ms, utc_now())
        client.set(key, msgspec.json.encode(other._asdict()))
        client.zadd(MEMBERS_KEY, {key: time.time()})
        checks = look(lean)
    assert checks["members"].found == "gateway: 1, relay: 1"
    assert statuses(checks, "releases of members", "clocks of members") == expected


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (["worker"], ["warn", "warn"]),
        (["worker", "relay"], ["ok", "warn"]),
        (["worker", "beat"], ["ok", "ok"]),  # then workers relay, as beat asks them to
        (["gateway", "beat"], ["warn", "ok"]),
    ],
)
def test_a_relay_or_beat_that_is_away(house: House, redis_url: str, roles: list[str], expected: list[str]) -> None:
    with Redis.from_url(redis_url) as client:
        for role in roles:
            Pulse(client, role).beat_once()
    checks = look(house)
    assert statuses(checks, "relays", "beat") == expected
    if expected[0] == "warn":
        assert checks["relays"].cure == "start `tombola relay`"


def test_an_audit_that_has_not_run(house: House, lean: House) -> None:
    assert look(lean)["audit"].status == "skip"  # no beat asks for one there
    check = look(house)["audit"]
    assert (check.status, check.found) == ("warn", "no audit is on record")
    report = audited(house.engine, house.wheels)
    audits.record(house.engine, report, by="tombola.audit")
    assert look(house)["audit"].status == "ok"
    with house.engine.begin() as connection:
        connection.execute(update(operator_actions).values(at=utc_now() - timedelta(hours=27)))
    check = look(house)["audit"]
    assert (check.status, check.found) == ("warn", "the last audit was 27 hours ago")
    report.since = utc_now()  # an audit that went on from another one
    audits.record(house.engine, report, by="tombola.audit")
    assert ", everything examined 20" in look(house)["audit"].found
    with house.engine.begin() as connection:
        old = operator_actions.c.details.like('{"everything":true%')
        connection.execute(update(operator_actions).where(old).values(at=utc_now() - timedelta(days=9)))
    check = look(house)["audit"]
    assert (check.status, check.cure.partition(",")[0]) == ("warn", "run `tombola audit --all`")
    report.counts["I3"] = 7
    report.completed.discard("I12")
    audits.record(house.engine, report, by="shell:root@lot")
    check = look(house)["audit"]
    assert check.status == "fail"
    assert "7 violations; not looked at: I12" in check.found


def test_conformity_reports(house: House, lean: House) -> None:
    assert look(lean)["conformity"].status == "skip"  # no beat asks for them there
    check = look(house)["conformity"]
    assert (check.status, check.found) == ("warn", "no conformity report is on record")
    nightly.record(house.engine, [], by="tombola.conformity")
    check = look(house)["conformity"]
    assert check.status == "ok"
    assert check.found.endswith("UTC, by tombola.conformity: the draws of 0 campaigns are as their odds say")
    with house.engine.begin() as connection:
        connection.execute(update(operator_actions).values(at=utc_now() - timedelta(hours=27)))
    check = look(house)["conformity"]
    assert (check.status, check.found) == ("warn", "the last conformity reports were 27 hours ago")
    for each in (house, lean):
        with each.engine.begin() as connection:
            details = {"pulls": {"default": 9}, "deviations": {"default": ["too lucky"]}}
            actions.record(
                connection, operator="tombola.conformity", action="conformity", reason="", count=1, details=details
            )
        check = look(each)["conformity"]
        assert (check.status, check.found) == ("fail", "draws are not as their odds say (1 deviations: default)")
        assert "`tombola campaign conformity`" in check.cure


# ---- servers that are away -------------------------------------------------------------------------------------------


def test_nothing_is_set() -> None:
    checks = {check.name: check for check in examine(Settings.from_env({}))}
    assert statuses(checks, "broker", "result store", "database") == ["fail"] * 3
    assert statuses(checks, "seed") == ["skip"]
    assert checks["workers"].status == "skip"


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "is_silent"), [("redis", False), ("amqp", False), ("amqp", True)])
def test_servers_that_are_away_are_told_once_and_soon(scheme: str, is_silent: bool) -> None:
    """Nobody listens; or somebody does, and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listening:
        port = listening.getsockname()[1] if is_silent else 1
        address = f"127.0.0.1:{port}"
        house = House(f"mysql+pymysql://root@{address}/x", f"{scheme}://{address}/0", f"redis://{address}/1", **SEALED)
        started = time.monotonic()
        checks = look(house)
        took_s = time.monotonic() - started
    failed = [name for name, check in checks.items() if check.status == "fail"]
    assert failed == ["broker", "result store", "database"]
    assert took_s < (18 if is_silent else 2)
    skipped = [name for name, check in checks.items() if check.status == "skip"]
    assert {*OF_THE_DATABASE, *OF_THE_DRAWS, "migrations", "members", "beat", "audit", "workers"} <= {*skipped}
