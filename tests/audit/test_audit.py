"""The audit: each invariant is broken once, and it says which, and of what."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, delete, insert, select, text

from tests.audits import EMPTY_STORE, audited
from tests.consoles import PASSWORD, quick_hashes
from tests.kept_results import keep_results
from tests.ledgers import migrated, recharge
from tests.processes import SEED
from tombola.producers.domain.causes import DeadReason
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.domain.errors import ConfigurationError, InternalError
from tombola.producers.results import ResultStore
from tombola.producers.settings import Settings
from tombola.producers.storage import api_keys, requests
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.schema import account_asset_balances as balances
from tombola.producers.storage.schema import api_idempotency_requests, operator_actions
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.transactions import transaction
from tombola.worker import cli
from tombola.worker.audit import audits, parts
from tombola.worker.audit import report as audit_report
from tombola.worker.audit.on_record import API_KEY_ADD, API_KEY_REVOKE
from tombola.worker.audit.report import INVARIANTS, Report
from tombola.worker.ledger import accounts
from tombola.worker.operators import users
from tombola.worker.operators.actions import Act, act_once
from tombola.worker.settle import tries
from tombola.worker.settle.rules import Rules

pytestmark = pytest.mark.slow

WHEELS = {DEFAULT_CAMPAIGN.name: Wheel(DEFAULT_CAMPAIGN, bytes.fromhex(SEED))}
DRAWS = 40  # of which some win

Break = Callable[..., None]


def examine(engine: Engine) -> Report:
    """An audit of everything."""
    return audited(engine, WHEELS)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = open_engine(database_url)
    migrated(made)
    yield made
    made.dispose()


@pytest.fixture
def books(engine: Engine) -> Engine:
    """Three accounts, the third without a row; draws that were settled, told no, only accepted, and dead."""
    rich = accounts.add(engine, user_id=1, balance=Decimal(100), by="ann")
    broke = accounts.add(engine, user_id=2, balance=Decimal("0.50"), by="ann")
    accounts.add(engine, user_id=3)
    recharge(engine, rich.account_id, Decimal(5), by="ann")
    draws = [DrawRequest(account_id=rich.account_id, request_key=f"d{number:02}") for number in range(DRAWS)]
    told_no = [DrawRequest(account_id=broke.account_id, request_key=key) for key in ("no", "neither")]
    tries.settle(engine, [*draws, *told_no], Rules(WHEELS, tries_max=3))
    keep_results(engine, "d05", "d09", "d10", "d11", "neither")  # as an older release did
    late = [Submission(DrawRequest(account_id=rich.account_id, request_key=key)) for key in ("waits", "dead")]
    with transaction(engine) as open_transaction:
        requests.accept(open_transaction, late, utc_now(), publish_at=utc_now(), is_published=True)
    with engine.begin() as connection:
        requests.give_up(connection, "dead", late[1].request.fingerprint(), DeadReason.TIMED_OUT)
    report = examine(engine)
    assert report.violations == []
    assert report.states == dict.fromkeys(INVARIANTS, "holds")
    assert (report.accounts, report.requests, report.is_clean) == (3, DRAWS + 4, True)
    return engine


@pytest.fixture
def spoil(books: Engine) -> Break:
    """Write past every check that the database has. Amounts are written ¤9.99, as SQLite has hundredths."""
    is_sqlite = books.dialect.name == "sqlite"

    def stored(amount: re.Match[str]) -> str:
        return str(int(Decimal(amount[1]) * 100)) if is_sqlite else amount[1]

    def spoil(*statements: str) -> None:
        with unchecked(books) as connection:
            for statement in statements:
                changed = connection.exec_driver_sql(re.sub(r"¤(-?[\d.]+)", stored, statement)).rowcount
                assert changed, statement

    return spoil


@contextmanager
def unchecked(engine: Engine) -> Iterator[Connection]:
    """A transaction in which no constraint is checked."""
    with engine.connect().execution_options(autobegin=False) as connection:
        driver: Any = connection.connection.driver_connection
        if engine.dialect.name == "sqlite":
            for pragma in ("foreign_keys=OFF", "ignore_check_constraints=ON"):
                driver.execute(f"PRAGMA {pragma}")
        else:
            with driver.cursor() as cursor:
                cursor.execute("SET check_constraint_checks=0, foreign_key_checks=0, sql_mode=''")
        with connection.begin():
            yield connection
        connection.invalidate()  # the next one checks again


def violated(engine: Engine) -> dict[str, list[str]]:
    """What the audit finds, by invariant."""
    report = examine(engine)
    assert {it for it, state in report.states.items() if state == "violated"} == {
        it.invariant for it in report.violations
    }
    assert "not looked at" not in report.states.values()
    return {
        name: [str(it) for it in report.violations if it.invariant == name]
        for name in report.counts
        if report.counts[name]
    }


LEDGER, ACCOUNTS, REQUESTS = "asset_transactions", "account_asset_balances", "api_idempotency_requests"

BROKEN: dict[str, tuple[list[str], dict[str, str]]] = {
    "an account without rows holds something": (
        [f"UPDATE {ACCOUNTS} SET balance = ¤9999.00 WHERE user_id = 3"],
        {"I3": "account 3: holds 9999.00, and has no rows"},
    ),
    "the opening recharge of a chain is gone": (
        [f"DELETE FROM {LEDGER} WHERE account_id = 2"],
        {"I3": "account 2: holds 0.50, and has no rows", "I12": "0.50 to account 2 are on record"},
    ),
    "the first row of a longer chain is gone": (
        [f"DELETE FROM {LEDGER} WHERE account_id = 1 AND balance_before = 0"],
        {
            "I3": "account 1: holds",
            "I4": "begins at 100.00, and is its account's first row",
            "I12": "100.00 to account 1 are on record, and not in the ledger",
        },
    ),
    "a row in the middle is gone": (
        [f"DELETE FROM {LEDGER} WHERE idempotency_key = 'd05:consume'"],
        {
            "I1": "request d05: is completed and has 0 charges",
            "I3": "account 1: holds",
            "I4": "the one before ended at",
            "I10": "request d05",
            "I11": "request d05",
        },
    ),
    "a balance is not what its rows say": (
        [f"UPDATE {ACCOUNTS} SET balance = balance + ¤1.00 WHERE user_id = 1"],
        {"I3": "account 1: holds"},
    ),
    "a row does not add up": (
        [f"UPDATE {LEDGER} SET delta_amount = ¤7.00 WHERE account_id = 2"],
        {
            "I3": "account 2: holds 0.50, its rows say 7.00",
            "I4": "0.00 +7.00 is not 0.50",
            "I12": "is 7.00 to account 2, on record are 0.50",
        },
    ),
    "an account is gone": (
        [f"DELETE FROM {ACCOUNTS} WHERE user_id = 2"],
        {"I3": "account 2: there is no such account, its rows say 0.50"},
    ),
    "a balance is negative": (
        [f"UPDATE {ACCOUNTS} SET balance = ¤-1.00 WHERE user_id = 3"],
        {"I3": "account 3: holds -1.00", "I5": "account 3: its balance is -1.00"},
    ),
    "a charge without a request": (
        [f"DELETE FROM {REQUESTS} WHERE request_key = 'd07'"],
        {"I1": "session d07: was charged without a request"},
    ),
    "a charge of a request that was told no": (
        [
            f"UPDATE {LEDGER} SET lottery_session_id = 'no', idempotency_key = 'no:consume' "
            "WHERE idempotency_key = 'd08:consume'"
        ],
        {"I1": "request no: is rejected and has 1 charges", "I10": "request d08", "I11": "request no: is rejected"},
    ),
    "a result says something else": (
        [f"UPDATE {REQUESTS} SET result = REPLACE(result, '-1.00', '-2.00') WHERE request_key = 'd09'"],
        {"I10": "request d09: its kept result is not what the ledger says"},
    ),
    "a result is no JSON": (
        [f"UPDATE {REQUESTS} SET result = 'rubbish' WHERE request_key = 'd09'"],
        {"I10": "request d09: its kept result is not what the ledger says"},
    ),
    "a result that this release rebuilds says something else": (
        [f"UPDATE {REQUESTS} SET result = '{{}}' WHERE request_key = 'd20'"],
        {"I10": "request d20: its kept result is not what the ledger says"},
    ),
    "a rejection's reason is gone": (
        [f"UPDATE {REQUESTS} SET reason = NULL WHERE request_key = 'no'"],
        {"I10": "request no: is rejected, its result says completed"},
    ),
    "a kept rejection has another reason": (
        [f"UPDATE {REQUESTS} SET reason = 'ACCOUNT_NOT_FOUND' WHERE request_key = 'neither'"],
        {"I10": "request neither: is rejected ACCOUNT_NOT_FOUND, its result says rejected INSUFFICIENT_BALANCE"},
    ),
    "a request is another one's": (
        [f"UPDATE {REQUESTS} SET campaign = 'other' WHERE request_key = 'd10'"],
        {"I2": "campaign other is unknown", "I10": "request d10: its row does not match its fingerprint"},
    ),
    "a request key is none": (
        [f"UPDATE {REQUESTS} SET request_key = 'a:b' WHERE request_key = 'd10'"],
        {"I10": "request a:b: cannot be checked: InvalidKey", "I11": "request a:b: its session holds foreign rows"},
    ),
    "a row of another request": (
        [f"UPDATE {LEDGER} SET idempotency_key = 'x:consume' WHERE idempotency_key = 'd11:consume'"],
        {"I10": "request d11", "I11": "request d11: its session holds foreign rows: ['x:consume"},
    ),
    "a recharge that nobody answers for": (
        ["DELETE FROM operator_actions WHERE action = 'account recharge'"],
        {"I12": "it is not on record"},
    ),
    "a recharge is on record with another amount": (
        ["UPDATE operator_actions SET details = REPLACE(details, '5.00', '4.00') WHERE action = 'account recharge'"],
        {"I12": "is 5.00 to account 1, on record are 4.00 to account 1"},
    ),
    "the record cannot be read": (
        ["UPDATE operator_actions SET details = '[' WHERE action = 'account recharge'"],
        {"I12": "its details cannot be read"},
    ),
}  # fmt: skip


def test_what_is_broken_is_named(books: Engine, spoil: Break) -> None:
    tables = [transactions, balances, api_idempotency_requests, operator_actions]
    with books.connect().execution_options(read_only=True) as connection:
        kept = {it: [dict(row) for row in connection.execute(select(it)).mappings()] for it in tables}
    for what, (statements, expected) in BROKEN.items():
        spoil(*statements)
        found = violated(books)
        # A row that is gone or moved was perhaps a winner's.
        perhaps = {"I2", "I3", "I4", "I14"} if "row" in what or "charge" in what else set()
        assert expected.keys() <= found.keys() <= expected.keys() | perhaps, (what, found)
        for invariant, words in expected.items():
            assert any(words in it for it in found[invariant]), (what, found)
        with unchecked(books) as connection:
            for table, rows in kept.items():
                connection.execute(delete(table))
                connection.execute(insert(table), rows)
        assert violated(books) == {}, what


def test_a_reward_that_no_draw_says(books: Engine, spoil: Break) -> None:
    won = next(it for it in range(DRAWS) if WHEELS["default"].draw(1, f"d{it:02}").amount)
    spoil(f"UPDATE {LEDGER} SET delta_amount = delta_amount + ¤1.00 WHERE idempotency_key = 'd{won:02}:reward'")
    assert f"request d{won:02}: was paid" in violated(books)["I2"][0]
    spoil(f"DELETE FROM {LEDGER} WHERE idempotency_key = 'd{won:02}:reward'")
    found = violated(books)
    assert f"request d{won:02}: was paid 0" in found["I2"][0]
    assert found["I11"] == [f"I11 request d{won:02}: has 1 ledger rows"]
    spoil(f"UPDATE {LEDGER} SET notes = 'odds=other' WHERE idempotency_key = 'd00:consume'")
    assert any("request d00: was drawn with other odds" in it for it in violated(books)["I2"])


def test_what_cannot_be_read_is_a_violation_and_the_rest_is_looked_at(books: Engine, spoil: Break) -> None:
    if books.dialect.name == "sqlite":  # which keeps in a column whatever it is given
        odd = "'odd'"
        values = [f"UPDATE {ACCOUNTS} SET balance = {odd} WHERE user_id = 3"]
    else:
        odd = "NULL"
        values = [
            f"ALTER TABLE {ACCOUNTS} MODIFY balance decimal(10,2) NULL",
            f"ALTER TABLE {LEDGER} MODIFY delta_amount decimal(10,2) NULL",
        ]
        with books.connect() as connection:
            for statement in values:
                connection.exec_driver_sql(statement)
        values = [f"UPDATE {ACCOUNTS} SET balance = NULL WHERE user_id = 3"]
    spoil(
        *values,
        f"UPDATE {LEDGER} SET delta_amount = {odd} WHERE idempotency_key = 'd03:consume'",
        f"UPDATE {ACCOUNTS} SET balance = balance + ¤1.00 WHERE user_id = 2",
    )
    found = violated(books)
    for words in (
        "account 3: its balance cannot be read",
        "account 1: its rows cannot be added up",
        "account 2: holds",
    ):
        assert any(words in it for it in found["I3"]), found
    assert any("account 1, transaction" in it and "cannot be read" in it for it in found["I4"]), found
    assert any("account 3: its balance cannot be read" in it for it in found["I5"]), found
    assert [it for it in found["I10"] if "request d03: cannot be checked" in it], found


def test_a_key_that_was_revoked_on_record_stays_so(books: Engine, spoil: Break) -> None:
    made = Act.of(API_KEY_ADD, {"caller": "shop", "scopes": "read"})
    done = act_once(books, made, lambda it: {"key_id": api_keys.id_of(api_keys.add(it, "shop", scopes=["read"]))})
    revoked = Act.of(API_KEY_REVOKE, {"key_id": done.details["key_id"]})
    act_once(books, revoked, lambda it: {"caller": api_keys.revoke(it, done.details["key_id"])})
    assert violated(books) == {}
    for change in (
        "scopes = 'draw,read,money'",
        "scopes = NULL",
        "expires_at = '2100-01-01 00:00:00.000000'",
        "accounts = '6'",
    ):
        spoil(f"UPDATE api_keys SET {change}")
        assert "may do other things than on record" in violated(books)["I12"][0], change
        spoil("UPDATE api_keys SET scopes = 'read', expires_at = NULL, accounts = NULL")
    assert violated(books) == {}
    spoil("UPDATE api_keys SET revoked_at = NULL")
    assert "was revoked on record, and is valid again" in violated(books)["I12"][0]
    spoil("DELETE FROM api_keys")
    assert "is on record, and gone" in violated(books)["I12"][0]


def test_users_are_those_on_record(books: Engine, spoil: Break) -> None:
    with quick_hashes():
        for name in ("ann", "eve", "bob"):
            users.add(books, name, "viewer", PASSWORD, by="root")
        users.change_role(books, "ann", "operator", by="root", reason="promoted")
        users.remove(books, "bob", by="root")
    assert violated(books) == {}
    spoil("UPDATE operators SET role = 'operator' WHERE name = 'eve'")
    assert violated(books)["I12"] == ["I12 user eve: is operator, on record viewer"]
    spoil("UPDATE operators SET name = 'mallory' WHERE name = 'eve'")
    assert violated(books)["I12"] == ["I12 user eve: is on record, and gone", "I12 user mallory: is not on record"]


def test_what_old_code_left_begins_as_it_was_and_nothing_else_does(mariadb_url: str) -> None:
    engine = open_engine(mariadb_url)
    migrated(engine)
    old = [accounts.open_account(engine, user_id=number) for number in (1, 2)]
    with engine.begin() as connection:
        connection.execute(text("UPDATE account_asset_balances SET created_at = '2024-01-01', balance = 7"))
        connection.execute(
            text(
                "CREATE TABLE legacy_migration (step varchar(32) PRIMARY KEY, status varchar(16), "
                "started_at datetime(6), ended_at datetime(6), details text)"
            )
        )
        connection.execute(text("INSERT INTO legacy_migration VALUES ('contract', 'done', NULL, '2024-06-01', '{}')"))
    recharge(engine, old[0], Decimal(1))
    new = accounts.open_account(engine, user_id=3)
    assert violated(engine) == {}
    with engine.begin() as connection:
        connection.execute(text("UPDATE account_asset_balances SET balance = 9 WHERE user_id <> 2"))
    found = violated(engine)
    assert found["I3"] == [
        f"I3 account {old[0]}: holds 9.00, its rows say 8.00",
        f"I3 account {new}: holds 9.00, and has no rows",
    ]
    with engine.begin() as connection:  # as long as old code may write, it may open accounts as well
        connection.execute(text("UPDATE legacy_migration SET step = 'expand'"))
    assert violated(engine) == {"I3": found["I3"][:1]}
    engine.dispose()


# ---- what is said of it ----------------------------------------------------------------------------------------------


Audited = Callable[..., tuple[int, str]]


@pytest.fixture
def tombola_audit(database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Audited:
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", database_url)
    for name in ("BROKER", "RESULT"):
        monkeypatch.setenv(f"TOMBOLA_{name}_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("TOMBOLA_SEED", SEED)
    monkeypatch.setattr(ResultStore, "from_settings", lambda *_arguments, **_options: EMPTY_STORE)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tombola", "audit", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().out

    return run


def test_beyond_the_violations_that_are_kept_all_are_counted(
    books: Engine, spoil: Break, tombola_audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_report, "VIOLATIONS_KEPT_MAX", 7)
    spoil(f"DELETE FROM {LEDGER} WHERE account_id = 1 AND business_type <> 'recharge'")
    report = examine(books)
    assert report.counts["I1"] == DRAWS
    assert len([it for it in report.violations if it.invariant == "I1"]) == 7
    assert report.is_cut
    assert report.states["I3"] == "violated"
    assert report.states["I5"] == report.states["I12"] == "holds"
    status, said = tombola_audit()
    assert status == 1
    assert f"VIOLATED {DRAWS} times" in said
    assert "Only the first 7 violations of each are kept" in said
    assert "The books do not balance." in said


def test_what_was_not_looked_at_does_not_hold(books: Engine, tombola_audit: Audited) -> None:
    status, said = tombola_audit()
    assert (status, "The books balance." in said) == (0, True)
    with books.begin() as connection:
        connection.execute(text("DROP TABLE operator_actions"))
    report = examine(books)
    assert report.states == dict.fromkeys(INVARIANTS, "holds") | {"I12": "not looked at"}
    assert not report.is_clean
    status, said = tombola_audit()
    assert status == 1
    (line,) = [line for line in said.splitlines() if line.strip().startswith("I12")]
    assert "NOT LOOKED AT" in line
    assert "holds" not in line
    assert "The books balance." not in said
    status, said = tombola_audit("--json")
    told: dict[str, Any] = json.loads(said)
    assert (status, told["is_clean"], told["states"]["I12"]) == (1, False, "not looked at")
    assert told["violated"] == dict.fromkeys(INVARIANTS, 0)
    assert list(told["not_looked_at"]) == ["I12"]


def test_the_report_says_what_was_examined(
    books: Engine, tombola_audit: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "HORIZON_S", 0.0)
    rows = examine(books).rows
    first = tombola_audit()[1]
    assert f"{rows} ledger rows, 3 accounts (everything, up to transaction {rows})" in first.replace("\n", " ")
    recharge(books, 1, Decimal(5), by="ann")
    told = json.loads(tombola_audit("--json")[1])
    examined = [told[it] for it in ("everything", "after_transaction", "up_to_transaction", "rows", "accounts")]
    assert examined == [False, rows, rows + 1, 1, 3]
    second = tombola_audit()[1].replace("\n", " ")
    assert "(no new transactions, since the clean audit of 20" in second
    assert f"everything, up to transaction {rows + 1}" in tombola_audit("--all")[1].replace("\n", " ")


def test_the_nightly_audit_says_the_same(
    books: Engine, spoil: Break, tombola_audit: Audited, caplog: pytest.LogCaptureFixture
) -> None:
    from tombola.worker.celery import make_app  # it asks for TOMBOLA_* when it is imported

    spoil(f"UPDATE {ACCOUNTS} SET balance = ¤9999.00 WHERE user_id = 3")
    with books.begin() as connection:
        connection.execute(text("DROP TABLE operator_actions"))
    task = make_app(Settings.from_env()).tasks["tombola.audit"]
    told = task.apply().get()
    by_hand = json.loads(tombola_audit("--json")[1])
    assert told == {name: value for name, value in by_hand.items() if name != "violations"}
    assert (told["is_clean"], told["states"]["I3"], told["states"]["I12"]) == (False, "violated", "not looked at")
    logged = [it.getMessage() for it in caplog.records if it.name.startswith("tombola.worker")]
    assert any("account 3: holds 9999.00, and has no rows" in it for it in logged)
    assert any("I12 is not looked at" in it for it in logged)
    assert not any("I1 is" in it for it in logged)


def test_an_audit_is_on_record(books: Engine, spoil: Break, tombola_audit: Audited) -> None:
    """When it was, by whom, and what it found: so that one that did not run is seen."""
    from tombola.worker.celery import make_app

    def last() -> audits.Audited | None:
        with books.connect().execution_options(read_only=True) as connection:
            return audits.last(connection)

    assert last() is None
    began = utc_now()
    make_app(Settings.from_env()).tasks["tombola.audit"].apply().get()
    nightly = last()
    assert nightly is not None
    assert (nightly.by, nightly.violations, nightly.not_looked_at) == ("tombola.audit", 0, ())
    assert nightly.is_clean
    assert timedelta(seconds=-5) < nightly.at - began < timedelta(seconds=60)
    spoil(f"UPDATE {ACCOUNTS} SET balance = ¤9999.00 WHERE user_id = 3")
    assert tombola_audit()[0] == 1
    by_hand = last()
    assert by_hand is not None
    assert by_hand.by.startswith("shell:")
    assert by_hand.violations >= 1
    assert not by_hand.is_clean
    assert examine(books).states["I12"] == "holds"


def test_who_may_only_read_may_audit(books: Engine, tombola_audit: Audited, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise InternalError("the database refuses this: INSERT command denied")

    monkeypatch.setattr(audits, "record", refuse)
    status, said = tombola_audit()
    assert (status, "The books balance." in said) == (0, True)


def test_an_empty_database_is_no_audit(database_url: str) -> None:
    engine = open_engine(database_url)
    with pytest.raises(ConfigurationError, match="not migrated"):
        examine(engine)
    engine.dispose()


def test_nothing_holds_before_anything_was_looked_at() -> None:
    assert set(Report().states.values()) == {"not looked at"}
    assert not Report().is_clean
