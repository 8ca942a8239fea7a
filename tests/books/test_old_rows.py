"""A ledger that old code has written (`tombola legacy`): when it is sealed, and where its rows go."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, insert, text

from tests.books.conftest import seal_all
from tests.ledgers import migrated
from tombola.producers.storage import books
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.ledger_leaves import Range
from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.books import rows, sealing
from tombola.worker.books.balance import trial_balance
from tombola.worker.books.standing import standing
from tombola.worker.books.verification import check_blocks
from tombola.worker.ledger.old_rows import OldRows

pytestmark = pytest.mark.process

AT = datetime(2020, 1, 31, 23, 59, 59, tzinfo=UTC)


@pytest.fixture
def legacy(mariadb_url: str) -> Iterator[Engine]:
    """Three rows of old code, of which one is of a type of its own, and one of ours of a type that nobody knows."""
    engine = open_engine(mariadb_url)
    migrated(engine)
    with engine.begin() as connection:
        connection.execute(
            text(
                "CREATE TABLE legacy_migration (step varchar(32) PRIMARY KEY, status varchar(16), "
                "started_at datetime(6), ended_at datetime(6), details text)"
            )
        )
        connection.execute(text("INSERT INTO legacy_migration VALUES ('expand', 'done', NULL, NOW(6), '{}')"))
        connection.execute(text("INSERT INTO legacy_migration VALUES ('contract', 'running', NULL, NULL, '{}')"))
        values = {"user_id": 1, "asset_code": "POINT", "balance": Decimal(50), "created_at": AT, "updated_at": AT}
        connection.execute(insert(accounts).values(values))
        for id, (key, business_type, delta) in enumerate(
            [("tx_1", "gift", 5), ("tx_2", "lottery_consume", -1), ("tx_3", "recharge", 6), ("new:gift", "gift", 7)], 1
        ):
            row: dict[str, Any] = {
                **{"transaction_id": id, "account_id": 1, "business_id": f"b{id}", "lottery_session_id": f"b{id}"},
                **{"idempotency_key": key, "business_type": business_type, "asset_code": "POINT", "notes": None},
                **{"delta_amount": Decimal(delta), "balance_before": Decimal(10), "balance_after": Decimal(10) + delta},
                **{"created_at": AT, "updated_at": AT},
            }
            connection.execute(insert(transactions).values(row))
    yield engine
    engine.dispose()


def test_a_legacy_ledger_is_sealed_when_its_rows_change_no_more(legacy: Engine) -> None:
    assert sealing.seal(legacy, after_s=0) == 0
    with legacy.connect().execution_options(read_only=True) as connection:
        assert standing(connection).lag_s == 0
    with legacy.begin() as connection:
        done = "UPDATE legacy_migration SET status = 'done', ended_at = NOW(6) WHERE step = 'contract'"
        connection.execute(text(done))
    assert seal_all(legacy) == 1
    assert list(check_blocks(legacy)) == []
    with legacy.connect().execution_options(read_only=True) as connection:
        assert books.house_balances(connection) == {
            ("house/legacy", "POINT"): -5,
            ("house/default/sales", "POINT"): 1,
            ("house/issued", "POINT"): -6,
            ("house/unknown", "POINT"): -7,
        }
    found = trial_balance(legacy)
    assert found.is_legacy
    # The account began with a balance that no row explains: that alone is no violation.
    assert found.assets[0].difference == 33
    assert [it for it in found.wrong if "house/unknown" not in it] == []


def test_casts_change_no_leaf(legacy: Engine) -> None:
    """What is hashed by the types of our own columns, and by casts for columns of any type."""
    with legacy.connect().execution_options(read_only=True) as connection:
        ours, any_types = (rows.read_leaves(connection, Range(1, 9), it) for it in (OldRows.NONE, OldRows.BY_KEY))
        assert ours == any_types
        for change in (
            "MODIFY created_at datetime NULL, MODIFY business_id varchar(200) CHARACTER SET latin1 NULL",
            "MODIFY delta_amount decimal(12,4) NOT NULL, MODIFY notes varchar(500) CHARACTER SET latin1",
        ):
            connection.execute(text(f"ALTER TABLE asset_transactions {change}"))
        assert rows.read_leaves(connection, Range(1, 9), OldRows.BY_KEY) == ours
