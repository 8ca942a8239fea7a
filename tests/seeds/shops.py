"""A shop whose draws are drawn in seed epochs, and time that passes for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, select, text

from tests.audits import EMPTY_STORE
from tests.campaigns.shops import LOCK_WAIT_S, SEED, WHEELS, Shop
from tests.ledgers import migrated
from tombola.producers.domain import seeds as domain_seeds
from tombola.producers.domain.draw import blind_wheels, wheels
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.seeds import Chain
from tombola.worker.audit.audit import Scope, audit
from tombola.worker.audit.report import Report
from tombola.worker.seeds import chains
from tombola.worker.seeds.binding import EpochSeeds, seed_noted
from tombola.worker.seeds.masters import Masters
from tombola.worker.seeds.revealing import reveal_due

# Of an epoch here: a day would end while a test runs, once in a while.
LENGTH = timedelta(days=100)
# What stands in the database of when something happened.
TIMES = {
    "seed_chains": ("begun_at",),
    "seed_epochs": ("opens_at", "closes_at", "revealed_at"),
    "api_idempotency_requests": ("created_at", "accepted_at", "settled_at", "published_at", "publish_at"),
    "asset_transactions": ("created_at", "updated_at"),
}
EPOCHS_ALONE = ("seed_chains", "seed_epochs")
# Each letter is a campaign's prize; one of them has stock, so that a batch draws it before it decides.
PRIZES = """
name = "autumn"
asset = "POINT"
cost = { 1 = "1.00", 3 = "3.00" }

[[prize]]
code = "phone"
weight = 1
stock = 5
instead = "five"
grants = [{ asset = "ITEM.PHONE", amount = "1" }]

[[prize]]
code = "five"
weight = 4
grants = [{ asset = "POINT", amount = "5.00" }]

[[prize]]
code = "nothing"
weight = 9

[[guarantee]]
name = "soon"
prizes = ["phone", "five"]
hard_at = 10
"""


class SeededShop(Shop):
    """A shop with its first chain begun; its worker has all of `seeds`, the newest first."""

    def __init__(self, engine: Engine, *seeds: bytes) -> None:
        super().__init__(engine)
        self.masters = Masters(seeds or (SEED,))
        chains.begin_first(engine, Masters(self.masters.seeds[-1:]), epoch_length=LENGTH)
        self.rules = self.rules._replace(seeds=EpochSeeds(engine, self.masters))

    def look(self) -> None:
        """Let the door and the worker see at once what some seconds would show them."""
        super().look()
        self.entry.epochs.refresh_now()
        if self.rules.seeds is not None:
            self.rules.seeds.epochs.refresh_now()

    def pass_time(self, by: timedelta, *tables: str) -> None:
        """Let all that has happened have happened earlier; of some tables only, if they are named."""
        for table in tables or TIMES:
            with self.engine.begin() as connection:
                statement = text(f"UPDATE {table} SET {_earlier(self.engine, TIMES[table])}")
                connection.execute(statement, {"s": round(by.total_seconds())})
        self.look()

    def rotate(self, *seeds: bytes) -> Chain:
        """Begin the next chain with the first of `seeds`; the worker has them."""
        self.masters = Masters(seeds)
        with self.engine.begin() as connection:
            begun = chains.rotate(connection, self.masters, by="ann", reason="a leak", epoch_length=LENGTH)
        self.rules = self.rules._replace(seeds=EpochSeeds(self.engine, self.masters))
        self.look()
        return begun

    def reveal(self, after_s: float = 3600) -> list[str]:
        """Reveal what is due; the names of these epochs."""
        return [str(it) for it in reveal_due(self.engine, self.masters, after_s=after_s)]

    def audit(self, *seeds: bytes, **scope: Any) -> Report:
        """An audit with these seeds, perhaps none."""
        own = wheels(seeds[0]) if seeds else blind_wheels()
        return audit(self.engine, own, Scope(results=EMPTY_STORE, seeds=seeds, **scope))

    def violations(self) -> list[str]:
        report = self.audit(*self.masters.seeds)
        assert not report.obstacles, report.obstacles
        assert not report.unproven
        return [str(it) for it in report.violations]

    def bound(self) -> dict[str, int | None]:
        """The number of the epoch of each request, by request key."""
        with self.engine.connect() as connection:
            rows = connection.execute(select(requests.c.request_key, requests.c.seed_epoch))
            return {key: epoch for key, epoch in rows}  # noqa: C416 - rows are no pairs to mypy

    def noted(self) -> dict[str, str]:
        """What the notes of each charge call its seed, by request key."""
        with self.engine.connect() as connection:
            rows = connection.execute(
                select(transactions.c.idempotency_key, transactions.c.notes).where(
                    transactions.c.business_type == "lottery_consume"
                )
            )
            return {key.partition(":")[0]: seed_noted(notes) for key, notes in rows}


def _earlier(engine: Engine, columns: Sequence[str]) -> str:
    if engine.dialect.name == "sqlite":
        return ", ".join(f"{it} = strftime('%Y-%m-%d %H:%M:%f000', {it}, (0 - :s) || ' seconds')" for it in columns)
    return ", ".join(f"{it} = {it} - INTERVAL :s SECOND" for it in columns)


@contextmanager
def open_seeded_shop(url: str, *seeds: bytes) -> Iterator[SeededShop]:
    """A shop on a new ledger, whose books balance at the end."""
    migrated(url)
    shop = SeededShop(open_engine(url, lock_wait_s=LOCK_WAIT_S), *seeds)
    try:
        yield shop
        found = shop.violations()
        assert found == [], found
    finally:
        shop.entry.close()


@pytest.fixture
def short_chains(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chains of so many epochs, not of ten years: for tests that read all of them many times."""
    for module in (domain_seeds, chains):
        monkeypatch.setattr(module, "EPOCHS", 40)
    domain_seeds.secret_of.cache_clear()
    yield
    domain_seeds.secret_of.cache_clear()


__all__ = ["EPOCHS_ALONE", "LENGTH", "PRIZES", "SEED", "WHEELS", "SeededShop", "open_seeded_shop", "short_chains"]
