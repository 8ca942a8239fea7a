"""The migrations build what the code declares, on both databases, and what the owner asked for besides.

Alembic's own comparison sees neither CHECK constraints nor character sets nor a table's options: the databases' own
words for their tables are compared as well.
"""

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Engine, insert, inspect, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from tests import servers
from tombola import migrations
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.domain.operations import draw as operation
from tombola.producers.domain.operations.operation import Rejection
from tombola.producers.domain.receipt_keys import SigningKey
from tombola.producers.storage import api_keys
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.faults import Fault, fault_of
from tombola.producers.storage.ledger import Posting
from tombola.producers.storage.receipt_keys import open_signer
from tombola.producers.storage.requests import state_of_session
from tombola.producers.storage.schema import (
    account_asset_balances,
    api_idempotency_requests,
    asset_transactions,
    dead_letters,
    metadata,
    operator_actions,
    operators,
    replays,
)
from tombola.worker.ledger.accounts import open_account
from tombola.worker.relay.retention import archive_once

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
TABLES_BY_REVISION = {
    "0001": {"account_asset_balances", "api_idempotency_requests", "asset_transactions", "dead_letters"},
    "0002": {"api_keys"},
    "0003": {"operator_actions", "operator_sessions", "operators", "replays"},
    "0005": {
        "account_lists",
        "campaign_accounts",
        "campaign_codes",
        "campaign_stock",
        "campaign_stock_changes",
        "campaign_versions",
        "campaigns",
        "fulfilments",
        "webhooks",
    },
    "0006": {
        "account_holds",
        "audit_marks",
        "audited_accounts",
        "books_blocks",
        "books_head",
        "books_house",
        "books_snapshots",
    },
    "0007": {
        *("receipt_keys", "seed_chains", "seed_epochs"),
        *("conformity_accounts", "conformity_counts", "conformity_parts"),
    },
}
TABLES = set().union(*TABLES_BY_REVISION.values())
OURS = {"version_table": migrations.VERSION_TABLE}

# ARCHITECTURE, Tables: name, type, nullable. `text` and `datetime` without the precision that we may choose.
OWNERS_LEDGER = [
    ("transaction_id", "bigint", "NO"),
    ("account_id", "bigint", "NO"),
    ("business_id", "varchar(100)", "NO"),
    ("lottery_session_id", "varchar(100)", "NO"),
    ("idempotency_key", "varchar(100)", "NO"),
    ("business_type", "varchar(50)", "NO"),
    ("asset_code", "varchar(50)", "NO"),
    ("delta_amount", "decimal(10,2)", "NO"),
    ("balance_before", "decimal(10,2)", "NO"),
    ("balance_after", "decimal(10,2)", "NO"),
    ("notes", "text", "YES"),
    ("created_at", "datetime", "NO"),
    ("updated_at", "datetime", "NO"),
]
OWNERS_INDEXES = {
    "uk_idempotency_key": (["idempotency_key"], True),
    "idx_lottery_session_id": (["lottery_session_id"], False),
    "idx_account_created": (["account_id", "created_at"], False),
}


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


def definitions(engine: Engine) -> dict[str, str]:
    """Every table and index but Alembic's own in the database's words, by name."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            found = connection.execute(
                text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'")
            )
            named = {str(name): str(sql) for name, sql in found}
        else:
            tables = connection.execute(text("SHOW TABLES")).scalars().all()
            named = {name: connection.execute(text(f"SHOW CREATE TABLE {name}")).one()[1] for name in tables}
    return {name: _in_order(sql) for name, sql in named.items() if name != migrations.VERSION_TABLE}


def _in_order(sql: str) -> str:
    """The parts sorted: create_all makes indexes in the order of a set, and a column that is added comes last."""
    # A table that SQLite copied has its name in quotes.
    sql = re.sub(r'^CREATE TABLE "(\w+)"', r"CREATE TABLE \1", re.sub(r" AUTO_INCREMENT=\d+", "", sql))
    if not sql.startswith("CREATE TABLE"):
        return " ".join(sql.split())  # an index: there the order is what matters
    head, _, body = sql.partition("(")
    parts, _, tail = body.rpartition(")")
    # A comma between two parts, neither in a text nor in brackets.
    found = re.findall(r"(?:'(?:[^']|'')*'|\((?:'(?:[^']|'')*'|[^()]|\([^()]*\))*\)|[^,'(])+", parts)
    return "\n".join([" ".join(head.split()), *sorted(" ".join(part.split()) for part in found), tail])


def tables_of(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names()) - {migrations.VERSION_TABLE}


def alembic(*arguments: str, url: str | None, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=cwd,
        env=environment(url),
        capture_output=True,
        text=True,
        timeout=60,
    )


def environment(url: str | None) -> dict[str, str]:
    return os.environ | ({} if url is None else {"TOMBOLA_DATABASE_URL": url})


# ---- what they build -------------------------------------------------------------------------------------------------


def test_an_empty_database_goes_to_head_and_back_and_again(engine: Engine) -> None:
    migrations.upgrade(engine)
    assert tables_of(engine) == TABLES
    first = definitions(engine)
    with engine.connect() as connection:
        assert migrations.current_revision(connection) == migrations.head_revision()

    command.downgrade(migrations.alembic_config(engine), "base")
    assert tables_of(engine) == set()
    with engine.connect() as connection:
        assert migrations.current_revision(connection) is None

    migrations.upgrade(engine)
    migrations.upgrade(engine)  # at head there is nothing to do
    assert definitions(engine) == first


def test_a_database_that_was_never_migrated_has_no_revision(engine: Engine) -> None:
    with engine.connect() as connection:
        assert migrations.current_revision(connection) is None


def test_alembic_finds_no_difference_to_the_code(engine: Engine) -> None:
    migrations.upgrade(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={**OURS, "compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, metadata) == []


def test_the_databases_words_are_those_for_tables_made_by_the_code(engine: Engine) -> None:
    migrations.upgrade(engine)
    migrated = definitions(engine)
    metadata.drop_all(engine)
    assert tables_of(engine) == set()
    metadata.create_all(engine)
    assert migrated == definitions(engine)
    # and these words do show what alembic's comparison does not
    everything = " ".join(migrated.values())
    for name in ("ck_account_asset_balances_balance", "ck_asset_transactions_balance", *OWNERS_INDEXES):
        assert name in everything
    assert ("ascii_bin" in everything) == (engine.dialect.name == "mysql")


def test_the_owners_indexes_have_the_owners_names(engine: Engine) -> None:
    migrations.upgrade(engine)
    found = {
        index["name"]: (index["column_names"], bool(index["unique"]))
        for index in inspect(engine).get_indexes("asset_transactions")
    }
    assert {name: found.get(name) for name in OWNERS_INDEXES} == OWNERS_INDEXES


def test_the_ledger_has_the_owners_columns(mariadb_url: str) -> None:
    migrations.upgrade(mariadb_url)
    with open_engine(mariadb_url).connect() as connection:
        found = connection.execute(
            text(
                "SELECT column_name, column_type, is_nullable FROM information_schema.columns "
                "WHERE table_schema = DATABASE() AND table_name = 'asset_transactions' ORDER BY ordinal_position"
            )
        ).all()
    plain = [(name, re.sub(r"(bigint|datetime)\(\d+\)", r"\1", type_), nullable) for name, type_, nullable in found]
    assert plain == OWNERS_LEDGER


def test_key_columns_compare_bytes_whatever_the_servers_default(mariadb_url: str) -> None:
    migrations.upgrade(mariadb_url)
    with open_engine(mariadb_url).connect() as connection:
        assert connection.execute(text("SELECT @@character_set_database")).scalar_one() == "latin1"
        collations: dict[tuple[str, str], str] = {
            (table, column): collation
            for table, column, collation in connection.execute(
                text(
                    "SELECT table_name, column_name, collation_name FROM information_schema.columns "
                    "WHERE table_schema = DATABASE() AND collation_name IS NOT NULL"
                )
            )
        }
        engines = connection.execute(
            text(
                "SELECT DISTINCT engine, table_collation FROM information_schema.tables "
                "WHERE table_schema = DATABASE() AND table_name <> 'tombola_version'"
            )
        ).all()
    for table in TABLES:
        for column in (
            *("request_key", "idempotency_key", "lottery_session_id", "business_id", "business_type", "asset_code"),
            *("fingerprint", "status", "campaign", "body_sha256", "cause", "state", "group_id", "error_type"),
            *("action", "token_sha256", "role"),
        ):
            assert collations.get((table, column), "ascii_bin") == "ascii_bin", (table, column)
    assert collations["asset_transactions", "idempotency_key"] == "ascii_bin"
    assert collations["dead_letters", "group_id"] == "ascii_bin"
    assert collations["api_idempotency_requests", "result"] == "utf8mb4_bin"
    assert [tuple(row) for row in engines] == [("InnoDB", "utf8mb4_bin")]


# ---- what they refuse ------------------------------------------------------------------------------------------------


def ledger_row(account_id: int, **changes: Any) -> dict[str, Any]:
    now = utc_now()
    row = {
        "account_id": account_id,
        "business_id": "s1",
        "lottery_session_id": "s1",
        "idempotency_key": "k1:consume",
        "business_type": "lottery_consume",
        "asset_code": "POINT",
        "delta_amount": Decimal("-1.00"),
        "balance_before": Decimal("1.00"),
        "balance_after": Decimal("0.00"),
        "created_at": now,
        "updated_at": now,
    }
    return row | changes


def post(engine: Engine, *rows: dict[str, Any]) -> None:
    with engine.begin() as connection:
        for row in rows:
            connection.execute(insert(asset_transactions), row)


@pytest.fixture
def account_id(engine: Engine) -> int:
    migrations.upgrade(engine)
    return open_account(engine, user_id=1)


def test_a_negative_balance_is_refused(engine: Engine, account_id: int) -> None:
    with pytest.raises(DBAPIError, match="ck_account_asset_balances_balance"), engine.begin() as connection:
        connection.execute(account_asset_balances.update().values(balance=Decimal("-0.01")))
    for column in ("balance_before", "balance_after"):
        with pytest.raises(DBAPIError, match="ck_asset_transactions_balance"):
            post(engine, ledger_row(account_id, **{column: Decimal("-0.01")}))
    post(engine, ledger_row(account_id))


def test_a_balance_ends_where_its_column_does_on_both(engine: Engine, account_id: int) -> None:
    def set_balance(balance: str) -> None:
        with engine.begin() as connection:
            connection.execute(account_asset_balances.update().values(balance=Decimal(balance)))

    set_balance("99999999.99")
    with pytest.raises(DBAPIError) as refused:
        set_balance("100000000.00")
    assert fault_of(refused.value) is Fault.REFUSED


def test_a_key_is_taken_once_and_case_counts(engine: Engine, account_id: int) -> None:
    post(engine, ledger_row(account_id, idempotency_key="ABC"), ledger_row(account_id, idempotency_key="abc"))
    with pytest.raises(IntegrityError) as refused:
        post(engine, ledger_row(account_id, idempotency_key="abc"))
    assert "idempotency_key" in str(refused.value)


def test_a_ledger_row_needs_an_account(engine: Engine, account_id: int) -> None:
    with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
        post(engine, ledger_row(account_id + 1))


def test_a_key_too_long_for_its_column_is_refused_not_cut(mariadb_url: str) -> None:
    engine = open_engine(mariadb_url)
    migrations.upgrade(engine)
    account_id = open_account(engine, user_id=1)
    post(engine, ledger_row(account_id, idempotency_key="k" * 100))
    with pytest.raises(DBAPIError, match="Data too long"):
        post(engine, ledger_row(account_id, idempotency_key="x" * 101))
    with engine.connect() as connection:
        assert connection.execute(text("SELECT idempotency_key FROM asset_transactions")).scalars().all() == ["k" * 100]
    engine.dispose()


@pytest.mark.parametrize(
    ("status", "result", "fits"),
    [
        ("accepted", None, True),
        ("completed", "{}", True),
        ("rejected", "{}", True),
        ("accepted", "{}", False),
        ("completed", None, True),  # rebuilt
        ("dead", None, True),
        ("dead", "{}", False),
        ("unheard", None, False),
    ],
)
def test_a_request_has_a_result_only_when_it_has_settled(
    engine: Engine, status: str, result: str | None, fits: bool
) -> None:
    migrations.upgrade(engine)

    def add() -> None:
        with engine.begin() as connection:
            connection.execute(
                insert(api_idempotency_requests).values(
                    request_key="k",
                    lottery_session_id="k",
                    account_id=1,
                    campaign="default",
                    fingerprint="f",
                    status=status,
                    result=result,
                    created_at=utc_now(),
                )
            )

    if fits:
        add()
    else:
        with pytest.raises(DBAPIError, match="ck_api_idempotency_requests"):
            add()


def test_times_keep_their_microseconds_and_bodies_their_bytes(engine: Engine) -> None:
    migrations.upgrade(engine)
    moment = utc_now().replace(microsecond=123456)
    letter = {
        "body_sha256": "0" * 64,
        "cause": "invalid",
        "error": "unlesbar: 🎲",
        "body": bytes(range(256)) * 300,  # longer than a BLOB's 64 KB
        "body_bytes": 256 * 300,
        "queue": "draws",
        "deliveries": 1,
        "times_parked": 1,
        "first_parked_at": moment,
        "last_parked_at": moment,
    }
    with engine.begin() as connection:
        connection.execute(insert(dead_letters), letter)
        row = connection.execute(dead_letters.select()).mappings().one()
    assert {name: row[name] for name in letter} == letter


def test_a_ledger_in_use_is_not_dropped(engine: Engine, account_id: int) -> None:
    post(engine, ledger_row(account_id))
    with pytest.raises(CommandError, match="a ledger is not dropped"):
        command.downgrade(migrations.alembic_config(engine), "base")
    # Where DDL is transactional nothing has happened, elsewhere what came before the ledger's own revision.
    is_whole = engine.dialect.name == "sqlite"
    assert tables_of(engine) == (TABLES if is_whole else TABLES_BY_REVISION["0001"])
    with engine.connect() as connection:
        assert migrations.current_revision(connection) == (migrations.head_revision() if is_whole else "0001")


# ---- with requests in it ---------------------------------------------------------------------------------------------

LONG_AGO = "2020-02-03 04:05:06.000007"


def posted(entry_type: str, delta: str, before: str, after: str) -> Posting:
    amounts = Decimal(delta), Decimal(before), Decimal(after)
    return Posting(0, "s_won", f"won:{entry_type}", f"lottery_{entry_type}", "POINT", *amounts, "")


ROWS = [posted("consume", "-1.00", "7.00", "6.00"), posted("reward", "5.00", "6.00", "11.00")]


def requests_at_0001(account_id: int) -> list[dict[str, Any]]:
    """One of each kind, as the release of that revision wrote them."""
    won, poor, nobody, waiting = (
        DrawRequest(account_id=number, request_key=key, lottery_session_id=f"s_{key}")
        for key, number in {"won": account_id, "poor": account_id, "nobody": 4711, "waiting": account_id}.items()
    )
    rows = [it._replace(account_id=account_id) for it in ROWS]
    unknown, short = Rejection("ACCOUNT_NOT_FOUND", None), Rejection("INSUFFICIENT_BALANCE", Decimal("0.30"))
    outcomes: list[tuple[DrawRequest, str, str | None, bytes | None]] = [
        (nobody, "rejected", "ACCOUNT_NOT_FOUND", operation.result(nobody, unknown)),
        (poor, "rejected", "INSUFFICIENT_BALANCE", operation.result(poor, short)),
        (waiting, "accepted", None, None),
        (won, "completed", None, operation.result(won, rows)),
    ]
    return [
        {
            "request_key": draw.request_key,
            "lottery_session_id": draw.lottery_session_id,
            "account_id": draw.account_id,
            "campaign": draw.campaign,
            "fingerprint": draw.fingerprint(),
            "status": status,
            "reason": reason,
            "result": None if result is None else result.decode(),
            "created_at": LONG_AGO,
            "settled_at": None if result is None else LONG_AGO,
        }
        for draw, status, reason, result in outcomes
    ]


def add_requests(engine: Engine, *rows: dict[str, Any]) -> None:
    names = list(rows[0])
    into = f"INSERT INTO api_idempotency_requests ({', '.join(names)}) VALUES (:{', :'.join(names)})"
    with engine.begin() as connection:
        connection.execute(text(into), list(rows))


def requests_in(engine: Engine, columns: list[str]) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        found = connection.execute(
            text(f"SELECT {', '.join(columns)} FROM api_idempotency_requests ORDER BY request_key")
        ).mappings()
        rows = [dict(row) for row in found]
    for row in rows:
        for name in ("created_at", "settled_at"):
            row[name] = row[name] and str(row[name])
    return rows


def test_requests_are_kept_on_the_way_to_the_outbox_and_back(engine: Engine) -> None:
    migrations.upgrade(engine, "0001")
    account_id = open_account(engine, user_id=1)
    before = requests_at_0001(account_id)
    add_requests(engine, *before)
    columns = list(before[0])
    assert requests_in(engine, columns) == before

    migrations.upgrade(engine)
    assert requests_in(engine, columns) == before
    with engine.connect() as connection:
        added = connection.execute(
            text("SELECT DISTINCT caller, accepted_at, publish_attempts, published_at FROM api_idempotency_requests")
        ).all()
    assert [tuple(row) for row in added] == [("", None, 0, None)]
    # A worker of the previous release goes on for a while.
    late = before[-1] | {"request_key": "z_late", "lottery_session_id": "z_late"}
    add_requests(engine, late)

    command.downgrade(migrations.alembic_config(engine), "0001")
    assert requests_in(engine, columns) == [*before, late]
    migrations.upgrade(engine)
    assert requests_in(engine, columns) == [*before, late]


def test_requests_from_before_the_outbox_are_archived_like_all_others(engine: Engine) -> None:
    migrations.upgrade(engine, "0001")
    account_id = open_account(engine, user_id=1)
    before = requests_at_0001(account_id)
    add_requests(engine, *before)
    migrations.upgrade(engine)
    for it in ROWS:
        amounts = {"delta_amount": it.delta, "balance_before": it.before, "balance_after": it.after}
        names = {"idempotency_key": it.idempotency_key, "business_type": it.business_type}
        post(engine, ledger_row(account_id, lottery_session_id="s_won", business_id="s_won", **names, **amounts))
    assert [archive_once(engine, older_than_s=86_400) for _ in range(2)] == [3, 0]
    for row in before:
        with engine.connect() as connection:
            state = state_of_session(connection, row["lottery_session_id"])
        assert state is not None
        assert (state.status, state.reason) == (row["status"], row["reason"])
        assert (state.result and state.result.decode()) == row["result"]
    # The revision before has no words for them.
    with pytest.raises(CommandError, match="dead or archived requests"):
        command.downgrade(migrations.alembic_config(engine), "0001")
    is_whole = engine.dialect.name == "sqlite"
    later = set().union(*(TABLES_BY_REVISION[it] for it in ("0003", "0005", "0006", "0007")))
    assert tables_of(engine) == (TABLES if is_whole else TABLES - later)
    with engine.connect() as connection:
        kept = connection.execute(text("SELECT COUNT(*) FROM api_idempotency_requests WHERE result IS NULL")).scalar()
    assert kept == len(before)


# ---- with dead letters in it -----------------------------------------------------------------------------------------


def dead_letter_at_0002(number: int) -> dict[str, Any]:
    """A row with the columns that the release of that revision names."""
    return {
        "body_sha256": f"{number:064x}",
        "cause": "invalid",
        "error": "account_id: 🎲 is no number",
        "body": bytes(range(256)) * (300 if number == 1 else 1),
        "body_bytes": 256 * (300 if number == 1 else 1),
        "request_key": None if number == 1 else f"key_{number}",
        "account_id": None if number == 1 else number,
        "queue": "draws",
        "deliveries": number,
        "times_parked": 1,
        "first_parked_at": LONG_AGO,
        "last_parked_at": LONG_AGO,
    }


def add_dead_letters(engine: Engine, *rows: dict[str, Any]) -> None:
    names = list(rows[0])
    into = f"INSERT INTO dead_letters ({', '.join(names)}) VALUES (:{', :'.join(names)})"
    with engine.begin() as connection:
        connection.execute(text(into), list(rows))


def dead_letters_in(engine: Engine) -> list[dict[str, Any]]:
    """Every row, with the columns of 0002."""
    columns = list(dead_letter_at_0002(1))
    with engine.connect() as connection:
        found = connection.execute(text(f"SELECT {', '.join(columns)} FROM dead_letters ORDER BY body_sha256"))
        return [
            dict(row) | {name: str(row[name]) for name in ("first_parked_at", "last_parked_at")}
            for row in found.mappings()
        ]


def test_dead_letters_and_requests_are_kept_on_the_way_to_the_operators_and_back(engine: Engine) -> None:
    migrations.upgrade(engine, "0002")
    account_id = open_account(engine, user_id=1)
    accepted = {"caller": "shop", "accepted_at": LONG_AGO, "publish_attempts": 3, "publish_at": LONG_AGO}
    asked = [row | accepted for row in requests_at_0001(account_id)]
    add_requests(engine, *asked)
    columns = list(asked[0])
    requests_before = requests_in(engine, columns)
    letters = [dead_letter_at_0002(number) for number in (1, 2)]
    add_dead_letters(engine, *letters)
    assert dead_letters_in(engine) == letters
    with_0002 = definitions(engine)

    migrations.upgrade(engine)
    assert dead_letters_in(engine) == letters
    assert requests_in(engine, columns) == requests_before
    # A worker of the previous release goes on for a while: it parks, and it parks again.
    letters.append(dead_letter_at_0002(3))
    add_dead_letters(engine, letters[-1])
    again = "UPDATE dead_letters SET times_parked = times_parked + 1, cause = 'again' WHERE body_sha256 = :sha"
    with engine.begin() as connection:
        connection.execute(text(again), {"sha": letters[0]["body_sha256"]})
    letters[0] |= {"times_parked": 2, "cause": "again"}
    late = asked[-1] | {"request_key": "z_late", "lottery_session_id": "z_late"}
    add_requests(engine, late)
    # What it knows nothing of reads as parked, in no group, since nobody knows when.
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT state, group_id, state_at, replay_id, version FROM dead_letters"))
        assert {tuple(row) for row in rows} == {("parked", "", None, None, None)}
        settled_by = connection.execute(text("SELECT DISTINCT deliveries, settled_by FROM api_idempotency_requests"))
        assert [tuple(row) for row in settled_by] == [(None, None)]

    command.downgrade(migrations.alembic_config(engine), "0002")
    assert dead_letters_in(engine) == letters
    assert [row["request_key"] for row in requests_in(engine, columns)] == [
        *(row["request_key"] for row in requests_before),
        "z_late",
    ]
    assert definitions(engine) == with_0002
    migrations.upgrade(engine)
    assert dead_letters_in(engine) == letters


def test_what_operators_did_is_not_forgotten(engine: Engine) -> None:
    migrations.upgrade(engine)
    action = {"operator": "ann", "action": "discard", "reason": "spam", "count": 1, "details": "{}", "at": utc_now()}
    with engine.begin() as connection:
        connection.execute(insert(operator_actions), action)
    with pytest.raises(CommandError, match="operator_actions is kept for ever"):
        command.downgrade(migrations.alembic_config(engine), "0002")
    # On SQLite a downgrade is atomic; MySQL keeps each statement.
    is_atomic = engine.dialect.name == "sqlite"
    later = set().union(*(TABLES_BY_REVISION[it] for it in (() if is_atomic else ("0005", "0006", "0007"))))
    assert tables_of(engine) == TABLES - later
    is_whole = engine.dialect.name == "sqlite"
    with engine.connect() as connection:
        assert migrations.current_revision(connection) == (migrations.head_revision() if is_whole else "0003")
        assert connection.execute(select(operator_actions.c.reason)).scalars().all() == ["spam"]


@pytest.mark.parametrize(
    ("statement", "values"),
    [
        (insert(operators), {"name": "ann", "role": "god", "password_hash": "h", "created_at": utc_now()}),
        (
            insert(replays),
            {
                "operator": "ann",
                "reason": "r",
                "selection": "{}",
                "options": "{}",
                "status": "unheard",
                "selected": 1,
                "started_at": utc_now(),
                "seen_at": utc_now(),
            },
        ),
    ],
)
def test_a_role_and_a_replays_status_are_of_those_we_know(engine: Engine, statement: Any, values: Any) -> None:
    migrations.upgrade(engine)
    known = {"god": "viewer", "unheard": "running"}
    with engine.begin() as connection:
        connection.execute(statement, {name: known.get(str(value), value) for name, value in values.items()})
    with pytest.raises(DBAPIError, match=r"ck_(operators_role|replays_status)"), engine.begin() as connection:
        connection.execute(statement, values | ({"name": "bob"} if "name" in values else {}))


# ---- with API keys in it ---------------------------------------------------------------------------------------------


def test_keys_from_before_are_for_all_accounts_and_no_key_is_widened(engine: Engine) -> None:
    migrations.upgrade(engine, "0003")
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO api_keys (key_id, caller, secret_sha256, created_at) VALUES (:id, 'shop', :hash, :now)"),
            {"id": "0" * 16, "hash": "0" * 64, "now": "2026-01-02 03:04:05.000006"},
        )
    before = definitions(engine)
    migrations.upgrade(engine)
    ((old,), bound) = api_keys.list_all(engine), api_keys.Bounds.parse("6", "")
    assert (old.caller, old.bounds) == ("shop", api_keys.NO_BOUNDS)
    key = api_keys.add(engine, "tenant", bound)
    with pytest.raises(CommandError, match="would be valid for all"):
        command.downgrade(migrations.alembic_config(engine), "0003")
    api_keys.revoke(engine, key)
    command.downgrade(migrations.alembic_config(engine), "0003")
    assert definitions(engine) == before


@pytest.mark.parametrize("more", [{"scopes": ["read"]}, {"expires_at": datetime(2100, 1, 1, tzinfo=UTC)}], ids=str)
def test_no_key_gains_a_scope_or_outlives_its_end(engine: Engine, more: dict[str, Any]) -> None:
    migrations.upgrade(engine)
    wide = api_keys.add(engine, "wide", scopes=["draw", "read", "money"])
    key = api_keys.add(engine, "narrow", **more)
    with pytest.raises(CommandError, match="would lose that"):
        command.downgrade(migrations.alembic_config(engine), "0005")
    api_keys.revoke(engine, key)
    command.downgrade(migrations.alembic_config(engine), "0005")
    migrations.upgrade(engine)
    (kept,) = [it for it in api_keys.list_all(engine) if it.revoked_at is None]
    assert kept.key_id == api_keys.id_of(wide)
    assert kept.scopes == "draw,read"


# ---- scripts ---------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_the_sql_script_of_sqlite_builds_the_same(tmp_path: Path) -> None:
    done = alembic("upgrade", "head", "--sql", url=f"sqlite:///{tmp_path}/never.db")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "never.db").exists()
    by_script, by_upgrade = tmp_path / "script.db", tmp_path / "upgrade.db"
    with sqlite3.connect(by_script) as connection:
        connection.executescript(done.stdout)
    connection.close()
    migrations.upgrade(f"sqlite:///{by_upgrade}")
    built, expected = (open_engine(f"sqlite:///{path}") for path in (by_script, by_upgrade))
    assert definitions(built) == definitions(expected)
    with built.connect() as built_connection:
        assert migrations.current_revision(built_connection) == migrations.head_revision()


def test_the_sql_script_of_mariadb_builds_the_same(mariadb_url: str) -> None:
    # A port where nobody listens: the script is made without a connection.
    done = alembic("upgrade", "head", "--sql", url="mysql+pymysql://nobody@127.0.0.1:1/nothing")
    assert done.returncode == 0, done.stderr
    engine = open_engine(mariadb_url)
    with engine.begin() as connection:
        for statement in done.stdout.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
        assert migrations.current_revision(connection) == migrations.head_revision()
    by_script = definitions(engine)
    metadata.drop_all(engine)
    metadata.create_all(engine)
    assert by_script == definitions(engine)
    engine.dispose()


def test_the_sql_script_of_mariadb_takes_it_back(mariadb_url: str) -> None:
    migrations.upgrade(mariadb_url, "0002")
    engine = open_engine(mariadb_url)
    before = definitions(engine)
    migrations.upgrade(engine)
    done = alembic(
        "downgrade", f"{migrations.head_revision()}:0002", "--sql", url="mysql+pymysql://nobody@127.0.0.1:1/nothing"
    )
    assert done.returncode == 0, done.stderr
    with engine.begin() as connection:
        for statement in done.stdout.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
        assert migrations.current_revision(connection) == "0002"
    assert definitions(engine) == before
    engine.dispose()


# ---- from the command line -------------------------------------------------------------------------------------------


@pytest.mark.process
def test_the_command_takes_its_database_from_the_environment(database_url: str) -> None:
    done = alembic("upgrade", "head", url=database_url)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"upgraded to {migrations.head_revision()}" in done.stdout
    engine = open_engine(database_url)
    assert tables_of(engine) == TABLES
    engine.dispose()
    checked = alembic("check", url=database_url)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.process
@pytest.mark.parametrize(
    ("url", "words"),
    [
        (None, "TOMBOLA_DATABASE_URL is not set"),
        ("nonsense", "TOMBOLA_DATABASE_URL: not a SQLAlchemy URL"),
        ("postgresql://me:hidden@127.0.0.1/x", "TOMBOLA_DATABASE_URL: postgresql is not supported"),
        ("mysql+pymysql://me:hidden@127.0.0.1:1/x", "the database does not answer: Can't connect"),
        ("sqlite:////no/such/folder/x.db", "the SQLite file cannot be opened"),
    ],
)
def test_what_cannot_be_migrated_is_told_in_one_line(url: str | None, words: str) -> None:
    done = alembic("upgrade", "head", url=url)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "hidden" not in done.stdout + done.stderr
    assert len((done.stdout + done.stderr).strip().splitlines()) == 1


def test_a_wrong_password_is_told_in_one_line(mariadb_server: servers.Server) -> None:
    done = alembic("upgrade", "head", url=mariadb_server.url.replace("root@", "root:hidden@") + "mysql")
    assert done.returncode != 0
    assert "the database refuses this login" in done.stdout + done.stderr
    assert "hidden" not in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_the_revisions_are_known_without_alembic(engine: Engine) -> None:
    """Workers ask for them; the history is one line, and its files are named after it."""
    scripts = ScriptDirectory.from_config(migrations.alembic_config())
    history = [script.revision for script in scripts.walk_revisions()]
    assert migrations.head_revision() == scripts.get_current_head() == history[0] == max(history)
    assert all(migrations.knows(revision) for revision in history)
    assert not migrations.knows("9999")
    with engine.connect() as connection:
        assert migrations.current_revision(connection) is None
    migrations.upgrade(engine, history[1])
    with engine.connect() as connection:
        assert migrations.current_revision(connection) == history[1]
        assert MigrationContext.configure(connection, opts=OURS).get_current_revision() == history[1]


def test_tables_of_another_history_are_left_alone(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE asset_transactions (transaction_id INTEGER PRIMARY KEY)"))
    with pytest.raises(ConfigurationError, match=r"tombola did not make: asset_transactions\. Nothing has changed"):
        migrations.upgrade(engine)
    assert [column["name"] for column in inspect(engine).get_columns("asset_transactions")] == ["transaction_id"]
    assert tables_of(engine) == {"asset_transactions"}


@pytest.mark.process
def test_two_upgrades_at_once_take_turns(database_url: str) -> None:
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "alembic", "upgrade", "head"],
            cwd=PROJECT,
            env=environment(database_url),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("upgraded to" in output for output in outputs) == 1


@pytest.mark.process
def test_it_works_from_elsewhere_without_the_project_files(tmp_path: Path) -> None:
    """As from an installed wheel: no pyproject.toml in sight, logging left alone, in a folder with a % in its name."""
    home = tmp_path / "50%(off)s"
    home.mkdir()
    script = (
        "import logging\nfrom tombola import migrations\n"
        "before = (logging.root.level, list(logging.root.handlers))\n"
        f"migrations.upgrade('sqlite:///{home}/x.db')\n"
        "assert before == (logging.root.level, list(logging.root.handlers))\n"
        "print(migrations.head_revision())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=home,
        env=environment(None),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (f"{migrations.head_revision()}\n", "")
    assert tables_of(open_engine(f"sqlite:///{home}/x.db")) == TABLES


def test_refusals_are_no_outages(engine: Engine, account_id: int) -> None:
    """A violated CHECK must cost one draw, not stop the worker: the driver files it under an operational error."""
    with pytest.raises(DBAPIError) as refused:
        post(engine, ledger_row(account_id, balance_after=Decimal("-0.01")))
    assert fault_of(refused.value) is Fault.REFUSED


# ---- with receipts signed --------------------------------------------------------------------------------------------


def test_the_keys_of_receipts_are_not_forgotten(engine: Engine) -> None:
    migrations.upgrade(engine)
    open_signer(engine, [SigningKey.make()])
    with pytest.raises(CommandError, match="nobody can verify"):
        command.downgrade(migrations.alembic_config(engine), "0006")
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM receipt_keys"))
    command.downgrade(migrations.alembic_config(engine), "0006")
    assert "receipt_keys" not in tables_of(engine)
