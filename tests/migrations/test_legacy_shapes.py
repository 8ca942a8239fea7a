"""The owner's table as their guide leaves it: four shapes, each taken over, killed at every step, and given back.

The guide's steps are run by hand (tests/legacy.py), with columns of whatever collation the table has, half filled, with
or without indexes; in shape d the owner's own new code goes on writing keys of its own all the while.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from tests import legacy
from tests.kept_results import keep_results
from tests.migrations.command import tombola
from tombola import migrations
from tombola.migrations.legacy import (
    backfill,
    checksums,
    contract,
    expand,
    inspection,
    record,
    rollback,
    status,
    tables,
    verify,
)
from tombola.migrations.legacy.session import open_session
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.ledger import get_lottery_session_transactions
from tombola.producers.storage.requests import archive, state_of_session
from tombola.worker.audit.audit import audit
from tombola.worker.ledger.old_rows import OldDraws
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Answer, Refused, Settled
from tombola.worker.settle.rules import Rules

WHEELS = {DEFAULT_CAMPAIGN.name: Wheel(DEFAULT_CAMPAIGN, bytes.fromhex("5eed" * 16))}
DRAWS = 90
SHAPES = ("a", "b", "b, keys alone", "b, sessions alone", "c", "d")
COLUMNS_OF_BOTH = ("idempotency_key", "lottery_session_id")


@pytest.fixture
def url(mariadb_url: str) -> str:
    return mariadb_url


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = open_session(url)
    yield engine
    engine.dispose()


def quiet(*_words: object) -> None:
    pass


def run(engine: Engine, *steps: str) -> None:
    for step in steps:
        legacy.run_step(engine, step)


def scalar(engine: Engine, statement: str) -> Any:
    with engine.connect() as connection:
        return connection.execute(text(statement)).scalar()


def execute(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def everything(engine: Engine, upto: int) -> list[tuple[Any, ...]]:
    """Every column of every row up to an id."""
    with engine.connect() as connection:
        found = connection.execute(
            text("SELECT * FROM asset_transactions WHERE transaction_id <= :upto ORDER BY transaction_id"),
            {"upto": upto},
        )
        return [tuple(row) for row in found]


def definitions(engine: Engine) -> list[tuple[list[str], list[str]]]:
    """Both tables' columns and options in their order, their indexes and constraints in none."""
    found = []
    with engine.connect() as connection:
        for name in ("asset_transactions", "account_asset_balances"):
            sql = re.sub(r" AUTO_INCREMENT=\d+", "", connection.execute(text(f"SHOW CREATE TABLE {name}")).one()[1])
            # MySQL says a column's character set, where it goes without saying, once somebody has said it.
            sql = re.sub(r" CHARACTER SET (\w+)(?= COLLATE \1_)", "", sql)
            lines = [line.strip().rstrip(",") for line in sql.splitlines()]
            keys = [line for line in lines if re.match("(UNIQUE )?KEY|CONSTRAINT", line)]
            found.append(([line for line in lines if line not in keys], sorted(keys)))
    return found


def highest(engine: Engine) -> int:
    return int(scalar(engine, "SELECT MAX(transaction_id) FROM asset_transactions"))


def make(engine: Engine, url: str, shape: str, **options: Any) -> list[str]:
    """The table in `shape`; the sessions of draws that were charged in it, the last ones by the owner's new code."""
    legacy.create(engine, **options)
    names = legacy.fill_chains(engine, DRAWS)
    legacy.take_by_hand(engine, shape)
    if shape == "d":
        connection = legacy.connect(url)
        for number in range(6):
            draw = legacy.service_draw if number % 2 else legacy.drawn_key_draw
            names.append(f"lottery_req_{1_700_000_000_000 + number}_0123abcd_00{number}")
            draw(connection, names[-1], 1 + number, wins=number > 2)
        connection.close()
    return names


def first_step(shape: str) -> str:
    return "expand" if shape == "a" else "adopt"


def ask(engine: Engine, session_id: str, **fields: Any) -> Answer:
    """Ask for the draw that old code called `session_id`, as a retry or a redelivery does."""
    account = f"SELECT account_id FROM asset_transactions WHERE business_id = '{session_id}' LIMIT 1"
    request = DrawRequest(**{"account_id": scalar(engine, account), "request_key": session_id} | fields)
    (answer,) = tries.settle(engine, [request], Rules(WHEELS, tries_max=2, old_draws=OldDraws()))
    return answer


def assert_answered_from_first_rows(engine: Engine, names: list[str]) -> None:
    """Each of these draws is answered with its rows, and nothing is charged."""
    # What our workers charge, they note.
    charged = "SELECT COUNT(*) FROM asset_transactions WHERE notes LIKE 'odds=%'"
    before = scalar(engine, charged)
    for name in names:
        with engine.connect() as connection:
            first = connection.execute(
                text(
                    "SELECT business_type, delta_amount, balance_after FROM asset_transactions "
                    "WHERE business_id = :name ORDER BY transaction_id"
                ),
                {"name": name},
            ).all()
        answer = ask(engine, name)
        assert isinstance(answer, Settled), answer
        assert answer.is_repeat
        result = json.loads(answer.result)
        shown = [(it["business_type"], it["delta_amount"], it["balance_after"]) for it in result["transactions"]]
        assert shown == [(it[0], str(it[1]), str(it[2])) for it in first]
        assert result["prize_amount"] == ("5.00" if len(first) == 2 else "0.00")
        kept = get_lottery_session_transactions(name, engine=engine)
        assert [it["idempotency_key"] for it in kept] == [it["idempotency_key"] for it in result["transactions"]]
    assert scalar(engine, charged) == before


def some_of(names: list[str]) -> list[str]:
    return [*names[:2], *names[28:33], *names[-6:]]


# ---- the whole way ---------------------------------------------------------------------------------------------------


@contextmanager
def others_writing(url: str, shape: str) -> Iterator[legacy.Writers | None]:
    """Whoever can write into a table of this shape while it is taken over."""
    draw = {"c": None, "d": legacy.service_draw}.get(shape, legacy.old_draw)
    if draw is None:  # the columns are NOT NULL, and no code fills them yet
        yield None
        return
    with legacy.writers(url, 1, rate=20, draw=draw) as old:
        yield old
    assert not old.failures


@pytest.mark.parametrize("shape", ["a", "b", "c", "d"])
def test_to_contracted_and_back_killed_at_every_step(url: str, engine: Engine, shape: str) -> None:
    names = make(engine, url, shape)
    last, shape_before = highest(engine), definitions(engine)
    before = everything(engine, last)

    with others_writing(url, shape):
        legacy.kill_and_resume(url, f"{first_step(shape)}/17", "backfill/11", "verify/7")
        assert_answered_from_first_rows(engine, some_of(names))
        service = others_writing(url, shape) if shape == "d" else nullcontext()
    with service:
        legacy.kill_and_resume(url, "contract/11")
        run(engine, "verify")
        assert_answered_from_first_rows(engine, some_of(names[5:]))
    with engine.connect() as connection:
        ledger = tables.ledger(connection)
        assert tables.is_contracted(ledger)
        assert all(ledger.columns[name].compares_bytes for name in COLUMNS_OF_BOTH)
        assert {"uk_idempotency_key", "idx_lottery_session_id"} <= ledger.indexes.keys()
        assert migrations.current_revision(connection) == migrations.head_revision()
        assert status.status_of(connection).stage == "contracted"
    total, distinct = "SELECT COUNT(*) FROM asset_transactions", "SELECT COUNT(DISTINCT idempotency_key) "
    assert scalar(engine, total) == scalar(engine, f"{distinct} FROM asset_transactions")
    new = ask(engine, names[0], request_key="a_new_draw")
    assert isinstance(new, Settled)
    assert not new.is_repeat
    found = audit(engine, WHEELS)
    assert found.violations == []

    # The way back: our requests are on record, so it asks first.
    with pytest.raises(ConfigurationError, match="new code has written"):
        run(engine, "rollback")
    with others_writing(url, shape) if shape == "d" else nullcontext():
        legacy.kill_and_resume(url, "rollback, rows kept/13")
    run(engine, "verify")
    assert definitions(engine) == shape_before
    assert everything(engine, last) == before
    with others_writing(url, shape) as old:
        deadline = time.monotonic() + 20
        while old is not None and not old.draws and time.monotonic() < deadline:
            time.sleep(0.02)
    assert old is None or old.draws

    # And once more: what was charged is answered as it was.
    run(engine, first_step(shape), "backfill", "verify")
    assert_answered_from_first_rows(engine, some_of(names))
    again = ask(engine, names[0], request_key="a_new_draw")
    assert isinstance(again, Settled)
    assert again.result == new.result


@pytest.mark.parametrize("shape", SHAPES[1:])  # of the old one test_legacy.py says the same
def test_every_shape_goes_back_from_every_step(url: str, engine: Engine, shape: str) -> None:
    names = make(engine, url, shape)
    last, shape_before = highest(engine), definitions(engine)
    before = everything(engine, last)
    way = [first_step(shape), "backfill", "verify", "contract"]
    for number in (1, 2, 4):
        run(engine, *way[:number], "rollback", "verify")
        assert definitions(engine) == shape_before, way[:number]
        assert everything(engine, last) == before, way[:number]
    run(engine, *way, "verify")
    assert_answered_from_first_rows(engine, some_of(names))
    assert audit(engine, WHEELS).violations == []


@pytest.mark.parametrize("collation", ["latin1_swedish_ci", "utf8mb4_unicode_ci", "utf8mb4_bin"])
def test_whatever_collation_the_columns_have(url: str, engine: Engine, collation: str) -> None:
    # Without the old unique index, which would hold such draws' business_ids for equal.
    names = make(engine, url, "c", collation=collation, id_type="int", lacks_updated_at=True, unique=legacy.WITHOUT)
    shape_before, before = definitions(engine), everything(engine, highest(engine))
    run(engine, "adopt", "backfill", "verify")
    assert_answered_from_first_rows(engine, names[:3])
    # Workers run from here on, also one that waits for no lock.
    (impatient,) = tries.settle(
        engine, [DrawRequest(account_id=1, request_key="impatient")],
        Rules(WHEELS, tries_max=2, old_draws=OldDraws()), has_patience=False,
    )  # fmt: skip
    assert isinstance(impatient, Settled)
    assert audit(engine, WHEELS).violations == []
    run(engine, "contract", "verify")
    assert_answered_from_first_rows(engine, names[3:6])
    # Keys that differ in case alone are two.
    both = [ask(engine, names[0], request_key=key) for key in ("a_key", "A_KEY")]
    assert [isinstance(it, Settled) and not it.is_repeat for it in both] == [True, True]
    assert audit(engine, WHEELS).violations == []
    # On the way back their keys are one again, unless the old collation knew two: the later ones go aside meanwhile.
    run(engine, "rollback, rows kept", "verify")
    assert definitions(engine) == shape_before
    assert everything(engine, len(before)) == before
    set_aside = scalar(engine, "SELECT COUNT(*) FROM legacy_migration_keys")
    assert bool(set_aside) == (not collation.endswith("_bin"))
    run(engine, "adopt", "backfill", "verify", "contract", "verify")
    assert scalar(engine, "SELECT COUNT(*) FROM asset_transactions WHERE idempotency_key LIKE 'A\\_KEY%'") in (1, 2)
    again = [ask(engine, names[0], request_key=key) for key in ("a_key", "A_KEY")]
    assert [it.result for it in again if isinstance(it, Settled) and it.is_repeat] == [
        it.result for it in both if isinstance(it, Settled)
    ]
    assert audit(engine, WHEELS).violations == []


def test_the_table_is_copied_while_writers_wait_only_when_somebody_says_so(url: str, engine: Engine) -> None:
    if "MariaDB" in str(scalar(engine, "SELECT VERSION()")) and scalar(engine, "SELECT VERSION() >= '11.2'"):
        pytest.skip("this server copies beside the writers")
    make(engine, url, "c")
    shape_before = definitions(engine)
    run(engine, "adopt", "backfill", "verify")
    with pytest.raises(ConfigurationError, match=r"nothing has changed.*--writers-wait"):
        contract.contract(engine, drop_business_unique=False, quiet_s=0, say=quiet, on_progress=quiet)
    with engine.connect() as connection:
        assert not tables.ledger(connection).columns["idempotency_key"].compares_bytes
    run(engine, "contract")
    with pytest.raises(ConfigurationError, match=r"nothing has changed.*--writers-wait"):
        rollback.rollback(engine, keep_new_rows=False, say=quiet)
    run(engine, "rollback", "verify")
    assert definitions(engine) == shape_before


# ---- which draws are charged already ---------------------------------------------------------------------------------


def test_a_draw_is_known_by_its_session_and_its_charge_whatever_its_keys(url: str, engine: Engine) -> None:
    make(engine, url, "d")
    run(engine, "adopt", "backfill")
    connection = legacy.connect(url)
    for name, draw in (("of the service", legacy.service_draw), ("drawn", legacy.drawn_key_draw)):
        session_id = name.replace(" ", "_")
        draw(connection, session_id, 6, wins=True)  # meanwhile, beside us
        assert_answered_from_first_rows(engine, [session_id])
        other_account = ask(engine, session_id, account_id=7)
        assert isinstance(other_account, Refused)
        intruder = ask(engine, session_id, request_key="another", lottery_session_id=session_id)
        assert isinstance(intruder, Refused)
        first = ask(engine, session_id)
        assert isinstance(first, Settled)
        keep_results(engine)
        with engine.begin() as archiving:
            assert archive(archiving, utc_now() + timedelta(days=1), rows_max=10) == 1
        with engine.connect() as reading:
            rebuilt = state_of_session(reading, session_id)
        assert rebuilt is not None
        assert rebuilt.result == first.result
    # A further row of the session, under a key of any form, is part of the answer.
    legacy.service_draw(connection, "with_coupon", 6, wins=False)
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO asset_transactions (account_id, business_id, lottery_session_id, idempotency_key, "
            "business_type, asset_code, delta_amount, balance_before, balance_after, created_at, updated_at) "
            "SELECT account_id, business_id, lottery_session_id, 'coupon_1', 'lottery_coupon', 'COUPON', 0, "
            "balance_after, balance_after, created_at, updated_at FROM asset_transactions "
            "WHERE idempotency_key = 'with_coupon:consume'"
        )
        connection.commit()
    connection.close()
    answer = ask(engine, "with_coupon")
    assert isinstance(answer, Settled)
    keys = [it["idempotency_key"] for it in json.loads(answer.result)["transactions"]]
    assert keys == ["with_coupon:consume", "coupon_1"]
    run(engine, "verify", "contract")
    assert audit(engine, WHEELS).violations == []


def test_a_session_of_our_own_is_no_charge_of_a_request_called_like_it(url: str, engine: Engine) -> None:
    names = make(engine, url, "d")
    run(engine, "adopt", "backfill")
    ours = ask(engine, names[0], request_key="ours", lottery_session_id="a_session")
    assert isinstance(ours, Settled)
    assert not ours.is_repeat
    # Another request that is called like that session, and has one of its own, is another draw.
    other = ask(engine, names[0], request_key="a_session", lottery_session_id="another_session")
    assert isinstance(other, Settled)
    assert not other.is_repeat
    assert isinstance(ask(engine, names[0], request_key="a_session", lottery_session_id="a_session"), Refused)
    again = ask(engine, names[0], request_key="ours", lottery_session_id="a_session")
    assert isinstance(again, Settled)
    assert again.result == ours.result


def test_rows_that_are_half_filled_are_read_as_the_backfill_will_leave_them(url: str, engine: Engine) -> None:
    make(engine, url, "b")
    run(engine, "adopt", "backfill")
    connection = legacy.connect(url)
    for name, missing in (("no_key", "idempotency_key"), ("no_session", "lottery_session_id"), ("neither", "")):
        legacy.service_draw(connection, name, 6, wins=True)
        emptied = ", ".join(f"{it} = NULL" for it in ([missing] if missing else COLUMNS_OF_BOTH))
        with connection.cursor() as cursor:
            cursor.execute(f"UPDATE asset_transactions SET {emptied} WHERE business_id = '{name}'")
            connection.commit()
        assert_answered_from_first_rows(engine, [name])
    connection.close()
    assert (
        scalar(
            engine,
            "SELECT COUNT(*) FROM asset_transactions WHERE idempotency_key IS NULL OR lottery_session_id IS NULL",
        )
        == 0
    )
    run(engine, "verify", "contract")
    assert audit(engine, WHEELS).violations == []


# ---- inspect, and what it points at ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_inspect_names_the_shape_and_the_next_command(url: str, engine: Engine, shape: str) -> None:
    make(engine, url, shape)
    found = inspection.inspect(engine, on_progress=quiet)
    assert found.shape == shape[0]
    assert found.can_begin
    assert found.next == f"tombola legacy {first_step(shape)}"
    right, wrong = (expand.expand, expand.adopt) if shape == "a" else (expand.adopt, expand.expand)
    before = definitions(engine)
    with pytest.raises(ConfigurationError, match=rf": run `tombola legacy {first_step(shape)}`$"):
        wrong(engine, say=quiet, on_progress=quiet)
    with pytest.raises(ConfigurationError, match="tombola legacy inspect"):
        migrations.upgrade(url)
    with engine.connect() as connection:
        assert status.is_legacy(connection)  # what keeps workers from starting, and doctor from being content
    assert definitions(engine) == before

    right(engine, say=quiet, on_progress=quiet)
    with pytest.raises(ConfigurationError, match=rf": run `tombola legacy {first_step(shape)}`$"):
        wrong(engine, say=quiet, on_progress=quiet)
    after = inspection.inspect(engine, on_progress=quiet)
    assert (after.shape, after.next) == (None, "tombola legacy backfill")
    with engine.connect() as connection:
        assert "tombola legacy backfill" in (status.why_workers_must_wait(connection) or "")
    run(engine, "backfill")
    assert "verify" in inspection.inspect(engine, on_progress=quiet).next


def test_a_ledger_of_our_own_is_told_as_such(url: str, engine: Engine) -> None:
    migrations.upgrade(url)
    found = inspection.inspect(engine, on_progress=quiet)
    assert (found.shape, found.next) == (None, "")
    for step in (expand.expand, expand.adopt):
        with pytest.raises(ConfigurationError, match="it is migrated"):
            step(engine, say=quiet, on_progress=quiet)


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("MODIFY idempotency_key varchar(64) NULL", r"idempotency_key is varchar\(64\).*VARCHAR\(100\)"),
        ("MODIFY lottery_session_id text NULL", r"lottery_session_id is text.*VARCHAR\(100\)"),
        ("ADD INDEX uk_idempotency_key (idempotency_key)", "uk_idempotency_key is not a unique index"),
        (
            "ADD UNIQUE INDEX uk_idempotency_key (idempotency_key, business_type)",
            "uk_idempotency_key is not a unique index",
        ),
        ("ADD INDEX idx_lottery_session_id (created_at)", "idx_lottery_session_id does not begin with"),
    ],
)
def test_columns_and_indexes_that_workers_cannot_live_with(url: str, engine: Engine, statement: str, what: str) -> None:
    make(engine, url, "b")
    execute(engine, f"ALTER TABLE asset_transactions {statement}")
    before = definitions(engine)
    found = inspection.inspect(engine, on_progress=quiet)
    assert not found.can_begin
    assert found.next == ""
    with pytest.raises(ConfigurationError, match=what):
        run(engine, "adopt")
    assert definitions(engine) == before


def test_a_table_of_the_owners_with_a_name_of_ours_is_told_before_anything_changes(url: str, engine: Engine) -> None:
    make(engine, url, "d")
    execute(
        engine, "CREATE TABLE api_idempotency_requests (id INT PRIMARY KEY, idempotency_key VARCHAR(100), result TEXT)"
    )
    before = definitions(engine)
    found = inspection.inspect(engine, on_progress=quiet, with_rows=False)
    assert not found.can_begin
    with pytest.raises(ConfigurationError, match="there is a table api_idempotency_requests without request_key"):
        run(engine, "adopt")
    assert definitions(engine) == before
    execute(engine, "RENAME TABLE api_idempotency_requests TO the_owners_requests")
    run(engine, "adopt")


def test_values_that_no_key_can_be_are_named_and_nothing_is_lost(url: str, engine: Engine) -> None:
    make(engine, url, "b")
    for transaction_id, change in (
        (10, "idempotency_key = 'Lösung'"),
        (12, "idempotency_key = ''"),
        (20, "idempotency_key = 'twice'"),
        (21, "idempotency_key = 'twice'"),
        (30, "lottery_session_id = ''"),
        (32, "lottery_session_id = 'Süden'"),
        (40, "idempotency_key = 'tx_70'"),
    ):
        execute(engine, f"UPDATE asset_transactions SET {change} WHERE transaction_id = {transaction_id}")
    shape_before, before = definitions(engine), everything(engine, highest(engine))
    by_name = {finding.name: finding for finding in inspection.inspect(engine, on_progress=quiet).findings}
    assert by_name["key not ascii"].samples == [10, 12]
    assert by_name["key twice"].samples == ["twice"]
    assert by_name["session not usable"].samples == [30, 32]
    assert by_name["key of another row"].samples == [40]
    assert all(by_name[name].cure for name in by_name)

    run(engine, "adopt")
    with pytest.raises(ConfigurationError, match=r"two rows would have one key .*(twice|tx_70)"):
        run(engine, "backfill")
    execute(engine, "UPDATE asset_transactions SET idempotency_key = NULL WHERE transaction_id IN (20, 40)")
    run(engine, "backfill")
    assert scalar(engine, "SELECT idempotency_key FROM asset_transactions WHERE transaction_id = 21") == "twice"
    found = verify.verify(engine, on_progress=quiet)
    assert len(found.problems) == 1  # what was just changed by hand
    execute(
        engine,
        "UPDATE asset_transactions SET idempotency_key = 'twice' WHERE transaction_id = 20 AND FALSE",
        "DELETE FROM legacy_migration_chunks",
        "UPDATE legacy_migration SET details = JSON_SET(details, '$.problems', JSON_ARRAY()) WHERE step = 'verify'",
    )
    with pytest.raises(ConfigurationError, match="cannot be one of 100 ASCII characters"):
        run(engine, "contract")
    run(engine, "rollback")
    assert definitions(engine) == shape_before
    changed = {20, 40}
    now = everything(engine, highest(engine))
    assert [row for row in now if row[0] not in changed] == [row for row in before if row[0] not in changed]


def test_a_changed_key_is_found_by_its_checksum(url: str, engine: Engine) -> None:
    make(engine, url, "d")
    run(engine, "adopt", "backfill")
    assert verify.verify(engine, on_progress=quiet).is_clean
    execute(
        engine,
        "UPDATE asset_transactions SET idempotency_key = 'changed', updated_at = updated_at "
        "WHERE idempotency_key LIKE 'lottery_req%' LIMIT 1",
    )
    assert "other values" in verify.verify(engine, on_progress=quiet).problems[0]


# ---- ids that run out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id_type", "counter", "says"),
    [
        (
            "int",
            2_000_000_000,
            r"asset_transactions.transaction_id is int.*: 2,0\d\d,\d{3},\d{3} of 2,147,483,647 numbers",
        ),
        ("int unsigned", 4_294_000_000, "of 4,294,967,295 numbers"),
        ("int", None, None),
        ("bigint", 2_000_000_000, None),
    ],
)
def test_inspect_says_when_an_int_id_runs_out(
    url: str, engine: Engine, id_type: str, counter: int | None, says: str | None
) -> None:
    legacy.create(engine, id_type=id_type)
    legacy.fill_chains(engine, 50)  # one draw a minute
    if counter:
        execute(engine, f"ALTER TABLE asset_transactions AUTO_INCREMENT = {counter}")
        legacy.fill_chains(engine, 50, first=51)
    found = [it for it in inspection.inspect(engine, on_progress=quiet).findings if it.name == "id runs out"]
    if says is None:
        assert found == []
        return
    (finding,) = found
    assert re.search(says, finding.what)
    assert re.search(r"a day the last one is taken on \d{4}-\d\d-\d\d$", finding.what)
    assert "BIGINT" in finding.cure
    assert not finding.is_blocking


def test_the_day_an_id_runs_out_follows_from_the_rate_of_its_rows(engine: Engine) -> None:
    legacy.create(engine, id_type="int")
    legacy.fill_chains(engine, 10)
    # 100 million ids in 100 days, and 40 million are left: forty days.
    execute(
        engine,
        "UPDATE asset_transactions SET created_at = NOW() - INTERVAL 100 DAY + INTERVAL transaction_id SECOND",
        "UPDATE asset_transactions SET transaction_id = transaction_id + 2007483640 ORDER BY transaction_id DESC",
        "INSERT INTO asset_transactions SELECT 2107483647, account_id, 'newest', business_type, asset_code, "
        "delta_amount, balance_before, balance_after, notes, NOW(), NOW() FROM asset_transactions LIMIT 1",
    )
    (finding,) = [it for it in inspection.inspect(engine, on_progress=quiet).findings if it.name == "id runs out"]
    day = scalar(engine, "SELECT DATE(NOW() + INTERVAL 40 DAY)")
    assert re.search(r"at (999,99|1,000,00)\d a day", finding.what)
    assert str(day) in finding.what


# ---- checksums -------------------------------------------------------------------------------------------------------


def test_checksums_name_their_algorithm_and_those_of_the_first_release_are_still_compared(
    url: str, engine: Engine
) -> None:
    make(engine, url, "a")
    run(engine, "expand")
    with engine.connect() as connection:
        details = record.recorded(connection).details
    assert details["algorithm"] == "sha256"
    columns = ", ".join(f"CAST(QUOTE(`{name}`) AS BINARY)" for name in details["columns"])
    # As the first release put it on record, without a name: MD5, by whoever has it.
    with engine.begin() as connection:
        rows = connection.execute(text(f"SELECT CONCAT_WS(',', {columns}) FROM asset_transactions")).scalars()
        total = 0
        for row in rows:
            total ^= int(hashlib.md5(bytes(row)).hexdigest(), 16)
        connection.execute(text("UPDATE legacy_migration_chunks SET checksum = :sum"), {"sum": f"{total:032x}"})
        connection.execute(
            text("UPDATE legacy_migration SET details = :details WHERE step = 'expand'"),
            {"details": json.dumps({name: it for name, it in details.items() if name not in ("algorithm", "shape")})},
        )
    run(engine, "backfill", "verify", "contract", "verify")
    execute(engine, "UPDATE asset_transactions SET notes = 'x', updated_at = updated_at WHERE transaction_id = 50")
    assert "other values" in verify.verify(engine, on_progress=quiet).problems[0]


def test_the_old_algorithm_is_what_mariadb_called_md5(url: str, engine: Engine) -> None:
    make(engine, url, "a")
    if "MariaDB" not in str(scalar(engine, "SELECT VERSION()")):
        pytest.skip("this server has no MD5")
    recipe = checksums.Recipe(("transaction_id", "notes", "business_id"), checksums.MD5)
    with engine.connect() as connection:
        rows, found = checksums.checksum(connection, recipe, 1, 100)
        halves = [
            f"BIT_XOR(CAST(CONV({side}(MD5({recipe.row}), 16), 16, 10) AS UNSIGNED))" for side in ("LEFT", "RIGHT")
        ]
        left, right = connection.execute(
            text(f"SELECT {', '.join(halves)} FROM asset_transactions WHERE transaction_id BETWEEN 1 AND 100")
        ).one()
    assert rows == 100
    assert found == f"{left:016x}{right:016x}"


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command(url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", url)
    names = make(engine, url, "d")
    shape_before = definitions(engine)
    said = tombola("inspect")
    assert "shape d" in said
    assert "tombola legacy adopt" in said
    assert "tombola legacy adopt" in tombola("expand", code=1)
    assert "CREATE TABLE" in tombola("adopt", "--sql")
    tombola("adopt")
    assert json.loads(tombola("status", "--json"))["stage"] == "adopted"
    assert "0 rows were given keys" in tombola("backfill", "--follow")
    tombola("verify")
    assert "COPY" in tombola("contract", "--sql")
    tombola("contract", "--quiet-s", "0", "--yes", "--writers-wait")
    assert_answered_from_first_rows(engine, names[-2:])
    assert "--keep-new-rows" in tombola("rollback", "--yes", "--writers-wait", code=1)
    tombola("rollback", "--yes", "--writers-wait", "--keep-new-rows")
    assert definitions(engine) == shape_before


@pytest.mark.parametrize("shape", ["b", "c"])
def test_the_printed_statements_do_the_same_by_hand(url: str, engine: Engine, shape: str) -> None:
    make(engine, url, shape)
    last, shape_before = highest(engine), definitions(engine)
    before = everything(engine, last)

    def by_hand(statements: list[str]) -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for statement in statements:
                if not statement.startswith("--"):
                    connection.exec_driver_sql(
                        statement.replace("<first>", "1").replace("<last>", str(last)).replace("%", "%%")
                    )

    by_hand(expand.statements(engine))
    run(engine, "adopt")
    by_hand(backfill.statements(engine, own_session=False))
    run(engine, "backfill", "verify")
    by_hand(contract.statements(engine, drop_business_unique=True))
    run(engine, "contract", "verify")
    by_hand(rollback.statements(engine))
    run(engine, "rollback", "verify")
    assert definitions(engine) == shape_before
    assert everything(engine, last) == before
