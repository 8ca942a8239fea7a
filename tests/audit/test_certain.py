"""What is passed on the lines of the ledger alone is what `check` finds nothing wrong with: whatever was forged."""

from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, text

from tests.campaigns.shops import SEED, WHEELS
from tests.kept_results import keep_results
from tests.ledgers import migrated
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import blind_wheels
from tombola.producers.storage.campaigns import Campaigns
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.requests import archive
from tombola.worker.audit import lines
from tombola.worker.audit.certain import CertainDraws
from tombola.worker.audit.report import Report
from tombola.worker.audit.seeds import NotedSeeds
from tombola.worker.audit.sessions import Drawings, Sessions
from tombola.worker.audit.stored_results import StoredResults
from tombola.worker.ledger.accounts import open_account
from tombola.worker.ledger.old_rows import OldRows
from tombola.worker.seeds.masters import Masters
from tombola.worker.settle import tries
from tombola.worker.settle.rules import Rules

pytestmark = pytest.mark.slow

DRAWS = 12
COLUMNS = {
    "asset_transactions": (
        *("account_id", "lottery_session_id", "idempotency_key", "business_type", "asset_code"),
        *("delta_amount", "balance_before", "balance_after", "notes"),
    ),
    "api_idempotency_requests": (
        *("request_key", "lottery_session_id", "account_id", "campaign", "fingerprint", "status", "reason", "result"),
        *("kind", "terms", "seed_epoch"),
    ),
}
ODD: list[Any] = [
    *(None, "", "x", "%", "%(key)s", "1", " 1", "default", "draw", "completed", "rejected", "lottery_consume"),
    *("lottery_reward", "POINT", "d01", "d01:consume", "d01:reward", "d01\x1f1\x1fdefault", "\x1e", "d01\x1e0"),
    *(0, 1, 2, -100, 500, 501, 100.5, "[1]", '["default",10]', '["default",null,"nonce-0000000001"]'),
    *('["default",null,""]', '["default",10,"nonce-0000000001"]', '["other",null,"nonce-0000000002"]'),
]
FORGERY = st.tuples(
    st.sampled_from([(table, column) for table, columns in COLUMNS.items() for column in columns]),
    st.integers(0, DRAWS - 1),  # of which row
    st.one_of(st.sampled_from(ODD), st.integers(0, DRAWS - 1).map(lambda it: ("as", it))),  # or as another row has it
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    made = open_engine(f"sqlite:///{tmp_path_factory.mktemp('certain')}/ledger.db")
    migrated(made)
    accounts = [open_account(made, user_id=user, balance=Decimal(100)) for user in (1, 2)]
    nonces = ["", *(f"nonce-{number:010}" for number in range(1, DRAWS))]
    draws = [
        DrawRequest(account_id=accounts[it % 2], request_key=f"d{it:02}", client_nonce=nonces[it * (it % 3 > 0)])
        for it in range(DRAWS)
    ]
    tries.settle(made, draws, Rules(WHEELS, tries_max=3))
    keep_results(made, *[it.request_key for it in draws[:5]])  # as an older release did
    yield made
    made.dispose()


def judged(connection: Connection, engine: Engine) -> tuple[set[str], set[str]]:
    """The sessions that are certainly right, and those that `check` finds something wrong with."""
    sessions: dict[str, list[lines.Line]] = {}
    for line in lines.read(connection, lines.BEFORE_ALL_IDS, 2**62, rows_max=1000):
        if not lines.is_odd(line):
            sessions.setdefault(line[lines.SESSION], []).append(line)
    seeds = NotedSeeds(engine, Masters([SEED]), SEED)
    is_right = CertainDraws(WHEELS, seeds).is_right
    report = Report()
    in_full = Sessions(report, Drawings(WHEELS, Campaigns(engine), seeds), OldRows.NONE, StoredResults(None, report))
    wrong = {it for it in sessions if list(in_full.check(connection, [it], is_counting=False))}
    return {session_id for session_id, some in sessions.items() if is_right(some)}, wrong


def test_plain_draws_are_certain(engine: Engine) -> None:
    with engine.connect() as connection:
        everyone = {f"d{it:02}" for it in range(DRAWS)}
        assert judged(connection, engine) == (everyone, set())
        assert archive(connection, utc_now() + timedelta(seconds=1), rows_max=50) == 5
        assert judged(connection, engine) == (everyone, set())
        connection.rollback()


@given(forgeries=st.lists(FORGERY, min_size=1, max_size=3))
@hypothesis_settings(max_examples=150, deadline=None)
def test_nothing_wrong_is_certain(engine: Engine, forgeries: list[tuple[tuple[str, str], int, Any]]) -> None:
    with engine.connect().execution_options(autobegin=False) as connection:
        driver: Any = connection.connection.driver_connection
        for pragma in ("foreign_keys=OFF", "ignore_check_constraints=ON"):
            driver.execute(f"PRAGMA {pragma}")
        with connection.begin() as open_transaction:
            for (table, column), number, value in forgeries:
                ids = f"(SELECT rowid FROM {table} ORDER BY rowid LIMIT 1 OFFSET %d)"
                new = (
                    f"(SELECT {column} FROM {table} WHERE rowid = {ids % value[1]})" if value_is_copy(value) else ":new"
                )
                statement = f"UPDATE OR IGNORE {table} SET {column} = {new} WHERE rowid = {ids % (number + 2)}"
                connection.execute(text(statement), {} if value_is_copy(value) else {"new": value})
            certain, wrong = judged(connection, engine)
            assert not certain & wrong, (forgeries, certain & wrong)
            open_transaction.rollback()
        connection.invalidate()


def value_is_copy(value: Any) -> bool:
    return isinstance(value, tuple)


def test_without_the_seed_nothing_is_certain(engine: Engine) -> None:
    with engine.connect().execution_options(read_only=True) as connection:
        rows = lines.read(connection, 0, 2**62, rows_max=1000)
    blind = CertainDraws(blind_wheels(), NotedSeeds(engine, Masters()))
    assert not any(blind.is_right([it]) for it in rows)
