"""A ledger with draws of two users, recharges and gaps in its ids; sealed without waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import Engine

from tests.ledgers import migrated
from tests.processes import SEED
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.storage import ledger_leaves
from tombola.producers.storage.engines import open_engine
from tombola.worker.books import head, sealing
from tombola.worker.ledger import accounts
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Settled
from tombola.worker.settle.rules import Rules

WHEELS = {DEFAULT_CAMPAIGN.name: Wheel(DEFAULT_CAMPAIGN, bytes.fromhex(SEED))}

Draw = Callable[[int], None]


@pytest.fixture
def engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(head, "SEEN_EVERY", timedelta(0))
    made = open_engine(database_url)
    migrated(made)
    yield made
    made.dispose()


@pytest.fixture
def draw(engine: Engine) -> Draw:
    """Makes so many more draws, by two accounts in turn; each begins with 100.00, by two recharges."""
    ids = [accounts.add(engine, user_id=user, balance=Decimal(70)).account_id for user in (1, 2)]
    payments = [
        RechargeRequest(account_id=id, request_key=f"pay-{id}", amount="30.00", channel="stripe", reference=f"py_{id}")
        for id in ids
    ]
    count = 0

    def draw(more: int) -> None:
        nonlocal count
        asked = [
            DrawRequest(account_id=ids[number % 2], request_key=f"d{number:04}")
            for number in range(count, count + more)
        ]
        count += more
        answers = tries.settle(engine, [*payments, *asked], Rules(WHEELS, tries_max=3))
        assert all(isinstance(it, Settled) for it in answers)

    return draw


def seal_all(engine: Engine, *, rows_max: int = ledger_leaves.ROWS_MAX) -> int:
    """Seal everything that is committed, as if the longest transaction took no time; return the number of blocks."""
    blocks = 0
    while (step := sealing.seal_once(engine, after_s=0, rows_max=rows_max)).block is not None:
        blocks += 1
    assert not step.is_more
    return blocks
