"""The owner's old table becomes ours while old code writes, with proof, and goes back from every step.

On a real MariaDB, with old writers as the owner's service has them (tests/legacy.py). What is compared at the end is
read here by plain SQL: none of the checksums of the code under test.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from tests import legacy
from tests.audits import audited
from tests.ledgers import recharge
from tests.migrations.command import tombola
from tests.processes import House, failed_start
from tombola import migrations
from tombola.migrations.legacy import backfill, contract, expand, inspection, record, rollback, status, tables, verify
from tombola.migrations.legacy.session import open_session
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.ledger import get_lottery_session_transactions
from tombola.worker.audit.audit import audit
from tombola.worker.ledger.old_rows import OldDraws, holds_old_rows
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Answer, Refused, Settled
from tombola.worker.settle.rules import Rules

ROWS = 20_000
WAIT_S_MAX = 1.5  # of the writers; a second is for the table's lock, the rest for two busy cores
WHEELS = {DEFAULT_CAMPAIGN.name: Wheel(DEFAULT_CAMPAIGN, bytes.fromhex("5eed" * 16))}
OLD_COLUMNS = (
    "transaction_id, account_id, business_id, business_type, asset_code, delta_amount, balance_before, balance_after, "
    "notes, created_at, updated_at"
)


@pytest.fixture
def url(mariadb_url: str) -> str:
    return mariadb_url


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = open_session(url)
    yield engine
    engine.dispose()


def rows_of(engine: Engine, upto: int | None = None) -> list[tuple[Any, ...]]:
    """What old code wrote, all columns."""
    where = "" if upto is None else f"WHERE transaction_id <= {upto}"
    with engine.connect() as connection:
        found = connection.execute(
            text(f"SELECT {OLD_COLUMNS} FROM asset_transactions {where} ORDER BY transaction_id")
        )
        return [tuple(row) for row in found]


def definitions(engine: Engine) -> dict[str, str]:
    with engine.connect() as connection:
        names = ("asset_transactions", "account_asset_balances")
        return {name: tables.plain(connection.execute(text(f"SHOW CREATE TABLE {name}")).one()[1]) for name in names}


def scalar(engine: Engine, statement: str) -> Any:
    with engine.connect() as connection:
        return connection.execute(text(statement)).scalar()


def execute(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def quiet(*_words: object) -> None:
    pass


def run(engine: Engine, *steps: str) -> None:
    for step in steps:
        legacy.run_step(engine, step)


def assert_migrated(engine: Engine) -> None:
    """The guide's checks, and its rules for every row of old code."""
    with engine.connect() as connection:
        total, distinct, by_rule = connection.execute(
            text(
                "SELECT COUNT(*), COUNT(DISTINCT idempotency_key), SUM(idempotency_key = CONCAT('tx_', transaction_id) "
                "AND lottery_session_id = business_id) FROM asset_transactions"
            )
        ).one()
        assert total == distinct == by_rule
        found = tables.ledger(connection)
        assert {"uk_idempotency_key", "idx_lottery_session_id"} <= found.indexes.keys()
        assert tables.is_contracted(found)
        assert migrations.current_revision(connection) == migrations.head_revision()


def assert_chains(engine: Engine) -> None:
    last: dict[int, Decimal] = {}
    for row in rows_of(engine):
        _id, account_id, _business, _type, _asset, delta, before, after, *_ = row
        assert before + delta == after, row
        assert last.get(account_id, before) == before, row
        last[account_id] = after
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT id, balance FROM account_asset_balances"))
        balances = {row.id: row.balance for row in rows}
    assert {account_id: balances[account_id] for account_id in last} == last


# ---- the whole way ---------------------------------------------------------------------------------------------------


def test_a_table_in_use_old_code_writes_on_every_step_killed_and_all_the_way_back(url: str, engine: Engine) -> None:
    legacy.create(engine, lacks_updated_at=True)
    legacy.fill(engine, ROWS)
    before, shape = rows_of(engine), definitions(engine)

    with legacy.writers(url, 4, rate=25) as old:
        legacy.kill_and_resume(url, "expand*2@0.6", "backfill*2@1.2", "verify*2@0.4")
        with pytest.raises(ConfigurationError, match="old code is still writing"):
            contract.contract(engine, drop_business_unique=True, quiet_s=0.5, say=quiet, on_progress=quiet)
    assert not old.failures
    assert max(old.waits_s) < WAIT_S_MAX
    legacy.kill_and_resume(url, "contract*3@1.5", "verify")

    assert_migrated(engine)
    assert_chains(engine)
    assert rows_of(engine, upto=ROWS + 20)[: len(before)] == before
    all_rows = rows_of(engine)
    assert len(all_rows) > ROWS
    assert audited(engine, WHEELS).is_clean

    legacy.kill_and_resume(url, "rollback*2@0.4", "verify")
    assert definitions(engine) == shape
    assert rows_of(engine) == all_rows
    with legacy.writers(url, 1) as old:
        threading.Event().wait(0.3)
    assert old.draws
    assert not old.failures


WAYS = (
    ["expand"],
    ["expand", "half a backfill"],
    ["expand", "backfill"],
    ["expand", "backfill", "verify"],
    ["expand", "backfill", "verify", "contract"],
)


@pytest.mark.parametrize("unique", [legacy.BOTH, legacy.ALONE, legacy.WITHOUT], ids=["both", "alone", "without"])
def test_it_goes_back_from_every_step(engine: Engine, unique: str) -> None:
    """One table, taken a step further each time: it comes back as it was before the next time begins."""
    legacy.create(engine, unique=unique)
    legacy.fill(engine, 3000, alone=unique == legacy.ALONE)
    before, shape = rows_of(engine), definitions(engine)
    for way in WAYS:
        for step in way:
            if step == "half a backfill":
                with each(engine) as connection:
                    record.begin(connection, "backfill", {"last_id": 0, "up_to": 3000, "filled": 0})
                execute(engine, backfill_of(engine, 1, 1500))
            else:
                run(engine, step)
        run(engine, "rollback", "verify", "rollback")
        assert definitions(engine) == shape, way
        assert rows_of(engine) == before, way
    # and all the way again
    run(engine, "expand", "backfill", "verify", "contract")
    assert_migrated(engine)


def each(engine: Engine) -> Any:
    from tombola.migrations.legacy.session import each_by_itself

    return each_by_itself(engine)


def backfill_of(engine: Engine, first: int, last: int) -> str:
    with engine.connect() as connection:
        statement = backfill.chunk_statement(tables.ledger(connection), own_session=False)
    return statement.replace(":first", str(first)).replace(":last", str(last))


@pytest.mark.parametrize(
    ("collation", "id_type"),
    [
        ("latin1_swedish_ci", "int"),
        ("utf8mb4_general_ci", "bigint unsigned"),
        ("utf8mb4_unicode_ci", "int"),
        ("ascii_bin", "bigint unsigned"),
    ],
)
def test_whatever_the_old_tables_look_like(engine: Engine, collation: str, id_type: str) -> None:
    legacy.create(engine, collation=collation, id_type=id_type, on_update=id_type == "int", lacks_updated_at=True)
    legacy.fill(engine, 2000)
    before, shape = rows_of(engine), definitions(engine)
    run(engine, "expand", "backfill", "verify", "contract", "verify")
    assert_migrated(engine)
    assert rows_of(engine) == before
    (settled,) = tries.settle(engine, [DrawRequest(account_id=6)], Rules(WHEELS, tries_max=2, old_draws=OldDraws()))
    assert isinstance(settled, Settled)
    assert audited(engine, WHEELS).is_clean
    rollback.rollback(engine, keep_new_rows=True, say=quiet)
    assert definitions(engine) == shape
    assert rows_of(engine, upto=2000)[: len(before)] == before


def test_a_changed_value_is_found(engine: Engine) -> None:
    legacy.create(engine)
    legacy.fill(engine, 12_000)
    run(engine, "expand", "backfill")
    execute(engine, "UPDATE asset_transactions SET notes = 'x', updated_at = updated_at WHERE transaction_id = 7000")
    found = verify.verify(engine, on_progress=quiet)
    assert len(found.problems) == 1
    assert "transaction_id 5,001 to 10,000: other values" in found.problems[0]
    with pytest.raises(ConfigurationError, match="not verified"):
        contract.contract(engine, drop_business_unique=False, quiet_s=0, say=quiet, on_progress=quiet)


# ---- what is in the way ----------------------------------------------------------------------------------------------


def test_inspect_tells_what_is_in_the_way_and_changes_nothing(engine: Engine) -> None:
    legacy.create(engine, unique=legacy.WITHOUT, nullable=True, length=255)
    legacy.fill(engine, 1300)
    shape = definitions(engine)
    for transaction_id, change in (
        (10, "business_id = NULL"),
        (20, "business_id = ' '"),
        (30, "business_id = REPEAT('x', 101)"),
        (40, "business_id = 'Lösung'"),
        (50, "account_id = 99999"),
        (60, "delta_amount = 1"),
        (70, "balance_before = 7, balance_after = 7"),
        (80, "business_id = 'ABC'"),
        (82, "business_id = 'abc'"),
        (84, "business_id = 'abc '"),
        (90, "business_id = 'won alone', business_type = 'lottery_reward'"),
    ):
        execute(engine, f"UPDATE asset_transactions SET {change} WHERE transaction_id = {transaction_id}")
    found = inspection.inspect(engine, on_progress=quiet)
    by_name = {finding.name: finding for finding in found.findings}
    for name, sample in (
        ("business_id null", 10), ("business_id empty", 20), ("business_id too long", 30),
        ("business_id not ascii", 40),
        ("no account", 50), ("sum", 60), ("reward alone", "won alone"),
    ):  # fmt: skip
        assert sample in by_name[name].samples, name
        assert by_name[name].cure
    assert 71 in by_name["chain"].samples
    assert by_name["collision"].count == 1
    assert found.can_begin
    assert found.rows == 1300
    assert found.account_columns_beside_ours == ["frozen_amount", "level", "version"]
    assert definitions(engine) == shape

    run(engine, "expand")
    with pytest.raises(ConfigurationError, match=r"4 rows have a business_id .* 10, 20, 30, 40.*--own-session"):
        run(engine, "backfill")
    backfill.backfill(engine, own_session=True, follow=False, say=quiet, on_progress=quiet)
    run(engine, "verify", "contract")
    sessions = (
        "SELECT GROUP_CONCAT(lottery_session_id) FROM asset_transactions WHERE transaction_id IN (10, 20, 30, 40)"
    )
    assert scalar(engine, sessions) == "tx_10,tx_20,tx_30,tx_40"
    run(engine, "rollback", "verify")
    assert definitions(engine) == shape


def test_what_cannot_be_migrated_is_refused_before_anything_changes(engine: Engine) -> None:
    legacy.create(engine)
    execute(engine, "ALTER TABLE asset_transactions MODIFY delta_amount bigint NOT NULL")
    shape = definitions(engine)
    assert not inspection.inspect(engine, on_progress=quiet).can_begin
    with pytest.raises(ConfigurationError, match="delta_amount is bigint"):
        run(engine, "expand")
    assert definitions(engine) == shape
    with engine.connect() as connection:
        assert migrations.current_revision(connection) is None


def test_alembic_sends_a_legacy_database_to_inspect(url: str, engine: Engine) -> None:
    legacy.create(engine)
    with pytest.raises(ConfigurationError, match="tombola legacy inspect"):
        migrations.upgrade(url)
    run(engine, "expand")
    migrations.upgrade(url)  # at head there is nothing to do
    run(engine, "rollback")
    with pytest.raises(ConfigurationError, match="tombola legacy inspect"):
        migrations.upgrade(url)


def test_workers_are_let_in_when_the_ledger_is_ready_for_them(url: str, engine: Engine) -> None:
    def why() -> str | None:
        with engine.connect() as connection:
            return status.why_workers_must_wait(connection)

    legacy.create(engine, unique=legacy.ALONE)
    legacy.fill(engine, 100, alone=True)
    env = {
        "TOMBOLA_DATABASE_URL": url,
        "TOMBOLA_BROKER_URL": "redis://127.0.0.1:1/0",
        "TOMBOLA_RESULT_URL": "redis://127.0.0.1:1/0",
        "TOMBOLA_SEED": "5eed" * 16,
    }
    assert "tombola legacy inspect" in failed_start(env).stderr
    run(engine, "expand")
    assert "tombola legacy backfill" in (why() or "")
    run(engine, "backfill", "verify")
    assert "--drop-business-unique" in (why() or "")
    assert "--drop-business-unique" in failed_start(env).stderr
    run(engine, "contract")
    assert why() is None


# ---- old and new code together ---------------------------------------------------------------------------------------


def test_old_and_new_code_charge_the_same_accounts_and_no_chain_breaks(url: str, engine: Engine) -> None:
    legacy.create(engine)
    legacy.fill(engine, 5000)
    run(engine, "expand", "backfill")
    assert holds_old_rows(engine)
    stopping = threading.Event()
    following = threading.Thread(
        target=backfill.backfill,
        args=(engine,),
        kwargs={"own_session": False, "follow": True, "say": quiet, "tell": quiet, "stopping": stopping},
    )
    answers: list[Answer] = []
    mine = open_engine(url)

    def settle(lane: int) -> None:
        chance = random.Random(lane)
        for number in range(40):
            draws = [
                DrawRequest(account_id=chance.randint(1, legacy.ACCOUNTS), request_key=f"new_{lane}_{number}_{i}")
                for i in range(10)
            ]
            answers.extend(tries.settle(mine, draws, Rules(WHEELS, tries_max=10, old_draws=OldDraws())))

    with legacy.writers(url, 3, rate=100) as old:
        following.start()
        lanes = [threading.Thread(target=settle, args=(lane,)) for lane in range(2)]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
    stopping.set()
    following.join(20)
    mine.dispose()
    assert not old.failures
    assert old.draws > 50
    assert [type(answer) for answer in answers] == [Settled] * 800
    assert_chains(engine)
    run(engine, "backfill", "verify", "contract")
    assert audit(engine, WHEELS).violations == []

    # The way back is closed for those who would lose something, and open with the rows kept.
    with pytest.raises(ConfigurationError, match="new code has written"):
        run(engine, "rollback")
    kept = rows_of(engine)
    rollback.rollback(engine, keep_new_rows=True, say=quiet)
    assert rows_of(engine) == kept
    run(engine, "expand", "backfill", "verify", "contract", "verify")
    assert rows_of(engine) == kept
    assert audit(engine, WHEELS).violations == []
    asked = [answer.request for answer in answers[:20]]
    again = tries.settle(engine, asked, Rules(WHEELS, tries_max=2, old_draws=OldDraws()))
    assert [answer.result for answer in again if isinstance(answer, Settled) and answer.is_repeat] == [
        answer.result for answer in answers[:20] if isinstance(answer, Settled)
    ]


@pytest.mark.parametrize("is_late", [False, True], ids=["backfilled", "not backfilled yet"])
def test_a_draw_by_old_code_is_not_charged_again(url: str, engine: Engine, is_late: bool) -> None:
    legacy.create(engine)
    legacy.fill(engine, 100)
    run(engine, "expand", "backfill")
    connection = legacy.connect(url)
    legacy.old_draw(connection, "old_key", 6, wins=True)
    connection.close()
    if not is_late:
        run(engine, "backfill")
    old = rows_of(engine)
    first, last = old[-2][0], old[-1][0]
    rows = get_lottery_session_transactions("old_key", engine=engine)
    assert [(row["idempotency_key"], row["lottery_session_id"]) for row in rows] == [
        (f"tx_{first}", "old_key"),
        (f"tx_{last}", "old_key"),
    ]

    def settle(**fields: Any) -> Answer:
        (answer,) = tries.settle(engine, [DrawRequest(**fields)], Rules(WHEELS, tries_max=2, old_draws=OldDraws()))
        return answer

    stranger = settle(account_id=7, request_key="old_key")
    assert isinstance(stranger, Refused)
    assert stranger.cause == "fingerprint mismatch"
    intruder = settle(account_id=6, request_key="other", lottery_session_id="old_key")
    assert isinstance(intruder, Refused)

    for _ in range(2):
        answer = settle(account_id=6, request_key="old_key")
        assert isinstance(answer, Settled)
        assert answer.is_repeat
        result = json.loads(answer.result)
        assert [row["idempotency_key"] for row in result["transactions"]] == [f"tx_{first}", f"tx_{last}"]
        assert result["prize_amount"] == "5.00"
    assert rows_of(engine) == old
    assert [row["lottery_session_id"] for row in get_lottery_session_transactions("old_key", engine=engine)] == [
        "old_key",
        "old_key",
    ]
    run(engine, "backfill", "verify")
    assert audit(engine, WHEELS).violations == []
    # Another key by its bytes is another draw, wherever the old index does not mind.
    assert isinstance(settle(account_id=6, request_key="newer"), Settled)


def test_a_whole_worker_on_a_migrated_ledger(url: str, engine: Engine, redis_url: str) -> None:
    from tests import processes

    legacy.create(engine, lacks_updated_at=True)
    legacy.fill(engine, 1000)
    run(engine, "expand", "backfill")
    old_key = rows_of(engine)[0][2]
    house = House(url, redis_url, redis_url)
    with processes.worker(house.env) as worker:
        new = [DrawRequest(account_id=1 + number % 5, request_key=f"draw_{number}") for number in range(50)]
        house.enqueue([*new, DrawRequest(account_id=rows_of(engine)[0][1], request_key=old_key)])
        house.wait_settled(51, within_s=30, log=worker.log)
    assert scalar(engine, "SELECT COUNT(*) FROM asset_transactions WHERE idempotency_key LIKE '%consume'") == 50
    run(engine, "verify", "contract")
    with processes.worker(house.env) as worker:
        house.enqueue([DrawRequest(account_id=3, request_key="after")])
        house.wait_settled(52, within_s=30, log=worker.log)
    assert house.violations() == []
    assert house.causes() == []
    recharge(house.engine, 3, Decimal("5.00"))
    house.engine.dispose()


# ---- by hand, and by the command -------------------------------------------------------------------------------------


def test_the_printed_statements_do_the_same_by_hand(engine: Engine) -> None:
    legacy.create(engine, lacks_updated_at=True)
    legacy.fill(engine, 500)
    shape = definitions(engine)

    def by_hand(statements: list[str]) -> None:
        with each(engine) as connection:
            for statement in statements:
                if not statement.startswith("--"):
                    connection.exec_driver_sql(
                        statement.replace("<first>", "1").replace("<last>", "500").replace("%", "%%")
                    )

    by_hand(expand.statements(engine))
    run(engine, "expand")
    by_hand(backfill.statements(engine, own_session=False))
    run(engine, "backfill", "verify")
    by_hand(contract.statements(engine, drop_business_unique=True))
    run(engine, "contract", "verify")
    assert_migrated(engine)
    by_hand(rollback.statements(engine))
    run(engine, "rollback", "verify")
    assert definitions(engine) == shape


def test_the_command(url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", url)
    legacy.create(engine)
    legacy.fill(engine, 500)
    assert json.loads(tombola("inspect", "--json"))["can_begin"]
    assert "tombola legacy inspect" in tombola("backfill", code=1)
    assert "ALGORITHM=INSTANT" in tombola("expand", "--sql")
    tombola("expand")
    assert json.loads(tombola("status", "--json"))["stage"] == "expanded"
    assert "500 rows were given keys" in tombola("backfill")
    assert json.loads(tombola("verify", "--json"))["duplicates"] == 0
    tombola("contract", "--drop-business-unique", "--quiet-s", "0.2", "--yes")
    assert "contracted" in tombola("status")
    tombola("rollback", "--yes")
    assert "rolled back" in tombola("status")


def test_no_row_of_old_code_gets_in_after_the_contract(url: str, engine: Engine) -> None:
    legacy.create(engine)
    legacy.fill(engine, 100)
    run(engine, "expand", "backfill", "verify", "contract")
    connection = legacy.connect(url)
    with pytest.raises(Exception, match="idempotency_key"):
        legacy.old_draw(connection, "late", 6, wins=False)
    connection.close()
    with pytest.raises(DBAPIError, match="account"):
        execute(
            engine,
            "INSERT INTO asset_transactions (account_id, business_id, lottery_session_id, idempotency_key, "
            "business_type, asset_code, delta_amount, balance_before, balance_after, created_at, updated_at) "
            "VALUES (99999, 'x', 'x', 'x', 'x', 'POINT', 0, 0, 0, NOW(), NOW())",
        )


def test_sessions_of_won_draws_are_whole(engine: Engine) -> None:
    legacy.create(engine)
    legacy.fill(engine, 1300)
    run(engine, "expand", "backfill", "verify", "contract")
    sessions: dict[str, list[str]] = defaultdict(list)
    for row in rows_of(engine):
        sessions[row[2]].append(row[3])
    won = [business_id for business_id, kinds in sessions.items() if "lottery_reward" in kinds]
    assert len(won) == 300
    for business_id in won[:20]:
        rows = get_lottery_session_transactions(business_id, engine=engine)
        assert [row["business_type"] for row in rows] == ["lottery_consume", "lottery_reward"]


def test_a_long_transaction_on_the_table_holds_up_the_step_and_not_the_writers(url: str, engine: Engine) -> None:
    legacy.create(engine)
    legacy.fill(engine, 500)
    reader = legacy.connect(url)
    reader.begin()
    with reader.cursor() as cursor:
        cursor.execute("SELECT COUNT(*) FROM asset_transactions")
    # Young at first: the ALTER asks for the table and has to give up. Old then: it waits before it asks.
    ending = threading.Timer(4.0, reader.rollback)
    with legacy.writers(url, 2) as old:
        ending.start()
        run(engine, "expand")
    ending.join()
    reader.close()
    assert not old.failures
    assert max(old.waits_s) < WAIT_S_MAX
    with engine.connect() as connection:
        assert {"idempotency_key", "lottery_session_id"} <= tables.ledger(connection).columns.keys()


def test_what_others_have_added_meanwhile_stays(engine: Engine) -> None:
    legacy.create(engine)
    legacy.fill(engine, 500)
    run(engine, "expand", "backfill")
    execute(engine, "ALTER TABLE asset_transactions ADD INDEX idx_notes (notes(10))")
    with pytest.raises(ConfigurationError, match="it was changed since expand"):
        run(engine, "rollback")
    with engine.connect() as connection:
        ledger = tables.ledger(connection)
    assert "idx_notes" in ledger.indexes
    assert "idempotency_key" not in ledger.columns


def test_new_code_goes_on_while_the_table_is_rebuilt(url: str, engine: Engine) -> None:
    legacy.create(engine)
    legacy.fill(engine, ROWS)
    run(engine, "expand", "backfill", "verify")
    waits_s: list[float] = []
    answers: list[Answer] = []
    stopping = threading.Event()
    mine = open_engine(url)

    def settle() -> None:
        while not stopping.is_set():
            begin = time.perf_counter()
            draws = [DrawRequest(account_id=account_id) for account_id in range(1, 6)]
            answers.extend(tries.settle(mine, draws, Rules(WHEELS, tries_max=3, old_draws=OldDraws())))
            waits_s.append(time.perf_counter() - begin)

    worker = threading.Thread(target=settle)
    worker.start()
    run(engine, "contract")
    stopping.set()
    worker.join()
    mine.dispose()
    assert len(waits_s) > 10
    assert max(waits_s) < WAIT_S_MAX
    assert all(isinstance(answer, Settled) and not answer.is_repeat for answer in answers)
    run(engine, "verify")
    assert_chains(engine)
    assert audit(engine, WHEELS).violations == []
