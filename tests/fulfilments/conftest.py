"""A migrated ledger on each database, with an account."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

import pytest
from sqlalchemy import Engine

from tests.ledgers import migrated
from tombola.producers.storage.engines import open_engine
from tombola.worker.ledger.accounts import open_account


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = open_engine(database_url)
    migrated(made)
    yield made
    made.dispose()


@pytest.fixture
def account(engine: Engine) -> int:
    return open_account(engine, user_id=1, balance=Decimal(1000))
